// What the kernels of the step share: arguments, and how teams take the samples.
//
// A team of `ranks` blocks takes a group of samples at a time. Each block owns some channels of all of them, keeps
// that part of the map on chip, and meets the others twice a group (docs/kernels.md, the GPU step).
#pragma once

#include "cell_backward.h"
#include "cell_forward.h"
#include "image.h"

namespace dia::kernels {

// kAffine: with a norm of given statistics in front. Its part is known at compile time, so that the step alone does not
// pay for it.
template <class T, bool kAffine>
struct StepForward {
  CellForward cell;
  Teams teams;
  MapSize size;
  bool relu;
  Samples<const T> x, shortcut;  // no shortcut: no data
  Samples<T> y;
  NormedMeans norm;  // with kAffine
};

template <class T, bool kAffine>
struct StepBackward {
  CellBackward cell;
  Teams teams;
  MapSize size;
  bool relu;
  Samples<const T> dy, y, x;  // no dy: the map had no gradient. y where the step ended in a ReLU.
  Samples<T> dshortcut, dx;   // no data: not wanted
  ChannelAffine affine;       // with kAffine; and what the gradients of scale and bias are made of, (N, C) each:
  float *sum, *product;       // sums of g and of g ((x - shift) - d)
  float* dp;
};

}  // namespace dia::kernels
