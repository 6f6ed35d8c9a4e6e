// The operators of the tail with its batch norm folded in, on the CPU: y = act(bn(z) h' + shortcut).
//
// Norm statistics and the pooled p follow from the same moments of z, so norm, attention, shortcut and activation are
// two sweeps forward and two backward (docs/kernels.md, the tail). With batch statistics all samples meet between the
// sweeps; with given ones each chunk goes through both, as in the step.
#include <cmath>
#include <tuple>

#include "cpu_cell.h"

namespace dia::ops {
namespace {

// The norm of each channel: z to ((z - shift) - d) rstd gamma + beta, shift + d being the mean; and `off`, a sample's
// mean less that mean. They lie in the operator's `tables`, behind those of the cell, so that backward finds them.
template <class A>
struct NormTables {
  A *off, *shift, *d, *rstd;

  static int64_t count(int64_t n, int64_t c) { return n * c + 3 * c; }
  NormTables(A* data, int64_t n, int64_t c) : off(data), shift(data + n * c), d(shift + c), rstd(d + c) {}
};

// Per-channel weights of a norm, or 1 and 0.
template <class A>
struct Affine {
  OptionalTensor gamma_tensor, beta_tensor;
  const A *gamma_data, *beta_data;

  Affine(const OptionalTensor& gamma, const OptionalTensor& beta)
      : gamma_tensor(dense(gamma)),
        beta_tensor(dense(beta)),
        gamma_data(data_of<A>(gamma_tensor)),
        beta_data(data_of<A>(beta_tensor)) {}
  A gamma(int64_t c) const { return gamma_data != nullptr ? gamma_data[c] : A(1); }
  A beta(int64_t c) const { return beta_data != nullptr ? beta_data[c] : A(0); }
};

// Ranges of channels of small per-channel work over all samples.
template <class Body>
void for_table_columns(int64_t samples, int64_t channels, Body body) {
  parallel_for(0, channels, std::max<int64_t>(kGrain / std::max<int64_t>(samples, 1), 1), body);
}

template <class T>
void run_moments(const Moments<T>& args, Chunk chunk) {
  for_channel_ranges(args.shape, chunk,
                     [&](int64_t n, int64_t a, int64_t b) { map_kernels<T>().moments(args, n, a, b); });
}

template <class T>
void run_normalise(const Normalise<T>& args, Chunk chunk) {
  for_rows(args.shape, chunk, [&](int64_t n, int64_t a, int64_t b) { map_kernels<T>().normalise(args, n, a, b); });
}

template <class T>
void run_reduce(const ReduceNormGradient<T>& args, Chunk chunk) {
  for_channel_ranges(args.shape, chunk,
                     [&](int64_t n, int64_t a, int64_t b) { map_kernels<T>().reduce_norm_gradient(args, n, a, b); });
}

template <class T>
void run_spread(const SpreadNormGradient<T>& args, Chunk chunk) {
  for_rows(args.shape, chunk,
           [&](int64_t n, int64_t a, int64_t b) { map_kernels<T>().spread_norm_gradient(args, n, a, b); });
}

// Mean and biased variance of each channel over all samples and positions, from the moments about `shift`.
template <class A>
void batch_statistics(const double* d1, const double* m2, const A* shift, const MapShape& shape, double* mean,
                      double* var) {
  const int64_t n = shape.samples, width = shape.channels;
  const double positions = static_cast<double>(shape.positions), count = positions * static_cast<double>(n);
  for_table_columns(n, width, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double sum = 0, squares = 0;
      for (int64_t k = 0; k < n; ++k) sum += d1[k * width + c];
      const double d = sum / static_cast<double>(n);
      for (int64_t k = 0; k < n; ++k) {
        const double off = d1[k * width + c] - d;
        squares += m2[k * width + c] + positions * off * off;
      }
      mean[c] = static_cast<double>(shift[c]) + d;
      var[c] = squares / count;
    }
  });
}

void check_norm(const Tensor& z, const MapInfo& info, const OptionalTensor& gamma, const OptionalTensor& beta,
                const OptionalTensor& mean, const OptionalTensor& var) {
  const ScalarType dtype = compute_scalar_type(z);
  const auto check_channels = [&](const char* name, const OptionalTensor& t) {
    if (t) check_table(name, *t, {info.shape.channels}, dtype, z);
  };
  check_channels("norm weight", gamma), check_channels("norm bias", beta);
  check_channels("running_mean", mean), check_channels("running_var", var);
  check(mean.has_value() == var.has_value(), "norm: expected both of a mean and a variance, or neither");
}

using TailResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
TailResult run_tail(const Tensor& z, const MapInfo& info, const OptionalTensor& shortcut, const OptionalTensor& h,
                    const OptionalTensor& c, const OptionalTensor& gamma, const OptionalTensor& beta,
                    const OptionalTensor& given_mean, const OptionalTensor& given_var, double eps, const Parameters& w,
                    bool relu, bool tanh_output) {
  using A = Compute<T>;
  const int64_t n = info.shape.samples, width = info.shape.channels, m = w.input_reduce_weight.size(0);
  const MapReader<T> z_reader(z, info);
  const OptionalMapReader<T> s_reader(shortcut, info);
  const Tensor y = empty_map(z, info);
  const Tensor new_h = empty_table<A>(z, {n, width}), new_c = empty_table<A>(z, {n, width});
  const Tensor all = empty_table<A>(z, {Tables<A>::count(n, width, m) + NormTables<A>::count(n, width)});
  const Tables<A> tables(data_of<A>(all), n, width, m);
  const NormTables<A> norm(data_of<A>(all) + Tables<A>::count(n, width, m), n, width);
  const Affine<A> affine(gamma, beta);
  const bool batch = !given_mean.has_value();
  const Tensor mean = empty_table<A>(z, {batch ? width : 0}), var = empty_table<A>(z, {batch ? width : 0});
  const Tensor scratch = empty_table<A>(z, {2 * n * width + width});
  A *scale = data_of<A>(scratch), *offset = scale + n * width, *first_shift = offset + n * width;
  const Tensor moments_table = empty_table<double>(z, {2 * n * width + 2 * width});
  double *d1 = data_of<double>(moments_table), *m2 = d1 + n * width, *means = m2 + n * width,
         *variances = means + width;

  const CellPass<A> cell(w, h, c, tables, n, width, tanh_output, new_h, new_c);
  const Normalise<T> normalise{info.shape, z_reader.map, s_reader.map, map_writer<T>(y, info),
                               norm.shift, scale,        offset,       relu};
  const auto use_statistics = [&] {
    map_kernels<T>().split_mean(means, width, norm.shift, norm.d);
    for (int64_t ch = 0; ch < width; ++ch) norm.rstd[ch] = static_cast<A>(1 / std::sqrt(variances[ch] + eps));
  };
  // From the moments about `shift` to y.
  const auto finish = [&](Chunk chunk, const A* shift) {
    for_samples(chunk, width, [&](int64_t a, int64_t b) {
      for (int64_t k = a; k < b; ++k)
        for (int64_t ch = 0; ch < width; ++ch) {
          const int64_t at = k * width + ch;
          norm.off[at] = static_cast<A>(d1[at] - (means[ch] - static_cast<double>(shift[ch])));
          tables.p[at] = affine.gamma(ch) * norm.rstd[ch] * norm.off[at] + affine.beta(ch);
        }
    });
    cell.run(chunk);
    const A* scaling = static_cast<const A*>(new_h.const_data_ptr());
    for_samples(chunk, width, [&](int64_t a, int64_t b) {
      for (int64_t k = a; k < b; ++k)
        for (int64_t ch = 0; ch < width; ++ch) {
          const int64_t at = k * width + ch;
          scale[at] = affine.gamma(ch) * norm.rstd[ch] * scaling[at];
          offset[at] = affine.beta(ch) * scaling[at] - norm.d[ch] * scale[at];
        }
    });
    run_normalise(normalise, chunk);
  };
  if (batch) {
    map_kernels<T>().choose_shift(z_reader.map, info.shape, first_shift);
    const Moments<T> moments{info.shape, z_reader.map, first_shift, d1, m2};
    for_chunks(n, 0, 0, [&](Chunk chunk) { run_moments(moments, chunk); });
    batch_statistics<A>(d1, m2, first_shift, info.shape, means, variances);
    use_statistics();
    std::transform(means, means + width, data_of<A>(mean), [](double v) { return static_cast<A>(v); });
    std::transform(variances, variances + width, data_of<A>(var), [](double v) { return static_cast<A>(v); });
    for_chunks(n, 0, 0, [&](Chunk chunk) { finish(chunk, first_shift); });
  } else {
    const Tensor mean_table = dense(*given_mean), var_table = dense(*given_var);
    std::copy_n(static_cast<const A*>(mean_table.const_data_ptr()), width, means);
    std::copy_n(static_cast<const A*>(var_table.const_data_ptr()), width, variances);
    use_statistics();
    const Moments<T> moments{info.shape, z_reader.map, norm.shift, d1, m2};
    const int64_t sample_bytes = width * info.shape.positions * static_cast<int64_t>(sizeof(T));
    for_chunks(n, sample_bytes, weight_bytes<A>(width, m), [&](Chunk chunk) {
      run_moments(moments, chunk);
      finish(chunk, norm.shift);
    });
  }
  return {y, new_h, new_c, all, mean, var};
}

TailResult tail(Tensor z, OptionalTensor shortcut, OptionalTensor h, OptionalTensor c, OptionalTensor gamma,
                OptionalTensor beta, OptionalTensor mean, OptionalTensor var, double eps, Tensor w1, Tensor b1,
                Tensor w2, Tensor b2, Tensor v1, Tensor a1, Tensor v2, Tensor a2, int64_t channel_dim, bool relu,
                bool tanh_output) {
  const Parameters w{w1, b1, w2, b2, v1, a1, v2, a2};
  const MapInfo info = map_info(z, channel_dim);
  check_step(z, info, shortcut, h, c, w);
  check_norm(z, info, gamma, beta, mean, var);
  return with_map_type(z, [&]<class T>() {
    return run_tail<T>(z, info, shortcut, dense(h), dense(c), gamma, beta, mean, var, eps, w, relu, tanh_output);
  });
}

struct Wanted {
  bool z, shortcut, state, parameters, affine;
};

using TailGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                 Tensor, Tensor, Tensor>;

template <class T>
TailGradients run_tail_backward(const OptionalTensor& dy, const OptionalTensor& dh, const OptionalTensor& dc,
                                const Tensor& z, const OptionalTensor& y, const OptionalTensor& h,
                                const OptionalTensor& c, const Tensor& new_c, const Tensor& all,
                                const OptionalTensor& gamma, const OptionalTensor& beta, const Weights& w,
                                const MapInfo& info, bool tanh_output, bool batch, Wanted wanted) {
  using A = Compute<T>;
  const int64_t n = info.shape.samples, width = info.shape.channels, m = w.input_reduce.size(0);
  const double positions = static_cast<double>(info.shape.positions), count = positions * static_cast<double>(n);
  const OptionalMapReader<T> dy_reader(dy, info), y_reader(dy ? y : std::nullopt, info);
  const MapReader<T> z_reader(z, info);
  const Tables<A> tables(data_of<A>(all), n, width, m);
  const NormTables<A> norm(data_of<A>(all) + Tables<A>::count(n, width, m), n, width);
  const Affine<A> affine(gamma, beta);

  const Tensor dz = wanted.z ? empty_map(z, info) : empty_strided({0}, {1}, z, dtype_code(z));
  const Tensor dshortcut = wanted.shortcut ? empty_map(z, info) : empty_strided({0}, {1}, z, dtype_code(z));
  const Tensor dgamma = empty_table<A>(z, {wanted.affine ? width : 0});
  const Tensor dbeta = empty_table<A>(z, {wanted.affine ? width : 0});
  const bool need_p = wanted.z || wanted.affine;
  CellGradientPass<A> cell({dh, dc, h, c, new_c, tables, w, n, width, tanh_output}, z, dy.has_value(), need_p,
                           wanted.state, wanted.parameters);
  const Tensor scratch = empty_table<A>(z, {4 * n * width + 3 * width});
  A *s0 = data_of<A>(scratch), *s1 = s0 + n * width, *scale = s1 + n * width, *offset = scale + n * width,
    *sum_beta = offset + n * width, *sum_gamma = sum_beta + width, *slope = sum_gamma + width;
  if (!dy) std::fill(s0, s0 + 2 * n * width, A(0));

  const Map<T> g = wanted.shortcut ? map_writer<T>(dshortcut, info) : Map<T>{};
  const ReduceNormGradient<T> reduce{info.shape, dy_reader.map, y_reader.map, z_reader.map, g, norm.shift, s0, s1};
  const bool reread = dy && wanted.shortcut;
  const Map<const T> source = reread ? Map<const T>{g.data, g.strides} : dy_reader.map;
  const Map<const T> mask = reread ? Map<const T>{} : y_reader.map;
  const Map<T> to = wanted.z ? map_writer<T>(dz, info) : Map<T>{};

  // From the sums over a sample's positions to the gradients of the cell.
  const auto first = [&](Chunk chunk) {
    if (dy) {
      run_reduce(reduce, chunk);
      for_samples(chunk, width, [&](int64_t a, int64_t b) {
        for (int64_t k = a; k < b; ++k)
          for (int64_t ch = 0; ch < width; ++ch) {
            const int64_t at = k * width + ch;
            s1[at] = norm.rstd[ch] * (s1[at] - norm.d[ch] * s0[at]);
            cell.dscale[at] = affine.gamma(ch) * s1[at] + affine.beta(ch) * s0[at];
          }
      });
    }
    if (cell.needed()) cell.run(chunk, 1.0);
  };
  // Sums over the samples; then what the second sweep adds to each channel of a sample.
  const auto channel_sums = [&] {
    for_table_columns(n, width, [&](int64_t begin, int64_t end) {
      for (int64_t ch = begin; ch < end; ++ch) {
        double b = 0, a = 0;
        for (int64_t k = 0; k < n; ++k) {
          const int64_t at = k * width + ch;
          const double hh = static_cast<double>(cell.new_h[at]), dp = static_cast<double>(cell.dp[at]);
          b += hh * static_cast<double>(s0[at]) + dp;
          a += hh * static_cast<double>(s1[at]) + dp * static_cast<double>(norm.off[at] * norm.rstd[ch]);
        }
        sum_beta[ch] = static_cast<A>(b);
        sum_gamma[ch] = static_cast<A>(a);
      }
    });
    if (!wanted.affine) return;
    std::copy(sum_beta, sum_beta + width, data_of<A>(dbeta));
    std::copy(sum_gamma, sum_gamma + width, data_of<A>(dgamma));
  };
  const auto scales = [&](Chunk chunk) {
    for_samples(chunk, width, [&](int64_t a, int64_t b) {
      for (int64_t k = a; k < b; ++k)
        for (int64_t ch = 0; ch < width; ++ch) {
          const int64_t at = k * width + ch;
          const A factor = affine.gamma(ch) * norm.rstd[ch];
          A pooled = cell.dp[at] / static_cast<A>(positions);
          if (batch) pooled += (norm.d[ch] * norm.rstd[ch] * sum_gamma[ch] - sum_beta[ch]) / static_cast<A>(count);
          scale[at] = factor * cell.new_h[at];
          offset[at] = factor * pooled;
        }
    });
  };

  if (batch) {
    for_chunks(n, 0, 0, first);
    if (need_p) channel_sums();
    if (wanted.z) {
      for (int64_t ch = 0; ch < width; ++ch)
        slope[ch] = -affine.gamma(ch) * norm.rstd[ch] * norm.rstd[ch] * sum_gamma[ch] / static_cast<A>(count);
      const SpreadNormGradient<T> spread{info.shape, source, mask, z_reader.map, to, norm.shift, scale, slope, offset};
      for_chunks(n, 0, 0, [&](Chunk chunk) {
        scales(chunk);
        run_spread(spread, chunk);
      });
    }
  } else {
    const int64_t sample_bytes =
        width * info.shape.positions * static_cast<int64_t>(sizeof(T)) * (reread || !y_reader.map.data ? 1 : 2);
    const SpreadGradient<T> spread{info.shape, source, mask, to, scale, offset};
    for_chunks(n, sample_bytes, weight_bytes<A>(width, m), [&](Chunk chunk) {
      first(chunk);
      if (!wanted.z) return;
      scales(chunk);
      run_spread_gradient(spread, chunk);
    });
    if (wanted.affine) channel_sums();
  }
  if (wanted.shortcut && !dy) torch::stable::fill_(dshortcut, 0.0);
  const ParameterGradients<A> d = cell.parameters(z);
  return {dz, dshortcut, cell.old_dh, cell.old_dc, dgamma, dbeta, d.w1, d.b1, d.w2, d.b2, d.v1, d.a1, d.v2, d.a2};
}

TailGradients tail_backward(OptionalTensor dy, OptionalTensor dh, OptionalTensor dc, Tensor z, OptionalTensor y,
                            OptionalTensor h, OptionalTensor c, Tensor new_c, Tensor tables, OptionalTensor gamma,
                            OptionalTensor beta, Tensor w1, Tensor w2, Tensor v1, Tensor v2, int64_t channel_dim,
                            bool relu, bool tanh_output, bool batch, bool need_z, bool need_shortcut, bool need_state,
                            bool need_parameters, bool need_affine) {
  const MapInfo info = map_info(z, channel_dim);
  const Weights w{w1, w2, v1, v2};
  check_step_gradient(dy, dh, dc, z, info, y, h, c, new_c, tables,
                      NormTables<float>::count(info.shape.samples, info.shape.channels), w, relu);
  check_norm(z, info, gamma, beta, std::nullopt, std::nullopt);
  return with_map_type(z, [&]<class T>() {
    return run_tail_backward<T>(dy, dense(dh), dense(dc), z, relu ? y : std::nullopt, dense(h), dense(c), dense(new_c),
                                dense(tables), gamma, beta, w, info, tanh_output, batch,
                                {need_z, need_shortcut, need_state, need_parameters, need_affine});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dia_kernels, CPU, m) {
  m.impl("tail", TORCH_BOX(&tail));
  m.impl("tail_backward", TORCH_BOX(&tail_backward));
}

}  // namespace dia::ops
