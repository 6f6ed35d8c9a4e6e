// The LSTM cell as its kernels see it: arguments, and what is done for one channel of one sample.
#pragma once

#include "map.h"

namespace dia::kernels {

// The parameters of the cell, dense: weights (m, C) and (4 C, m), as in dia_kernels/cells.py.
struct CellWeights {
  const float *input_reduce, *input_reduce_bias, *input_expand, *input_expand_bias;
  const float *hidden_reduce, *hidden_reduce_bias, *hidden_expand, *hidden_expand_bias;
};

// What the gradient needs of the forward pass, (N, ...) each: the pooled p (C), both bottlenecks (m), the gates (4 C).
struct CellTables {
  float *p, *zx, *zh, *gates;
};

struct CellForward {
  int samples, channels, bottleneck;
  bool tanh_output;
  const float *h, *c;  // (N, C); no state: null
  CellWeights weights;
  CellTables tables;  // gates null: no gradient will be asked for
  float *new_h, *new_c;
};

struct CellBackward {
  int samples, channels, bottleneck;
  bool tanh_output;
  const float *dh, *dc;    // null: zero
  const float *c, *new_c;  // c null: no state
  CellWeights weights;
  CellTables tables;
  float* du;               // (N, 4 C), of the pre-activations
  float *dzx, *dzh;        // (N, m), of both bottlenecks
  float *old_dh, *old_dc;  // null: not wanted
};

// The arguments of samples [first, first + count).
DIA_DEVICE CellTables from_sample(const CellTables& tables, int64_t first, int64_t c, int64_t m) {
  return {rows_from(tables.p, first, c), rows_from(tables.zx, first, m), rows_from(tables.zh, first, m),
          rows_from(tables.gates, first, 4 * c)};
}
DIA_DEVICE CellForward of_samples(CellForward cell, int64_t first, int count) {
  const int64_t c = cell.channels;
  cell.samples = count;
  cell.h = rows_from(cell.h, first, c), cell.c = rows_from(cell.c, first, c);
  cell.tables = from_sample(cell.tables, first, c, cell.bottleneck);
  cell.new_h = rows_from(cell.new_h, first, c), cell.new_c = rows_from(cell.new_c, first, c);
  return cell;
}
DIA_DEVICE CellBackward of_samples(CellBackward cell, int64_t first, int count) {
  const int64_t c = cell.channels, m = cell.bottleneck;
  cell.samples = count;
  cell.dh = rows_from(cell.dh, first, c), cell.dc = rows_from(cell.dc, first, c);
  cell.c = rows_from(cell.c, first, c), cell.new_c = rows_from(cell.new_c, first, c);
  cell.tables = from_sample(cell.tables, first, c, m);
  cell.du = rows_from(cell.du, first, 4 * c);
  cell.dzx = rows_from(cell.dzx, first, m), cell.dzh = rows_from(cell.dzh, first, m);
  cell.old_dh = rows_from(cell.old_dh, first, c), cell.old_dc = rows_from(cell.old_dc, first, c);
  return cell;
}

// Values where the bottleneck's ReLU lets them through: where z > 0, so that NaN passes.
DIA_DEVICE float rectified(float value, float z) { return z <= 0.0f ? 0.0f : value; }

template <class M>
DIA_DEVICE float squashed(float new_c, bool tanh_output) {
  return tanh_output ? Cell<MachineMaths<M>, Output::tanh>::squash(new_c)
                     : Cell<MachineMaths<M>, Output::sigmoid>::squash(new_c);
}

// Both biases of a channel's pre-activation.
template <class M>
DIA_DEVICE float expand_bias(M& m, const CellForward& args, int gate, int channel) {
  const int at = gate * args.channels + channel;
  return m.load(args.weights.input_expand_bias + at) + m.load(args.weights.hidden_expand_bias + at);
}

// The old c of one channel of one sample.
template <class M>
DIA_DEVICE float old_c(M& m, const CellForward& args, int64_t row, int channel) {
  return args.c != nullptr ? m.load(args.c + row_at(row, args.channels) + channel) : 0.0f;
}

// Gates and state of one channel of one sample, from its old c and pre-activations. Returns h'.
template <class M>
DIA_DEVICE float make_state(M& m, const CellForward& args, int64_t row, int channel, float c, const Gates<float>& u) {
  const int channels = args.channels;
  using Maths = Cell<MachineMaths<M>, Output::sigmoid>;  // the gates do not depend on the output's function
  const Gates<float> gates = Maths::activate(u);
  const int64_t at = row_at(row, channels) + channel;
  const float new_c = Maths::next_c(gates, c);
  const float new_h = gates.o * squashed<M>(new_c, args.tanh_output);
  m.store(args.new_c + at, new_c);
  m.store(args.new_h + at, new_h);
  if (args.tables.gates != nullptr) {
    float* to = args.tables.gates + row * 4 * channels + channel;
    m.store(to, gates.i);
    m.store(to + channels, gates.f);
    m.store(to + 2 * channels, gates.g);
    m.store(to + 3 * channels, gates.o);
  }
  return new_h;
}

// The gradient of one channel of one sample, as far as its pre-activations, `du`, and old c. `map_dh` is what the map
// sends to h'. Returns h'.
template <class M>
DIA_DEVICE float gate_gradient(M& m, const CellBackward& args, int64_t row, int channel, float map_dh, float (&du)[4]) {
  const int channels = args.channels;
  const int64_t at = row_at(row, channels) + channel;
  const float* from = args.tables.gates + row * 4 * channels + channel;
  const Gates<float> gates{m.load(from), m.load(from + channels), m.load(from + 2 * channels),
                           m.load(from + 3 * channels)};
  const float new_c = m.load(args.new_c + at), old_c = args.c != nullptr ? m.load(args.c + at) : 0.0f;
  const float dc = args.dc != nullptr ? m.load(args.dc + at) : 0.0f;
  const float dh = map_dh + (args.dh != nullptr ? m.load(args.dh + at) : 0.0f);
  const float s = squashed<M>(new_c, args.tanh_output);
  float of[5];
  const auto keep = [&](const auto& gradient) {
    of[0] = gradient.u.i, of[1] = gradient.u.f, of[2] = gradient.u.g, of[3] = gradient.u.o, of[4] = gradient.c;
  };
  if (args.tanh_output)
    keep(Cell<MachineMaths<M>, Output::tanh>::backward(gates, old_c, s, dh, dc));
  else
    keep(Cell<MachineMaths<M>, Output::sigmoid>::backward(gates, old_c, s, dh, dc));
  DIA_UNROLL
  for (int gate = 0; gate < 4; ++gate) {
    du[gate] = of[gate];
    m.store(args.du + (row * 4 + gate) * channels + channel, of[gate]);
  }
  if (args.old_dc != nullptr) m.store(args.old_dc + at, of[4]);
  return gates.o * s;
}

}  // namespace dia::kernels
