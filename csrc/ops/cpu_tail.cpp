// The operators of the tail with its batch norm folded in, on the CPU: y = act(bn(z) h' + shortcut).
//
// Norm statistics and the pooled p follow from the same moments of z, so norm, attention, shortcut and activation are
// two sweeps forward and two backward (docs/kernels.md, the tail). With batch statistics all samples meet between the
// sweeps; with given ones each chunk goes through both, as in the step.
#include <optional>
#include <tuple>

#include "cpu_cell.h"
#include "cpu_norm.h"
#include "results.h"

namespace dia::ops {
namespace {

using TailResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
TailResult run_tail(const ResultOverMap& results, const Tensor& z, const MapInfo& info, const OptionalTensor& shortcut,
                    const OptionalTensor& h, const OptionalTensor& c, const OptionalTensor& gamma,
                    const OptionalTensor& beta, const OptionalTensor& given_mean, const OptionalTensor& given_var,
                    const OptionalTensor& sample_means, double eps, const Parameters& w, bool relu, bool tanh_output) {
  using A = Compute<T>;
  const int64_t n = info.shape.samples, width = info.shape.channels, m = w.input_reduce_weight.size(0);
  const MapReader<T> z_reader(z, info);
  const OptionalMapReader<T> s_reader(shortcut, info);
  const Tensor y = results.make(0, true, z, info);
  const Tensor new_h = empty_table<A>(z, {n, width}), new_c = empty_table<A>(z, {n, width});
  const Tensor all = empty_table<A>(z, {Tables<A>::count(n, width, m) + NormTables<A>::count(n, width)});
  const Tables<A> tables(data_of<A>(all), n, width, m);
  const bool batch = !given_mean.has_value();
  const Tensor mean = empty_table<A>(z, {batch ? width : 0}), var = empty_table<A>(z, {batch ? width : 0});

  NormForward<T> norm(z_reader.map, z, info.shape, gamma, beta, eps, NormTables<A>(all, n, width));
  const CellPass<A> cell(w, h, c, tables, n, width, tanh_output, new_h, new_c);
  const Normalising<T> normalising(z_reader.map, s_reader.map, map_writer<T>(y, info), z, info.shape, norm.norm,
                                   norm.affine, relu);
  const auto finish = [&](Chunk chunk) {
    norm.put_means(chunk, tables.p);
    cell.run(chunk);
    normalising.run(chunk, static_cast<const A*>(new_h.const_data_ptr()));
  };
  if (batch) {
    norm.of_batch();
    norm.copy_statistics_to(mean, var);
  } else {
    norm.given(*given_mean, *given_var);
  }
  if (sample_means) norm.given_means(*sample_means);
  if (batch || sample_means) {
    for_chunks(n, 0, weight_bytes<A>(width, m), finish);
  } else {
    const int64_t sample_bytes = width * info.shape.positions * static_cast<int64_t>(sizeof(T));
    for_chunks(n, sample_bytes, weight_bytes<A>(width, m), [&](Chunk chunk) {
      norm.sweep(chunk);
      finish(chunk);
    });
  }
  return {y, new_h, new_c, all, mean, var, empty_mask(false, z, info)};
}

// A tail's arguments, checked.
TailResult checked_tail(const ResultOverMap& results, const Tensor& z, const OptionalTensor& shortcut,
                        const OptionalTensor& h, const OptionalTensor& c, const OptionalTensor& gamma,
                        const OptionalTensor& beta, const OptionalTensor& mean, const OptionalTensor& var,
                        const OptionalTensor& means, double eps, const Parameters& w, int64_t channel_dim, bool relu,
                        bool tanh_output, bool keep_mask) {
  const MapInfo info = map_info(z, channel_dim);
  check_step(z, info, shortcut, h, c, w);
  check_norm(z, info, gamma, beta, mean, var);
  if (means) check_means(*means, z, info);
  check_no_mask(keep_mask);
  return with_map_type(z, [&]<class T>() {
    return run_tail<T>(results, z, info, shortcut, dense(h), dense(c), gamma, beta, mean, var, dense(means), eps, w,
                       relu, tanh_output);
  });
}

TailResult tail(const ResultOverMap& results, Tensor z, OptionalTensor shortcut, OptionalTensor h, OptionalTensor c,
                OptionalTensor gamma, OptionalTensor beta, OptionalTensor mean, OptionalTensor var, double eps,
                Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor v1, Tensor a1, Tensor v2, Tensor a2,
                int64_t channel_dim, bool relu, bool tanh_output, bool keep_mask) {
  return checked_tail(results, z, shortcut, h, c, gamma, beta, mean, var, std::nullopt, eps,
                      {w1, b1, w2, b2, v1, a1, v2, a2}, channel_dim, relu, tanh_output, keep_mask);
}

// With the statistics of the batch, towards which the norm's buffers are moved.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tail_tracking(
    Tensor z, OptionalTensor shortcut, OptionalTensor h, OptionalTensor c, OptionalTensor gamma, OptionalTensor beta,
    Tensor running_mean, Tensor running_var, Tensor batches, double factor, double eps, Tensor w1, Tensor b1, Tensor w2,
    Tensor b2, Tensor v1, Tensor a1, Tensor v2, Tensor a2, int64_t channel_dim, bool relu, bool tanh_output,
    bool keep_mask) {
  const MapInfo info = map_info(z, channel_dim);
  const TrackedBuffers buffers{running_mean, running_var, batches, factor};
  check_tracked(buffers, z, info, {z, shortcut, h, c, gamma, beta, w1, b1, w2, b2, v1, a1, v2, a2});
  const auto [y, new_h, new_c, tables, mean, var, mask] =
      checked_tail({}, z, shortcut, h, c, gamma, beta, std::nullopt, std::nullopt, std::nullopt, eps,
                   {w1, b1, w2, b2, v1, a1, v2, a2}, channel_dim, relu, tanh_output, keep_mask);
  track(buffers, mean, var, info.shape);
  return {y, new_h, new_c, tables, mask};
}

// With statistics over several processes, and the means of the samples here.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tail_join(
    Tensor z, OptionalTensor shortcut, OptionalTensor h, OptionalTensor c, OptionalTensor gamma, OptionalTensor beta,
    Tensor mean, Tensor var, Tensor means, double eps, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor v1, Tensor a1,
    Tensor v2, Tensor a2, int64_t channel_dim, bool relu, bool tanh_output, bool keep_mask) {
  const auto [y, new_h, new_c, tables, none, nothing, mask] =
      checked_tail({}, z, shortcut, h, c, gamma, beta, mean, var, means, eps, {w1, b1, w2, b2, v1, a1, v2, a2},
                   channel_dim, relu, tanh_output, keep_mask);
  return {y, new_h, new_c, tables, mask};
}

// What the gradient starts from: what came with the forward pass, and what came in from the layers after it.
struct GivenGradient {
  OptionalTensor dy, dh, dc;
  Tensor z;
  OptionalTensor y, h, c;  // y: the result, if it ended in a ReLU
  Tensor new_c, tables;
  OptionalTensor gamma, beta;
  Weights weights;
  MapInfo info;
  bool tanh_output;

  int64_t samples() const { return info.shape.samples; }
  int64_t width() const { return info.shape.channels; }
  int64_t bottleneck() const { return weights.input_reduce.size(0); }
  template <class A>
  Tables<A> cell_tables() const {
    return {data_of<A>(tables), samples(), width(), bottleneck()};
  }
};

// The first sweep of the gradient, and from its sums through the cell to dp.
template <class T>
class Reduction {
  using A = Compute<T>;

 public:
  // `g`, the map for the shortcut's gradient, if that is wanted.
  Reduction(const GivenGradient& given, const Tensor& g, bool need_p, bool need_shortcut, bool need_state,
            WantedParameters parameters)
      : dshortcut(g),
        cell({given.dh, given.dc, given.h, given.c, given.new_c, given.cell_tables<A>(), given.weights, given.samples(),
              given.width(), given.tanh_output},
             given.z, given.dy.has_value(), need_p, need_state, parameters),
        has_dy_(given.dy.has_value()),
        shape_(given.info.shape),
        norm_(given.tables, given.samples(), given.width()),
        dy_(given.dy, given.info),
        y_(has_dy_ ? given.y : std::nullopt, given.info),
        z_(given.z, given.info),
        sums_(empty_table<A>(given.z, {2 * given.samples() * given.width()})),
        sweep_({dy_.map, y_.map, z_.map}, need_shortcut ? map_writer<T>(dshortcut, given.info) : Map<T>{}, shape_,
               norm_, Affine<A>(given.gamma, given.beta), data_of<A>(sums_)) {
    if (has_dy_) return;
    std::fill_n(data_of<A>(sums_), sums_.numel(), A(0));
    if (need_shortcut) torch::stable::fill_(dshortcut, 0.0);
  }

  void run(Chunk chunk) {
    if (has_dy_) sweep_.run(chunk, cell.dscale);
    if (cell.needed()) cell.run(chunk, 1.0);
  }
  void channel_sums(A* dbeta, A* dgamma) const {
    norm_gradients(shape_, cell.new_h, cell.dp, data_of<A>(sums_), norm_, dbeta, dgamma);
  }
  Sources<T> sources() const { return sweep_.sources(); }

  Tensor dshortcut;
  CellGradientPass<A> cell;

 private:
  bool has_dy_;
  MapShape shape_;
  NormTables<A> norm_;
  OptionalMapReader<T> dy_, y_;
  MapReader<T> z_;
  Tensor sums_;
  NormReduction<T> sweep_;
};

struct Wanted {
  bool z, shortcut, state;
  WantedParameters parameters;
  bool affine;
};

using TailGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
TailGradients run_tail_backward(const ResultMaps<0, 1>& results, const GivenGradient& given, bool batch,
                                Wanted wanted) {
  using A = Compute<T>;
  const Tensor& z = given.z;
  const MapInfo& info = given.info;
  const int64_t n = given.samples(), width = given.width();
  const double count = static_cast<double>(info.shape.positions) * static_cast<double>(n);
  const int64_t bytes = weight_bytes<A>(width, given.bottleneck());
  const Tensor dz = results.make(0, wanted.z, z, info), dshortcut = results.make(1, wanted.shortcut, z, info);
  Reduction<T> reduction(given, dshortcut, wanted.z || wanted.affine, wanted.shortcut, wanted.state, wanted.parameters);
  const auto& cell = reduction.cell;
  const Tensor sums = empty_table<A>(z, {2 * width}), shares = empty_table<A>(z, {2 * width});
  A *sum = data_of<A>(sums), *share = data_of<A>(shares);

  const Sources<T> sources = reduction.sources();
  std::optional<Spreading<T>> spreading;
  if (wanted.z)
    spreading.emplace(sources, dz, info, given.tables, given.gamma, cell.new_h, cell.dp, batch ? share : nullptr);
  if (batch) {
    for_chunks(n, 0, bytes, [&](Chunk chunk) { reduction.run(chunk); });
    if (wanted.z || wanted.affine) reduction.channel_sums(sum, sum + width);
    if (wanted.z) {
      std::transform(sum, sum + 2 * width, share, [count](A v) { return v / static_cast<A>(count); });
      spreading->start();
      for_chunks(n, 0, 0, [&](Chunk chunk) { spreading->run(chunk); });
    }
  } else {
    const int64_t sample_bytes =
        width * info.shape.positions * static_cast<int64_t>(sizeof(T)) * (sources.y.data == nullptr ? 1 : 2);
    for_chunks(n, sample_bytes, bytes, [&](Chunk chunk) {
      reduction.run(chunk);
      if (wanted.z) spreading->run(chunk);
    });
    if (wanted.affine) reduction.channel_sums(sum, sum + width);
  }
  const Tensor dgamma = empty_table<A>(z, {wanted.affine ? width : 0});
  const Tensor dbeta = empty_table<A>(z, {wanted.affine ? width : 0});
  if (wanted.affine) {
    std::copy(sum, sum + width, data_of<A>(dbeta));
    std::copy(sum + width, sum + 2 * width, data_of<A>(dgamma));
  }
  return {dz, dshortcut, cell.old_dh, cell.old_dc, dgamma, dbeta, cell.parameters()};
}

// The arguments of the gradient, checked.
GivenGradient given_gradient(OptionalTensor dy, OptionalTensor dh, OptionalTensor dc, Tensor z, OptionalTensor y,
                             OptionalTensor h, OptionalTensor c, Tensor new_c, Tensor tables, OptionalTensor gamma,
                             OptionalTensor beta, const Weights& w, int64_t channel_dim, bool relu, bool tanh_output) {
  const MapInfo info = map_info(z, channel_dim);
  check_tail_gradient(dy, dh, dc, z, info, y, h, c, new_c, tables, gamma, beta, w, relu, false);
  return {dy,
          dense(dh),
          dense(dc),
          z,
          relu ? y : std::nullopt,
          dense(h),
          dense(c),
          dense(new_c),
          dense(tables),
          gamma,
          beta,
          w,
          info,
          tanh_output};
}

TailGradients tail_backward(const ResultMaps<0, 1>& results, OptionalTensor dy, OptionalTensor dh, OptionalTensor dc,
                            Tensor z, OptionalTensor y, OptionalTensor h, OptionalTensor c, Tensor new_c, Tensor tables,
                            OptionalTensor gamma, OptionalTensor beta, Tensor w1, Tensor w2, Tensor v1, Tensor v2,
                            int64_t channel_dim, bool relu, bool tanh_output, bool batch, bool need_z,
                            bool need_shortcut, bool need_state, bool need_parameters, bool need_affine,
                            bool as_factors) {
  const GivenGradient given = given_gradient(dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, {w1, w2, v1, v2},
                                             channel_dim, relu, tanh_output);
  return with_map_type(z, [&]<class T>() {
    return run_tail_backward<T>(results, given, batch,
                                {need_z, need_shortcut, need_state, {need_parameters, as_factors, h}, need_affine});
  });
}

// --- the same with statistics over several processes: what goes from one to the other lies between these ---

template <class T>
std::tuple<Tensor, Tensor, Tensor> run_statistics(const Tensor& z, const MapInfo& info) {
  using A = Compute<T>;
  const int64_t n = info.shape.samples, width = info.shape.channels;
  const MapReader<T> reader(z, info);
  const Tensor mean = empty_table<double>(z, {width}), var = empty_table<double>(z, {width});
  const Tensor means = empty_table<double>(z, {n, width});
  const Tensor shift = empty_table<A>(z, {width}), squares = empty_table<double>(z, {n * width});
  A* shifts = data_of<A>(shift);
  double* d1 = data_of<double>(means);
  map_kernels<T>().choose_shift(reader.map, info.shape, shifts);
  const Moments<T> moments{info.shape, reader.map, shifts, nullptr, d1, data_of<double>(squares)};
  for_chunks(n, 0, 0, [&](Chunk chunk) { run_moments(moments, chunk); });
  batch_statistics<A>(d1, moments.m2, shifts, info.shape, data_of<double>(mean), data_of<double>(var));
  for (int64_t k = 0; k < n; ++k)
    for (int64_t ch = 0; ch < width; ++ch) d1[k * width + ch] += static_cast<double>(shifts[ch]);
  return {mean, var, means};
}

std::tuple<Tensor, Tensor, Tensor> statistics(Tensor z, int64_t channel_dim) {
  const MapInfo info = map_info(z, channel_dim);
  return with_map_type(z, [&]<class T>() { return run_statistics<T>(z, info); });
}

using ReducedGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ReducedGradients tail_reduce(OptionalTensor dy, OptionalTensor dh, OptionalTensor dc, Tensor z, OptionalTensor y,
                             OptionalTensor h, OptionalTensor c, Tensor new_c, Tensor tables, OptionalTensor gamma,
                             OptionalTensor beta, Tensor w1, Tensor w2, Tensor v1, Tensor v2, int64_t channel_dim,
                             bool relu, bool tanh_output, bool need_shortcut, bool need_state, bool need_parameters) {
  const GivenGradient given = given_gradient(dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, {w1, w2, v1, v2},
                                             channel_dim, relu, tanh_output);
  return with_map_type(z, [&]<class T>() -> ReducedGradients {
    using A = Compute<T>;
    const int64_t n = given.samples(), width = given.width();
    const Tensor dshortcut = map_if(need_shortcut, z, given.info);
    Reduction<T> reduction(given, dshortcut, true, need_shortcut, need_state, {need_parameters, false, h});
    const auto& cell = reduction.cell;
    for_chunks(n, 0, weight_bytes<A>(width, given.bottleneck()), [&](Chunk chunk) { reduction.run(chunk); });
    const Tensor sums = empty_table<A>(z, {2, width}), dp = empty_table<A>(z, {n, width});
    reduction.channel_sums(data_of<A>(sums), data_of<A>(sums) + width);
    std::copy_n(cell.dp, n * width, data_of<A>(dp));
    return {sums, dshortcut, dp, cell.old_dh, cell.old_dc, cell.parameters()};
  });
}

Tensor tail_spread(OptionalTensor dy, OptionalTensor y, Tensor z, Tensor new_h, Tensor dp, Tensor tables,
                   OptionalTensor gamma, Tensor shares, int64_t channel_dim) {
  const MapInfo info = map_info(z, channel_dim);
  check_spread(dy, y, z, info, new_h, dp, tables, gamma, shares, false);
  return with_map_type(z, [&]<class T>() {
    using A = Compute<T>;
    const Tensor h = dense(new_h), p = dense(dp), all = dense(tables), share = dense(shares);
    const OptionalMapReader<T> dy_reader(dy, info), y_reader(dy ? y : std::nullopt, info);
    const MapReader<T> z_reader(z, info);
    const Tensor dz = empty_map(z, info);
    Spreading<T> spreading({dy_reader.map, y_reader.map, z_reader.map}, dz, info, all, gamma, data_of<A>(h),
                           data_of<A>(p), data_of<A>(share));
    spreading.start();
    for_chunks(info.shape.samples, 0, 0, [&](Chunk chunk) { spreading.run(chunk); });
    return dz;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dia_kernels, CPU, m) {
  DIA_IMPL_FORMS(m, tail);
  m.impl("tail_tracking_", TORCH_BOX(&tail_tracking));
  DIA_IMPL_FORMS(m, tail_backward);
  m.impl("statistics", TORCH_BOX(&statistics));
  m.impl("tail_join", TORCH_BOX(&tail_join));
  m.impl("tail_reduce", TORCH_BOX(&tail_reduce));
  m.impl("tail_spread", TORCH_BOX(&tail_spread));
}

}  // namespace dia::ops
