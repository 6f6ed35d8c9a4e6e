// The cell where a BLAS does its products: what lies between them, an element to a thread.
//
//     forward    z = rectify(b + W1 p) | products = W2x zx + W2h zh | split_gates
//     backward   split_gate_gradients | dz = rectify(du W2) where z > 0 | dp, dh = dz W1
//
// Right where the cell's arithmetic outweighs the map (C = 2048 at r = 4: see the plan).
#pragma once

#include "cell.h"
#include "norm.h"

namespace dia::kernels {

// In place: a bottleneck's product and bias through its ReLU, forward by its own value, backward by `z`.
struct Rectify {
  int64_t count;
  float* values;
  const float *bias, *z;  // (width) or null; null: the values themselves
  int width;
  bool fresh;  // there is no product: the values are not read
};

template <class M>
DIA_DEVICE void rectify(M& m, const Rectify& args) {
  for_elements(m, args.count, [&](int64_t k) {
    const float value = (args.fresh ? 0.0f : m.load(args.values + k)) +
                        (args.bias != nullptr ? m.load(args.bias + k % args.width) : 0.0f);
    m.store(args.values + k, rectified(value, args.z != nullptr ? m.load(args.z + k) : value));
  });
}

template <bool kAffine>
struct SplitGates {
  CellForward cell;
  const float* products;  // (N, 4 C)
  ChannelAffine affine;   // with kAffine; and (N, C):
  float *factor, *added;
};

template <class M, bool kAffine>
DIA_DEVICE void split_gates(M& m, const SplitGates<kAffine>& args) {
  const int channels = args.cell.channels;
  for_elements(m, row_at(args.cell.samples, channels), [&](int64_t k) {
    const int64_t row = k / channels;
    const int channel = static_cast<int>(k - row * channels);
    const float* at = args.products + row * 4 * channels + channel;
    const auto u = [&](int gate) {
      return m.load(at + static_cast<int64_t>(gate) * channels) + expand_bias(m, args.cell, gate, channel);
    };
    const float h = make_state(m, args.cell, row, channel, old_c(m, args.cell, row, channel), {u(0), u(1), u(2), u(3)});
    if constexpr (kAffine) {
      m.store(args.factor + k, m.load(args.affine.scale + channel) * h);
      m.store(args.added + k, added_of(m, args.affine, channel, h));
    }
  });
}

// What a gradient through a norm needs again of the forward pass: scale = gamma rstd, and h'.
struct NormAgain {
  const float *d, *rstd, *gamma, *beta;  // (C); gamma, beta null: 1 and 0
  float *scale, *new_h;                  // (C), written with the first sample's row, or null; (N, C)

  template <class M>
  DIA_DEVICE float scale_of(M& m, int channel) const {
    return kernels::scale_of(m, gamma, channel, m.load(rstd + channel));
  }
};

template <bool kAffine>
struct SplitGateGradients {
  CellBackward cell;
  const float* sum;  // see map_gradient
  float* product;    // null: no gradient of the map
  NormAgain norm;    // with kAffine
  float* factor;     // null: not wanted
};

// The arguments of samples [first, first + count).
template <bool kAffine>
DIA_DEVICE SplitGateGradients<kAffine> of_samples(SplitGateGradients<kAffine> gates, int64_t first, int count) {
  const int64_t width = gates.cell.channels;
  gates.cell = of_samples(gates.cell, first, count);
  gates.sum = rows_from(gates.sum, first, width), gates.product = rows_from(gates.product, first, width);
  gates.factor = rows_from(gates.factor, first, width);
  gates.norm.new_h = rows_from(gates.norm.new_h, first, width);
  if (first > 0) gates.norm.scale = nullptr;
  return gates;
}

// One channel of one sample; `du` is the gradient of its pre-activations.
template <class M, bool kAffine>
DIA_DEVICE void put_gate_gradients(M& m, const SplitGateGradients<kAffine>& args, int64_t row, int channel,
                                   float (&du)[4]) {
  const int64_t at = row_at(row, args.cell.channels) + channel;
  float dh = args.product != nullptr ? m.load(args.product + at) : 0.0f, scale = 1;
  if constexpr (kAffine) {
    const NormAgain& norm = args.norm;
    scale = norm.scale_of(m, channel);
    if (row == 0 && norm.scale != nullptr) m.store(norm.scale + channel, scale);
    const float bias = norm.beta != nullptr ? m.load(norm.beta + channel) : 0.0f;
    float product = dh;
    dh = map_gradient(m.load(norm.d + channel), scale, bias, m.load(args.sum + at), product);
    m.store(args.product + at, product);
  }
  const float h = gate_gradient(m, args.cell, row, channel, dh, du);
  if constexpr (kAffine) m.store(args.norm.new_h + at, h);
  if (args.factor != nullptr) m.store(args.factor + at, h * scale);
}

template <class M, bool kAffine>
DIA_DEVICE void split_gate_gradients(M& m, const SplitGateGradients<kAffine>& args) {
  const int channels = args.cell.channels;
  for_elements(m, row_at(args.cell.samples, channels), [&](int64_t k) {
    const int64_t row = k / channels;
    float du[4];
    put_gate_gradients(m, args, row, static_cast<int>(k - row * channels), du);
  });
}

// Behind a norm of given statistics: what the second sweep of a gradient adds, scale dp / HW.
struct MeanGradients {
  int64_t count;
  int channels, positions;
  const float *dp, *scale;  // (N, C), (C)
  float* offset;            // (N, C)
};

template <class M>
DIA_DEVICE void mean_gradients(M& m, const MeanGradients& args) {
  for_elements(m, args.count, [&](int64_t k) {
    const float scale = m.load(args.scale + k % args.channels);
    m.store(args.offset + k, scale * m.load(args.dp + k) / static_cast<float>(args.positions));
  });
}

}  // namespace dia::kernels
