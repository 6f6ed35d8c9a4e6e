// The step on a GPU, and its gradient: by chunks of samples reduce | cell | spread, or by clusters of blocks, as one
// kernel; the weights' gradients once over all samples, beside the last spread. Behind a norm of known statistics a
// tail goes the same way.
#pragma once

#include <tuple>

#include "gpu_cell.h"

namespace dia::ops {
namespace {

// Calls `body.template operator()<T>()` with the element type of x; one that the GPU's kernels know.
template <class Body>
auto with_gpu_type(const Tensor& x, Body body) {
  check(x.scalar_type() != ScalarType::Double, "x: a GPU's kernels know no float64; the reference does");
  return with_narrow_type(x, body);
}

// --- forward -------------------------------------------------------------------------------------------------

struct StepResult {
  Tensor h, c, tables;
};

template <class T>
struct ForwardMaps {
  Samples<const T> x, shortcut;
  Samples<T> y;
  Samples<uint8_t> mask;  // no data: not wanted
};

// The mask that a forward pass keeps.
template <class T>
Tensor gpu_mask(bool wanted, const Tensor& x, const MapInfo& info) {
  check(!wanted || sizeof(T) == 2, "keep_mask: a GPU's kernels keep one of 16-bit maps only");
  return empty_mask(wanted, x, info);
}

// The cell's arguments forward, and the tensors behind them.
struct ForwardCell {
  GpuWeights weights;
  OptionalTensor h_tensor, c_tensor;
  StepResult result;
  kernels::CellForward args;

  // `more` values of tables behind those of the cell.
  ForwardCell(GpuCall& call, const Parameters& w, const OptionalTensor& h, const OptionalTensor& c, bool tanh_output,
              int64_t more)
      : weights(w), h_tensor(dense(h)), c_tensor(dense(c)), args(call.cell<kernels::CellForward>(tanh_output)) {
    const int64_t n = call.samples(), width = call.channels(), m = call.bottleneck();
    result = {call.table({n, width}), call.table({n, width}), call.table({Tables<float>::count(n, width, m) + more})};
    const Tables<float> tables(data_of<float>(result.tables), n, width, m);
    args.h = data_of<float>(h_tensor), args.c = data_of<float>(c_tensor);
    args.weights = weights.weights;
    args.tables = {tables.p, tables.zx, tables.zh, tables.gates};
    args.new_h = data_of<float>(result.h), args.new_c = data_of<float>(result.c);
  }
};

// The second sweep: y = act((x - shift) factor + added + shortcut).
template <class T>
kernels::Spread<T> spread_of(const GpuCall& call, const ForwardMaps<T>& maps, bool relu, const float* factor,
                             const float* added, const float* shift) {
  kernels::Spread<T> spread{};
  spread.size = call.size(call.samples()), spread.relu = relu;
  spread.x = maps.x, spread.shortcut = maps.shortcut, spread.out = maps.y, spread.passed = maps.mask;
  spread.scale = factor, spread.offset = added, spread.shift = shift;
  return spread;
}

// A step, behind a norm of known statistics if kAffine, by the plan.
template <class T, bool kAffine>
void run_forward(GpuCall& call, const GpuPlan& plan, const ForwardCell& cell, const ForwardMaps<T>& maps, bool relu,
                 const kernels::ChannelAffine& affine, float* off) {
  const int64_t n = call.samples(), width = call.channels();
  float* factor = kAffine ? call.scratch(n * width) : cell.args.new_h;
  float* added = kAffine ? call.scratch(n * width) : nullptr;
  kernels::Reduce<T> reduce{};
  reduce.size = call.size(n), reduce.x = maps.x, reduce.means = {cell.args.tables.p, off, affine};
  if (kAffine) reduce.shift = affine.shift;
  const kernels::Spread<T> spread = spread_of(call, maps, relu, factor, added, reduce.shift);
  if (plan.cell == GpuCell::clusters)
    return call.launch_clusters(kernels::ClusterStep<T, kAffine>{0, reduce, spread, {cell.args, affine, factor, added}},
                                plan.together);
  for (int64_t first = 0; first < n; first += plan.chunk) {
    const int count = static_cast<int>(std::min(plan.chunk, n - first));
    const auto rows = [&](float* table) { return rows_from(table, first, width); };
    call.launch_sweep(of_samples(reduce, first, count));
    run_cell<kAffine>(call, plan, of_samples(cell.args, first, count), affine, rows(factor), rows(added));
    call.launch_sweep(of_samples(spread, first, count));
  }
}

template <class T>
GpuPlan forward_plan(GpuCall& call, const MapInfo& info, const ForwardMaps<T>& maps, bool relu, GpuNorm norm) {
  return call.plan(maps.shortcut.data != nullptr || relu, maps.mask.data != nullptr, false, norm, sizeof(T),
                   aligned_maps<T>(info, {maps.x, maps.shortcut, {maps.y.data, maps.y.stride}}));
}

template <class T>
StepResult run_step(const Tensor& x, const MapInfo& info, const ForwardMaps<T>& maps, const OptionalTensor& h,
                    const OptionalTensor& c, const Parameters& w, bool relu, bool tanh_output, bool keep_tables) {
  GpuCall call(x, info, w.input_reduce_weight.size(0));
  ForwardCell cell(call, w, h, c, tanh_output, 0);
  if (!keep_tables) cell.args.tables.gates = nullptr;
  run_forward<T, false>(call, forward_plan<T>(call, info, maps, relu, GpuNorm::none), cell, maps, relu, {}, nullptr);
  if (!keep_tables) cell.result.tables = call.table({0});
  return cell.result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> step(Tensor x, OptionalTensor shortcut, OptionalTensor h,
                                                        OptionalTensor c, Tensor w1, Tensor b1, Tensor w2, Tensor b2,
                                                        Tensor v1, Tensor a1, Tensor v2, Tensor a2, int64_t channel_dim,
                                                        bool relu, bool tanh_output, bool keep_tables, bool keep_mask) {
  const Parameters w{w1, b1, w2, b2, v1, a1, v2, a2};
  const MapInfo info = map_info(x, channel_dim);
  check_step(x, info, shortcut, h, c, w);
  return with_gpu_type(x, [&]<class T>() {
    const Tensor mask = gpu_mask<T>(relu && keep_mask, x, info);
    const bool packs = mask.numel() > 0;
    const GpuMap<T> x_map(x, info, packs);
    const OptionalGpuMap<T> s_map(shortcut, info, packs);
    const GpuResult<T> y(true, x, info);
    const StepResult result =
        run_step<T>(x, info, {x_map.samples, s_map.samples, y.samples, mask_samples<uint8_t>(mask, info)}, h, c, w,
                    relu, tanh_output, keep_tables);
    return std::make_tuple(y.tensor, result.h, result.c, result.tables, mask);
  });
}

// Whoever writes an element of y has read that of x: y may be x.
std::tuple<Tensor, Tensor> step_in_place(Tensor x, OptionalTensor shortcut, OptionalTensor h, OptionalTensor c,
                                         Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor v1, Tensor a1, Tensor v2,
                                         Tensor a2, int64_t channel_dim, bool relu, bool tanh_output) {
  const Parameters given{w1, b1, w2, b2, v1, a1, v2, a2};
  const MapInfo info = map_info(x, channel_dim);
  check_step(x, info, shortcut, h, c, given);
  const Parameters w = apart(given, x);
  shortcut = shortcut_apart(shortcut, x), h = apart(h, x), c = apart(c, x);
  return with_gpu_type(x, [&]<class T>() {
    const GpuMap<T> x_map(x, info);
    const OptionalGpuMap<T> s_map(shortcut, info);
    // Where the kernel reads a copy of x, it may as well write there; the result is copied back.
    const Samples<T> y{const_cast<T*>(x_map.samples.data), x_map.samples.stride};
    const StepResult result =
        run_step<T>(x, info, {x_map.samples, s_map.samples, y, {}}, h, c, w, relu, tanh_output, false);
    if (x_map.samples.data != x.const_data_ptr()) torch::stable::copy_(x, x_map.tensor);
    return std::make_tuple(result.h, result.c);
  });
}

// --- gradient ------------------------------------------------------------------------------------------------

struct WantedGradients {
  bool x, shortcut, state;
  WantedParameters parameters;
  bool affine;
};

// What came with the forward pass and from the layers after it.
struct GradientArguments {
  OptionalTensor dy, dh, dc;
  Tensor x;
  ReluResult relu;
  OptionalTensor h, c;
  Tensor new_c, tables;
};

template <class T>
struct BackwardMaps {
  Samples<const T> dy, y, x;
  Samples<T> dshortcut, dx;
  kernels::Mask mask;
};

struct BackwardCell {
  GpuWeights weights;
  std::vector<OptionalTensor> kept;
  Tensor old_dh, old_dc, new_c, tables;
  kernels::CellBackward args;

  BackwardCell(GpuCall& call, const GradientArguments& given, const Weights& w, bool tanh_output, bool need_state,
               const ParameterGradients& parameters)
      : weights(w),
        new_c(dense(given.new_c)),
        tables(dense(given.tables)),
        args(call.cell<kernels::CellBackward>(tanh_output)) {
    const int64_t n = call.samples(), width = call.channels(), m = call.bottleneck();
    const std::vector<int64_t> state = need_state ? std::vector<int64_t>{n, width} : std::vector<int64_t>{0};
    old_dh = call.table(state), old_dc = call.table(state);
    const Tables<float> of(data_of<float>(tables), n, width, m);
    args.dh = add(given.dh), args.dc = add(given.dc), args.c = add(given.c);
    args.new_c = static_cast<const float*>(new_c.const_data_ptr());
    args.weights = weights.weights;
    args.tables = {of.p, of.zx, of.zh, of.gates};
    const Factors<float> factors(parameters.factors(call), n, width, m);
    args.du = factors.du, args.dzx = factors.dzx, args.dzh = factors.dzh;
    if (need_state) args.old_dh = data_of<float>(old_dh), args.old_dc = data_of<float>(old_dc);
  }

 private:
  const float* add(const OptionalTensor& t) {
    kept.push_back(dense(t));
    return data_of<float>(kept.back());
  }
};

// The norm's part of a gradient: its affine, and tables of (N, C).
struct NormOfGradient {
  const float* shift = nullptr;
  kernels::NormAgain again{};
  float *sum = nullptr, *product = nullptr, *dp = nullptr;
};

// The first sweep: g, and what the cell's gradient begins with.
template <class T>
kernels::Reduce<T> reduce_of(const GpuCall& call, const BackwardMaps<T>& maps, const float* shift, float* sum,
                             float* product) {
  kernels::Reduce<T> reduce{};
  reduce.size = call.size(call.samples());
  reduce.dy = maps.dy, reduce.y = maps.y, reduce.x = maps.x, reduce.g = maps.dshortcut;
  reduce.mask = maps.mask;
  reduce.shift = shift, reduce.sum = sum, reduce.product = product;
  return reduce;
}

// The second sweep: dx = g factor + (x - shift) slope + offset. What the first wrote is masked, and one map instead of
// two.
template <class T>
kernels::Spread<T> spread_of(const GpuCall& call, const BackwardMaps<T>& maps, const float* factor, const float* offset,
                             const float* shift, const float* slope) {
  kernels::Spread<T> spread{};
  spread.size = call.size(call.samples());
  const bool reread = maps.dshortcut.data != nullptr && maps.dy.data != nullptr;
  spread.dy = reread ? Samples<const T>{maps.dshortcut.data, maps.dshortcut.stride} : maps.dy;
  if (!reread) spread.y = maps.y, spread.mask = maps.mask;
  if (slope != nullptr) spread.x = maps.x;
  spread.out = maps.dx;
  spread.scale = spread.dy.data != nullptr ? factor : nullptr, spread.offset = offset;
  spread.shift = shift, spread.slope = slope;
  return spread;
}

// The first sweep of a gradient, where something comes from the map, and the cell's.
template <class T, bool kAffine>
void run_first_gradients(GpuCall& call, const GpuPlan& plan, const kernels::Reduce<T>& reduce,
                         const kernels::SplitGateGradients<kAffine>& gates, const kernels::MeanGradient& means) {
  if (plan.cell == GpuCell::clusters)
    return call.launch_clusters(kernels::ClusterGradient<T, kAffine>{0, reduce, gates, nullptr, means}, plan.together);
  if (reduce.dy.data != nullptr) call.launch_sweep(reduce);
  run_cell_gradient(call, plan, gates, means);
}

// The gradient of a step by the plan, behind a norm of given statistics if kAffine; the weights' comes with the last
// sweep.
template <class T, bool kAffine>
void run_backward(GpuCall& call, const GpuPlan& plan, const BackwardCell& cell, const BackwardMaps<T>& maps,
                  const NormOfGradient& norm, const ParameterGradients& parameters) {
  const int64_t n = call.samples(), width = call.channels();
  const bool has_g = maps.dy.data != nullptr, has_dx = maps.dx.data != nullptr;
  float* product = kAffine ? norm.product : has_g ? call.scratch(n * width) : nullptr;
  if (kAffine && !has_g)
    for (float* table : {norm.sum, norm.product}) call.clear(table, n * width);
  float *factor = has_dx ? call.scratch(n * width) : nullptr, *offset = has_dx ? call.scratch(n * width) : nullptr;
  const kernels::Reduce<T> reduce = reduce_of(call, maps, norm.shift, norm.sum, product);
  kernels::Spread<T> spread = spread_of<T>(call, maps, factor, offset, nullptr, nullptr);
  if (n == 0) parameters.launch(call, cell.args);
  for (int64_t first = 0; first < n; first += plan.chunk) {
    const int count = static_cast<int>(std::min(plan.chunk, n - first));
    const bool last = first + count == n;
    const auto rows = [&](float* table) { return rows_from(table, first, width); };
    kernels::NormAgain again = norm.again;
    again.new_h = rows(again.new_h);
    run_first_gradients<T, kAffine>(
        call, plan, of_samples(reduce, first, count),
        {of_samples(cell.args, first, count), rows(norm.sum), rows(product), again, rows(factor)},
        {rows(norm.dp), rows(offset)});
    if (last) parameters.launch(call, cell.args);
    spread.beside = last && parameters.wanted;
    if (has_dx) call.launch_sweep(of_samples(spread, first, count));
  }
}

template <class T>
GpuPlan backward_plan(GpuCall& call, const MapInfo& info, const BackwardMaps<T>& maps, GpuNorm norm) {
  const bool masked = maps.mask.data != nullptr;
  return call.plan(
      maps.y.data != nullptr || masked || maps.dshortcut.data != nullptr, masked, true, norm, sizeof(T),
      aligned_maps<T>(
          info,
          {maps.x, maps.dy, maps.y, {maps.dx.data, maps.dx.stride}, {maps.dshortcut.data, maps.dshortcut.stride}}));
}

// The maps of a gradient, and the copies that some may need.
template <class T>
struct GradientMaps {
  OptionalGpuMap<T> dy, y;
  OptionalTensor mask;
  GpuMap<T> x;
  GpuResult<T> dshortcut, dx;
  BackwardMaps<T> maps;

  GradientMaps(const OptionalTensor& given, const Tensor& of_x, const ReluResult& relu, const MapInfo& info,
               const WantedGradients& wanted)
      : dy(given, info),
        y(given ? relu.y : std::nullopt, info),
        mask(given ? relu.mask : std::nullopt),
        x(of_x, info),
        dshortcut(wanted.shortcut, of_x, info),
        dx(wanted.x, of_x, info),
        maps{dy.samples, y.samples, x.samples, dshortcut.samples, dx.samples, mask_samples(mask, info)} {
    check(sizeof(T) == 2 || maps.mask.data == nullptr, "y: a GPU's kernels know masks of 16-bit maps only");
    if (wanted.shortcut && !given) torch::stable::fill_(dshortcut.tensor, 0.0);
    if (!given) maps.dshortcut = {};
  }
};

using StepGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

StepGradients step_backward(OptionalTensor dy, OptionalTensor dh, OptionalTensor dc, Tensor x, OptionalTensor y,
                            OptionalTensor h, OptionalTensor c, Tensor new_c, Tensor tables, Tensor w1, Tensor w2,
                            Tensor v1, Tensor v2, int64_t channel_dim, bool relu, bool tanh_output, bool need_x,
                            bool need_shortcut, bool need_state, bool need_parameters, bool as_factors) {
  const MapInfo info = map_info(x, channel_dim);
  const Weights w{w1, w2, v1, v2};
  check_step_gradient(dy, dh, dc, x, info, y, h, c, new_c, tables, 0, w, relu, true);
  const GradientArguments given{dy, dh, dc, x, ReluResult(relu ? y : std::nullopt), h, c, new_c, tables};
  return with_gpu_type(x, [&]<class T>() -> StepGradients {
    GpuCall call(x, info, w1.size(0));
    const GradientMaps<T> maps(given.dy, given.x, given.relu, info,
                               {need_x, need_shortcut, need_state, {need_parameters, as_factors, h}, false});
    const ParameterGradients parameters(call, h, {need_parameters, as_factors, h});
    const BackwardCell cell(call, given, w, tanh_output, need_state, parameters);
    run_backward<T, false>(call, backward_plan<T>(call, info, maps.maps, GpuNorm::none), cell, maps.maps, {},
                           parameters);
    return {maps.dx.tensor, maps.dshortcut.tensor, cell.old_dh, cell.old_dc, parameters.result};
  });
}

}  // namespace
}  // namespace dia::ops
