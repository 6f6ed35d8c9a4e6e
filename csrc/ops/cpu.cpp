// The operators on the CPU: checks, chunks of samples, threads, and the products between the sweeps.
//
// A step is, per chunk of samples (core/plan.h): pool | two reductions with bias and ReLU | two expansions |
// gates | rescale. Its gradient: reduce | gates | products | spread; then the weights' gradients once
// over all samples. The kernels (cpu/kernels.h) are serial; here samples, or where they are few the parts of each,
// are spread over torch's threads.
#include <algorithm>
#include <tuple>

#if defined(__linux__)
#include <unistd.h>
#endif

#include "../core/plan.h"
#include "../cpu/dispatch.h"
#include "tensors.h"

namespace dia::ops {
namespace {

using namespace dia::cpu;
using torch::stable::parallel_for;

// Elements below which a second thread costs more than it saves.
constexpr int64_t kGrain = 16384;

template <class T>
const MapKernels<T>& map_kernels() {
  if constexpr (std::is_same_v<T, double>)
    return kernels().f64;
  else if constexpr (std::is_same_v<T, BFloat16>)
    return kernels().bf16;
  else if constexpr (std::is_same_v<T, Float16>)
    return kernels().f16;
  else
    return kernels().f32;
}

template <class A>
const CellKernels<A>& cell_kernels() {
  if constexpr (std::is_same_v<A, double>)
    return kernels().cell64;
  else
    return kernels().cell32;
}

// Calls `body.template operator()<T>()` with the element type of x.
template <class Body>
auto with_map_type(const Tensor& x, Body body) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return body.template operator()<double>();
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

// A part of the shared last-level cache: the other threads' data and the streams want room too.
int64_t cache_bytes() {
  static const int64_t bytes = [] {
    int64_t size = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    size = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return size > 0 ? size / 4 : int64_t{8} << 20;
  }();
  return bytes;
}

// Samples [first, first + count) of a batch.
struct Chunk {
  int64_t first, count;
};

// Splits the batch into chunks and calls `body` on each. With a sample for every thread each thread takes its own
// samples through the whole step, and no thread waits for another in between (parallel loops inside `body` are then
// serial); with fewer samples the chunks come one after the other and threads share each.
template <class Body>
void for_chunks(int64_t samples, int64_t sample_bytes, int64_t weight_bytes, Body body) {
  const int64_t threads = torch::stable::get_num_threads();
  const bool own = samples >= threads;
  const auto run = [&](int64_t begin, int64_t end) {
    const int64_t size = samples_per_chunk(end - begin, sample_bytes, weight_bytes,
                                           own ? cache_bytes() / threads : cache_bytes(), own ? 1 : threads);
    for (int64_t first = begin; first < end; first += size) body(Chunk{first, std::min(size, end - first)});
  };
  if (own)
    parallel_for(0, samples, std::max<int64_t>(kGrain * 4 / std::max<int64_t>(sample_bytes, 1), 1), run);
  else
    run(0, samples);
}

// Spreads `per_sample` units of each sample of the chunk over threads; calls body(sample, begin, end).
template <class Body>
void for_units(Chunk chunk, int64_t per_sample, int64_t grain, Body body) {
  parallel_for(0, chunk.count * per_sample, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t sample = begin / per_sample, unit = begin % per_sample;
      const int64_t stop = std::min(per_sample, unit + end - begin);
      body(chunk.first + sample, unit, stop);
      begin += stop - unit;
    }
  });
}

// Rows of the map, for kernels that write row by row.
template <class Body>
void for_rows(const MapShape& shape, Chunk chunk, Body body) {
  for_units(chunk, shape.rows(), kGrain / std::max<int64_t>(shape.row_length(), 1), body);
}

// Ranges of channels, for reductions. Interleaved rows are cut only as far as threads would idle, and
// at cache lines.
template <class Body>
void for_channel_ranges(const MapShape& shape, Chunk chunk, Body body) {
  if (!shape.interleaved) return for_rows(shape, chunk, body);
  constexpr int64_t line = 32;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = (threads + chunk.count - 1) / std::max<int64_t>(chunk.count, 1);
  const int64_t width = (shape.channels + wanted * line - 1) / (wanted * line) * line;
  const int64_t ranges = (shape.channels + width - 1) / width;
  for_units(chunk, ranges, kGrain / std::max<int64_t>(shape.positions * width, 1),
            [&](int64_t sample, int64_t begin, int64_t end) {
              body(sample, begin * width, std::min(end * width, shape.channels));
            });
}

// Rows of a table of `width` values a sample.
template <class Body>
void for_samples(Chunk chunk, int64_t width, Body body) {
  parallel_for(chunk.first, chunk.first + chunk.count, std::max<int64_t>(kGrain / 8 / width, 1), body);
}

template <class T>
void run_pool(const Pool<T>& args, Chunk chunk) {
  for_channel_ranges(args.shape, chunk, [&](int64_t n, int64_t a, int64_t b) { map_kernels<T>().pool(args, n, a, b); });
}

template <class T>
void run_rescale(const Rescale<T>& args, Chunk chunk) {
  for_rows(args.shape, chunk, [&](int64_t n, int64_t a, int64_t b) { map_kernels<T>().rescale(args, n, a, b); });
}

template <class T>
void run_reduce_gradient(const ReduceGradient<T>& args, Chunk chunk) {
  for_channel_ranges(args.shape, chunk,
                     [&](int64_t n, int64_t a, int64_t b) { map_kernels<T>().reduce_gradient(args, n, a, b); });
}

template <class T>
void run_spread_gradient(const SpreadGradient<T>& args, Chunk chunk) {
  for_rows(args.shape, chunk,
           [&](int64_t n, int64_t a, int64_t b) { map_kernels<T>().spread_gradient(args, n, a, b); });
}

template <class A>
void column_sums(const A* table, int64_t rows, int64_t width, A* sums) {
  constexpr int64_t line = 32;
  parallel_for(0, (width + line - 1) / line, std::max<int64_t>(kGrain / std::max<int64_t>(rows * line, 1), 1),
               [&](int64_t begin, int64_t end) {
                 cell_kernels<A>().column_sums(table, rows, width, sums, begin * line, std::min(end * line, width));
               });
}

// y = x W' (+ y), or relu(x W' + bias), by the kernel where it is faster than the BLAS: with few samples the
// weights' bytes decide, which the kernel reads once; with more of them, long sums pay for its ends.
template <class A>
void linear(const A* x, int64_t samples, const Tensor& weight, const A* bias, A* y, bool add = false) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  if (weight.stride(1) == 1 && (samples <= 8 || (samples <= 64 && inputs >= 128))) {
    const cpu::Linear<A> args{samples,          inputs, outputs, x,  static_cast<const A*>(weight.const_data_ptr()),
                              weight.stride(0), bias,   y,       add};
    // Whole tiles of three rows a thread.
    parallel_for(0, (outputs + 2) / 3, std::max<int64_t>(kGrain / (samples * inputs), 1),
                 [&](int64_t a, int64_t b) { cell_kernels<A>().linear(args, 3 * a, std::min(3 * b, outputs)); });
    return;
  }
  product<A>(y, Matrix<A>::dense(x, samples, inputs), Matrix<A>::of(weight).transposed(), add);
  if (bias == nullptr) return;
  for_samples({0, samples}, outputs,
              [&](int64_t a, int64_t b) { cell_kernels<A>().bias_relu(y, bias, outputs, a, b); });
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
OptionalTensor dense(const OptionalTensor& t) { return t ? OptionalTensor(dense(*t)) : t; }

// --- step --------------------------------------------------------------------------------------------

// The parameters of the LSTM cell: a weight may have any strides, a bias is dense.
struct Parameters {
  Tensor input_reduce_weight, input_reduce_bias, input_expand_weight, input_expand_bias;
  Tensor hidden_reduce_weight, hidden_reduce_bias, hidden_expand_weight, hidden_expand_bias;
};

void check_parameters(const Parameters& w, int64_t c, ScalarType dtype, const Tensor& x) {
  check(w.input_reduce_weight.dim() == 2, "input_reduce_weight: expected 2 dimensions");
  const int64_t m = w.input_reduce_weight.size(0);
  check(c >= 1 && m >= 1, "x: expected at least one channel and a bottleneck of at least one value");
  check_table("input_reduce_weight", w.input_reduce_weight, {m, c}, dtype, x);
  check_table("input_reduce_bias", w.input_reduce_bias, {m}, dtype, x);
  check_table("input_expand_weight", w.input_expand_weight, {4 * c, m}, dtype, x);
  check_table("input_expand_bias", w.input_expand_bias, {4 * c}, dtype, x);
  check_table("hidden_reduce_weight", w.hidden_reduce_weight, {m, c}, dtype, x);
  check_table("hidden_reduce_bias", w.hidden_reduce_bias, {m}, dtype, x);
  check_table("hidden_expand_weight", w.hidden_expand_weight, {4 * c, m}, dtype, x);
  check_table("hidden_expand_bias", w.hidden_expand_bias, {4 * c}, dtype, x);
}

// The parts of the operator's `tables`: see operators.py, table_sizes.
template <class A>
struct Tables {
  A *p, *zx, *zh, *gates;

  static int64_t count(int64_t n, int64_t c, int64_t m) { return n * (5 * c + 2 * m); }
  Tables(A* data, int64_t n, int64_t c, int64_t m) : p(data), zx(p + n * c), zh(zx + n * m), gates(zh + n * m) {}
};

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

struct StepResult {
  Tensor h, c, tables;
};

template <class T>
StepResult run_step(const Tensor& x, const MapInfo& info, const Map<const T>& x_map, const Map<const T>& shortcut,
                    const Map<T>& y, const OptionalTensor& h, const OptionalTensor& c, const Parameters& w, bool relu,
                    bool tanh_output) {
  using A = Compute<T>;
  const int64_t n = info.shape.samples, width = info.shape.channels, m = w.input_reduce_weight.size(0);
  StepResult result{empty_table<A>(x, {n, width}), empty_table<A>(x, {n, width}),
                    empty_table<A>(x, {Tables<A>::count(n, width, m)})};
  const Tables<A> tables(data_of<A>(result.tables), n, width, m);
  const Tensor input_reduce_bias = dense(w.input_reduce_bias);
  const HiddenPath<A> hidden(w, h, n, width, m, tables.zh);

  const Pool<T> pool{info.shape, x_map, tables.p};
  const CellForward<A> cell{width,
                            tanh_output ? Output::tanh : Output::sigmoid,
                            tables.gates,
                            hidden.bias(),
                            data_of<A>(c),
                            data_of<A>(result.h),
                            data_of<A>(result.c)};
  const Rescale<T> rescale{info.shape, x_map, shortcut, y, data_of<A>(result.h), relu};

  const int64_t sample_bytes = width * info.shape.positions * static_cast<int64_t>(sizeof(T));
  const int64_t weight_bytes = 10 * width * m * static_cast<int64_t>(sizeof(A));
  for_chunks(n, sample_bytes, weight_bytes, [&](Chunk chunk) {
    run_pool(pool, chunk);
    A *zx = tables.zx + chunk.first * m, *u = tables.gates + chunk.first * 4 * width;
    linear<A>(tables.p + chunk.first * width, chunk.count, w.input_reduce_weight, data_of<A>(input_reduce_bias), zx);
    linear<A>(zx, chunk.count, w.input_expand_weight, nullptr, u);
    hidden.add(chunk, u);
    for_samples(chunk, 4 * width, [&](int64_t a, int64_t b) { cell_kernels<A>().forward(cell, a, b); });
    run_rescale(rescale, chunk);
  });
  return result;
}

void check_step(const Tensor& x, const MapInfo& info, const OptionalTensor& shortcut, const OptionalTensor& h,
                const OptionalTensor& c, const Parameters& w) {
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (shortcut) check_map("shortcut", *shortcut, x);
  check(h.has_value() == c.has_value(), "state: expected both of h and c, or neither");
  if (h) check_table("h", *h, {info.shape.samples, info.shape.channels}, dtype, x);
  if (c) check_table("c", *c, {info.shape.samples, info.shape.channels}, dtype, x);
  check_parameters(w, info.shape.channels, dtype, x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> step(Tensor x, OptionalTensor shortcut, OptionalTensor h, OptionalTensor c,
                                                Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor v1, Tensor a1,
                                                Tensor v2, Tensor a2, int64_t channel_dim, bool relu, bool tanh_output,
                                                bool keep_tables) {
  const Parameters w{w1, b1, w2, b2, v1, a1, v2, a2};
  const MapInfo info = map_info(x, channel_dim);
  check_step(x, info, shortcut, h, c, w);
  return with_map_type(x, [&]<class T>() {
    const MapReader<T> x_reader(x, info);
    const OptionalMapReader<T> s_reader(shortcut, info);
    const Tensor y = empty_map(x, info);
    StepResult result = run_step<T>(x, info, x_reader.map, s_reader.map, map_writer<T>(y, info), dense(h), dense(c), w,
                                    relu, tanh_output);
    if (!keep_tables) result.tables = empty_table<Compute<T>>(x, {0});
    return std::make_tuple(y, result.h, result.c, result.tables);
  });
}

// The bytes that a tensor spans.
struct Span {
  const char *begin, *end;

  explicit Span(const Tensor& t) : begin(static_cast<const char*>(t.const_data_ptr())), end(begin) {
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) {
      if (t.size(d) == 0) return;
      last += (t.size(d) - 1) * t.stride(d);
    }
    end = begin + (last + 1) * static_cast<int64_t>(t.element_size());
  }
};

// Whether writing x in place would change what is still to be read of the shortcut: they share memory,
// but not element for element.
bool clash(const Tensor& x, const Tensor& shortcut) {
  const Span a(x), b(shortcut);
  if (a.end <= b.begin || b.end <= a.begin) return false;
  bool same = a.begin == b.begin;
  for (int64_t d = 0; d < x.dim(); ++d) same = same && (x.size(d) == 1 || x.stride(d) == shortcut.stride(d));
  return !same;
}

std::tuple<Tensor, Tensor> step_in_place(Tensor x, OptionalTensor shortcut, OptionalTensor h, OptionalTensor c,
                                         Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor v1, Tensor a1, Tensor v2,
                                         Tensor a2, int64_t channel_dim, bool relu, bool tanh_output) {
  const Parameters w{w1, b1, w2, b2, v1, a1, v2, a2};
  const MapInfo info = map_info(x, channel_dim);
  check_step(x, info, shortcut, h, c, w);
  if (shortcut && clash(x, *shortcut)) shortcut = torch::stable::clone(*shortcut);
  return with_map_type(x, [&]<class T>() {
    const MapReader<T> x_reader(x, info);
    const OptionalMapReader<T> s_reader(shortcut, info);
    const bool walkable = x_reader.map.data == x.const_data_ptr();
    // Where the kernel reads a copy of x, it may as well write there; the result is copied back.
    const Map<T> y{const_cast<T*>(x_reader.map.data), x_reader.map.strides};
    const StepResult result =
        run_step<T>(x, info, x_reader.map, s_reader.map, y, dense(h), dense(c), w, relu, tanh_output);
    if (!walkable) torch::stable::copy_(x, x_reader.tensor);
    return std::make_tuple(result.h, result.c);
  });
}

// --- gradient of the step ----------------------------------------------------------------------------

struct Weights {
  Tensor input_reduce, input_expand, hidden_reduce, hidden_expand;
};

// Gradients of the eight parameters, once over all samples.
template <class A>
struct ParameterGradients {
  Tensor w1, b1, w2, b2, v1, a1, v2, a2;

  ParameterGradients(const Tensor& x, int64_t c, int64_t m, bool wanted) {
    const auto table = [&](std::initializer_list<int64_t> sizes) {
      return empty_table<A>(x, wanted ? std::vector<int64_t>(sizes) : std::vector<int64_t>{0});
    };
    w1 = table({m, c}), b1 = table({m}), w2 = table({4 * c, m}), b2 = table({4 * c});
    v1 = table({m, c}), a1 = table({m}), v2 = table({4 * c, m}), a2 = table({4 * c});
  }

  void fill(const Tables<A>& tables, const A* h, const A* du, const A* dzx, const A* dzh, const Weights& w, int64_t n,
            int64_t c, int64_t m) {
    const auto matrix = [n](const A* data, int64_t columns) { return Matrix<A>::dense(data, n, columns); };
    product<A>(data_of<A>(w1), matrix(dzx, m).transposed(), matrix(tables.p, c));
    product<A>(data_of<A>(w2), matrix(du, 4 * c).transposed(), matrix(tables.zx, m));
    column_sums(dzx, n, m, data_of<A>(b1));
    column_sums(du, n, 4 * c, data_of<A>(b2));
    std::copy(data_of<A>(b2), data_of<A>(b2) + 4 * c, data_of<A>(a2));
    if (h != nullptr) {
      product<A>(data_of<A>(v1), matrix(dzh, m).transposed(), matrix(h, c));
      product<A>(data_of<A>(v2), matrix(du, 4 * c).transposed(), matrix(tables.zh, m));
      column_sums(dzh, n, m, data_of<A>(a1));
      return;
    }
    // With no state every sample has the same zh and a zero h: sums over samples come before products.
    const Tensor zero_row = empty_table<A>(w1, {m});
    std::fill(data_of<A>(zero_row), data_of<A>(zero_row) + m, A(0));
    const A* zh = n > 0 ? tables.zh : data_of<A>(zero_row);
    product<A>(data_of<A>(v2), Matrix<A>::dense(data_of<A>(b2), 4 * c, 1), Matrix<A>::dense(zh, 1, m));
    // Weights first: as a row times a matrix the BLAS sums a single column with twice the error.
    product<A>(data_of<A>(a1), Matrix<A>::of(w.hidden_expand).transposed(), Matrix<A>::dense(data_of<A>(b2), 4 * c, 1));
    cell_kernels<A>().mask(data_of<A>(a1), zh, 0, m);
    // Times the zero of h: zero, or NaN where the gradient is not finite, as in a product with zeros.
    for (int64_t row = 0; row < m; ++row)
      std::fill(data_of<A>(v1) + row * c, data_of<A>(v1) + (row + 1) * c, data_of<A>(a1)[row] * A(0));
  }
};

using StepGradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Wanted {
  bool x, shortcut, state, parameters;
};

template <class T>
StepGradients run_step_backward(const OptionalTensor& dy, const OptionalTensor& dh, const OptionalTensor& dc,
                                const Tensor& x, const OptionalTensor& y, const OptionalTensor& h,
                                const OptionalTensor& c, const Tensor& new_c, const Tensor& tables_tensor,
                                const Weights& w, const MapInfo& info, bool tanh_output, Wanted wanted) {
  using A = Compute<T>;
  const int64_t n = info.shape.samples, width = info.shape.channels, m = w.input_reduce.size(0);
  const bool need_zx = wanted.x || wanted.parameters;
  const bool need_zh = wanted.state || (wanted.parameters && h);
  const bool need_cell = need_zx || need_zh;

  // The copies a map or table may need live until the kernels are done.
  const OptionalMapReader<T> dy_reader(dy, info), y_reader(dy ? y : std::nullopt, info);
  const MapReader<T> x_reader(x, info);
  const Tables<A> tables(data_of<A>(tables_tensor), n, width, m);

  const Tensor dx = wanted.x ? empty_map(x, info) : empty_strided({0}, {1}, x, dtype_code(x));
  const Tensor dshortcut = wanted.shortcut ? empty_map(x, info) : empty_strided({0}, {1}, x, dtype_code(x));
  const std::vector<int64_t> state_sizes = wanted.state ? std::vector<int64_t>{n, width} : std::vector<int64_t>{0};
  const Tensor dh_old = empty_table<A>(x, state_sizes), dc_old = empty_table<A>(x, state_sizes);
  ParameterGradients<A> gradients(x, width, m, wanted.parameters);

  // dscale, then dp / HW; h'; du; dzx; dzh: one allocation.
  const Tensor scratch = empty_table<A>(x, {n * (7 * width + 2 * m)});
  A* dscale = data_of<A>(scratch);
  A *dp = dscale + n * width, *scale = dp + n * width, *du = scale + n * width;
  A *dzx = du + n * 4 * width, *dzh = dzx + n * m;

  const Map<T> g = wanted.shortcut ? map_writer<T>(dshortcut, info) : Map<T>{};
  const ReduceGradient<T> reduce{
      info.shape, dy_reader.map, y_reader.map, x_reader.map, g, need_cell ? dscale : nullptr};
  const CellBackward<A> cell{width,
                             tanh_output ? Output::tanh : Output::sigmoid,
                             tables.gates,
                             data_of<A>(c),
                             data_of<A>(new_c),
                             dy ? dscale : nullptr,
                             data_of<A>(dh),
                             data_of<A>(dc),
                             du,
                             wanted.state ? data_of<A>(dc_old) : nullptr,
                             scale};
  // What the first sweep wrote is already masked, and is one map to read instead of two.
  const bool reread = dy && wanted.shortcut;
  const Map<const T> source = reread ? Map<const T>{g.data, g.strides} : dy_reader.map;
  const SpreadGradient<T> spread{
      info.shape, source, reread ? Map<const T>{} : y_reader.map, wanted.x ? map_writer<T>(dx, info) : Map<T>{},
      scale,      dp};

  const int64_t sample_bytes =
      width * info.shape.positions * static_cast<int64_t>(sizeof(T)) * (reread || !y_reader.map.data ? 1 : 2);
  const int64_t weight_bytes = 10 * width * m * static_cast<int64_t>(sizeof(A));
  for_chunks(n, sample_bytes, weight_bytes, [&](Chunk chunk) {
    if (dy) run_reduce_gradient(reduce, chunk);
    if (!need_cell) return;
    for_samples(chunk, 4 * width, [&](int64_t a, int64_t b) { cell_kernels<A>().backward(cell, a, b); });
    const auto du_chunk = Matrix<A>::dense(du + chunk.first * 4 * width, chunk.count, 4 * width);
    const auto reduced = [&](A* dz, const A* z, const Tensor& expand) {
      product<A>(dz + chunk.first * m, du_chunk, Matrix<A>::of(expand));
      parallel_for(chunk.first * m, (chunk.first + chunk.count) * m, kGrain,
                   [&](int64_t a, int64_t b) { cell_kernels<A>().mask(dz, z, a, b); });
      return Matrix<A>::dense(dz + chunk.first * m, chunk.count, m);
    };
    if (need_zx) {
      const auto dz = reduced(dzx, tables.zx, w.input_expand);
      if (wanted.x && info.shape.positions > 0)
        product<A>(dp + chunk.first * width, dz, Matrix<A>::of(w.input_reduce), false,
                   1.0 / static_cast<double>(info.shape.positions));
    }
    if (need_zh) {
      const auto dz = reduced(dzh, tables.zh, w.hidden_expand);
      if (wanted.state) product<A>(data_of<A>(dh_old) + chunk.first * width, dz, Matrix<A>::of(w.hidden_reduce));
    }
    if (wanted.x) run_spread_gradient(spread, chunk);
  });
  if (wanted.shortcut && !dy) torch::stable::fill_(dshortcut, 0.0);
  if (wanted.parameters) gradients.fill(tables, data_of<A>(h), du, dzx, dzh, w, n, width, m);
  return {dx,           dshortcut,    dh_old,       dc_old,       gradients.w1, gradients.b1,
          gradients.w2, gradients.b2, gradients.v1, gradients.a1, gradients.v2, gradients.a2};
}

StepGradients step_backward(OptionalTensor dy, OptionalTensor dh, OptionalTensor dc, Tensor x, OptionalTensor y,
                            OptionalTensor h, OptionalTensor c, Tensor new_c, Tensor tables, Tensor w1, Tensor w2,
                            Tensor v1, Tensor v2, int64_t channel_dim, bool relu, bool tanh_output, bool need_x,
                            bool need_shortcut, bool need_state, bool need_parameters) {
  const MapInfo info = map_info(x, channel_dim);
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t n = info.shape.samples, width = info.shape.channels;
  check(w1.dim() == 2 && width >= 1 && w1.size(0) >= 1, "input_reduce_weight: expected 2 dimensions");
  const int64_t m = w1.size(0);
  check_table("input_reduce_weight", w1, {m, width}, dtype, x);
  check_table("input_expand_weight", w2, {4 * width, m}, dtype, x);
  check_table("hidden_reduce_weight", v1, {m, width}, dtype, x);
  check_table("hidden_expand_weight", v2, {4 * width, m}, dtype, x);
  if (dy) check_map("dy", *dy, x);
  if (y) check_map("y", *y, x);
  check(!relu || !dy || y, "y: expected the result of the step, which ended in a ReLU");
  check(h.has_value() == c.has_value(), "state: expected both of h and c, or neither");
  const auto check_state = [&](const char* name, const OptionalTensor& t) {
    if (t) check_table(name, *t, {n, width}, dtype, x);
  };
  check_state("dh", dh), check_state("dc", dc), check_state("h", h), check_state("c", c), check_state("new_c", new_c);
  check_table("tables", tables, {n * (5 * width + 2 * m)}, dtype, x);
  return with_map_type(x, [&]<class T>() {
    return run_step_backward<T>(dy, dense(dh), dense(dc), x, relu ? y : std::nullopt, dense(h), dense(c), dense(new_c),
                                dense(tables), {w1, w2, v1, v2}, info, tanh_output,
                                {need_x, need_shortcut, need_state, need_parameters});
  });
}

// --- the parts: pool and rescale ---------------------------------------------------------------------

Tensor pool(Tensor x, int64_t channel_dim) {
  const MapInfo info = map_info(x, channel_dim);
  return with_map_type(x, [&]<class T>() {
    const MapReader<T> reader(x, info);
    const Tensor p = empty_table<Compute<T>>(x, {info.shape.samples, info.shape.channels});
    run_pool<T>({info.shape, reader.map, data_of<Compute<T>>(p)}, {0, info.shape.samples});
    return p;
  });
}

void check_scale(const Tensor& scale, const MapInfo& info, const Tensor& x) {
  check_table("scale", scale, {info.shape.samples, info.shape.channels},
              x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float, x);
}

Tensor rescale(Tensor x, Tensor scale, OptionalTensor shortcut, int64_t channel_dim, bool relu) {
  const MapInfo info = map_info(x, channel_dim);
  check_scale(scale, info, x);
  if (shortcut) check_map("shortcut", *shortcut, x);
  const Tensor scales = dense(scale);
  return with_map_type(x, [&]<class T>() {
    const MapReader<T> reader(x, info);
    const OptionalMapReader<T> s_reader(shortcut, info);
    const Tensor y = empty_map(x, info);
    run_rescale<T>({info.shape, reader.map, s_reader.map, map_writer<T>(y, info), data_of<Compute<T>>(scales), relu},
                   {0, info.shape.samples});
    return y;
  });
}

std::tuple<Tensor, Tensor, Tensor> rescale_backward(Tensor dy, Tensor x, Tensor scale, OptionalTensor y,
                                                    int64_t channel_dim, bool need_x, bool need_scale,
                                                    bool need_shortcut) {
  const MapInfo info = map_info(x, channel_dim);
  check_scale(scale, info, x);
  check_map("dy", dy, x);
  if (y) check_map("y", *y, x);
  const Tensor scales = dense(scale);
  return with_map_type(x, [&]<class T>() {
    using A = Compute<T>;
    const MapReader<T> dy_reader(dy, info), x_reader(x, info);
    const OptionalMapReader<T> y_reader(y, info);
    const Tensor dx = need_x ? empty_map(x, info) : empty_strided({0}, {1}, x, dtype_code(x));
    const Tensor dshortcut = need_shortcut ? empty_map(x, info) : empty_strided({0}, {1}, x, dtype_code(x));
    const Tensor dscale =
        need_scale ? empty_table<A>(x, {info.shape.samples, info.shape.channels}) : empty_table<A>(x, {0});
    const Map<T> g = need_shortcut ? map_writer<T>(dshortcut, info) : Map<T>{};
    const ReduceGradient<T> reduce{
        info.shape, dy_reader.map, y_reader.map, x_reader.map, g, need_scale ? data_of<A>(dscale) : nullptr};
    const Map<const T> source = need_shortcut ? Map<const T>{g.data, g.strides} : dy_reader.map;
    const SpreadGradient<T> spread{info.shape,
                                   source,
                                   need_shortcut ? Map<const T>{} : y_reader.map,
                                   need_x ? map_writer<T>(dx, info) : Map<T>{},
                                   data_of<A>(scales),
                                   nullptr};
    const int64_t sample_bytes = info.shape.channels * info.shape.positions * static_cast<int64_t>(sizeof(T));
    for_chunks(info.shape.samples, sample_bytes, 0, [&](Chunk chunk) {
      if (need_scale || need_shortcut) run_reduce_gradient(reduce, chunk);
      if (need_x) run_spread_gradient(spread, chunk);
    });
    return std::make_tuple(dx, dscale, dshortcut);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dia_kernels, CPU, m) {
  m.impl("step", TORCH_BOX(&step));
  m.impl("step_", TORCH_BOX(&step_in_place));
  m.impl("step_backward", TORCH_BOX(&step_backward));
  m.impl("pool", TORCH_BOX(&pool));
  m.impl("rescale", TORCH_BOX(&rescale));
  m.impl("rescale_backward", TORCH_BOX(&rescale_backward));
}

}  // namespace dia::ops
