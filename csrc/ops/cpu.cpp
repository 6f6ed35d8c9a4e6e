// The operators on the CPU: checks, chunks of samples, threads, and the products between the sweeps.
//
// A step is, per chunk of samples (core/plan.h): pool | two reductions with bias and ReLU | two expansions |
// gates | rescale. Its gradient: reduce | gates | products | spread; then the weights' gradients once
// over all samples. The kernels (cpu/kernels.h) are serial; here samples, or where they are few the parts of each,
// are spread over torch's threads.
#include <tuple>

#include "cpu_cell.h"
#include "results.h"

namespace dia::ops {
namespace {

// --- step --------------------------------------------------------------------------------------------

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
  const CellPass<A> cell(w, h, c, tables, n, width, tanh_output, result.h, result.c);
  const Pool<T> pool{info.shape, x_map, tables.p};
  const Rescale<T> rescale{info.shape, x_map, shortcut, y, data_of<A>(result.h), relu};
  const int64_t sample_bytes = width * info.shape.positions * static_cast<int64_t>(sizeof(T));
  for_chunks(n, sample_bytes, weight_bytes<A>(width, m), [&](Chunk chunk) {
    run_pool(pool, chunk);
    cell.run(chunk);
    run_rescale(rescale, chunk);
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> step(const ResultOverMap& results, Tensor x, OptionalTensor shortcut,
                                                        OptionalTensor h, OptionalTensor c, Tensor w1, Tensor b1,
                                                        Tensor w2, Tensor b2, Tensor v1, Tensor a1, Tensor v2,
                                                        Tensor a2, int64_t channel_dim, bool relu, bool tanh_output,
                                                        bool keep_tables, bool keep_mask) {
  const Parameters w{w1, b1, w2, b2, v1, a1, v2, a2};
  const MapInfo info = map_info(x, channel_dim);
  check_step(x, info, shortcut, h, c, w);
  check_no_mask(keep_mask);
  return with_map_type(x, [&]<class T>() {
    const MapReader<T> x_reader(x, info);
    const OptionalMapReader<T> s_reader(shortcut, info);
    const Tensor y = results.make(0, true, x, info);
    StepResult result = run_step<T>(x, info, x_reader.map, s_reader.map, map_writer<T>(y, info), dense(h), dense(c), w,
                                    relu, tanh_output);
    if (!keep_tables) result.tables = empty_table<Compute<T>>(x, {0});
    return std::make_tuple(y, result.h, result.c, result.tables, empty_mask(false, x, info));
  });
}

std::tuple<Tensor, Tensor> step_in_place(Tensor x, OptionalTensor shortcut, OptionalTensor h, OptionalTensor c,
                                         Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor v1, Tensor a1, Tensor v2,
                                         Tensor a2, int64_t channel_dim, bool relu, bool tanh_output) {
  const Parameters given{w1, b1, w2, b2, v1, a1, v2, a2};
  const MapInfo info = map_info(x, channel_dim);
  check_step(x, info, shortcut, h, c, given);
  const Parameters w = apart(given, x);
  shortcut = shortcut_apart(shortcut, x), h = apart(h, x), c = apart(c, x);
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

using StepGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Wanted {
  bool x, shortcut, state;
  WantedParameters parameters;
};

template <class T>
StepGradients run_step_backward(const ResultMaps<0, 1>& results, const OptionalTensor& dy, const OptionalTensor& dh,
                                const OptionalTensor& dc, const Tensor& x, const OptionalTensor& y,
                                const OptionalTensor& h, const OptionalTensor& c, const Tensor& new_c,
                                const Tensor& tables_tensor, const Weights& w, const MapInfo& info, bool tanh_output,
                                Wanted wanted) {
  using A = Compute<T>;
  const int64_t n = info.shape.samples, width = info.shape.channels, positions = info.shape.positions;
  const int64_t m = w.input_reduce.size(0);

  // The copies a map or table may need live until the kernels are done.
  const OptionalMapReader<T> dy_reader(dy, info), y_reader(dy ? y : std::nullopt, info);
  const MapReader<T> x_reader(x, info);
  const Tables<A> tables(data_of<A>(tables_tensor), n, width, m);
  const Tensor dx = results.make(0, wanted.x, x, info), dshortcut = results.make(1, wanted.shortcut, x, info);
  CellGradientPass<A> cell({dh, dc, h, c, new_c, tables, w, n, width, tanh_output}, x, dy.has_value(), wanted.x,
                           wanted.state, wanted.parameters);

  const Map<T> g = wanted.shortcut ? map_writer<T>(dshortcut, info) : Map<T>{};
  const ReduceGradient<T> reduce{
      info.shape, dy_reader.map, y_reader.map, x_reader.map, g, cell.needed() ? cell.dscale : nullptr};
  // What the first sweep wrote is already masked, and is one map to read instead of two.
  const bool reread = dy && wanted.shortcut;
  const Map<const T> source = reread ? Map<const T>{g.data, g.strides} : dy_reader.map;
  const SpreadGradient<T> spread{
      info.shape, source, reread ? Map<const T>{} : y_reader.map, wanted.x ? map_writer<T>(dx, info) : Map<T>{},
      cell.new_h, cell.dp};

  const int64_t sample_bytes =
      width * positions * static_cast<int64_t>(sizeof(T)) * (reread || !y_reader.map.data ? 1 : 2);
  for_chunks(n, sample_bytes, weight_bytes<A>(width, m), [&](Chunk chunk) {
    if (dy) run_reduce_gradient(reduce, chunk);
    if (!cell.needed()) return;
    cell.run(chunk, positions > 0 ? 1.0 / static_cast<double>(positions) : 0.0);
    if (wanted.x) run_spread_gradient(spread, chunk);
  });
  if (wanted.shortcut && !dy) torch::stable::fill_(dshortcut, 0.0);
  return {dx, dshortcut, cell.old_dh, cell.old_dc, cell.parameters()};
}

StepGradients step_backward(const ResultMaps<0, 1>& results, OptionalTensor dy, OptionalTensor dh, OptionalTensor dc,
                            Tensor x, OptionalTensor y, OptionalTensor h, OptionalTensor c, Tensor new_c, Tensor tables,
                            Tensor w1, Tensor w2, Tensor v1, Tensor v2, int64_t channel_dim, bool relu,
                            bool tanh_output, bool need_x, bool need_shortcut, bool need_state, bool need_parameters,
                            bool as_factors) {
  const MapInfo info = map_info(x, channel_dim);
  const Weights w{w1, w2, v1, v2};
  check_step_gradient(dy, dh, dc, x, info, y, h, c, new_c, tables, 0, w, relu, false);
  return with_map_type(x, [&]<class T>() {
    return run_step_backward<T>(results, dy, dense(dh), dense(dc), x, relu ? y : std::nullopt, dense(h), dense(c),
                                dense(new_c), dense(tables), w, info, tanh_output,
                                {need_x, need_shortcut, need_state, {need_parameters, as_factors, h}});
  });
}

// --- parameters that steps share -----------------------------------------------------------------------

// Tables of several steps, as if they were those of one: the rows of each behind those of the step before.
template <class A>
struct JoinedSteps {
  Tensor memory;
  int64_t rows;
  Factors<A> factors;
  A* h;
  Tables<A> tables;

  JoinedSteps(const Tensor* of_factors, const Tensor* of_tables, const Tensor* of_h, int64_t steps, int64_t n,
              int64_t c, int64_t m)
      : memory(empty_table<A>(*of_h, {steps * n * (6 * c + 4 * m)})),
        rows(steps * n),
        factors(data_of<A>(memory), rows, c, m),
        h(factors.dzh + rows * m),
        tables(h + rows * c, rows, c, m) {
    parallel_for(0, steps, std::max<int64_t>(kGrain / (n * (6 * c + 4 * m)), 1), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const auto put = [&](const A* from, int64_t width, A* table) {
          std::copy_n(from, n * width, table + k * n * width);
        };
        const Factors<A> left(data_of<A>(of_factors[k]), n, c, m);
        const Tables<A> right(data_of<A>(of_tables[k]), n, c, m);
        put(left.du, 4 * c, factors.du), put(left.dzx, m, factors.dzx), put(left.dzh, m, factors.dzh);
        put(right.p, c, tables.p), put(right.zx, m, tables.zx), put(right.zh, m, tables.zh);
        put(data_of<A>(of_h[k]), c, h);
      }
    });
  }
};

// Rows that are worth a copy to have them in one product: with few, it is the writing of the result that takes the
// time, and with these a longer one gains nothing. (Measured on two cores, the time of one step after the other: 8
// samples, C = 1024 and 2048, 0.7 to 0.6 of it; 32 samples, C = 64 to 256, 0.6 to 1.0; from 128 samples on 1.0 to 1.1.)
constexpr int64_t kJoinedRows = 256;

// Steps of few samples are joined; the gradients of what is joined, and of steps of many, are added up.
template <class A>
Tensor run_parameter_gradients(const std::vector<Tensor>& factors, const std::vector<Tensor>& tables,
                               const std::vector<Tensor>& h, int64_t n, int64_t c, int64_t m) {
  const Tensor flat = empty_table<A>(h.front(), {FlatParameters(c, m).count});
  if (n == 0) {
    torch::stable::fill_(flat, 0.0);
    return flat;
  }
  const int64_t steps = static_cast<int64_t>(factors.size());
  const int64_t together = std::max<int64_t>(kJoinedRows / n, 1);
  for (int64_t first = 0; first < steps; first += together) {
    const int64_t count = std::min(together, steps - first);
    const bool add = first > 0;
    if (count == 1) {
      fill_parameter_gradients<A>(flat, Tables<A>(data_of<A>(tables[first]), n, c, m), data_of<A>(h[first]),
                                  Factors<A>(data_of<A>(factors[first]), n, c, m), nullptr, n, c, m, add);
      continue;
    }
    const JoinedSteps<A> joined(&factors[first], &tables[first], &h[first], count, n, c, m);
    fill_parameter_gradients<A>(flat, joined.tables, joined.h, joined.factors, nullptr, joined.rows, c, m, add);
  }
  return flat;
}

Tensor parameter_gradients(std::vector<Tensor> factors, std::vector<Tensor> tables, std::vector<Tensor> h,
                           int64_t bottleneck) {
  const MapShape shape = check_steps(factors, tables, h, bottleneck);
  for (std::vector<Tensor>* list : {&factors, &tables, &h})
    for (Tensor& t : *list) t = dense(t);
  const auto run =
      h.front().scalar_type() == ScalarType::Double ? run_parameter_gradients<double> : run_parameter_gradients<float>;
  return run(factors, tables, h, shape.samples, shape.channels, bottleneck);
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

Tensor rescale(const ResultOverMap& results, Tensor x, Tensor scale, OptionalTensor shortcut, int64_t channel_dim,
               bool relu) {
  const MapInfo info = map_info(x, channel_dim);
  check_scale(scale, info, x);
  if (shortcut) check_map("shortcut", *shortcut, x);
  const Tensor scales = dense(scale);
  return with_map_type(x, [&]<class T>() {
    const MapReader<T> reader(x, info);
    const OptionalMapReader<T> s_reader(shortcut, info);
    const Tensor y = results.make(0, true, x, info);
    run_rescale<T>({info.shape, reader.map, s_reader.map, map_writer<T>(y, info), data_of<Compute<T>>(scales), relu},
                   {0, info.shape.samples});
    return y;
  });
}

std::tuple<Tensor, Tensor, Tensor> rescale_backward(const ResultMaps<0, 2>& results, Tensor dy, Tensor x, Tensor scale,
                                                    OptionalTensor y, int64_t channel_dim, bool need_x, bool need_scale,
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
    const Tensor dx = results.make(0, need_x, x, info), dshortcut = results.make(1, need_shortcut, x, info);
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
  DIA_IMPL_FORMS(m, step);
  m.impl("step_", TORCH_BOX(&step_in_place));
  DIA_IMPL_FORMS(m, step_backward);
  m.impl("parameter_gradients", TORCH_BOX(&parameter_gradients));
  m.impl("pool", TORCH_BOX(&pool));
  DIA_IMPL_FORMS(m, rescale);
  DIA_IMPL_FORMS(m, rescale_backward);
}

}  // namespace dia::ops
