// What the kernels of the step share: arguments, and how teams take the samples.
//
// A team of `ranks` blocks takes a group of samples at a time. Each block owns some channels of all of them, keeps
// that part of the map on chip, and meets the others twice a group (docs/kernels.md, the GPU step).
#pragma once

#include "sums.h"

namespace dia::kernels {

// The parameters of the LSTM cell, dense: weights (m, C) and (4 C, m), as in dia_kernels/cells.py.
struct CellWeights {
  const float *input_reduce, *input_reduce_bias, *input_expand, *input_expand_bias;
  const float *hidden_reduce, *hidden_reduce_bias, *hidden_expand, *hidden_expand_bias;
};

// A norm with given statistics before the step: x to ((x - shift) - d) scale + bias, a value of each channel. `shift`
// is one that the map's type holds, near the mean, and `d` the rest of the mean: see docs/kernels.md, digits.
struct ChannelAffine {
  const float *shift, *d, *scale, *bias;
};

// How a launch takes the samples: `group` at a time; an owner's channels begin at multiples of `quantum`.
struct Teams {
  int group, quantum;
};

// What the gradient needs of the forward pass, (N, ...) each: the pooled p (C), both bottlenecks (m), the gates (4 C).
struct CellTables {
  float *p, *zx, *zh, *gates;
};

// kAffine: with a norm in front. Its part is known at compile time, so that the step alone does not pay for it.
template <class T, bool kAffine>
struct StepForward {
  MapSize size;
  int bottleneck;
  bool relu, tanh_output;
  Teams teams;
  Samples<const T> x, shortcut;  // no shortcut: no data
  Samples<T> y;
  const float *h, *c;  // no state: null
  CellWeights weights;
  CellTables tables;
  float *new_h, *new_c;
  ChannelAffine affine;  // with kAffine; and (N, C), the means of (x - shift) - d:
  float* off;
};

template <class T, bool kAffine>
struct StepBackward {
  MapSize size;
  int bottleneck;
  bool relu, tanh_output;
  Teams teams;
  Samples<const T> dy, y, x;  // no dy: the map had no gradient. y where the step ended in a ReLU.
  Samples<T> dshortcut, dx;   // no data: not wanted
  const float *dh, *dc;       // null: zero
  const float *c, *new_c;     // c null: no state
  CellWeights weights;
  CellTables tables;
  float* du;               // (N, 4 C), of the pre-activations
  float *dzx, *dzh;        // (N, m), of both bottlenecks
  float* partial;          // (teams, ranks, group, 2 m)
  float *old_dh, *old_dc;  // null: not wanted
  ChannelAffine affine;    // with kAffine; and what the gradients of scale and bias are made of, (N, C) each:
  float *sum, *product;    // sums of g and of g ((x - shift) - d)
  float* dp;
};

// Zero where the ReLU that made y let nothing through: where y <= 0, so that NaN passes.
template <class M, class T>
DIA_DEVICE void mask(T& g, T y) {
  if (M::widen(y) <= 0.0f) g = M::template narrow<T>(0.0f);
}
template <class M, class T>
DIA_DEVICE void mask_pack(Pack<T>& g, const Pack<T>& y) {
  DIA_UNROLL
  for (int k = 0; k < Pack<T>::size; ++k) mask<M>(g.values[k], y.values[k]);
}

// The state h' from the gates and c'.
template <class M>
DIA_DEVICE float hidden_of(float o, float new_c, bool tanh_output) {
  return o * (tanh_output ? Cell<MachineMaths<M>, Output::tanh>::squash(new_c)
                          : Cell<MachineMaths<M>, Output::sigmoid>::squash(new_c));
}

}  // namespace dia::kernels
