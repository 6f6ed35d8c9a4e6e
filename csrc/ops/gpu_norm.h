// The parts of a tail on a GPU, for a cell that is not here: its sweeps, one an operator, with the norm folded in.
#pragma once

#include "gpu_tail.h"

namespace dia::ops {
namespace {

struct Pooled {
  Tensor p, tables;
  NormTokens tokens;
  OptionalTensor mean, var;  // of the batch, unless buffers are moved
};

template <class T>
Pooled run_norm_pool(const Tensor& z, const MapInfo& info, const OptionalTensor& gamma, const OptionalTensor& beta,
                     const OptionalTensor& mean, const OptionalTensor& var, double eps, bool keep_tokens,
                     const kernels::Tracked& tracked) {
  GpuCall call(z, info, 1);
  const int64_t n = call.samples(), width = call.channels();
  const GpuMap<T> map(z, info);
  Pooled result{call.table({n, width}),
                call.table({NormTables<float>::count(n, width)}),
                norm_tokens<float>(keep_tokens, z, info),
                {},
                {}};
  float* const p = data_of<float>(result.p);
  const NormTables<float> tables(data_of<float>(result.tables), n, width);
  const ForwardNorm norm(call, gamma, beta, tables);
  if (mean) {
    norm.given(call, *mean, *var, std::nullopt, eps, nullptr, nullptr);
    kernels::Reduce<T> reduce{};
    reduce.size = call.size(n), reduce.x = map.samples, reduce.shift = norm.shift;
    reduce.means = {p, tables.off, norm.affine()};
    call.launch_sweep(reduce);
    result.mean = call.table({0}), result.var = call.table({0});
    return result;
  }
  if (tracked.running_mean == nullptr) result.mean = call.table({width}), result.var = call.table({width});
  const auto values_of = [](const OptionalTensor& t) { return t ? data_of<float>(*t) : nullptr; };
  norm.of_batch(call, run_moments(call, map.samples), eps, tables.off, p, values_of(result.mean), values_of(result.var),
                tracked);
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_pool(Tensor z, OptionalTensor gamma,
                                                                     OptionalTensor beta, OptionalTensor mean,
                                                                     OptionalTensor var, double eps,
                                                                     int64_t channel_dim, bool keep_tokens) {
  const MapInfo info = map_info(z, channel_dim);
  check_norm(z, info, gamma, beta, mean, var);
  return with_gpu_type(z, [&]<class T>() {
    const Pooled of = run_norm_pool<T>(z, info, gamma, beta, mean, var, eps, keep_tokens, {});
    return std::make_tuple(of.p, of.tables, of.tokens.of_g, of.tokens.of_handed, *of.mean, *of.var);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_pool_tracking(Tensor z, OptionalTensor gamma, OptionalTensor beta,
                                                              Tensor running_mean, Tensor running_var, Tensor batches,
                                                              double factor, double eps, int64_t channel_dim,
                                                              bool keep_tokens) {
  const MapInfo info = map_info(z, channel_dim);
  const TrackedBuffers buffers{running_mean, running_var, batches, factor};
  check_norm(z, info, gamma, beta, std::nullopt, std::nullopt);
  check_tracked(buffers, z, info, {z, gamma, beta});
  return with_gpu_type(z, [&]<class T>() {
    const Pooled of =
        run_norm_pool<T>(z, info, gamma, beta, std::nullopt, std::nullopt, eps, keep_tokens, tracked_of(buffers, info));
    return std::make_tuple(of.p, of.tables, of.tokens.of_g, of.tokens.of_handed);
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

std::tuple<Tensor, Tensor, Tensor> norm_pool_backward(Tensor g, Tensor handed, Tensor dp, Tensor z, Tensor tables,
                                                      OptionalTensor gamma, int64_t channel_dim, bool batch,
                                                      bool need_z) {
  const MapInfo info = map_info(z, channel_dim);
  check_norm_pool_gradient(g, handed, dp, z, info, tables, gamma);
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
    args.positions = static_cast<int>(call.positions());
    args.sum = data_of<float>(sums), args.product = args.sum + count, args.new_h = args.sum + 2 * count;
    args.dp = data_of<float>(of_p), args.off = norm.off;
    args.d = norm.d, args.rstd = norm.rstd, args.gamma = data_of<float>(weight);
    args.dgamma = data_of<float>(dgamma), args.dbeta = data_of<float>(dbeta);
    if (need_z) args.factor = call.scratch(count), args.offset = call.scratch(count);
    if (need_z && batch) args.slope = call.scratch(width);
    call.launch_channels(args);
    if (need_z) call.launch_sweep(spread_of<T>(call, maps.maps, args.factor, args.offset, norm.shift, args.slope));
    // Sums over no values, whatever the mean and the deviation of none are.
    if (z.numel() == 0)
      for (const Tensor& of_values : {dgamma, dbeta}) torch::stable::fill_(of_values, 0.0);
    return std::make_tuple(maps.dx.tensor, dgamma, dbeta);
  });
}

}  // namespace
}  // namespace dia::ops
