// The parts of a tail on the CPU, for a cell that is not here: the mean of each channel behind a batch norm, the
// rescaling behind it, and their gradients. y = act(bn(z) scale + shortcut), p = mean of bn(z); the norm's result is
// nowhere in memory. Beside the mean a cell may want to know the variance of each channel, and its extreme value.
//
// The same four sweeps as a tail's, of which each operator has one. The sums that the gradient needs of all samples lie
// between the two of backward, as do the cell's gradient and dp.
#include "cpu_norm.h"

#include <tuple>

#include "results.h"

namespace dia::ops {
namespace {

struct Pooled {
  Tensor p, tables;
  NormTokens tokens;
  Tensor variance, extreme, where;
  Tensor mean, var;
};

template <class T>
Pooled run_norm_pool(const Tensor& z, const MapInfo& info, const OptionalTensor& gamma, const OptionalTensor& beta,
                     const OptionalTensor& mean, const OptionalTensor& var, double eps, bool with_variance,
                     bool with_extreme, bool keep_tokens) {
  using A = Compute<T>;
  const int64_t n = info.shape.samples, width = info.shape.channels;
  const MapReader<T> z_reader(z, info);
  const bool batch = !mean.has_value();
  const Pooled result{empty_table<A>(z, {n, width}),
                      empty_table<A>(z, {NormTables<A>::count(n, width)}),
                      norm_tokens<A>(keep_tokens, z, info),
                      empty_table<double>(z, with_variance ? std::vector{n, width} : std::vector{int64_t{0}}),
                      empty_table<A>(z, with_extreme ? std::vector{n, width} : std::vector{int64_t{0}}),
                      empty_places(with_extreme, z, n, width),
                      empty_table<A>(z, {batch ? width : 0}),
                      empty_table<A>(z, {batch ? width : 0})};
  StatisticTables<A> wanted;
  if (with_variance) wanted.variance = data_of<double>(result.variance);
  if (with_extreme) wanted.extreme = data_of<A>(result.extreme), wanted.where = data_of<int64_t>(result.where);
  NormForward<T> norm(z_reader.map, z, info.shape, gamma, beta, eps, NormTables<A>(result.tables, n, width), wanted);
  if (batch) {
    norm.of_batch();
    norm.copy_statistics_to(result.mean, result.var);
  } else {
    norm.given(*mean, *var);
  }
  for_chunks(n, 0, 0, [&](Chunk chunk) {
    if (!batch) norm.sweep(chunk);
    norm.put_means(chunk, data_of<A>(result.p));
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_pool(
    Tensor z, OptionalTensor gamma, OptionalTensor beta, OptionalTensor mean, OptionalTensor var, double eps,
    int64_t channel_dim, bool with_variance, bool with_extreme, bool keep_tokens) {
  const MapInfo info = map_info(z, channel_dim);
  check_norm(z, info, gamma, beta, mean, var);
  const Pooled of = with_map_type(z, [&]<class T>() {
    return run_norm_pool<T>(z, info, gamma, beta, mean, var, eps, with_variance, with_extreme, keep_tokens);
  });
  const auto& [of_g, of_handed] = of.tokens;
  return {of.p, of.tables, of_g, of_handed, of.variance, of.extreme, of.where, of.mean, of.var};
}

// With the statistics of the batch, towards which the norm's buffers are moved.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_pool_tracking(
    Tensor z, OptionalTensor gamma, OptionalTensor beta, Tensor running_mean, Tensor running_var, Tensor batches,
    double factor, double eps, int64_t channel_dim, bool with_variance, bool with_extreme, bool keep_tokens) {
  const MapInfo info = map_info(z, channel_dim);
  const TrackedBuffers buffers{running_mean, running_var, batches, factor};
  check_norm(z, info, gamma, beta, std::nullopt, std::nullopt);
  check_tracked(buffers, z, info, {z, gamma, beta});
  const Pooled of = with_map_type(z, [&]<class T>() {
    return run_norm_pool<T>(z, info, gamma, beta, std::nullopt, std::nullopt, eps, with_variance, with_extreme,
                            keep_tokens);
  });
  track(buffers, of.mean, of.var, info.shape);
  return {of.p, of.tables, of.tokens.of_g, of.tokens.of_handed, of.variance, of.extreme, of.where};
}

std::tuple<Tensor, Tensor> norm_rescale(const ResultOverMap& results, Tensor z, Tensor scale, OptionalTensor shortcut,
                                        Tensor tables, OptionalTensor, OptionalTensor, OptionalTensor gamma,
                                        OptionalTensor beta, int64_t channel_dim, bool relu, bool keep_mask) {
  const MapInfo info = map_info(z, channel_dim);
  check_norm_rescale(z, info, scale, shortcut, tables, gamma, beta);
  check_no_mask(keep_mask);
  const Tensor y = results.make(0, true, z, info), scales = dense(scale), all = dense(tables);
  with_map_type(z, [&]<class T>() {
    using A = Compute<T>;
    const MapReader<T> z_reader(z, info);
    const OptionalMapReader<T> s_reader(shortcut, info);
    const Normalising<T> normalising(z_reader.map, s_reader.map, map_writer<T>(y, info), z, info.shape,
                                     NormTables<A>(all, info.shape.samples, info.shape.channels),
                                     Affine<A>(gamma, beta), relu);
    for_chunks(info.shape.samples, 0, 0, [&](Chunk chunk) { normalising.run(chunk, data_of<A>(scales)); });
  });
  return {y, empty_mask(false, z, info)};
}

std::tuple<Tensor, Tensor, Tensor> norm_rescale_backward(const ResultMaps<2>& results, Tensor dy, OptionalTensor y,
                                                         Tensor z, Tensor scale, Tensor tables, OptionalTensor gamma,
                                                         OptionalTensor beta, int64_t channel_dim, bool need_g) {
  const MapInfo info = map_info(z, channel_dim);
  check_result_gradient(dy, y, z, info, false);
  check_norm_rescale(z, info, scale, std::nullopt, tables, gamma, beta);
  const int64_t n = info.shape.samples, width = info.shape.channels;
  const Tensor g = results.make(0, need_g, z, info), all = dense(tables), scales = dense(scale);
  return with_map_type(z, [&]<class T>() -> std::tuple<Tensor, Tensor, Tensor> {
    using A = Compute<T>;
    const Tensor dscale = empty_table<A>(z, {n, width}), handed = empty_table<A>(z, {3, n, width});
    const OptionalMapReader<T> y_reader(y, info);
    const MapReader<T> dy_reader(dy, info), z_reader(z, info);
    const NormReduction<T> reduction({dy_reader.map, y_reader.map, z_reader.map},
                                     need_g ? map_writer<T>(g, info) : Map<T>{}, info.shape,
                                     NormTables<A>(all, n, width), Affine<A>(gamma, beta), data_of<A>(handed));
    if (info.shape.positions > 0) {
      for_chunks(n, 0, 0, [&](Chunk chunk) { reduction.run(chunk, data_of<A>(dscale)); });
      std::copy_n(data_of<A>(scales), n * width, data_of<A>(handed) + 2 * n * width);
    } else {
      // Sums over no values, whatever the deviation of none is.
      for (const Tensor& of_none : {dscale, handed}) torch::stable::fill_(of_none, 0.0);
    }
    return {dscale, handed, g};
  });
}

std::tuple<Tensor, Tensor, Tensor> norm_pool_backward(const ResultMaps<0>& results, Tensor g, Tensor handed, Tensor dp,
                                                      OptionalTensor dvariance, OptionalTensor variance,
                                                      OptionalTensor dextreme, OptionalTensor extreme,
                                                      OptionalTensor where, Tensor z, Tensor tables,
                                                      OptionalTensor gamma, int64_t channel_dim, bool batch,
                                                      bool need_z) {
  const MapInfo info = map_info(z, channel_dim);
  const CellStatistics given{dvariance, variance, dextreme, extreme, where};
  check_norm_pool_gradient(g, handed, dp, given, z, info, tables, gamma);
  const CellStatistics statistics = dense(given);
  const Tensor of_p = dense(dp), sums = dense(handed), all = dense(tables);
  const int64_t n = info.shape.samples, width = info.shape.channels;
  return with_map_type(z, [&]<class T>() -> std::tuple<Tensor, Tensor, Tensor> {
    using A = Compute<T>;
    const Tensor dgamma = empty_table<A>(z, {width}), dbeta = empty_table<A>(z, {width});
    A *by_gamma = data_of<A>(dgamma), *by_beta = data_of<A>(dbeta);
    const A *sum = data_of<A>(sums), *scale = sum + 2 * n * width, *p = data_of<A>(of_p);
    norm_gradients(info.shape, scale, p, sum, NormTables<A>(all, n, width), by_beta, by_gamma);
    const Tensor dz = results.make(0, need_z, z, info);
    if (!need_z) return {dz, dgamma, dbeta};
    const Tensor shares = empty_table<A>(z, {2 * width});
    const A count = static_cast<A>(static_cast<double>(info.shape.positions) * static_cast<double>(n));
    A* share = data_of<A>(shares);
    std::transform(by_beta, by_beta + width, share, [count](A v) { return v / count; });
    std::transform(by_gamma, by_gamma + width, share + width, [count](A v) { return v / count; });
    const MapReader<T> g_reader(g, info), z_reader(z, info);
    const StatisticGradients<A> gradients{data_of<double>(statistics.dvariance), data_of<double>(statistics.variance),
                                          data_of<A>(statistics.dextreme), data_of<A>(statistics.extreme),
                                          data_of<int64_t>(statistics.where)};
    Spreading<T> spreading({g_reader.map, {}, z_reader.map}, dz, info, all, gamma, scale, p, batch ? share : nullptr,
                           gradients);
    if (batch) spreading.start();
    for_chunks(n, 0, 0, [&](Chunk chunk) { spreading.run(chunk); });
    return {dz, dgamma, dbeta};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dia_kernels, CPU, m) {
  m.impl("norm_pool", TORCH_BOX(&norm_pool));
  m.impl("norm_pool_tracking_", TORCH_BOX(&norm_pool_tracking));
  DIA_IMPL_FORMS(m, norm_rescale);
  DIA_IMPL_FORMS(m, norm_rescale_backward);
  DIA_IMPL_FORMS(m, norm_pool_backward);
}

}  // namespace dia::ops
