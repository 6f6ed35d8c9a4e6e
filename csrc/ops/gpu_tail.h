// The tail on a GPU, and its gradient: moments | statistics of the batch | cell | spread; of given statistics as the
// step.
#pragma once

#include "gpu_step.h"

namespace dia::ops {
namespace {

// What a norm's kernels make of each sample's channels, (N, C): the means of (z - shift) - d and of x; and of the
// norm's result before its affine the variance, or null.
struct SampleTables {
  float *off, *p;
  double* variance;
};

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

  // `means` of each sample, or their moments: what they make goes to `of`.
  void given(GpuCall& call, const Tensor& mean, const Tensor& var, const OptionalTensor& means,
             const kernels::SampleMoments& moments, double eps, const SampleTables& of) const {
    const Tensor m = dense(mean), v = dense(var);
    const OptionalTensor of_samples = dense(means);
    kernels::GivenStatistics args{};
    args.samples = static_cast<int>(call.samples()), args.channels = static_cast<int>(call.channels());
    args.positions = static_cast<int>(call.positions()), args.eps = static_cast<float>(eps);
    if (of_samples) args.means = data_of<double>(of_samples);
    args.moments = moments;
    if (of_samples || moments.first != nullptr) args.off = of.off, args.p = of.p, args.variance = of.variance;
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
  void of_batch(GpuCall& call, const kernels::SampleMoments& moments, double eps, const SampleTables& of, float* mean,
                float* var, const kernels::Tracked& tracked) const {
    kernels::BatchStatistics args{};
    args.samples = static_cast<int>(call.samples()), args.channels = static_cast<int>(call.channels());
    args.positions = static_cast<int>(call.positions()), args.eps = static_cast<float>(eps);
    args.moments = moments, args.gamma = data_of<float>(gamma), args.beta = data_of<float>(beta);
    args.off = of.off, args.p = of.p, args.variance = of.variance;
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

// The first sweep: the moments of every sample; `centred` where each sample's are wanted for themselves.
template <class T>
kernels::SampleMoments run_moments(GpuCall& call, const Samples<const T>& z, bool centred = false) {
  const int64_t count = call.samples() * call.channels();
  kernels::Reduce<T> reduce{};
  reduce.size = call.size(call.samples()), reduce.x = z, reduce.centred = centred;
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
  if (given.mean) norm.given(call, *given.mean, *given.var, given.means, {}, given.eps, {off, p, nullptr});
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
    norm.of_batch(call, run_moments(call, maps.x), given.eps, {off, p, nullptr}, values_of(mean), values_of(var),
                  tracked);
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
  kernels::NormGradients of_norm(bool batch, float* dgamma, float* dbeta) const {
    kernels::NormGradients args{};
    args.samples = static_cast<int>(call.samples()), args.channels = static_cast<int>(call.channels());
    args.positions = static_cast<int>(call.positions()), args.batch = batch;
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
  kernels::NormGradients gradients = of.of_norm(batch, data_of<float>(dgamma), data_of<float>(dbeta));
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
    call.launch_channels(of.of_norm(true, of_beta + width, of_beta));
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

}  // namespace
}  // namespace dia::ops
