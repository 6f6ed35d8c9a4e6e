// The CPU kernels' interface: serial functions over a part of a map or of a table, which the caller
// spreads over threads. No torch here. One table of functions per instruction set.
//
// T is the element type of a map, Compute<T> that of pooling, cell and state: double for double,
// else float. A table is a dense (samples, channels) or (samples, 4 channels) array of Compute<T>.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../core/elements.h"
#include "../core/gates.h"
#include "../core/layout.h"

namespace dia::cpu {

// A map in memory; `data` is null where a map is optional and absent.
template <class T>
struct Map {
  T* data = nullptr;
  RowStrides strides;
};

// p = mean of x, written at table[sample * channels + channel].
template <class T>
struct Pool {
  MapShape shape;
  Map<const T> x;
  Compute<T>* p;
};

// y = act(x * scale + shortcut). y may be x, and x may be the shortcut.
template <class T>
struct Rescale {
  MapShape shape;
  Map<const T> x;
  Map<const T> shortcut;
  Map<T> y;
  const Compute<T>* scale;
  bool relu;
};

// First sweep of the gradient. g = dy, zero where y <= 0 if there is a y; dscale = sum of x * g.
// Writes g to `g` if it is there, dscale to its table if it is there.
template <class T>
struct ReduceGradient {
  MapShape shape;
  Map<const T> dy;
  Map<const T> y;
  Map<const T> x;
  Map<T> g;
  Compute<T>* dscale;
};

// Second sweep of the gradient. dx = g * scale + offset, g from dy and y as above.
// No dy: dx = offset. No offset: dx = g * scale.
template <class T>
struct SpreadGradient {
  MapShape shape;
  Map<const T> dy;
  Map<const T> y;
  Map<T> dx;
  const Compute<T>* scale;
  const Compute<T>* offset;
};

// --- the tail of a block with its batch norm folded in (docs/kernels.md) ---
// `shift` has a value per channel, which is taken off z before anything else: a value near the channel's mean, so that
// no digits are lost where the mean is large and the deviation small. It is one that T holds, so that z - shift is
// exact for maps of 16 bits; what is left of the mean is `d`.

// d1 = mean of z - shift, m2 = sum of (z - shift - d1)^2, for each sample and channel; without m2 the mean alone. In
// double: what is wanted of d1 is its difference from the batch's, which is small. With `own`, a value of each sample
// and channel, sums are taken about that: where m2 of each sample is wanted for itself, and their means lie further
// apart than they deviate.
template <class T>
struct Moments {
  MapShape shape;
  Map<const T> z;
  const Compute<T>* shift;
  const Compute<T>* own;
  double* d1;
  double* m2;
};

// The largest value of each sample and channel, the smallest where gamma, of each channel, is negative; and its
// position, the first of equal ones. NaN is beyond all. No gamma: the largest.
template <class T>
struct Extremes {
  MapShape shape;
  Map<const T> z;
  const Compute<T>* gamma;
  Compute<T>* value;
  int64_t* where;
};

// y = act((z - shift) * scale + offset + shortcut), scale and offset for each sample and channel.
template <class T>
struct Normalise {
  MapShape shape;
  Map<const T> z;
  Map<const T> shortcut;
  Map<T> y;
  const Compute<T>* shift;
  const Compute<T>* scale;
  const Compute<T>* offset;
  bool relu;
};

// First sweep of the gradient: g and its writing as in ReduceGradient; s0 = sum of g, s1 = sum of g (z - shift).
template <class T>
struct ReduceNormGradient {
  MapShape shape;
  Map<const T> dy;
  Map<const T> y;
  Map<const T> z;
  Map<T> g;
  const Compute<T>* shift;
  Compute<T>* s0;
  Compute<T>* s1;
};

// Second sweep: dz = g * scale + (z - shift) * slope + offset; slope for each channel, those of the samples
// `slope_stride` apart. No dy: g is zero.
template <class T>
struct SpreadNormGradient {
  MapShape shape;
  Map<const T> dy;
  Map<const T> y;
  Map<const T> z;
  Map<T> dz;
  const Compute<T>* shift;
  const Compute<T>* scale;
  const Compute<T>* slope;
  const Compute<T>* offset;
  int64_t slope_stride;
};

// The same for one position of each channel, where `added` (samples, channels) comes to it. No slope: dz = g * scale +
// offset.
template <class T>
struct SpreadExtremeGradient {
  SpreadNormGradient<T> sweep;
  const int64_t* where;
  const Compute<T>* added;
};

// Every function works on one sample: a reduction on its channels [begin, end), a rescaling on its
// rows [begin, end).
template <class T>
struct MapKernels {
  void (*pool)(const Pool<T>&, int64_t sample, int64_t begin, int64_t end);
  void (*rescale)(const Rescale<T>&, int64_t sample, int64_t begin, int64_t end);
  void (*reduce_gradient)(const ReduceGradient<T>&, int64_t sample, int64_t begin, int64_t end);
  void (*spread_gradient)(const SpreadGradient<T>&, int64_t sample, int64_t begin, int64_t end);
  // For all channels at once: a value of each, or 0, to take its moments about.
  void (*choose_shift)(const Map<const T>&, const MapShape&, Compute<T>* shift);
  // A mean of each channel as shift + d.
  void (*split_mean)(const double* mean, int64_t channels, Compute<T>* shift, Compute<T>* d);
  void (*moments)(const Moments<T>&, int64_t sample, int64_t begin, int64_t end);
  void (*normalise)(const Normalise<T>&, int64_t sample, int64_t begin, int64_t end);
  void (*reduce_norm_gradient)(const ReduceNormGradient<T>&, int64_t sample, int64_t begin, int64_t end);
  void (*spread_norm_gradient)(const SpreadNormGradient<T>&, int64_t sample, int64_t begin, int64_t end);
  void (*extremes)(const Extremes<T>&, int64_t sample, int64_t begin, int64_t end);
  // Of channels [begin, end).
  void (*spread_extreme_gradient)(const SpreadExtremeGradient<T>&, int64_t sample, int64_t begin, int64_t end);
};

// Gates and new state of samples [begin, end). `gates` (samples, 4 channels) holds the products of the
// two expansions on entry and the activated gates on return; `bias` (4 channels) is added first.
// c may be null for zeros.
template <class A>
struct CellForward {
  int64_t channels;
  Output output;
  A* gates;
  const A* bias;
  const A* c;
  A* new_h;
  A* new_c;
};

// Gradients of the pre-activations (samples, 4 channels) and of the old c, and h' again.
// dh' is the sum of `dscale` and `dh`; these two, dc and c may be null for zeros; new_dc too if unwanted.
template <class A>
struct CellBackward {
  int64_t channels;
  Output output;
  const A* gates;
  const A* c;
  const A* new_c;
  const A* dscale;
  const A* dh;
  const A* dc;
  A* du;
  A* old_dc;
  A* h;
};

// A linear map of the cell, for the rows [begin, end) of W: y = relu(x W' + bias) where there is a bias,
// else y = x W', added to what is there if `add`. x (samples, inputs) and y (samples, outputs) are dense,
// a row of W is too.
template <class A>
struct Linear {
  int64_t samples, inputs, outputs;
  const A* x;
  const A* weight;
  int64_t weight_stride;
  const A* bias;
  A* y;
  bool add;
};

template <class A>
struct CellKernels {
  void (*linear)(const Linear<A>&, int64_t begin, int64_t end);
  void (*forward)(const CellForward<A>&, int64_t begin, int64_t end);
  void (*backward)(const CellBackward<A>&, int64_t begin, int64_t end);
  // z = relu(z + bias), rows [begin, end) of a (rows, width) table.
  void (*bias_relu)(A* z, const A* bias, int64_t width, int64_t begin, int64_t end);
  // dz = 0 where z <= 0, elements [begin, end).
  void (*mask)(A* dz, const A* z, int64_t begin, int64_t end);
  // sums[c] = sum over the rows of table[row * width + c], for c in [begin, end).
  void (*column_sums)(const A* table, int64_t rows, int64_t width, A* sums, int64_t begin, int64_t end);
};

struct Kernels {
  const char* instruction_set;
  MapKernels<float> f32;
  MapKernels<double> f64;
  MapKernels<BFloat16> bf16;
  MapKernels<Float16> f16;
  CellKernels<float> cell32;
  CellKernels<double> cell64;
};

}  // namespace dia::cpu
