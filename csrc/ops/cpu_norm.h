// A norm before the rescaling, on the CPU: the statistics, and the two sweeps each way that tails (cpu_tail.cpp) and
// their parts around any cell (cpu_norm.cpp) share. Norm statistics and the pooled p follow from the same moments of z;
// the algebra is in docs/kernels.md, the tail.
#pragma once

#include <cmath>
#include <limits>
#include <optional>

#include "../core/tracked.h"
#include "arguments.h"
#include "cpu_loops.h"

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

// Beside the moments the extremes, while the map is in the cache. With `own` (samples, channels) the moments are taken
// twice: about the shift, and then about each sample's mean, which is put there, so that each sample's variance keeps
// its digits.
template <class T>
void run_moments(const Moments<T>& args, Chunk chunk, Compute<T>* own = nullptr,
                 const std::optional<Extremes<T>>& extremes = std::nullopt) {
  constexpr int64_t kElements = 1 << 13;  // of the rows that are read again while they are in the nearest cache
  const MapShape& shape = args.shape;
  const bool all = shape.interleaved || (own == nullptr && !extremes);
  Moments<T> again = args;
  again.own = own;
  for_channel_ranges(shape, chunk, [&](int64_t n, int64_t begin, int64_t end) {
    const int64_t step = all ? end - begin : std::max<int64_t>(kElements / std::max<int64_t>(shape.positions, 1), 1);
    for (int64_t a = begin; a < end; a += step) {
      const int64_t b = std::min(a + step, end);
      map_kernels<T>().moments(args, n, a, b);
      if (own != nullptr) {
        for (int64_t c = a; c < b; ++c) {
          const int64_t at = n * shape.channels + c;
          const double mean = static_cast<double>(args.shift[c]) + args.d1[at];
          own[at] = mean - mean == 0 ? static_cast<Compute<T>>(mean) : args.shift[c];
        }
        map_kernels<T>().moments(again, n, a, b);
      }
      if (extremes) map_kernels<T>().extremes(*extremes, n, a, b);
    }
  });
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

// What a cell may want to know of the norm's result before its affine, beside the mean: of each sample and channel the
// unbiased variance, in double, as what a cell makes of it may tell samples apart that differ by little; the extreme
// value, that which the affine makes the largest, and its position. Null: not wanted.
template <class A>
struct StatisticTables {
  double* variance = nullptr;
  A* extreme = nullptr;
  int64_t* where = nullptr;
};

// Forward: the norm's tables, and p, from moments that a first sweep makes or that are given.
template <class T>
class NormForward {
  using A = Compute<T>;

 public:
  NormForward(const Map<const T>& z_map, const Tensor& z, const MapShape& shape, const OptionalTensor& gamma,
              const OptionalTensor& beta, double eps, const NormTables<A>& tables,
              const StatisticTables<A>& wanted = {})
      : affine(gamma, beta),
        norm(tables),
        z_(z_map),
        shape_(shape),
        eps_(eps),
        wanted_(wanted),
        shift_(empty_table<A>(z, {shape.channels})),
        own_(empty_table<A>(z, {wanted.variance != nullptr ? shape.samples * shape.channels : 0})),
        values_(empty_table<double>(z, {2 * shape.samples * shape.channels + 2 * shape.channels})),
        d1_(data_of<double>(values_)),
        m2_(d1_ + shape.samples * shape.channels),
        means_(m2_ + shape.samples * shape.channels),
        variances_(means_ + shape.channels),
        about_(norm.shift) {}

  // The statistics of the batch, by a sweep over all of it.
  void of_batch() {
    A* shift = data_of<A>(shift_);
    about_ = shift;
    map_kernels<T>().choose_shift(z_, shape_, shift);
    for_chunks(shape_.samples, 0, 0, [&](Chunk chunk) { take_moments(chunk, m2_); });
    batch_statistics<A>(d1_, m2_, shift, shape_, means_, variances_);
    use_statistics();
  }
  void given(const Tensor& mean, const Tensor& var) {
    copy_statistics<A>(mean, means_);
    copy_statistics<A>(var, variances_);
    use_statistics();
  }
  // With statistics that were given: the means of each sample, given too.
  void given_means(const Tensor& means) {
    A* zero = data_of<A>(shift_);
    about_ = zero;
    std::copy_n(data_of<double>(means), means.numel(), d1_);
    std::fill_n(zero, shape_.channels, A(0));
  }
  // With statistics that were given: the means of a chunk's samples, and what else is wanted, by a sweep.
  void sweep(Chunk chunk) const { take_moments(chunk, wanted_.variance != nullptr ? m2_ : nullptr); }

  // From the moments to p, what the mean of the norm's result is, and to the statistics that are wanted beside it.
  void put_means(Chunk chunk, A* p) const {
    const int64_t width = shape_.channels;
    const double terms = static_cast<double>(std::max<int64_t>(shape_.positions - 1, 1));
    for_samples(chunk, width, [&](int64_t a, int64_t b) {
      for (int64_t k = a; k < b; ++k)
        for (int64_t ch = 0; ch < width; ++ch) {
          const int64_t at = k * width + ch;
          const A rstd = norm.rstd[ch];
          norm.off[at] = static_cast<A>(d1_[at] - (means_[ch] - static_cast<double>(about_[ch])));
          p[at] = affine.gamma(ch) * rstd * norm.off[at] + affine.beta(ch);
          if (wanted_.variance != nullptr) wanted_.variance[at] = m2_[at] / terms / (variances_[ch] + eps_);
          if (wanted_.extreme != nullptr) {
            A& extreme = wanted_.extreme[at];
            extreme = ((extreme - norm.shift[ch]) - norm.d[ch]) * rstd;
          }
        }
    });
  }

  void copy_statistics_to(const Tensor& mean, const Tensor& var) const {
    const auto narrow = [](double v) { return static_cast<A>(v); };
    std::transform(means_, means_ + shape_.channels, data_of<A>(mean), narrow);
    std::transform(variances_, variances_ + shape_.channels, data_of<A>(var), narrow);
  }

  Affine<A> affine;
  NormTables<A> norm;

 private:
  void take_moments(Chunk chunk, double* squares) const {
    const int64_t width = shape_.channels;
    A* own = wanted_.variance != nullptr ? data_of<A>(own_) : nullptr;
    std::optional<Extremes<T>> extremes;
    if (wanted_.extreme != nullptr) {
      if (shape_.positions > 0) {
        extremes = Extremes<T>{shape_, z_, affine.gamma_data, wanted_.extreme, wanted_.where};
      } else {
        std::fill_n(wanted_.extreme, shape_.samples * width, std::numeric_limits<A>::quiet_NaN());
        std::fill_n(wanted_.where, shape_.samples * width, 0);
      }
    }
    run_moments(Moments<T>{shape_, z_, about_, nullptr, d1_, squares}, chunk, own, extremes);
  }
  void use_statistics() const {
    map_kernels<T>().split_mean(means_, shape_.channels, norm.shift, norm.d);
    for (int64_t ch = 0; ch < shape_.channels; ++ch)
      norm.rstd[ch] = static_cast<A>(1 / std::sqrt(variances_[ch] + eps_));
  }

  Map<const T> z_;
  MapShape shape_;
  double eps_;
  StatisticTables<A> wanted_;
  Tensor shift_, own_, values_;
  double *d1_, *m2_, *means_, *variances_;
  const A* about_;  // (C): what the moments are about
};

// The second sweep forward: y = act(norm(z) scale + shortcut).
template <class T>
class Normalising {
  using A = Compute<T>;

 public:
  Normalising(const Map<const T>& z_map, const Map<const T>& shortcut, const Map<T>& y, const Tensor& z,
              const MapShape& shape, const NormTables<A>& norm, const Affine<A>& affine, bool relu)
      : norm_(norm),
        affine_(affine),
        scratch_(empty_table<A>(z, {2 * shape.samples * shape.channels})),
        factor_(data_of<A>(scratch_)),
        offset_(factor_ + shape.samples * shape.channels),
        sweep_{shape, z_map, shortcut, y, norm.shift, factor_, offset_, relu} {}

  void run(Chunk chunk, const A* scale) const {
    const int64_t width = sweep_.shape.channels;
    for_samples(chunk, width, [&](int64_t a, int64_t b) {
      for (int64_t k = a; k < b; ++k)
        for (int64_t ch = 0; ch < width; ++ch) {
          const int64_t at = k * width + ch;
          factor_[at] = affine_.gamma(ch) * norm_.rstd[ch] * scale[at];
          offset_[at] = affine_.beta(ch) * scale[at] - norm_.d[ch] * factor_[at];
        }
    });
    run_normalise(sweep_, chunk);
  }

 private:
  NormTables<A> norm_;
  Affine<A> affine_;
  Tensor scratch_;
  A *factor_, *offset_;
  Normalise<T> sweep_;
};

// Moves a norm's buffers towards the statistics of a batch of `shape`.
inline void track(const TrackedBuffers& of, const Tensor& mean, const Tensor& var, const MapShape& shape) {
  const auto move = [&](const Tensor& buffer, const Tensor& to, float scale) {
    float* at = data_of<float>(buffer);
    const float* values = data_of<float>(to);
    for (int64_t k = 0; k < buffer.numel(); ++k)
      at[k] = moved(at[k], scaled(values[k], scale), static_cast<float>(of.factor));
  };
  const double count = static_cast<double>(shape.samples) * static_cast<double>(shape.positions);
  // Of no values there are no statistics: as in PyTorch, the batch counts, and nothing is moved.
  if (count > 0) move(of.running_mean, mean, 1.0f), move(of.running_var, var, static_cast<float>(correction_of(count)));
  ++*data_of<int64_t>(of.batches);
}

// What the second sweep reads: g, or dy with the y that masks it, and z. Absent ones have no data.
template <class T>
struct Sources {
  Map<const T> dy, y, z;
};

// The first sweep of the gradient: reads dy, y and z, writes g = dy masked (the shortcut's gradient) where it is
// wanted, and sums over a sample's positions.
template <class T>
class NormReduction {
  using A = Compute<T>;

 public:
  // `sums` (2, N, C): of g and of g (z - mean).
  NormReduction(const Sources<T>& sources, const Map<T>& g, const MapShape& shape, const NormTables<A>& norm,
                const Affine<A>& affine, A* sums)
      : norm_(norm),
        affine_(affine),
        reduce_{shape, sources.dy, sources.y, sources.z, g, norm.shift, sums, sums + shape.samples * shape.channels} {}

  // The gradient of the scale, from which the cell's goes on.
  void run(Chunk chunk, A* dscale) const {
    run_reduce(reduce_, chunk);
    const int64_t width = reduce_.shape.channels;
    for_samples(chunk, width, [&](int64_t a, int64_t b) {
      for (int64_t k = a; k < b; ++k)
        for (int64_t ch = 0; ch < width; ++ch) {
          const int64_t at = k * width + ch;
          A &s0 = reduce_.s0[at], &s1 = reduce_.s1[at];
          s1 -= norm_.d[ch] * s0;
          dscale[at] = affine_.gamma(ch) * norm_.rstd[ch] * s1 + affine_.beta(ch) * s0;
        }
    });
  }

  // Of the second sweep: what was written as g need not be made again from dy and y.
  Sources<T> sources() const {
    if (reduce_.dy.data != nullptr && reduce_.g.data != nullptr)
      return {{reduce_.g.data, reduce_.g.strides}, {}, reduce_.z};
    return {reduce_.dy, reduce_.y, reduce_.z};
  }

 private:
  NormTables<A> norm_;
  Affine<A> affine_;
  ReduceNormGradient<T> reduce_;
};

// Sums over the samples: the gradients of the norm's bias and weight. Without positions p is the mean of no values,
// and what it is told goes nowhere.
template <class A>
void norm_gradients(const MapShape& shape, const A* scale, const A* dp, const A* sums, const NormTables<A>& norm,
                    A* dbeta, A* dgamma) {
  const int64_t width = shape.channels, samples = shape.positions > 0 ? shape.samples : 0;
  const A *s0 = sums, *s1 = sums + shape.samples * width;
  for_table_columns(shape.samples, width, [&](int64_t begin, int64_t end) {
    for (int64_t ch = begin; ch < end; ++ch) {
      double b = 0, a = 0;
      for (int64_t k = 0; k < samples; ++k) {
        const int64_t at = k * width + ch;
        const double h = static_cast<double>(scale[at]), p = static_cast<double>(dp[at]);
        b += h * static_cast<double>(s0[at]) + p;
        a += h * static_cast<double>(s1[at]) + p * static_cast<double>(norm.off[at]);
      }
      dbeta[ch] = static_cast<A>(b);
      // Of no values the deviation is NaN, and the sum zero.
      dgamma[ch] = samples > 0 ? static_cast<A>(a * static_cast<double>(norm.rstd[ch])) : A(0);
    }
  });
}

// What comes to StatisticTables in the gradient, and their values. Null: not wanted, or no gradient.
template <class A>
struct StatisticGradients {
  const double *of_variance = nullptr, *variance = nullptr;
  const A *of_extreme = nullptr, *extreme = nullptr;
  const int64_t* where = nullptr;

  bool any() const { return of_variance != nullptr || of_extreme != nullptr; }
};

// The second sweep: reads g and, with batch statistics or a variance's gradient, z; writes dz.
//
// With zn = (z - mean) rstd, the norm's result before its affine, and u its gradient but for what comes by way of the
// batch's statistics: u = gamma (g h' + dp / HW) + 2 dvariance / (HW - 1) (zn - its mean) + dextreme in one place, and
// dz = rstd (u - mean(u) - zn mean(u zn)).
template <class T>
class Spreading {
  using A = Compute<T>;

 public:
  // `shares`: dbeta and dgamma divided by the number of a channel's values; null where the statistics were given.
  Spreading(const Sources<T>& sources, const Tensor& dz, const MapInfo& info, const Tensor& tables,
            const OptionalTensor& gamma, const A* new_h, const A* dp, const A* shares,
            const StatisticGradients<A>& statistics = {})
      : sources_(sources),
        shape_(info.shape),
        new_h_(new_h),
        dp_(dp),
        shares_(shares),
        statistics_(statistics),
        norm_(tables, shape_.samples, shape_.channels),
        affine_(gamma, std::nullopt),
        scratch_(empty_table<A>(dz, {(4 * shape_.samples + 3) * shape_.channels})),
        scale_(data_of<A>(scratch_)),
        offset_(scale_ + shape_.samples * shape_.channels),
        added_(offset_ + shape_.samples * shape_.channels),
        mean_u_(added_ + shape_.samples * shape_.channels),
        mean_u_zn_(mean_u_ + shape_.channels),
        slope_(mean_u_zn_ + shape_.channels),
        to_(map_writer<T>(dz, info)) {}

  // With batch statistics, once the shares are there.
  void start() {
    const double count = static_cast<double>(shape_.positions) * static_cast<double>(shape_.samples);
    for_table_columns(shape_.samples, shape_.channels, [&](int64_t begin, int64_t end) {
      for (int64_t ch = begin; ch < end; ++ch) {
        double of_u = 0, of_u_zn = 0;
        if (statistics_.any())
          for (int64_t k = 0; k < shape_.samples; ++k) add_statistics(k * shape_.channels + ch, of_u, of_u_zn);
        mean_u_[ch] = affine_.gamma(ch) * shares_[ch] + static_cast<A>(of_u / count);
        mean_u_zn_[ch] = affine_.gamma(ch) * shares_[shape_.channels + ch] + static_cast<A>(of_u_zn / count);
        slope_[ch] = -norm_.rstd[ch] * norm_.rstd[ch] * mean_u_zn_[ch];
      }
    });
  }

  void run(Chunk chunk) {
    const int64_t width = shape_.channels;
    const A positions = static_cast<A>(shape_.positions);
    const auto& [of_variance, variance, of_extreme, extreme, where] = statistics_;
    const A twice = A(2) / std::max<A>(positions - 1, 1);
    const int64_t stride = of_variance != nullptr ? width : 0;
    for_samples(chunk, width, [&](int64_t a, int64_t b) {
      for (int64_t k = a; k < b; ++k)
        for (int64_t ch = 0; ch < width; ++ch) {
          const int64_t at = k * width + ch;
          const A rstd = norm_.rstd[ch], factor = affine_.gamma(ch) * rstd;
          A offset = factor * dp_[at] / positions, slope = 0;
          if (of_variance != nullptr) {
            slope = twice * static_cast<A>(of_variance[at]) * rstd * rstd;
            offset -= slope * (norm_.off[at] + norm_.d[ch]);
          }
          if (shares_ != nullptr) {
            const A common = rstd * rstd * mean_u_zn_[ch];
            slope -= common;
            offset += common * norm_.d[ch] - rstd * mean_u_[ch];
          }
          scale_[at] = factor * new_h_[at];
          offset_[at] = offset;
          if (of_extreme != nullptr) added_[at] = rstd * of_extreme[at];
          if (stride > 0) slope_[at] = slope;
        }
    });
    const auto& [dy, y, z] = sources_;
    const bool sloping = shares_ != nullptr || of_variance != nullptr;
    const SpreadNormGradient<T> sweep{shape_,  dy,    y, z, to_, norm_.shift, scale_, sloping ? slope_ : nullptr,
                                      offset_, stride};
    if (sloping)
      run_spread(sweep, chunk);
    else
      run_spread_gradient(SpreadGradient<T>{shape_, dy, y, to_, scale_, offset_}, chunk);
    if (of_extreme != nullptr && positions > 0)
      for_samples(chunk, width, [&](int64_t a, int64_t b) {
        for (int64_t k = a; k < b; ++k) map_kernels<T>().spread_extreme_gradient({sweep, where, added_}, k, 0, width);
      });
  }

 private:
  // What the statistics add, of a sample and channel, to the sums over all positions of u and of u zn.
  void add_statistics(int64_t at, double& of_u, double& of_u_zn) const {
    const auto& [of_variance, variance, of_extreme, extreme, where] = statistics_;
    if (of_variance != nullptr) of_u_zn += 2 * of_variance[at] * variance[at];
    if (of_extreme == nullptr) return;
    of_u += static_cast<double>(of_extreme[at]);
    of_u_zn += static_cast<double>(of_extreme[at]) * static_cast<double>(extreme[at]);
  }

  Sources<T> sources_;
  MapShape shape_;
  const A *new_h_, *dp_, *shares_;
  StatisticGradients<A> statistics_;
  NormTables<A> norm_;
  Affine<A> affine_;
  Tensor scratch_;
  A *scale_, *offset_, *added_, *mean_u_, *mean_u_zn_, *slope_;
  Map<T> to_;
};

}  // namespace
}  // namespace dia::ops
