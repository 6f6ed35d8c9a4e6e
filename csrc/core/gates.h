// The gates of the LSTM cell and their derivatives: scalar formulas, host and device.
//
// Formulas: arXiv:1905.10671, section 3.2, and the authors' code. They are templates over `Maths`,
// which names a value type (a scalar, or a vector of lanes) and gives its sigmoid and tanh:
//
//     struct Maths { using Value = ...; static Value sigmoid(Value); static Value tanh(Value); };
//
// Plain C++: no torch, no CUDA headers.
#pragma once

#if defined(__CUDACC__)
#define DIA_HOST_DEVICE __host__ __device__
#else
#define DIA_HOST_DEVICE
#endif

namespace dia {

// The function of the cell state in h' = o * squash(c').
enum class Output { sigmoid, tanh };

// The four gates after their activations, in the order of the rows of the expansion weights.
template <class Value>
struct Gates {
  Value i, f, g, o;
};

template <class Maths, Output output>
struct Cell {
  using Value = typename Maths::Value;

  // Pre-activations u to gates.
  DIA_HOST_DEVICE static Gates<Value> activate(const Gates<Value>& u) {
    return {Maths::sigmoid(u.i), Maths::sigmoid(u.f), Maths::tanh(u.g), Maths::sigmoid(u.o)};
  }

  // c' = f c + i g
  DIA_HOST_DEVICE static Value next_c(const Gates<Value>& gates, Value c) { return gates.f * c + gates.i * gates.g; }

  DIA_HOST_DEVICE static Value squash(Value new_c) {
    return output == Output::sigmoid ? Maths::sigmoid(new_c) : Maths::tanh(new_c);
  }

  // h' = o squash(c')
  DIA_HOST_DEVICE static Value next_h(const Gates<Value>& gates, Value new_c) { return gates.o * squash(new_c); }

  // What the gradient of one step yields besides the weights' gradients.
  struct Gradient {
    Gates<Value> u;  // of the pre-activations
    Value c;         // of the old cell state
  };

  // From the gradients dh of h' and dc of c', with s = squash(c').
  DIA_HOST_DEVICE static Gradient backward(const Gates<Value>& gates, Value c, Value s, Value dh, Value dc) {
    const Value slope = output == Output::sigmoid ? s * (1 - s) : 1 - s * s;
    const Value total = dc + dh * gates.o * slope;
    return {{total * gates.g * gates.i * (1 - gates.i), total * c * gates.f * (1 - gates.f),
             total * gates.i * (1 - gates.g * gates.g), dh * s * gates.o * (1 - gates.o)},
            total * gates.f};
  }
};

}  // namespace dia
