// The operators on a GPU: checks, plans, workspaces, launches. Included where they are registered: for CUDA
// (cuda_operators.cpp), and in tests for a simulated GPU, so that all of this runs in every test.
//
//     gpu_step.h   the step
//     gpu_tail.h   the step with its batch norm folded in
//     gpu_norm.h   a tail's sweeps alone, around a cell that is not here
//     here         a map's pooling and rescaling, the gradient of parameters that steps share, and the registration
//
// Everything is put on the current stream and nothing waits for it; memory comes from torch's allocator, so a call can
// be captured into a graph.
#pragma once

#include "gpu_norm.h"

namespace dia::ops {
namespace {

// --- parameters that steps share -----------------------------------------------------------------------------

Tensor parameter_gradients(std::vector<Tensor> factors, std::vector<Tensor> tables, std::vector<Tensor> h,
                           int64_t bottleneck) {
  MapInfo info{};
  info.shape = check_steps(factors, tables, h, bottleneck);
  check(h.front().scalar_type() == ScalarType::Float, "h: a GPU's kernels know no float64; the reference does");
  GpuCall call(h.front(), info, bottleneck);
  const Tensor flat = call.table({FlatParameters(call.channels(), bottleneck).count});
  std::vector<Tensor> kept;  // the copies that some may need
  const auto data = [&](const Tensor& t) {
    kept.push_back(dense(t));
    return static_cast<const float*>(kept.back().const_data_ptr());
  };
  std::vector<kernels::StepTables> steps;
  for (size_t k = 0; k < factors.size(); ++k) steps.push_back({data(factors[k]), data(tables[k]), data(h[k])});
  launch_parameter_gradients(call, steps, data_of<float>(flat));
  return flat;
}

// --- the parts: pool and rescale -----------------------------------------------------------------------------

Tensor pool(Tensor x, int64_t channel_dim) {
  const MapInfo info = map_info(x, channel_dim);
  return with_gpu_type(x, [&]<class T>() {
    GpuCall call(x, info, 1);
    const int64_t n = call.samples(), width = call.channels();
    const GpuMap<T> map(x, info);
    const Tensor p = call.table({n, width});
    kernels::Reduce<T> reduce{};
    reduce.size = call.size(n);
    reduce.x = map.samples, reduce.means.p = data_of<float>(p);
    call.launch_sweep(reduce);
    return p;
  });
}

Tensor rescale(Tensor x, Tensor scale, OptionalTensor shortcut, int64_t channel_dim, bool relu) {
  const MapInfo info = map_info(x, channel_dim);
  check_scale(scale, info, x);
  if (shortcut) check_map("shortcut", *shortcut, x);
  return with_gpu_type(x, [&]<class T>() {
    GpuCall call(x, info, 1);
    const Tensor scales = dense(scale);
    const GpuMap<T> map(x, info);
    const OptionalGpuMap<T> s_map(shortcut, info);
    const GpuResult<T> y(true, x, info);
    kernels::Spread<T> spread{};
    spread.size = call.size(call.samples()), spread.relu = relu;
    spread.x = map.samples, spread.shortcut = s_map.samples, spread.out = y.samples;
    spread.scale = static_cast<const float*>(scales.const_data_ptr());
    call.launch_sweep(spread);
    return y.tensor;
  });
}

std::tuple<Tensor, Tensor, Tensor> rescale_backward(Tensor dy, Tensor x, Tensor scale, OptionalTensor y,
                                                    int64_t channel_dim, bool need_x, bool need_scale,
                                                    bool need_shortcut) {
  const MapInfo info = map_info(x, channel_dim);
  check_scale(scale, info, x);
  check_map("dy", dy, x);
  if (y) check_map("y", *y, x);
  return with_gpu_type(x, [&]<class T>() {
    GpuCall call(x, info, 1);
    const int64_t n = call.samples(), width = call.channels();
    const Tensor scales = dense(scale),
                 dscale = call.table(need_scale ? std::vector<int64_t>{n, width} : std::vector<int64_t>{0});
    const GpuMap<T> dy_map(dy, info), x_map(x, info);
    const OptionalGpuMap<T> y_map(y, info);
    const GpuResult<T> dx(need_x, x, info), dshortcut(need_shortcut, x, info);
    const BackwardMaps<T> maps{dy_map.samples, y_map.samples, x_map.samples, dshortcut.samples, dx.samples, {}};
    // A map without positions may have no memory, which looks as if there were none.
    if (need_scale && call.positions() == 0) torch::stable::fill_(dscale, 0.0);
    if (need_scale || need_shortcut)
      call.launch_sweep(reduce_of(call, maps, nullptr, nullptr, need_scale ? data_of<float>(dscale) : nullptr));
    if (need_x)
      call.launch_sweep(
          spread_of<T>(call, maps, static_cast<const float*>(scales.const_data_ptr()), nullptr, nullptr, nullptr));
    return std::make_tuple(dx.tensor, dscale, dshortcut.tensor);
  });
}

}  // namespace
}  // namespace dia::ops

// Which plans are taken from now on, a number of GpuLayouts: for tests and measurements.
extern "C" __attribute__((visibility("default"), used)) inline void dia_kernels_gpu_layouts(int layouts) {
  dia::ops::layouts() = static_cast<dia::GpuLayouts>(layouts);
}

// Registers them, by their names and a suffix.
#define DIA_REGISTER_GPU_OPERATORS(m, suffix)                                          \
  m.impl("step" suffix, TORCH_BOX(&dia::ops::step));                                   \
  m.impl("step_" suffix, TORCH_BOX(&dia::ops::step_in_place));                         \
  m.impl("step_backward" suffix, TORCH_BOX(&dia::ops::step_backward));                 \
  m.impl("tail" suffix, TORCH_BOX(&dia::ops::tail));                                   \
  m.impl("tail_tracking_" suffix, TORCH_BOX(&dia::ops::tail_tracking));                \
  m.impl("tail_backward" suffix, TORCH_BOX(&dia::ops::tail_backward));                 \
  m.impl("statistics" suffix, TORCH_BOX(&dia::ops::statistics));                       \
  m.impl("tail_join" suffix, TORCH_BOX(&dia::ops::tail_join));                         \
  m.impl("tail_reduce" suffix, TORCH_BOX(&dia::ops::tail_reduce));                     \
  m.impl("parameter_gradients" suffix, TORCH_BOX(&dia::ops::parameter_gradients));     \
  m.impl("tail_spread" suffix, TORCH_BOX(&dia::ops::tail_spread));                     \
  m.impl("norm_pool" suffix, TORCH_BOX(&dia::ops::norm_pool));                         \
  m.impl("norm_pool_tracking_" suffix, TORCH_BOX(&dia::ops::norm_pool_tracking));      \
  m.impl("norm_rescale" suffix, TORCH_BOX(&dia::ops::norm_rescale));                   \
  m.impl("norm_rescale_backward" suffix, TORCH_BOX(&dia::ops::norm_rescale_backward)); \
  m.impl("norm_pool_backward" suffix, TORCH_BOX(&dia::ops::norm_pool_backward));       \
  m.impl("pool" suffix, TORCH_BOX(&dia::ops::pool));                                   \
  m.impl("rescale" suffix, TORCH_BOX(&dia::ops::rescale));                             \
  m.impl("rescale_backward" suffix, TORCH_BOX(&dia::ops::rescale_backward))
