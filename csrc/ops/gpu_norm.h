// The parts of a tail on a GPU, for a cell that is not here: its sweeps, one an operator, with the norm folded in.
#pragma once

#include "gpu_tail.h"

namespace dia::ops {
namespace {

struct Pooled {
  Tensor p, tables;
  NormTokens tokens;
  Tensor variance, extreme, where;
  OptionalTensor mean, var;  // of the batch, unless buffers are moved
};

// What is wanted of a map beside its means.
struct WantedStatistics {
  bool variance, extreme;
};

template <class T>
Pooled run_norm_pool(const Tensor& z, const MapInfo& info, const OptionalTensor& gamma, const OptionalTensor& beta,
                     const OptionalTensor& mean, const OptionalTensor& var, double eps, WantedStatistics wanted,
                     bool keep_tokens, const kernels::Tracked& tracked) {
  GpuCall call(z, info, 1);
  const int64_t n = call.samples(), width = call.channels();
  const GpuMap<T> map(z, info);
  Pooled result{call.table({n, width}),
                call.table({NormTables<float>::count(n, width)}),
                norm_tokens<float>(keep_tokens, z, info),
                empty_table<double>(z, wanted.variance ? std::vector{n, width} : std::vector{int64_t{0}}),
                wanted.extreme ? call.table({n, width}) : call.table({0}),
                empty_places(wanted.extreme, z, n, width),
                {},
                {}};
  const NormTables<float> tables(data_of<float>(result.tables), n, width);
  const ForwardNorm norm(call, gamma, beta, tables);
  const SampleTables of{tables.off, data_of<float>(result.p),
                        wanted.variance ? data_of<double>(result.variance) : nullptr};
  if (!mean) {
    if (tracked.running_mean == nullptr) result.mean = call.table({width}), result.var = call.table({width});
    const auto values_of = [](const OptionalTensor& t) { return t ? data_of<float>(*t) : nullptr; };
    norm.of_batch(call, run_moments(call, map.samples, wanted.variance), eps, of, values_of(result.mean),
                  values_of(result.var), tracked);
  } else {
    result.mean = call.table({0}), result.var = call.table({0});
    if (wanted.variance) {
      norm.given(call, *mean, *var, std::nullopt, run_moments(call, map.samples, wanted.variance), eps, of);
    } else {
      norm.given(call, *mean, *var, std::nullopt, {}, eps, of);
      kernels::Reduce<T> reduce{};
      reduce.size = call.size(n), reduce.x = map.samples, reduce.shift = norm.shift;
      reduce.means = {of.p, of.off, norm.affine()};
      call.launch_sweep(reduce);
    }
  }
  if (!wanted.extreme) return result;
  if (call.positions() == 0) {
    torch::stable::fill_(result.extreme, std::numeric_limits<double>::quiet_NaN());
    torch::stable::fill_(result.where, 0.0);
    return result;
  }
  kernels::Extremes<T> extremes{};
  extremes.size = call.size(n), extremes.x = map.samples, extremes.gamma = data_of<float>(norm.gamma);
  extremes.shift = norm.shift, extremes.d = norm.d, extremes.rstd = norm.rstd;
  extremes.extreme = data_of<float>(result.extreme), extremes.where = data_of<int64_t>(result.where);
  call.launch_sweep(extremes);
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_pool(
    Tensor z, OptionalTensor gamma, OptionalTensor beta, OptionalTensor mean, OptionalTensor var, double eps,
    int64_t channel_dim, bool with_variance, bool with_extreme, bool keep_tokens) {
  const MapInfo info = map_info(z, channel_dim);
  check_norm(z, info, gamma, beta, mean, var);
  return with_gpu_type(z, [&]<class T>() {
    const Pooled of =
        run_norm_pool<T>(z, info, gamma, beta, mean, var, eps, {with_variance, with_extreme}, keep_tokens, {});
    const auto& [of_g, of_handed] = of.tokens;
    return std::make_tuple(of.p, of.tables, of_g, of_handed, of.variance, of.extreme, of.where, *of.mean, *of.var);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_pool_tracking(
    Tensor z, OptionalTensor gamma, OptionalTensor beta, Tensor running_mean, Tensor running_var, Tensor batches,
    double factor, double eps, int64_t channel_dim, bool with_variance, bool with_extreme, bool keep_tokens) {
  const MapInfo info = map_info(z, channel_dim);
  const TrackedBuffers buffers{running_mean, running_var, batches, factor};
  check_norm(z, info, gamma, beta, std::nullopt, std::nullopt);
  check_tracked(buffers, z, info, {z, gamma, beta});
  return with_gpu_type(z, [&]<class T>() {
    const Pooled of = run_norm_pool<T>(z, info, gamma, beta, std::nullopt, std::nullopt, eps,
                                       {with_variance, with_extreme}, keep_tokens, tracked_of(buffers, info));
    const auto& [of_g, of_handed] = of.tokens;
    return std::make_tuple(of.p, of.tables, of_g, of_handed, of.variance, of.extreme, of.where);
  });
}

std::tuple<Tensor, Tensor> norm_rescale(Tensor z, Tensor scale, OptionalTensor shortcut, Tensor tables, OptionalTensor,
                                        OptionalTensor, OptionalTensor gamma, OptionalTensor beta, int64_t channel_dim,
                                        bool relu, bool keep_mask) {
  const MapInfo info = map_info(z, channel_dim);
  check_norm_rescale(z, info, scale, shortcut, tables, gamma, beta);
  return with_gpu_type(z, [&]<class T>() {
    GpuCall call(z, info, 1);
    const int64_t n = call.samples(), width = call.channels();
    const Tensor mask = gpu_mask<T>(relu && keep_mask, z, info), scales = dense(scale), all = dense(tables);
    const OptionalTensor weight = dense(gamma), bias = dense(beta);
    const bool packs = mask.numel() > 0;
    const GpuMap<T> z_map(z, info, packs);
    const OptionalGpuMap<T> s_map(shortcut, info, packs);
    const GpuResult<T> y(true, z, info);
    const NormTables<float> norm(all, n, width);
    kernels::NormFactors args{};
    args.samples = static_cast<int>(n), args.channels = static_cast<int>(width);
    args.h = data_of<float>(scales), args.d = norm.d, args.rstd = norm.rstd;
    args.gamma = data_of<float>(weight), args.beta = data_of<float>(bias);
    args.factor = call.scratch(n * width), args.added = call.scratch(n * width);
    call.launch_elements(args, n * width);
    const ForwardMaps<T> maps{z_map.samples, s_map.samples, y.samples, mask_samples<uint8_t>(mask, info)};
    call.launch_sweep(spread_of(call, maps, relu, args.factor, args.added, norm.shift));
    return std::make_tuple(y.tensor, mask);
  });
}

std::tuple<Tensor, Tensor, Tensor> norm_rescale_backward(Tensor dy, OptionalTensor y, Tensor z, Tensor scale,
                                                         Tensor tables, OptionalTensor gamma, OptionalTensor beta,
                                                         int64_t channel_dim, bool need_g) {
  const MapInfo info = map_info(z, channel_dim);
  check_result_gradient(dy, y, z, info, true);
  check_norm_rescale(z, info, scale, std::nullopt, tables, gamma, beta);
  return with_gpu_type(z, [&]<class T>() {
    GpuCall call(z, info, 1);
    const int64_t n = call.samples(), width = call.channels(), count = n * width;
    const Tensor all = dense(tables), scales = dense(scale);
    const Tensor dscale = call.table({n, width}), handed = call.table({3, n, width});
    const OptionalTensor weight = dense(gamma), bias = dense(beta);
    const GradientMaps<T> maps(dy, z, ReluResult(y), info, {false, need_g, false, {}, false});
    const NormTables<float> norm(all, n, width);
    kernels::ScaleGradients args{};
    args.samples = static_cast<int>(n), args.channels = static_cast<int>(width);
    args.h = data_of<float>(scales), args.d = norm.d, args.rstd = norm.rstd;
    args.gamma = data_of<float>(weight), args.beta = data_of<float>(bias);
    float* const sum = data_of<float>(handed);
    args.sum = sum, args.product = sum + count, args.h_again = sum + 2 * count;
    args.dscale = data_of<float>(dscale);
    if (call.positions() > 0) {
      call.launch_sweep(reduce_of(call, maps.maps, norm.shift, sum, args.product));
      call.launch_elements(args, count);
    } else {
      // Sums over no values, whatever the deviation of none is.
      for (const Tensor& of_none : {dscale, handed}) torch::stable::fill_(of_none, 0.0);
    }
    return std::make_tuple(dscale, handed, maps.dshortcut.tensor);
  });
}

std::tuple<Tensor, Tensor, Tensor> norm_pool_backward(Tensor g, Tensor handed, Tensor dp, OptionalTensor dvariance,
                                                      OptionalTensor variance, OptionalTensor dextreme,
                                                      OptionalTensor extreme, OptionalTensor where, Tensor z,
                                                      Tensor tables, OptionalTensor gamma, int64_t channel_dim,
                                                      bool batch, bool need_z) {
  const MapInfo info = map_info(z, channel_dim);
  const CellStatistics given{dvariance, variance, dextreme, extreme, where};
  check_norm_pool_gradient(g, handed, dp, given, z, info, tables, gamma);
  const CellStatistics statistics = dense(given);
  return with_gpu_type(z, [&]<class T>() {
    GpuCall call(z, info, 1);
    const int64_t n = call.samples(), width = call.channels(), count = n * width;
    const Tensor of_p = dense(dp), sums = dense(handed), all = dense(tables);
    const Tensor dgamma = call.table({width}), dbeta = call.table({width});
    const OptionalTensor weight = dense(gamma);
    const GradientMaps<T> maps(g, z, ReluResult(std::nullopt), info, {need_z, false, false, {}, false});
    const NormTables<float> norm(all, n, width);
    kernels::NormGradients args{};
    args.samples = static_cast<int>(n), args.channels = static_cast<int>(width);
    args.positions = static_cast<int>(call.positions()), args.batch = batch;
    args.dvariance = data_of<double>(statistics.dvariance), args.variance = data_of<double>(statistics.variance);
    args.dextreme = data_of<float>(statistics.dextreme), args.extreme = data_of<float>(statistics.extreme);
    args.sum = data_of<float>(sums), args.product = args.sum + count, args.new_h = args.sum + 2 * count;
    args.dp = data_of<float>(of_p), args.off = norm.off;
    args.d = norm.d, args.rstd = norm.rstd, args.gamma = data_of<float>(weight);
    args.dgamma = data_of<float>(dgamma), args.dbeta = data_of<float>(dbeta);
    if (need_z) args.factor = call.scratch(count), args.offset = call.scratch(count);
    const bool own_slopes = args.dvariance != nullptr;
    if (need_z && (batch || own_slopes)) args.slope = call.scratch(own_slopes ? count : width);
    call.launch_channels(args);
    if (need_z) {
      kernels::Spread<T> spread = spread_of<T>(call, maps.maps, args.factor, args.offset, norm.shift, args.slope);
      spread.slope_of_samples = own_slopes;
      call.launch_sweep(spread);
      if (args.dextreme != nullptr) {
        const kernels::SpreadExtremeGradient<T> extreme_gradient{
            spread.size, spread.dy, spread.x,   spread.out, args.factor,   args.offset,
            norm.shift,  norm.rstd, args.slope, own_slopes, args.dextreme, data_of<int64_t>(statistics.where)};
        call.launch_elements(extreme_gradient, count);
      }
    }
    // Sums over no values, whatever the mean and the deviation of none are.
    if (z.numel() == 0)
      for (const Tensor& of_values : {dgamma, dbeta}) torch::stable::fill_(of_values, 0.0);
    return std::make_tuple(maps.dx.tensor, dgamma, dbeta);
  });
}

}  // namespace
}  // namespace dia::ops
