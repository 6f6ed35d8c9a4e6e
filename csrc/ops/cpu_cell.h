// The LSTM cell between two sweeps over the map, on the CPU: its products and gates, and their gradients.
#pragma once

#include <algorithm>
#include <vector>

#include "arguments.h"
#include "cpu_loops.h"

namespace dia::ops {
namespace {

template <class A>
void column_sums(const A* table, int64_t rows, int64_t width, A* sums) {
  constexpr int64_t line = 32;
  parallel_for(0, (width + line - 1) / line, std::max<int64_t>(kGrain / std::max<int64_t>(rows * line, 1), 1),
               [&](int64_t begin, int64_t end) {
                 cell_kernels<A>().column_sums(table, rows, width, sums, begin * line, std::min(end * line, width));
               });
}

// Whether the kernel is faster than the BLAS: with few samples the weights' bytes decide, which the kernel reads once,
// and what a call costs; with more of them, long sums pay for its ends (docs/kernels.md, structure).
inline bool takes_kernel(int64_t samples, int64_t inputs) {
  return samples <= 4 || (samples <= 8 && inputs >= 64) || (samples <= 64 && inputs >= 256);
}

// y = x W' (+ y), or relu(x W' + bias), by the kernel or the BLAS.
template <class A>
void linear(const A* x, int64_t samples, const Tensor& weight, const A* bias, A* y, bool add = false) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  if (weight.stride(1) == 1 && takes_kernel(samples, inputs)) {
    const cpu::Linear<A> args{samples,          inputs, outputs, x,  static_cast<const A*>(weight.const_data_ptr()),
                              weight.stride(0), bias,   y,       add};
    constexpr int64_t part = 12;  // whole tiles of three or four rows a thread
    parallel_for(0, (outputs + part - 1) / part, std::max<int64_t>(kGrain / (4 * samples * inputs), 1),
                 [&](int64_t a, int64_t b) { cell_kernels<A>().linear(args, part * a, std::min(part * b, outputs)); });
    return;
  }
  product<A>(y, Matrix<A>::dense(x, samples, inputs), Matrix<A>::of(weight).transposed(), add);
  if (bias == nullptr) return;
  for_samples({0, samples}, outputs,
              [&](int64_t a, int64_t b) { cell_kernels<A>().bias_relu(y, bias, outputs, a, b); });
}

// The cell's pre-activations split as zx Wx2' + zh Wh2' + bias. With no state the hidden bottleneck is
// the same for all samples, so its product is done once and goes into the bias.
template <class A>
class HiddenPath {
 public:
  HiddenPath(const Parameters& w, const OptionalTensor& h, int64_t n, int64_t c, int64_t m, A* zh)
      : reduce_(w.hidden_reduce_weight),
        expand_(w.hidden_expand_weight),
        reduce_bias_(dense(w.hidden_reduce_bias)),
        h_(data_of<A>(h)),
        zh_(zh),
        c_(c),
        m_(m),
        bias_(empty_table<A>(w.input_expand_bias, {4 * c})) {
    const Tensor input_bias = dense(w.input_expand_bias), hidden_bias = dense(w.hidden_expand_bias);
    A* bias = data_of<A>(bias_);
    const A *a = data_of<A>(input_bias), *b = data_of<A>(hidden_bias);
    for (int64_t k = 0; k < 4 * c; ++k) bias[k] = a[k] + b[k];
    if (h_ != nullptr || n == 0) return;
    std::fill(zh_, zh_ + m, A(0));
    cell_kernels<A>().bias_relu(zh_, data_of<A>(reduce_bias_), m, 0, 1);
    for (int64_t k = 1; k < n; ++k) std::copy(zh_, zh_ + m, zh_ + k * m);
    linear<A>(zh_, 1, expand_, nullptr, bias, true);
  }

  const A* bias() const { return data_of<A>(bias_); }

  // Adds this path's part to the pre-activations of the chunk.
  void add(Chunk chunk, A* u) const {
    if (h_ == nullptr) return;
    A* zh = zh_ + chunk.first * m_;
    linear<A>(h_ + chunk.first * c_, chunk.count, reduce_, data_of<A>(reduce_bias_), zh);
    linear<A>(zh, chunk.count, expand_, nullptr, u, true);
  }

 private:
  Tensor reduce_, expand_, reduce_bias_;
  const A* h_;
  A* zh_;
  int64_t c_, m_;
  Tensor bias_;
};

// The cell's pass over a chunk: from tables.p to the gates and the new state.
template <class A>
class CellPass {
 public:
  CellPass(const Parameters& w, const OptionalTensor& h, const OptionalTensor& c, const Tables<A>& tables, int64_t n,
           int64_t width, bool tanh_output, const Tensor& new_h, const Tensor& new_c)
      : w_(w),
        tables_(tables),
        width_(width),
        bottleneck_(w.input_reduce_weight.size(0)),
        input_reduce_bias_(dense(w.input_reduce_bias)),
        hidden_(w, h, n, width, bottleneck_, tables.zh),
        cell_{width,
              tanh_output ? Output::tanh : Output::sigmoid,
              tables.gates,
              hidden_.bias(),
              data_of<A>(c),
              data_of<A>(new_h),
              data_of<A>(new_c)} {}

  void run(Chunk chunk) const {
    A *zx = tables_.zx + chunk.first * bottleneck_, *u = tables_.gates + chunk.first * 4 * width_;
    linear<A>(tables_.p + chunk.first * width_, chunk.count, w_.input_reduce_weight, data_of<A>(input_reduce_bias_),
              zx);
    linear<A>(zx, chunk.count, w_.input_expand_weight, nullptr, u);
    hidden_.add(chunk, u);
    for_samples(chunk, 4 * width_, [&](int64_t a, int64_t b) { cell_kernels<A>().forward(cell_, a, b); });
  }

 private:
  const Parameters& w_;
  Tables<A> tables_;
  int64_t width_, bottleneck_;
  Tensor input_reduce_bias_;
  HiddenPath<A> hidden_;
  CellForward<A> cell_;
};

// Bytes of the cell's weights.
template <class A>
int64_t weight_bytes(int64_t width, int64_t bottleneck) {
  return 10 * width * bottleneck * static_cast<int64_t>(sizeof(A));
}

// Gradients of the eight parameters in one flat tensor, once over all samples. Weights are read where there is no h.
// `add`: to what is there, of samples with h.
template <class A>
void fill_parameter_gradients(const Tensor& flat, const Tables<A>& tables, const A* h, const Factors<A>& factors,
                              const Weights* w, int64_t n, int64_t c, int64_t m, bool add = false) {
  const auto [du, dzx, dzh] = factors;
  const FlatParameters at(c, m);
  A* const to = data_of<A>(flat);
  A *const v1 = to + at.hidden_reduce_weight, *const v2 = to + at.hidden_expand_weight;
  A *const b2 = to + at.input_expand_bias, *const a1 = to + at.hidden_reduce_bias;
  const auto matrix = [n](const A* data, int64_t columns) { return Matrix<A>::dense(data, n, columns); };
  const auto sums = [&](const A* table, int64_t width, A* out) {
    if (!add) return column_sums(table, n, width, out);
    const Tensor more = empty_table<A>(flat, {width});
    column_sums(table, n, width, data_of<A>(more));
    for (int64_t k = 0; k < width; ++k) out[k] += data_of<A>(more)[k];
  };
  product<A>(to + at.input_reduce_weight, matrix(dzx, m).transposed(), matrix(tables.p, c), add);
  product<A>(to + at.input_expand_weight, matrix(du, 4 * c).transposed(), matrix(tables.zx, m), add);
  sums(dzx, m, to + at.input_reduce_bias);
  sums(du, 4 * c, b2);
  std::copy(b2, b2 + 4 * c, to + at.hidden_expand_bias);
  if (h != nullptr) {
    product<A>(v1, matrix(dzh, m).transposed(), matrix(h, c), add);
    product<A>(v2, matrix(du, 4 * c).transposed(), matrix(tables.zh, m), add);
    sums(dzh, m, a1);
    return;
  }
  // With no state every sample has the same zh and a zero h: sums over samples come before products.
  const Tensor zero_row = empty_table<A>(flat, {m});
  std::fill(data_of<A>(zero_row), data_of<A>(zero_row) + m, A(0));
  const A* zh = n > 0 ? tables.zh : data_of<A>(zero_row);
  product<A>(v2, Matrix<A>::dense(b2, 4 * c, 1), Matrix<A>::dense(zh, 1, m));
  // Weights first: as a row times a matrix the BLAS sums a single column with twice the error.
  product<A>(a1, Matrix<A>::of(w->hidden_expand).transposed(), Matrix<A>::dense(b2, 4 * c, 1));
  cell_kernels<A>().mask(a1, zh, 0, m);
  // Times the zero of h: zero, or NaN where the gradient is not finite, as in a product with zeros.
  for (int64_t row = 0; row < m; ++row) std::fill(v1 + row * c, v1 + (row + 1) * c, a1[row] * A(0));
}

// The gradient of the cell over a chunk, from dscale (the gradient of h' from the map) to those of the state and of p.
template <class A>
struct CellGradientPass {
  // What came with the forward pass, and what came in from the next step; see the operator step_backward.
  struct Given {
    const OptionalTensor &dh, &dc, &h, &c;
    const Tensor& new_c;
    Tables<A> tables;
    const Weights& weights;
    int64_t samples, width;
    bool tanh_output;
  };

  CellGradientPass(const Given& given, const Tensor& like, bool has_dscale, bool need_p, bool need_state,
                   WantedParameters as)
      : given(given),
        bottleneck(given.weights.input_reduce.size(0)),
        need_p(need_p),
        need_state(need_state),
        wanted(as),
        // dscale, dp, h', and the factors unless they are a result: one allocation.
        scratch(empty_table<A>(like, {given.samples * 3 * given.width +
                                      (as.factors() ? 0 : Factors<A>::count(given.samples, given.width, bottleneck))})),
        dscale(data_of<A>(scratch)),
        dp(dscale + given.samples * given.width),
        new_h(dp + given.samples * given.width),
        result(empty_table<A>(like, {as.flat()      ? FlatParameters(given.width, bottleneck).count
                                     : as.factors() ? Factors<A>::count(given.samples, given.width, bottleneck)
                                                    : int64_t{0}})),
        factors(as.factors() ? data_of<A>(result) : new_h + given.samples * given.width, given.samples, given.width,
                bottleneck),
        old_dh(empty_table<A>(like,
                              need_state ? std::vector<int64_t>{given.samples, given.width} : std::vector<int64_t>{0})),
        old_dc(empty_table<A>(like,
                              need_state ? std::vector<int64_t>{given.samples, given.width} : std::vector<int64_t>{0})),
        cell{given.width,
             given.tanh_output ? Output::tanh : Output::sigmoid,
             given.tables.gates,
             data_of<A>(given.c),
             static_cast<const A*>(given.new_c.const_data_ptr()),
             has_dscale ? dscale : nullptr,
             data_of<A>(given.dh),
             data_of<A>(given.dc),
             factors.du,
             need_state ? data_of<A>(old_dc) : nullptr,
             new_h} {}

  // Whether there is anything to do.
  bool needed() const { return need_p || wanted.any || need_state; }

  // Reads dscale; writes new_h, the state's gradients, and dp times `factor`.
  void run(Chunk chunk, double factor) {
    const int64_t width = given.width, m = bottleneck;
    for_samples(chunk, 4 * width, [&](int64_t a, int64_t b) { cell_kernels<A>().backward(cell, a, b); });
    const auto du_rows = Matrix<A>::dense(factors.du + chunk.first * 4 * width, chunk.count, 4 * width);
    const auto reduced = [&](A* dz, const A* z, const Tensor& expand) {
      product<A>(dz + chunk.first * m, du_rows, Matrix<A>::of(expand));
      parallel_for(chunk.first * m, (chunk.first + chunk.count) * m, kGrain,
                   [&](int64_t a, int64_t b) { cell_kernels<A>().mask(dz, z, a, b); });
      return Matrix<A>::dense(dz + chunk.first * m, chunk.count, m);
    };
    if (need_p || wanted.any) {
      const auto dz = reduced(factors.dzx, given.tables.zx, given.weights.input_expand);
      if (need_p) product<A>(dp + chunk.first * width, dz, Matrix<A>::of(given.weights.input_reduce), false, factor);
    }
    if (need_state || (wanted.any && given.h)) {
      const auto dz = reduced(factors.dzh, given.tables.zh, given.weights.hidden_expand);
      if (need_state)
        product<A>(data_of<A>(old_dh) + chunk.first * width, dz, Matrix<A>::of(given.weights.hidden_reduce));
    }
  }

  // The gradients of the parameters as they are asked for, the flat one once over all samples.
  Tensor parameters() const {
    if (wanted.flat())
      fill_parameter_gradients<A>(result, given.tables, data_of<A>(given.h), factors, &given.weights, given.samples,
                                  given.width, bottleneck);
    return result;
  }

  Given given;
  int64_t bottleneck;
  bool need_p, need_state;
  WantedParameters wanted;
  Tensor scratch;

  A *dscale, *dp, *new_h;
  Tensor result;
  Factors<A> factors;
  Tensor old_dh, old_dc;
  CellBackward<A> cell;
};

}  // namespace
}  // namespace dia::ops
