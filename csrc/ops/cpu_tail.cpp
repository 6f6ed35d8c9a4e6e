// The operators of the tail with its batch norm folded in, on the CPU: y = act(bn(z) h' + shortcut).
//
// Norm statistics and the pooled p follow from the same moments of z, so norm, attention, shortcut and activation are
// two sweeps forward and two backward (docs/kernels.md, the tail). With batch statistics all samples meet between the
// sweeps; with given ones each chunk goes through both, as in the step.
#include <cmath>
#include <optional>
#include <tuple>

#include "../core/tracked.h"
#include "cpu_cell.h"

namespace dia::ops {
namespace {

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

// Given statistics, in float64 or in the compute dtype.
template <class A>
void copy_statistics(const Tensor& table, double* to) {
  const Tensor from = dense(table);
  if (from.scalar_type() == ScalarType::Double)
    std::copy_n(data_of<double>(from), from.numel(), to);
  else
    std::copy_n(data_of<A>(from), from.numel(), to);
}

using TailResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
TailResult run_tail(const Tensor& z, const MapInfo& info, const OptionalTensor& shortcut, const OptionalTensor& h,
                    const OptionalTensor& c, const OptionalTensor& gamma, const OptionalTensor& beta,
                    const OptionalTensor& given_mean, const OptionalTensor& given_var,
                    const OptionalTensor& sample_means, double eps, const Parameters& w, bool relu, bool tanh_output) {
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
  const auto result = [&] { return TailResult{y, new_h, new_c, all, mean, var, empty_mask(false, z, info)}; };
  if (batch) {
    map_kernels<T>().choose_shift(z_reader.map, info.shape, first_shift);
    const Moments<T> moments{info.shape, z_reader.map, first_shift, d1, m2};
    for_chunks(n, 0, 0, [&](Chunk chunk) { run_moments(moments, chunk); });
    batch_statistics<A>(d1, m2, first_shift, info.shape, means, variances);
    use_statistics();
    std::transform(means, means + width, data_of<A>(mean), [](double v) { return static_cast<A>(v); });
    std::transform(variances, variances + width, data_of<A>(var), [](double v) { return static_cast<A>(v); });
    for_chunks(n, 0, 0, [&](Chunk chunk) { finish(chunk, first_shift); });
    return result();
  }
  copy_statistics<A>(*given_mean, means);
  copy_statistics<A>(*given_var, variances);
  use_statistics();
  if (sample_means) {
    std::copy_n(data_of<double>(*sample_means), n * width, d1);
    std::fill_n(first_shift, width, A(0));
    for_chunks(n, 0, 0, [&](Chunk chunk) { finish(chunk, first_shift); });
  } else {
    const Moments<T> moments{info.shape, z_reader.map, norm.shift, d1, m2};
    const int64_t sample_bytes = width * info.shape.positions * static_cast<int64_t>(sizeof(T));
    for_chunks(n, sample_bytes, weight_bytes<A>(width, m), [&](Chunk chunk) {
      run_moments(moments, chunk);
      finish(chunk, norm.shift);
    });
  }
  return result();
}

// A tail's arguments, checked.
TailResult checked_tail(const Tensor& z, const OptionalTensor& shortcut, const OptionalTensor& h,
                        const OptionalTensor& c, const OptionalTensor& gamma, const OptionalTensor& beta,
                        const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& means, double eps,
                        const Parameters& w, int64_t channel_dim, bool relu, bool tanh_output, bool keep_mask) {
  const MapInfo info = map_info(z, channel_dim);
  check_step(z, info, shortcut, h, c, w);
  check_norm(z, info, gamma, beta, mean, var);
  if (means) check_means(*means, z, info);
  check_no_mask(keep_mask);
  return with_map_type(z, [&]<class T>() {
    return run_tail<T>(z, info, shortcut, dense(h), dense(c), gamma, beta, mean, var, dense(means), eps, w, relu,
                       tanh_output);
  });
}

TailResult tail(Tensor z, OptionalTensor shortcut, OptionalTensor h, OptionalTensor c, OptionalTensor gamma,
                OptionalTensor beta, OptionalTensor mean, OptionalTensor var, double eps, Tensor w1, Tensor b1,
                Tensor w2, Tensor b2, Tensor v1, Tensor a1, Tensor v2, Tensor a2, int64_t channel_dim, bool relu,
                bool tanh_output, bool keep_mask) {
  return checked_tail(z, shortcut, h, c, gamma, beta, mean, var, std::nullopt, eps, {w1, b1, w2, b2, v1, a1, v2, a2},
                      channel_dim, relu, tanh_output, keep_mask);
}

// With the statistics of the batch, towards which the norm's buffers are moved.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tail_tracking(
    Tensor z, OptionalTensor shortcut, OptionalTensor h, OptionalTensor c, OptionalTensor gamma, OptionalTensor beta,
    Tensor running_mean, Tensor running_var, Tensor batches, double factor, double eps, Tensor w1, Tensor b1, Tensor w2,
    Tensor b2, Tensor v1, Tensor a1, Tensor v2, Tensor a2, int64_t channel_dim, bool relu, bool tanh_output,
    bool keep_mask) {
  const MapInfo info = map_info(z, channel_dim);
  check_tracked({running_mean, running_var, batches, factor}, z, info,
                {z, shortcut, h, c, gamma, beta, w1, b1, w2, b2, v1, a1, v2, a2});
  const auto [y, new_h, new_c, tables, mean, var, mask] =
      checked_tail(z, shortcut, h, c, gamma, beta, std::nullopt, std::nullopt, std::nullopt, eps,
                   {w1, b1, w2, b2, v1, a1, v2, a2}, channel_dim, relu, tanh_output, keep_mask);
  const auto move = [&](const Tensor& buffer, const Tensor& to, float scale) {
    float* at = data_of<float>(buffer);
    const float* values = data_of<float>(to);
    for (int64_t k = 0; k < buffer.numel(); ++k)
      at[k] = moved(at[k], scaled(values[k], scale), static_cast<float>(factor));
  };
  const double count = static_cast<double>(info.shape.samples) * static_cast<double>(info.shape.positions);
  move(running_mean, mean, 1.0f), move(running_var, var, static_cast<float>(correction_of(count)));
  ++*data_of<int64_t>(batches);
  return {y, new_h, new_c, tables, mask};
}

// With statistics over several processes, and the means of the samples here.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tail_join(
    Tensor z, OptionalTensor shortcut, OptionalTensor h, OptionalTensor c, OptionalTensor gamma, OptionalTensor beta,
    Tensor mean, Tensor var, Tensor means, double eps, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor v1, Tensor a1,
    Tensor v2, Tensor a2, int64_t channel_dim, bool relu, bool tanh_output, bool keep_mask) {
  const auto [y, new_h, new_c, tables, none, nothing, mask] =
      checked_tail(z, shortcut, h, c, gamma, beta, mean, var, means, eps, {w1, b1, w2, b2, v1, a1, v2, a2}, channel_dim,
                   relu, tanh_output, keep_mask);
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

// The map where it is wanted, else an empty tensor.
Tensor map_if(bool wanted, const Tensor& like, const MapInfo& info) {
  return wanted ? empty_map(like, info) : empty_strided({0}, {1}, like, dtype_code(like));
}

// What the second sweep reads: g, or dy with the y that masks it, and z. Absent ones have no data.
template <class T>
struct Sources {
  Map<const T> dy, y, z;
};

// The first sweep of the gradient: reads dy, y and z, writes g = dy masked (the shortcut's gradient), and goes on from
// the sums over a sample's positions through the cell to dp.
template <class T>
class Reduction {
  using A = Compute<T>;

 public:
  Reduction(const GivenGradient& given, bool need_p, bool need_shortcut, bool need_state, WantedParameters parameters)
      : dshortcut(map_if(need_shortcut, given.z, given.info)),
        cell({given.dh, given.dc, given.h, given.c, given.new_c, given.cell_tables<A>(), given.weights, given.samples(),
              given.width(), given.tanh_output},
             given.z, given.dy.has_value(), need_p, need_state, parameters),
        has_dy_(given.dy.has_value()),
        has_positions_(given.info.shape.positions > 0),
        samples_(given.samples()),
        width_(given.width()),
        norm_(given.tables, samples_, width_),
        affine_(given.gamma, given.beta),
        dy_(given.dy, given.info),
        y_(has_dy_ ? given.y : std::nullopt, given.info),
        z_(given.z, given.info),
        sums_(empty_table<A>(given.z, {2 * samples_ * width_})),
        reduce_{given.info.shape,
                dy_.map,
                y_.map,
                z_.map,
                need_shortcut ? map_writer<T>(dshortcut, given.info) : Map<T>{},
                norm_.shift,
                data_of<A>(sums_),
                data_of<A>(sums_) + samples_ * width_} {
    if (has_dy_) return;
    std::fill(reduce_.s0, reduce_.s0 + 2 * samples_ * width_, A(0));
    if (need_shortcut) torch::stable::fill_(dshortcut, 0.0);
  }

  void run(Chunk chunk) {
    if (has_dy_) {
      run_reduce(reduce_, chunk);
      for_samples(chunk, width_, [&](int64_t a, int64_t b) {
        for (int64_t k = a; k < b; ++k)
          for (int64_t ch = 0; ch < width_; ++ch) {
            const int64_t at = k * width_ + ch;
            A &s0 = reduce_.s0[at], &s1 = reduce_.s1[at];
            s1 = norm_.rstd[ch] * (s1 - norm_.d[ch] * s0);
            cell.dscale[at] = affine_.gamma(ch) * s1 + affine_.beta(ch) * s0;
          }
      });
    }
    if (cell.needed()) cell.run(chunk, 1.0);
  }

  // Sums over the samples: the gradients of the norm's bias and weight. Without positions p is the mean of no values,
  // and what it is told goes nowhere.
  void channel_sums(A* dbeta, A* dgamma) const {
    const int64_t samples = has_positions_ ? samples_ : 0;
    for_table_columns(samples_, width_, [&](int64_t begin, int64_t end) {
      for (int64_t ch = begin; ch < end; ++ch) {
        double b = 0, a = 0;
        for (int64_t k = 0; k < samples; ++k) {
          const int64_t at = k * width_ + ch;
          const double hh = static_cast<double>(cell.new_h[at]), dp = static_cast<double>(cell.dp[at]);
          b += hh * static_cast<double>(reduce_.s0[at]) + dp;
          a += hh * static_cast<double>(reduce_.s1[at]) + dp * static_cast<double>(norm_.off[at] * norm_.rstd[ch]);
        }
        dbeta[ch] = static_cast<A>(b);
        dgamma[ch] = static_cast<A>(a);
      }
    });
  }

  // Of the second sweep: what was written as g need not be made again from dy and y.
  Sources<T> sources() const {
    if (has_dy_ && reduce_.g.data != nullptr) return {{reduce_.g.data, reduce_.g.strides}, {}, z_.map};
    return {dy_.map, y_.map, z_.map};
  }

  Tensor dshortcut;
  CellGradientPass<A> cell;

 private:
  bool has_dy_, has_positions_;
  int64_t samples_, width_;
  NormTables<A> norm_;
  Affine<A> affine_;
  OptionalMapReader<T> dy_, y_;
  MapReader<T> z_;
  Tensor sums_;
  ReduceNormGradient<T> reduce_;
};

// The second sweep: reads g and, with batch statistics, z; writes dz.
template <class T>
class Spreading {
  using A = Compute<T>;

 public:
  // `shares`: dbeta and dgamma divided by the number of a channel's values; null where the statistics were given.
  Spreading(const Sources<T>& sources, const Tensor& z, const MapInfo& info, const Tensor& tables,
            const OptionalTensor& gamma, const A* new_h, const A* dp, const A* shares)
      : dz(empty_map(z, info)),
        sources_(sources),
        shape_(info.shape),
        new_h_(new_h),
        dp_(dp),
        shares_(shares),
        norm_(tables, shape_.samples, shape_.channels),
        affine_(gamma, std::nullopt),
        scratch_(empty_table<A>(z, {2 * shape_.samples * shape_.channels + shape_.channels})),
        scale_(data_of<A>(scratch_)),
        offset_(scale_ + shape_.samples * shape_.channels),
        slope_(offset_ + shape_.samples * shape_.channels),
        to_(map_writer<T>(dz, info)) {}

  // With batch statistics, once the shares are there.
  void start() {
    for (int64_t ch = 0; ch < shape_.channels; ++ch)
      slope_[ch] = -affine_.gamma(ch) * norm_.rstd[ch] * norm_.rstd[ch] * dgamma(ch);
  }

  void run(Chunk chunk) {
    const int64_t width = shape_.channels;
    const A positions = static_cast<A>(shape_.positions);
    for_samples(chunk, width, [&](int64_t a, int64_t b) {
      for (int64_t k = a; k < b; ++k)
        for (int64_t ch = 0; ch < width; ++ch) {
          const int64_t at = k * width + ch;
          const A factor = affine_.gamma(ch) * norm_.rstd[ch];
          A pooled = dp_[at] / positions;
          if (shares_ != nullptr) pooled += norm_.d[ch] * norm_.rstd[ch] * dgamma(ch) - shares_[ch];
          scale_[at] = factor * new_h_[at];
          offset_[at] = factor * pooled;
        }
    });
    const auto& [dy, y, z] = sources_;
    if (shares_ != nullptr)
      run_spread(SpreadNormGradient<T>{shape_, dy, y, z, to_, norm_.shift, scale_, slope_, offset_}, chunk);
    else
      run_spread_gradient(SpreadGradient<T>{shape_, dy, y, to_, scale_, offset_}, chunk);
  }

  Tensor dz;

 private:
  A dgamma(int64_t ch) const { return shares_[shape_.channels + ch]; }

  Sources<T> sources_;
  MapShape shape_;
  const A *new_h_, *dp_, *shares_;
  NormTables<A> norm_;
  Affine<A> affine_;
  Tensor scratch_;
  A *scale_, *offset_, *slope_;
  Map<T> to_;
};

struct Wanted {
  bool z, shortcut, state;
  WantedParameters parameters;
  bool affine;
};

using TailGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
TailGradients run_tail_backward(const GivenGradient& given, bool batch, Wanted wanted) {
  using A = Compute<T>;
  const Tensor& z = given.z;
  const MapInfo& info = given.info;
  const int64_t n = given.samples(), width = given.width();
  const double count = static_cast<double>(info.shape.positions) * static_cast<double>(n);
  Reduction<T> reduction(given, wanted.z || wanted.affine, wanted.shortcut, wanted.state, wanted.parameters);
  const auto& cell = reduction.cell;
  const Tensor sums = empty_table<A>(z, {2 * width}), shares = empty_table<A>(z, {2 * width});
  A *sum = data_of<A>(sums), *share = data_of<A>(shares);

  const Sources<T> sources = reduction.sources();
  std::optional<Spreading<T>> spreading;
  if (wanted.z)
    spreading.emplace(sources, z, info, given.tables, given.gamma, cell.new_h, cell.dp, batch ? share : nullptr);
  if (batch) {
    for_chunks(n, 0, 0, [&](Chunk chunk) { reduction.run(chunk); });
    if (wanted.z || wanted.affine) reduction.channel_sums(sum, sum + width);
    if (wanted.z) {
      std::transform(sum, sum + 2 * width, share, [count](A v) { return v / static_cast<A>(count); });
      spreading->start();
      for_chunks(n, 0, 0, [&](Chunk chunk) { spreading->run(chunk); });
    }
  } else {
    const int64_t sample_bytes =
        width * info.shape.positions * static_cast<int64_t>(sizeof(T)) * (sources.y.data == nullptr ? 1 : 2);
    for_chunks(n, sample_bytes, weight_bytes<A>(width, given.bottleneck()), [&](Chunk chunk) {
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
  return {wanted.z ? spreading->dz : map_if(false, z, info),
          reduction.dshortcut,
          cell.old_dh,
          cell.old_dc,
          dgamma,
          dbeta,
          cell.parameters()};
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

TailGradients tail_backward(OptionalTensor dy, OptionalTensor dh, OptionalTensor dc, Tensor z, OptionalTensor y,
                            OptionalTensor h, OptionalTensor c, Tensor new_c, Tensor tables, OptionalTensor gamma,
                            OptionalTensor beta, Tensor w1, Tensor w2, Tensor v1, Tensor v2, int64_t channel_dim,
                            bool relu, bool tanh_output, bool batch, bool need_z, bool need_shortcut, bool need_state,
                            bool need_parameters, bool need_affine, bool as_factors) {
  const GivenGradient given = given_gradient(dy, dh, dc, z, y, h, c, new_c, tables, gamma, beta, {w1, w2, v1, v2},
                                             channel_dim, relu, tanh_output);
  return with_map_type(z, [&]<class T>() {
    return run_tail_backward<T>(given, batch,
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
  const Moments<T> moments{info.shape, reader.map, shifts, d1, data_of<double>(squares)};
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
    Reduction<T> reduction(given, true, need_shortcut, need_state, {need_parameters, false, h});
    const auto& cell = reduction.cell;
    for_chunks(n, 0, 0, [&](Chunk chunk) { reduction.run(chunk); });
    const Tensor sums = empty_table<A>(z, {2, width}), dp = empty_table<A>(z, {n, width});
    reduction.channel_sums(data_of<A>(sums), data_of<A>(sums) + width);
    std::copy_n(cell.dp, n * width, data_of<A>(dp));
    return {sums, reduction.dshortcut, dp, cell.old_dh, cell.old_dc, cell.parameters()};
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
    Spreading<T> spreading({dy_reader.map, y_reader.map, z_reader.map}, z, info, all, gamma, data_of<A>(h),
                           data_of<A>(p), data_of<A>(share));
    spreading.start();
    for_chunks(info.shape.samples, 0, 0, [&](Chunk chunk) { spreading.run(chunk); });
    return spreading.dz;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dia_kernels, CPU, m) {
  m.impl("tail", TORCH_BOX(&tail));
  m.impl("tail_tracking_", TORCH_BOX(&tail_tracking));
  m.impl("tail_backward", TORCH_BOX(&tail_backward));
  m.impl("statistics", TORCH_BOX(&statistics));
  m.impl("tail_join", TORCH_BOX(&tail_join));
  m.impl("tail_reduce", TORCH_BOX(&tail_reduce));
  m.impl("tail_spread", TORCH_BOX(&tail_spread));
}

}  // namespace dia::ops
