// The operators' arguments on any device: their checks, and the parts of the tables that forward hands to backward.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "../core/elements.h"
#include "tensors.h"

namespace dia::ops {

// Calls `body.template operator()<T>()` with the element type of x, which is not float64.
template <class Body>
auto with_narrow_type(const Tensor& x, Body body) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return body.template operator()<float>();
    case ScalarType::BFloat16:
      return body.template operator()<BFloat16>();
    case ScalarType::Half:
      return body.template operator()<Float16>();
    default:
      throw std::runtime_error("dia_kernels: x: expected float64, float32, float16 or bfloat16");
  }
}

template <class Body>
auto with_map_type(const Tensor& x, Body body) {
  return x.scalar_type() == ScalarType::Double ? body.template operator()<double>() : with_narrow_type(x, body);
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline OptionalTensor dense(const OptionalTensor& t) { return t ? OptionalTensor(dense(*t)) : t; }

// The parameters of the LSTM cell: a weight may have any strides, a bias is dense.
struct Parameters {
  Tensor input_reduce_weight, input_reduce_bias, input_expand_weight, input_expand_bias;
  Tensor hidden_reduce_weight, hidden_reduce_bias, hidden_expand_weight, hidden_expand_bias;
};

inline void check_parameters(const Parameters& w, int64_t c, ScalarType dtype, const Tensor& x) {
  check(w.input_reduce_weight.dim() == 2, "input_reduce_weight: expected 2 dimensions");
  const int64_t m = w.input_reduce_weight.size(0);
  check(c >= 1 && m >= 1, "x: expected at least one channel and a bottleneck of at least one value");
  check(m <= kMostRows, "input_reduce_weight: expected at most 2^30 rows, got ", m);
  check_table("input_reduce_weight", w.input_reduce_weight, {m, c}, dtype, x);
  check_table("input_reduce_bias", w.input_reduce_bias, {m}, dtype, x);
  check_table("input_expand_weight", w.input_expand_weight, {4 * c, m}, dtype, x);
  check_table("input_expand_bias", w.input_expand_bias, {4 * c}, dtype, x);
  check_table("hidden_reduce_weight", w.hidden_reduce_weight, {m, c}, dtype, x);
  check_table("hidden_reduce_bias", w.hidden_reduce_bias, {m}, dtype, x);
  check_table("hidden_expand_weight", w.hidden_expand_weight, {4 * c, m}, dtype, x);
  check_table("hidden_expand_bias", w.hidden_expand_bias, {4 * c}, dtype, x);
}

// The dtype of pooling, cell and state for a map.
inline ScalarType compute_scalar_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_state(const Tensor& x, const MapInfo& info, const OptionalTensor& h, const OptionalTensor& c) {
  check(h.has_value() == c.has_value(), "state: expected both of h and c, or neither");
  if (h) check_table("h", *h, {info.shape.samples, info.shape.channels}, compute_scalar_type(x), x);
  if (c) check_table("c", *c, {info.shape.samples, info.shape.channels}, compute_scalar_type(x), x);
}

inline void check_scale(const Tensor& scale, const MapInfo& info, const Tensor& x) {
  check_table("scale", scale, {info.shape.samples, info.shape.channels}, compute_scalar_type(x), x);
}

// What goes into a step, with or without its norm.
inline void check_step(const Tensor& x, const MapInfo& info, const OptionalTensor& shortcut, const OptionalTensor& h,
                       const OptionalTensor& c, const Parameters& w) {
  if (shortcut) check_map("shortcut", *shortcut, x);
  check_state(x, info, h, c);
  check_parameters(w, info.shape.channels, compute_scalar_type(x), x);
}

// The bytes that a tensor spans.
struct Span {
  const char *begin, *end;

  explicit Span(const Tensor& t)
      : begin(static_cast<const char*>(t.const_data_ptr())),
        end(begin + extent(t) * static_cast<int64_t>(t.element_size())) {}
};

inline bool overlap(const Span& a, const Span& b) {
  return a.begin < b.end && b.begin < a.end && a.begin < a.end && b.begin < b.end;
}

// Whether they are one map, element by element.
inline bool is_same_map(const Tensor& a, const Tensor& b) {
  bool same = a.const_data_ptr() == b.const_data_ptr() && a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d)
    same = a.size(d) == b.size(d) && (a.size(d) == 1 || a.stride(d) == b.stride(d));
  return same;
}

// --- what a step that is to be written over x reads: where it shares memory with x, a copy ---

inline Tensor apart(const Tensor& t, const Tensor& x) {
  return overlap(Span(t), Span(x)) ? torch::stable::clone(t) : t;
}
inline OptionalTensor apart(const OptionalTensor& t, const Tensor& x) { return t ? OptionalTensor(apart(*t, x)) : t; }
inline Parameters apart(const Parameters& w, const Tensor& x) {
  return {apart(w.input_reduce_weight, x),  apart(w.input_reduce_bias, x),    apart(w.input_expand_weight, x),
          apart(w.input_expand_bias, x),    apart(w.hidden_reduce_weight, x), apart(w.hidden_reduce_bias, x),
          apart(w.hidden_expand_weight, x), apart(w.hidden_expand_bias, x)};
}

// A shortcut may be x itself: an element is read before it is written.
inline OptionalTensor shortcut_apart(const OptionalTensor& shortcut, const Tensor& x) {
  return shortcut && is_same_map(*shortcut, x) ? shortcut : apart(shortcut, x);
}

// The parts of the operator's `tables`: see tables.py, table_sizes.
template <class A>
struct Tables {
  A *p, *zx, *zh, *gates;

  static int64_t count(int64_t n, int64_t c, int64_t m) { return n * (5 * c + 2 * m); }
  Tables(A* data, int64_t n, int64_t c, int64_t m) : p(data), zx(p + n * c), zh(zx + n * m), gates(zh + n * m) {}
};

// What a gradient leaves to make those of the parameters of: that of the pre-activations, (N, 4 C), and those of both
// bottlenecks, (N, m).
template <class A>
struct Factors {
  A *du, *dzx, *dzh;

  static int64_t count(int64_t n, int64_t c, int64_t m) { return n * (4 * c + 2 * m); }
  Factors(A* data, int64_t n, int64_t c, int64_t m) : du(data), dzx(data + 4 * n * c), dzh(dzx + n * m) {}
};

// Which form of the parameters' gradients is asked for: none, one flat tensor, or their factors.
struct WantedParameters {
  bool any = false, as_factors = false;

  WantedParameters() = default;
  // With no state what goes into the hidden bottleneck is no table of samples.
  WantedParameters(bool wanted, bool factors_wanted, const OptionalTensor& h)
      : any(wanted), as_factors(factors_wanted) {
    check(!factors() || h, "as_factors: expected a step with a state");
  }
  bool flat() const { return any && !as_factors; }
  bool factors() const { return any && as_factors; }
};

// The four weights: a gradient reads no bias.
struct Weights {
  Tensor input_reduce, input_expand, hidden_reduce, hidden_expand;
};

// Where the gradients of the eight parameters lie in one flat tensor: the weights, the biases of the expansions, those
// of the reductions, without gaps. So whatever has a multiple of four channels begins at sixteen bytes. See cells.py,
// join_parameters.
struct FlatParameters {
  int64_t input_reduce_weight = 0, input_expand_weight, hidden_reduce_weight, hidden_expand_weight;
  int64_t input_expand_bias, hidden_expand_bias, input_reduce_bias, hidden_reduce_bias;
  int64_t count;

  FlatParameters(int64_t c, int64_t m)
      : input_expand_weight(m * c),
        hidden_reduce_weight(input_expand_weight + 4 * c * m),
        hidden_expand_weight(hidden_reduce_weight + m * c),
        input_expand_bias(hidden_expand_weight + 4 * c * m),
        hidden_expand_bias(input_expand_bias + 4 * c),
        input_reduce_bias(hidden_expand_bias + 4 * c),
        hidden_reduce_bias(input_reduce_bias + m),
        count(hidden_reduce_bias + m) {}
};

// What steps left, for the gradient of the parameters that they share: returns their common shape, of one position.
inline MapShape check_steps(const std::vector<Tensor>& factors, const std::vector<Tensor>& tables,
                            const std::vector<Tensor>& h, int64_t m) {
  check(!factors.empty(), "factors: expected those of at least one step");
  check(tables.size() == factors.size(), "tables: expected as many as factors, ", factors.size(), ", got ",
        tables.size());
  check(h.size() == factors.size(), "h: expected as many as factors, ", factors.size(), ", got ", h.size());
  const Tensor& first = h.front();
  const ScalarType dtype = first.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double, "h: expected float32 or float64");
  check(first.dim() == 2, "h: expected 2 dimensions, got ", first.dim());
  const int64_t n = first.size(0), c = first.size(1);
  check(n <= kMostRows && c >= 1 && c <= kMostRows, "h: expected at most 2^30 samples and 1 to 2^30 channels, got ",
        sizes_text(first));
  check(m >= 1 && m <= kMostRows, "bottleneck: expected 1 to 2^30 values, got ", m);
  for (size_t k = 0; k < factors.size(); ++k) {
    check_table("h", h[k], {n, c}, dtype, first);
    check_table("factors", factors[k], {Factors<float>::count(n, c, m)}, dtype, first);
    // A tail's go on with those of its norm.
    check(tables[k].dim() == 1 && tables[k].size(0) >= Tables<float>::count(n, c, m),
          "tables: expected those of a step, got sizes ", sizes_text(tables[k]));
    check_table("tables", tables[k], {tables[k].size(0)}, dtype, first);
  }
  MapShape shape{};
  shape.samples = n, shape.channels = c, shape.positions = 1;
  return shape;
}

// What comes in from the layer after: the gradient of a result, and the result itself or its mask where it ended in a
// ReLU.
inline void check_result_gradient(const OptionalTensor& dy, const OptionalTensor& y, const Tensor& x,
                                  const MapInfo& info, bool masks) {
  if (dy) check_map("dy", *dy, x);
  if (masks)
    check_relu_result(y, x, info);
  else if (y)
    check_map("y", *y, x);
}

// What goes into the gradient of a step, with or without its norm, whose `tables` follow the cell's in `more` values.
// `masks`: whether y may be a mask.
inline void check_step_gradient(const OptionalTensor& dy, const OptionalTensor& dh, const OptionalTensor& dc,
                                const Tensor& x, const MapInfo& info, const OptionalTensor& y, const OptionalTensor& h,
                                const OptionalTensor& c, const Tensor& new_c, const Tensor& tables, int64_t more,
                                const Weights& w, bool relu, bool masks) {
  const ScalarType dtype = compute_scalar_type(x);
  const int64_t n = info.shape.samples, width = info.shape.channels;
  check(w.input_reduce.dim() == 2 && width >= 1 && w.input_reduce.size(0) >= 1 && w.input_reduce.size(0) <= kMostRows,
        "input_reduce_weight: expected 2 dimensions, the first of 1 to 2^30 rows");
  const int64_t m = w.input_reduce.size(0);
  check_table("input_reduce_weight", w.input_reduce, {m, width}, dtype, x);
  check_table("input_expand_weight", w.input_expand, {4 * width, m}, dtype, x);
  check_table("hidden_reduce_weight", w.hidden_reduce, {m, width}, dtype, x);
  check_table("hidden_expand_weight", w.hidden_expand, {4 * width, m}, dtype, x);
  check_result_gradient(dy, y, x, info, masks);
  check(!relu || !dy || y, "y: expected the result of the step, which ended in a ReLU");
  if (dh) check_table("dh", *dh, {n, width}, dtype, x);
  if (dc) check_table("dc", *dc, {n, width}, dtype, x);
  check_state(x, info, h, c);
  check_table("new_c", new_c, {n, width}, dtype, x);
  check_table("tables", tables, {n * (5 * width + 2 * m) + more}, dtype, x);
}

// The norm of each channel: z to ((z - shift) - d) rstd gamma + beta, shift + d being the mean; and `off`, a sample's
// mean less that mean. They lie in the operator's `tables`, behind those of the cell, so that backward finds them.
template <class A>
struct NormTables {
  A *off, *shift, *d, *rstd;

  static int64_t count(int64_t n, int64_t c) { return n * c + 3 * c; }
  NormTables(A* data, int64_t n, int64_t c) : off(data), shift(data + n * c), d(shift + c), rstd(d + c) {}
  // Those at the end of all `tables`.
  NormTables(const Tensor& tables, int64_t n, int64_t c)
      : NormTables(data_of<A>(tables) + (tables.numel() - count(n, c)), n, c) {}
};

// What a norm adds to a step's arguments.
inline void check_norm(const Tensor& z, const MapInfo& info, const OptionalTensor& gamma, const OptionalTensor& beta,
                       const OptionalTensor& mean, const OptionalTensor& var) {
  const ScalarType dtype = compute_scalar_type(z);
  const auto check_channels = [&](const char* name, const OptionalTensor& t) {
    if (t) check_table(name, *t, {info.shape.channels}, dtype, z);
  };
  check_channels("norm weight", gamma), check_channels("norm bias", beta);
  const auto check_statistics = [&](const char* name, const OptionalTensor& t) {
    if (t)
      check_table(name, *t, {info.shape.channels}, t->scalar_type() == ScalarType::Double ? ScalarType::Double : dtype,
                  z);
  };
  check_statistics("running_mean", mean), check_statistics("running_var", var);
  check(mean.has_value() == var.has_value(), "norm: expected both of a mean and a variance, or neither");
}

// What goes into the gradient of a tail.
inline void check_tail_gradient(const OptionalTensor& dy, const OptionalTensor& dh, const OptionalTensor& dc,
                                const Tensor& z, const MapInfo& info, const OptionalTensor& y, const OptionalTensor& h,
                                const OptionalTensor& c, const Tensor& new_c, const Tensor& tables,
                                const OptionalTensor& gamma, const OptionalTensor& beta, const Weights& w, bool relu,
                                bool masks) {
  check_step_gradient(dy, dh, dc, z, info, y, h, c, new_c, tables,
                      NormTables<float>::count(info.shape.samples, info.shape.channels), w, relu, masks);
  check_norm(z, info, gamma, beta, std::nullopt, std::nullopt);
}

// The means of each sample, for a norm of several processes.
inline void check_means(const Tensor& means, const Tensor& z, const MapInfo& info) {
  check_table("means", means, {info.shape.samples, info.shape.channels}, ScalarType::Double, z);
}

// The tables that a norm before a pooling left.
inline void check_norm_tables(const Tensor& tables, const Tensor& z, const MapInfo& info) {
  check_table("tables", tables, {NormTables<float>::count(info.shape.samples, info.shape.channels)},
              compute_scalar_type(z), z);
}

// What the second half of a gradient behind a norm of several processes takes.
inline void check_spread(const OptionalTensor& dy, const OptionalTensor& y, const Tensor& z, const MapInfo& info,
                         const Tensor& new_h, const Tensor& dp, const Tensor& tables, const OptionalTensor& gamma,
                         const Tensor& shares, bool masks) {
  const ScalarType dtype = compute_scalar_type(z);
  const int64_t n = info.shape.samples, width = info.shape.channels;
  check_result_gradient(dy, y, z, info, masks);
  check_table("new_h", new_h, {n, width}, dtype, z);
  check_table("dp", dp, {n, width}, dtype, z);
  check_table("shares", shares, {2, width}, dtype, z);
  check(tables.dim() == 1 && tables.size(0) >= NormTables<float>::count(n, width),
        "tables: expected those of the tail");
  check_table("tables", tables, {tables.size(0)}, dtype, z);
  check_norm(z, info, gamma, std::nullopt, std::nullopt, std::nullopt);
}

// A rescaling behind a norm, from the tables that its pooling left.
inline void check_norm_rescale(const Tensor& z, const MapInfo& info, const Tensor& scale,
                               const OptionalTensor& shortcut, const Tensor& tables, const OptionalTensor& gamma,
                               const OptionalTensor& beta) {
  check_scale(scale, info, z);
  if (shortcut) check_map("shortcut", *shortcut, z);
  check_norm_tables(tables, z, info);
  check_norm(z, info, gamma, beta, std::nullopt, std::nullopt);
}

// Statistics that a cell wants beside the mean: what the pooling behind a norm gave, and their gradients.
struct CellStatistics {
  OptionalTensor dvariance, variance, dextreme, extreme, where;
};

inline CellStatistics dense(const CellStatistics& of) {
  return {dense(of.dvariance), dense(of.variance), dense(of.dextreme), dense(of.extreme), dense(of.where)};
}

// The gradient of a pooling behind a norm, and of what a rescaling handed on.
inline void check_norm_pool_gradient(const Tensor& g, const Tensor& handed, const Tensor& dp,
                                     const CellStatistics& statistics, const Tensor& z, const MapInfo& info,
                                     const Tensor& tables, const OptionalTensor& gamma) {
  const ScalarType dtype = compute_scalar_type(z);
  const int64_t n = info.shape.samples, width = info.shape.channels;
  check_map("g", g, z);
  check_table("handed", handed, {3, n, width}, dtype, z);
  check_table("dp", dp, {n, width}, dtype, z);
  const auto check_optional = [&](const char* name, const OptionalTensor& t, ScalarType of) {
    if (t) check_table(name, *t, {n, width}, of, z);
  };
  const auto& [dvariance, variance, dextreme, extreme, where] = statistics;
  check_optional("dvariance", dvariance, ScalarType::Double), check_optional("variance", variance, ScalarType::Double);
  check_optional("dextreme", dextreme, dtype), check_optional("extreme", extreme, dtype);
  check_optional("where", where, ScalarType::Long);
  check(!dvariance || variance, "variance: expected it with its gradient");
  check(!dextreme || (extreme && where), "extreme, where: expected both with their gradient");
  check_norm_tables(tables, z, info);
  check_norm(z, info, gamma, std::nullopt, std::nullopt, std::nullopt);
}

// The buffers of a norm that are moved by `factor` towards the statistics of a batch, and its count of batches.
struct TrackedBuffers {
  Tensor running_mean, running_var, batches;
  double factor;
};

// The unbiased variance over a biased one, of `count` values.
inline double correction_of(double count) { return count / std::max(count - 1, 1.0); }

// Whoever writes the buffers may run beside whoever reads the rest of a tail's arguments.
inline void check_tracked(const TrackedBuffers& of, const Tensor& z, const MapInfo& info,
                          std::initializer_list<OptionalTensor> others) {
  check(z.scalar_type() != ScalarType::Double, "z: buffers are moved for maps of at most 32 bits, got float64");
  check(std::isinf(of.factor) || !std::isinf(static_cast<float>(of.factor)), "factor: expected a float, got ",
        of.factor);
  check_table("running_mean", of.running_mean, {info.shape.channels}, ScalarType::Float, z);
  check_table("running_var", of.running_var, {info.shape.channels}, ScalarType::Float, z);
  check_table("batches", of.batches, {}, ScalarType::Long, z);
  check(of.running_mean.is_contiguous(), "running_mean: expected a contiguous tensor");
  check(of.running_var.is_contiguous(), "running_var: expected a contiguous tensor");
  const Span written[] = {Span(of.running_mean), Span(of.running_var), Span(of.batches)};
  for (int a = 0; a < 3; ++a)
    for (int b = 0; b < a; ++b)
      check(!overlap(written[a], written[b]), "running_mean, running_var, batches: share memory");
  for (const OptionalTensor& other : others) {
    if (!other) continue;
    const Span read(*other);
    for (const Span& span : written)
      check(!overlap(span, read), "running_mean, running_var, batches: share memory with another argument");
  }
}

}  // namespace dia::ops
