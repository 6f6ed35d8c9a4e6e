// The operators on a GPU: checks, plans, workspaces, launches. Included where they are registered: for CUDA
// (cuda_operators.cpp), and in tests for a simulated GPU, so that all of this runs in every test.
//
//     step    by chunks of samples: reduce | cell | spread; or by clusters of blocks, as one kernel
//     tail    reduce: moments | statistics of the batch | cell | spread; of given statistics as the step
//     norm_pool, norm_rescale   a tail's sweeps around a cell that is not here
//     and their gradients, with the weights' once over all samples, beside the last spread
//
// Everything is put on the current stream and nothing waits for it; memory comes from torch's allocator, so a call can
// be captured into a graph.
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

// --- the tail ------------------------------------------------------------------------------------------------

// The norm's tables forward: of this batch, or of given statistics.
struct ForwardNorm {
  OptionalTensor gamma, beta;
  float *shift, *d, *rstd, *scale, *bias;

  ForwardNorm(GpuCall& call, const OptionalTensor& gamma_tensor, const OptionalTensor& beta_tensor,
              const NormTables<float>& tables)
      : gamma(dense(gamma_tensor)),
        beta(dense(beta_tensor)),
        shift(tables.shift),
        d(tables.d),
        rstd(tables.rstd),
        scale(call.scratch(call.channels())),
        bias(call.scratch(call.channels())) {}

  // `means` of each sample: what they make goes to `off` and `p`.
  void given(GpuCall& call, const Tensor& mean, const Tensor& var, const OptionalTensor& means, double eps, float* off,
             float* p) const {
    const Tensor m = dense(mean), v = dense(var);
    const OptionalTensor of_samples = dense(means);
    kernels::GivenStatistics args{};
    args.samples = static_cast<int>(call.samples()), args.channels = static_cast<int>(call.channels());
    args.eps = static_cast<float>(eps);
    if (of_samples) args.means = data_of<double>(of_samples), args.off = off, args.p = p;
    const auto either = [](const Tensor& t, const float*& narrow, const double*& wide) {
      if (t.scalar_type() == ScalarType::Double)
        wide = static_cast<const double*>(t.const_data_ptr());
      else
        narrow = static_cast<const float*>(t.const_data_ptr());
    };
    either(m, args.mean, args.wide_mean), either(v, args.var, args.wide_var);
    check((args.mean == nullptr) == (args.var == nullptr), "running_mean, running_var: expected one dtype for both");
    args.gamma = data_of<float>(gamma), args.beta = data_of<float>(beta);
    args.shift = shift, args.d = d, args.scale = scale, args.bias = bias, args.rstd = rstd;
    call.launch_elements(args, args.count());
  }
  // The buffers are moved with it.
  void of_batch(GpuCall& call, const kernels::SampleMoments& moments, double eps, float* off, float* p, float* mean,
                float* var, const kernels::Tracked& tracked) const {
    kernels::BatchStatistics args{};
    args.samples = static_cast<int>(call.samples()), args.channels = static_cast<int>(call.channels());
    args.positions = static_cast<int>(call.positions()), args.eps = static_cast<float>(eps);
    args.moments = moments, args.gamma = data_of<float>(gamma), args.beta = data_of<float>(beta);
    args.off = off, args.p = p;
    args.shift = shift, args.d = d, args.scale = scale, args.bias = bias, args.rstd = rstd;
    args.mean = mean, args.var = var, args.tracked = tracked;
    call.launch_channels(args);
  }
  kernels::ChannelAffine affine() const { return {shift, d, scale, bias}; }
};

kernels::Tracked tracked_of(const TrackedBuffers& of, const MapInfo& info) {
  const double count = static_cast<double>(info.shape.samples) * static_cast<double>(info.shape.positions);
  return {static_cast<float>(of.factor), static_cast<float>(correction_of(count)), data_of<float>(of.running_mean),
          data_of<float>(of.running_var), data_of<int64_t>(of.batches)};
}

// What goes into a tail.
struct TailArguments {
  Tensor z;
  OptionalTensor shortcut, h, c, gamma, beta, mean, var, means;
  double eps;
  Parameters weights;
  bool relu, tanh_output, keep_mask;
};

struct TailResult {
  Tensor y;
  StepResult cell;
  OptionalTensor mean, var;  // of the batch, for `tail`; empty where they were given
  Tensor mask;
};

// The first sweep: the moments of every sample.
template <class T>
kernels::SampleMoments run_moments(GpuCall& call, const Samples<const T>& z) {
  const int64_t count = call.samples() * call.channels();
  kernels::Reduce<T> reduce{};
  reduce.size = call.size(call.samples()), reduce.x = z;
  reduce.first = call.scratch(count), reduce.rest = call.scratch(count);
  reduce.sum = call.scratch(count), reduce.product = call.scratch(count);
  call.launch_sweep(reduce);
  return {reduce.first, reduce.sum, reduce.rest, reduce.product};
}

template <class T>
TailResult run_tail(const TailArguments& given, const MapInfo& info, const kernels::Tracked& tracked) {
  const Tensor& z = given.z;
  GpuCall call(z, info, given.weights.input_reduce_weight.size(0));
  const int64_t n = call.samples(), width = call.channels(), m = call.bottleneck();
  const Tensor mask = gpu_mask<T>(given.relu && given.keep_mask, z, info);
  const bool packs = mask.numel() > 0;
  const GpuMap<T> z_map(z, info, packs);
  const OptionalGpuMap<T> s_map(given.shortcut, info, packs);
  const GpuResult<T> y(true, z, info);
  ForwardCell cell(call, given.weights, given.h, given.c, given.tanh_output, NormTables<float>::count(n, width));
  const NormTables<float> tables(data_of<float>(cell.result.tables) + Tables<float>::count(n, width, m), n, width);
  const ForwardNorm norm(call, given.gamma, given.beta, tables);
  const ForwardMaps<T> maps{z_map.samples, s_map.samples, y.samples, mask_samples<uint8_t>(mask, info)};
  float *const off = tables.off, *const p = cell.args.tables.p;
  if (given.mean) norm.given(call, *given.mean, *given.var, given.means, given.eps, off, p);
  if (given.mean && !given.means) {
    run_forward<T, true>(call, forward_plan<T>(call, info, maps, given.relu, GpuNorm::given), cell, maps, given.relu,
                         norm.affine(), off);
    return {y.tensor, cell.result, call.table({0}), call.table({0}), mask};
  }
  const GpuPlan plan = forward_plan<T>(call, info, maps, given.relu, GpuNorm::batch);
  OptionalTensor mean, var;
  if (!given.mean) {
    if (tracked.running_mean == nullptr) mean = call.table({width}), var = call.table({width});
    const auto values_of = [](const OptionalTensor& t) { return t ? data_of<float>(*t) : nullptr; };
    norm.of_batch(call, run_moments(call, maps.x), given.eps, off, p, values_of(mean), values_of(var), tracked);
  }
  float *factor = call.scratch(n * width), *added = call.scratch(n * width);
  const kernels::Spread<T> spread = spread_of(call, maps, given.relu, factor, added, norm.shift);
  if (plan.cell == GpuCell::clusters) {
    // The means are there.
    const kernels::ClusterStep<T, true> rest{
        0, kernels::Reduce<T>{}, spread, {cell.args, norm.affine(), factor, added}};
    call.launch_clusters(rest, plan.together);
  } else {
    run_cell<true>(call, plan, cell.args, norm.affine(), factor, added);
    call.launch_sweep(spread);
  }
  return {y.tensor, cell.result, mean, var, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tail(
    Tensor z, OptionalTensor shortcut, OptionalTensor h, OptionalTensor c, OptionalTensor gamma, OptionalTensor beta,
    OptionalTensor mean, OptionalTensor var, double eps, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor v1,
    Tensor a1, Tensor v2, Tensor a2, int64_t channel_dim, bool relu, bool tanh_output, bool keep_mask) {
  const TailArguments given{
      z,    shortcut,    h,        c, gamma, beta, mean, var, std::nullopt, eps, {w1, b1, w2, b2, v1, a1, v2, a2},
      relu, tanh_output, keep_mask};
  const MapInfo info = map_info(z, channel_dim);
  check_step(z, info, shortcut, h, c, given.weights);
  check_norm(z, info, gamma, beta, mean, var);
  return with_gpu_type(z, [&]<class T>() {
    const TailResult result = run_tail<T>(given, info, {});
    return std::make_tuple(result.y, result.cell.h, result.cell.c, result.cell.tables, *result.mean, *result.var,
                           result.mask);
  });
}

// With the statistics of the batch, towards which the norm's buffers are moved.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tail_tracking(
    Tensor z, OptionalTensor shortcut, OptionalTensor h, OptionalTensor c, OptionalTensor gamma, OptionalTensor beta,
    Tensor running_mean, Tensor running_var, Tensor batches, double factor, double eps, Tensor w1, Tensor b1, Tensor w2,
    Tensor b2, Tensor v1, Tensor a1, Tensor v2, Tensor a2, int64_t channel_dim, bool relu, bool tanh_output,
    bool keep_mask) {
  const TailArguments given{z,
                            shortcut,
                            h,
                            c,
                            gamma,
                            beta,
                            std::nullopt,
                            std::nullopt,
                            std::nullopt,
                            eps,
                            {w1, b1, w2, b2, v1, a1, v2, a2},
                            relu,
                            tanh_output,
                            keep_mask};
  const MapInfo info = map_info(z, channel_dim);
  check_step(z, info, shortcut, h, c, given.weights);
  check_norm(z, info, gamma, beta, std::nullopt, std::nullopt);
  const TrackedBuffers buffers{running_mean, running_var, batches, factor};
  check_tracked(buffers, z, info, {z, shortcut, h, c, gamma, beta, w1, b1, w2, b2, v1, a1, v2, a2});
  return with_gpu_type(z, [&]<class T>() {
    const TailResult result = run_tail<T>(given, info, tracked_of(buffers, info));
    return std::make_tuple(result.y, result.cell.h, result.cell.c, result.cell.tables, result.mask);
  });
}

// The gradient of a tail, up to where all samples of a batch meet.
template <class T>
struct TailBackward {
  GpuCall call;
  GradientMaps<T> maps;
  ParameterGradients parameters;
  BackwardCell cell;
  NormTables<float> tables;
  OptionalTensor gamma, beta;
  NormOfGradient norm;

  TailBackward(const GradientArguments& given, const MapInfo& info, const OptionalTensor& gamma_tensor,
               const OptionalTensor& beta_tensor, const Weights& w, bool tanh_output, const WantedGradients& wanted)
      : call(given.x, info, w.input_reduce.size(0)),
        maps(given.dy, given.x, given.relu, info, wanted),
        parameters(call, given.h, wanted.parameters),
        cell(call, given, w, tanh_output, wanted.state, parameters),
        tables(cell.tables, call.samples(), call.channels()),
        gamma(dense(gamma_tensor)),
        beta(dense(beta_tensor)) {
    const int64_t width = call.channels(), count = call.samples() * width;
    norm.shift = tables.shift;
    norm.again = {tables.d,           tables.rstd, data_of<float>(gamma), data_of<float>(beta), call.scratch(width),
                  call.scratch(count)};
    norm.sum = call.scratch(count), norm.product = call.scratch(count), norm.dp = call.scratch(count);
  }

  // The gradients of gamma and beta, behind what is computed before.
  kernels::NormGradients of_norm(float* dgamma, float* dbeta) const {
    kernels::NormGradients args{};
    args.samples = static_cast<int>(call.samples()), args.channels = static_cast<int>(call.channels());
    args.positions = static_cast<int>(call.positions());
    args.sum = norm.sum, args.product = norm.product, args.dp = norm.dp, args.off = tables.off;
    args.new_h = norm.again.new_h, args.d = tables.d, args.rstd = tables.rstd, args.gamma = data_of<float>(gamma);
    args.dgamma = dgamma, args.dbeta = dbeta;
    return args;
  }

  // Of a batch: the first sweep and the cell's gradient. `factor`: for the last sweep, or null.
  void run_first(const MapInfo& info, float* factor) {
    const int64_t count = call.samples() * call.channels();
    if (maps.maps.dy.data == nullptr)
      for (float* table : {norm.sum, norm.product}) call.clear(table, count);
    run_first_gradients<T, true>(call, backward_plan<T>(call, info, maps.maps, GpuNorm::batch),
                                 reduce_of(call, maps.maps, tables.shift, norm.sum, norm.product),
                                 {cell.args, norm.sum, norm.product, norm.again, factor}, {norm.dp, nullptr});
  }
};

using TailGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
TailGradients run_tail_backward(const GradientArguments& given, const MapInfo& info, const OptionalTensor& gamma,
                                const OptionalTensor& beta, const Weights& w, bool tanh_output, bool batch,
                                const WantedGradients& wanted) {
  TailBackward<T> of(given, info, gamma, beta, w, tanh_output, wanted);
  GpuCall& call = of.call;
  const int64_t n = call.samples(), width = call.channels();
  const BackwardMaps<T>& maps = of.maps.maps;
  const Tensor dgamma = call.table({width}), dbeta = call.table({width});
  kernels::NormGradients gradients = of.of_norm(data_of<float>(dgamma), data_of<float>(dbeta));
  if (batch) {
    float *factor = nullptr, *offset = nullptr, *slope = nullptr;
    if (wanted.x) factor = call.scratch(n * width), offset = call.scratch(n * width), slope = call.scratch(width);
    gradients.offset = offset, gradients.slope = slope;
    of.run_first(info, factor);
    call.launch_channels(gradients);
    of.parameters.launch(call, of.cell.args);
    kernels::Spread<T> spread = spread_of<T>(call, maps, factor, offset, of.tables.shift, slope);
    spread.beside = of.parameters.wanted;
    if (wanted.x) call.launch_sweep(spread);
  } else {
    run_backward<T, true>(call, backward_plan<T>(call, info, maps, GpuNorm::given), of.cell, maps, of.norm,
                          of.parameters);
    if (wanted.affine) call.launch_channels(gradients);
  }
  // Sums over no values, whatever the mean and the deviation of none are.
  if (given.x.numel() == 0)
    for (const Tensor& sums : {dgamma, dbeta}) torch::stable::fill_(sums, 0.0);
  const Tensor nothing = call.table({0});
  return {of.maps.dx.tensor,   of.maps.dshortcut.tensor,         of.cell.old_dh,
          of.cell.old_dc,      wanted.affine ? dgamma : nothing, wanted.affine ? dbeta : call.table({0}),
          of.parameters.result};
}

TailGradients tail_backward(OptionalTensor dy, OptionalTensor dh, OptionalTensor dc, Tensor z, OptionalTensor y,
                            OptionalTensor h, OptionalTensor c, Tensor new_c, Tensor tables, OptionalTensor gamma,
                            OptionalTensor beta, Tensor w1, Tensor w2, Tensor v1, Tensor v2, int64_t channel_dim,
                            bool relu, bool tanh_output, bool batch, bool need_z, bool need_shortcut, bool need_state,
                            bool need_parameters, bool need_affine, bool as_factors) {
  const MapInfo info = map_info(z, channel_dim);
  const Weights w{w1, w2, v1, v2};
  check_tail_gradient(dy, dh, dc, z, info, y, h, c, new_c, tables, gamma, beta, w, relu, true);
  const GradientArguments given{dy, dh, dc, z, ReluResult(relu ? y : std::nullopt), h, c, new_c, tables};
  return with_gpu_type(z, [&]<class T>() {
    return run_tail_backward<T>(given, info, gamma, beta, w, tanh_output, batch,
                                {need_z, need_shortcut, need_state, {need_parameters, as_factors, h}, need_affine});
  });
}

// --- the tail with statistics over several processes: what goes from one to the other lies between these --------

std::tuple<Tensor, Tensor, Tensor> statistics(Tensor z, int64_t channel_dim) {
  const MapInfo info = map_info(z, channel_dim);
  return with_gpu_type(z, [&]<class T>() {
    GpuCall call(z, info, 1);
    const int64_t n = call.samples(), width = call.channels();
    const GpuMap<T> map(z, info);
    const Tensor mean = empty_table<double>(z, {width}), var = empty_table<double>(z, {width});
    const Tensor means = empty_table<double>(z, {n, width});
    const kernels::SampleMoments moments = run_moments(call, map.samples);
    call.launch_channels(kernels::ChannelStatistics{static_cast<int>(n), static_cast<int>(width),
                                                    static_cast<int>(call.positions()), moments, data_of<double>(mean),
                                                    data_of<double>(var), data_of<double>(means)});
    return std::make_tuple(mean, var, means);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tail_join(
    Tensor z, OptionalTensor shortcut, OptionalTensor h, OptionalTensor c, OptionalTensor gamma, OptionalTensor beta,
    Tensor mean, Tensor var, Tensor means, double eps, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor v1, Tensor a1,
    Tensor v2, Tensor a2, int64_t channel_dim, bool relu, bool tanh_output, bool keep_mask) {
  const TailArguments given{
      z,    shortcut,    h,        c, gamma, beta, mean, var, means, eps, {w1, b1, w2, b2, v1, a1, v2, a2},
      relu, tanh_output, keep_mask};
  const MapInfo info = map_info(z, channel_dim);
  check_step(z, info, shortcut, h, c, given.weights);
  check_norm(z, info, gamma, beta, mean, var);
  check_means(means, z, info);
  return with_gpu_type(z, [&]<class T>() {
    const TailResult result = run_tail<T>(given, info, {});
    return std::make_tuple(result.y, result.cell.h, result.cell.c, result.cell.tables, result.mask);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tail_reduce(
    OptionalTensor dy, OptionalTensor dh, OptionalTensor dc, Tensor z, OptionalTensor y, OptionalTensor h,
    OptionalTensor c, Tensor new_c, Tensor tables, OptionalTensor gamma, OptionalTensor beta, Tensor w1, Tensor w2,
    Tensor v1, Tensor v2, int64_t channel_dim, bool relu, bool tanh_output, bool need_shortcut, bool need_state,
    bool need_parameters) {
  const MapInfo info = map_info(z, channel_dim);
  const Weights w{w1, w2, v1, v2};
  check_tail_gradient(dy, dh, dc, z, info, y, h, c, new_c, tables, gamma, beta, w, relu, true);
  const GradientArguments given{dy, dh, dc, z, ReluResult(relu ? y : std::nullopt), h, c, new_c, tables};
  return with_gpu_type(z, [&]<class T>() {
    TailBackward<T> of(given, info, gamma, beta, w, tanh_output,
                       {false, need_shortcut, need_state, {need_parameters, false, h}, false});
    GpuCall& call = of.call;
    const int64_t n = call.samples(), width = call.channels();
    const Tensor sums = call.table({2, width}), dp = call.table({n, width});
    float* const of_beta = data_of<float>(sums);
    of.norm.dp = data_of<float>(dp);
    of.run_first(info, nullptr);
    call.launch_channels(of.of_norm(of_beta + width, of_beta));
    of.parameters.launch(call, of.cell.args);
    if (z.numel() == 0) torch::stable::fill_(sums, 0.0);
    return std::make_tuple(sums, of.maps.dshortcut.tensor, dp, of.cell.old_dh, of.cell.old_dc, of.parameters.result);
  });
}

Tensor tail_spread(OptionalTensor dy, OptionalTensor y, Tensor z, Tensor new_h, Tensor dp, Tensor tables,
                   OptionalTensor gamma, Tensor shares, int64_t channel_dim) {
  const MapInfo info = map_info(z, channel_dim);
  check_spread(dy, y, z, info, new_h, dp, tables, gamma, shares, true);
  return with_gpu_type(z, [&]<class T>() {
    GpuCall call(z, info, 1);
    const int64_t n = call.samples(), width = call.channels();
    const Tensor h = dense(new_h), p = dense(dp), all = dense(tables), share = dense(shares);
    const OptionalTensor weight = dense(gamma);
    const NormTables<float> norm(all, n, width);
    const GradientMaps<T> maps(dy, z, ReluResult(y), info, {true, false, false, {}, false});
    kernels::SharedNormGradients args{};
    args.samples = static_cast<int>(n), args.channels = static_cast<int>(width);
    args.positions = static_cast<int>(call.positions());
    args.new_h = data_of<float>(h), args.dp = data_of<float>(p);
    args.d = norm.d, args.rstd = norm.rstd, args.gamma = data_of<float>(weight);
    args.of_beta = data_of<float>(share), args.of_gamma = args.of_beta + width;
    args.factor = call.scratch(n * width), args.offset = call.scratch(n * width), args.slope = call.scratch(width);
    call.launch_elements(args, n * width);
    call.launch_sweep(spread_of<T>(call, maps.maps, args.factor, args.offset, norm.shift, args.slope));
    return maps.dx.tensor;
  });
}

// --- the parts of a tail, for a cell that is not here ---------------------------------------------------------

struct Pooled {
  Tensor p, tables;
  OptionalTensor mean, var;  // of the batch, unless buffers are moved
};

template <class T>
Pooled run_norm_pool(const Tensor& z, const MapInfo& info, const OptionalTensor& gamma, const OptionalTensor& beta,
                     const OptionalTensor& mean, const OptionalTensor& var, double eps,
                     const kernels::Tracked& tracked) {
  GpuCall call(z, info, 1);
  const int64_t n = call.samples(), width = call.channels();
  const GpuMap<T> map(z, info);
  Pooled result{call.table({n, width}), call.table({NormTables<float>::count(n, width)}), {}, {}};
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

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_pool(Tensor z, OptionalTensor gamma, OptionalTensor beta,
                                                     OptionalTensor mean, OptionalTensor var, double eps,
                                                     int64_t channel_dim) {
  const MapInfo info = map_info(z, channel_dim);
  check_norm(z, info, gamma, beta, mean, var);
  return with_gpu_type(z, [&]<class T>() {
    const Pooled pooled = run_norm_pool<T>(z, info, gamma, beta, mean, var, eps, {});
    return std::make_tuple(pooled.p, pooled.tables, *pooled.mean, *pooled.var);
  });
}

std::tuple<Tensor, Tensor> norm_pool_tracking(Tensor z, OptionalTensor gamma, OptionalTensor beta, Tensor running_mean,
                                              Tensor running_var, Tensor batches, double factor, double eps,
                                              int64_t channel_dim) {
  const MapInfo info = map_info(z, channel_dim);
  const TrackedBuffers buffers{running_mean, running_var, batches, factor};
  check_norm(z, info, gamma, beta, std::nullopt, std::nullopt);
  check_tracked(buffers, z, info, {z, gamma, beta});
  return with_gpu_type(z, [&]<class T>() {
    const Pooled pooled =
        run_norm_pool<T>(z, info, gamma, beta, std::nullopt, std::nullopt, eps, tracked_of(buffers, info));
    return std::make_tuple(pooled.p, pooled.tables);
  });
}

std::tuple<Tensor, Tensor> norm_rescale(Tensor z, Tensor scale, OptionalTensor shortcut, Tensor tables,
                                        OptionalTensor gamma, OptionalTensor beta, int64_t channel_dim, bool relu,
                                        bool keep_mask) {
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

std::tuple<Tensor, Tensor, Tensor> norm_rescale_backward(Tensor dy, OptionalTensor y, Tensor z, Tensor tables,
                                                         OptionalTensor gamma, OptionalTensor beta, int64_t channel_dim,
                                                         bool need_shortcut) {
  const MapInfo info = map_info(z, channel_dim);
  check_result_gradient(dy, y, z, info, true);
  check_norm_tables(tables, z, info);
  check_norm(z, info, gamma, beta, std::nullopt, std::nullopt);
  return with_gpu_type(z, [&]<class T>() {
    GpuCall call(z, info, 1);
    const int64_t n = call.samples(), width = call.channels(), count = n * width;
    const Tensor all = dense(tables), dscale = call.table({n, width}), sums = call.table({2, n, width});
    const OptionalTensor weight = dense(gamma), bias = dense(beta);
    const GradientMaps<T> maps(dy, z, ReluResult(y), info, {false, need_shortcut, false, {}, false});
    const NormTables<float> norm(all, n, width);
    float *const sum = data_of<float>(sums), *const product = sum + count;
    if (call.positions() == 0) {
      // Sums over no values, whatever the deviation of none is.
      for (const Tensor& of_none : {dscale, sums}) torch::stable::fill_(of_none, 0.0);
      return std::make_tuple(dscale, sums, maps.dshortcut.tensor);
    }
    call.launch_sweep(reduce_of(call, maps.maps, norm.shift, sum, product));
    kernels::ScaleGradients args{};
    args.samples = static_cast<int>(n), args.channels = static_cast<int>(width);
    args.d = norm.d, args.rstd = norm.rstd;
    args.gamma = data_of<float>(weight), args.beta = data_of<float>(bias);
    args.sum = sum, args.product = product, args.dscale = data_of<float>(dscale);
    call.launch_elements(args, count);
    return std::make_tuple(dscale, sums, maps.dshortcut.tensor);
  });
}

std::tuple<Tensor, Tensor, Tensor> norm_pool_backward(Tensor dy, OptionalTensor y, Tensor z, Tensor scale, Tensor dp,
                                                      Tensor sums, Tensor tables, OptionalTensor gamma,
                                                      int64_t channel_dim, bool batch, bool need_z) {
  const MapInfo info = map_info(z, channel_dim);
  check_norm_pool_gradient(dy, y, z, info, scale, dp, sums, tables, gamma, true);
  return with_gpu_type(z, [&]<class T>() {
    GpuCall call(z, info, 1);
    const int64_t n = call.samples(), width = call.channels(), count = n * width;
    const Tensor scales = dense(scale), of_p = dense(dp), of_map = dense(sums), all = dense(tables);
    const Tensor dgamma = call.table({width}), dbeta = call.table({width});
    const OptionalTensor weight = dense(gamma);
    const GradientMaps<T> maps(dy, z, ReluResult(y), info, {need_z, false, false, {}, false});
    const NormTables<float> norm(all, n, width);
    kernels::NormGradients args{};
    args.samples = static_cast<int>(n), args.channels = static_cast<int>(width);
    args.positions = static_cast<int>(call.positions());
    args.sum = data_of<float>(of_map), args.product = args.sum + count;
    args.dp = data_of<float>(of_p), args.off = norm.off, args.new_h = data_of<float>(scales);
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
