// A norm in front of the step: what it does to means and gradients, and the kernels of its tables.
//
// x = ((z - shift) - d) scale + bias, a value of each channel. `shift` is the float next to the mean and `d` the rest
// of the mean, so that nothing cancels (docs/kernels.md; arXiv:1502.03167, algorithm 1). Of a batch, in double,
// from each sample's sum about its own value f_n (core/shift.h) and its squares m2_n about its own mean:
//
//     d_n = (f_n - f_0) + sum_n / HW,  D = mean over n of d_n,  mean = f_0 + D
//     var = mean over n of (m2_n / HW + (d_n - D)^2)
//
// A float of d_n would do for values of the map, not for the means p, which are smaller by the root of HW.
//
// Those that sum over samples give a block a sector of channels and its threads a part of the samples each, added in a
// fixed order: the same bits every time.
#pragma once

#include "../core/tracked.h"
#include "machine.h"

namespace dia::kernels {

struct ChannelAffine {
  const float *shift, *d, *scale, *bias;  // (C)
};

// Where the means of x go, (N, C): those of the map itself; or where it comes from a norm, and `off` is there, those
// behind the norm's affine, with each sample's means of (z - shift) - d in `off`, which the gradient of the scale
// needs.
struct Means {
  float *p, *off;
  ChannelAffine affine;
};

// Puts the mean of x, from that of x or of z - shift.
template <class M>
DIA_DEVICE void put_mean(M& m, const Means& means, int channel, int64_t at, float mean) {
  if (means.off != nullptr) {
    const float off = mean - m.load(means.affine.d + channel);
    m.store(means.off + at, off);
    mean = off * m.load(means.affine.scale + channel) + m.load(means.affine.bias + channel);
  }
  m.store(means.p + at, mean);
}

// x h = (z - shift) (scale h) + this.
template <class M>
DIA_DEVICE float added_of(M& m, const ChannelAffine& affine, int channel, float h) {
  return m.load(affine.bias + channel) * h - m.load(affine.d + channel) * (m.load(affine.scale + channel) * h);
}

// gamma rstd, where gamma may be null for 1.
template <class M>
DIA_DEVICE float scale_of(M& m, const float* gamma, int channel, float rstd) {
  return gamma != nullptr ? m.load(gamma + channel) * rstd : rstd;
}

// What the map sends to h' through a norm, from its sums over the positions, of g and of g (z - shift). Of the latter
// the product about the mean, which norm_gradients takes, is left in its place.
DIA_DEVICE float map_gradient(float d, float scale, float bias, float sum, float& product) {
  product -= d * sum;
  return scale * product + bias * sum;
}

// Channels of a block: a sector of a table's row.
constexpr int kNormChannels = 8;

// Calls `body(channel, samples)` for the block's channels, to each of which a quarter of every warp belongs, with some
// of the samples; all threads of a block come along, with no samples where there is no such channel.
template <class M, class Body>
DIA_DEVICE void for_channels(M& m, int samples, int channels, Body body) {
  constexpr int kParts = 32 / kNormChannels;
  const int blocks = m.blocks(), block = m.block();
  for (int first = block * kNormChannels; first < channels; first += blocks * kNormChannels) {
    const int channel = first + m.lane() % kNormChannels, part = m.warp() * kParts + m.lane() / kNormChannels;
    body(channel, channel < channels ? part_of(samples, part, m.warps() * kParts) : Part{0, 0});
  }
}
// Whether this thread writes its channel's values.
template <class M>
DIA_DEVICE bool writes_channel(const M& m) {
  return m.thread() < kNormChannels;
}

// A channel's sum over the block's threads; all of them get it.
template <class M, class V, class Array>
DIA_DEVICE V sum_of_channel(M& m, const Array& scratch, V value) {
  value = m.warp_sum(value, kNormChannels);
  m.sync_block();  // the sum before may still be read
  if (m.lane() < kNormChannels) scratch[m.warp() * kNormChannels + m.lane()] = value;
  m.sync_block();
  V sum = 0;
  for (int warp = 0; warp < m.warps(); ++warp) sum += scratch[warp * kNormChannels + m.lane() % kNormChannels];
  return sum;
}
// Shared memory of a block of so many threads.
constexpr int64_t norm_shared_bytes(int threads) { return threads / 32 * kNormChannels * 8; }

// The moments of each sample's channels, (N, C): f_n, the sum about it, what rounding took off that sum, m2_n.
struct SampleMoments {
  const float *first, *sum, *rest, *squares;
};

// The mean of a sample's channel.
template <class M>
DIA_DEVICE double mean_of(M& m, const SampleMoments& of, int64_t at, int positions) {
  const double sum = static_cast<double>(m.load(of.sum + at)) + static_cast<double>(m.load(of.rest + at));
  return static_cast<double>(m.load(of.first + at)) + sum / positions;
}

// A channel's moments over all samples: f_0, what the mean is more than that, and the mean of the squares about it.
struct ChannelMoments {
  double origin, off, var;
};

// Joins those of `samples` over a block's threads, which all get them. `put(at, apart)` takes what each sample's mean
// is more than the mean.
template <class M, class Array, class Put>
DIA_DEVICE ChannelMoments join_moments(M& m, const Array& scratch, const SampleMoments& of, int all, int channels,
                                       int positions_of_one, int channel, Part samples, Put put) {
  const double positions = positions_of_one, count = positions * all;
  const double origin = channel < channels && all > 0 ? m.load(of.first + channel) : 0.0f;
  const auto about_origin = [&](int64_t at) {
    return static_cast<double>(m.load(of.sum + at)) + static_cast<double>(m.load(of.rest + at)) +
           positions * (static_cast<double>(m.load(of.first + at)) - origin);
  };
  double sum = 0;
  for (int n = samples.begin; n < samples.end; ++n) sum += about_origin(row_at(n, channels) + channel);
  const double off = sum_of_channel(m, scratch, sum) / count;
  double squares = 0;
  for (int n = samples.begin; n < samples.end; ++n) {
    const int64_t at = row_at(n, channels) + channel;
    const double about = about_origin(at), apart = about / positions - off;
    squares += static_cast<double>(m.load(of.squares + at)) + positions * apart * apart;
    put(at, apart);
  }
  return {origin, off, sum_of_channel(m, scratch, squares) / count};
}

// The unbiased variance of a sample's channel behind a norm, before its affine; of one position it is 0. In double, as
// what a cell makes of it may tell samples apart that differ by little. `of_norm`: the norm's, with its eps.
template <class M>
DIA_DEVICE void put_variance(M& m, const SampleMoments& of, double* variance, int64_t at, int positions,
                             double of_norm) {
  const double terms = positions > 1 ? positions - 1 : 1;
  m.store(variance + at, static_cast<double>(m.load(of.squares + at)) / (terms * of_norm));
}

// What a norm keeps of a batch: its buffers, moved by `factor` towards the mean and, `correction` times the biased one,
// the variance.
struct Tracked {
  float factor, correction;
  float *running_mean, *running_var;  // (C), or null
  int64_t* batches;                   // one more
};

template <class M>
DIA_DEVICE void track(M& m, const Tracked& of, bool any, int channel, float mean, float var) {
  if (any) {  // of no values there are no statistics: as in PyTorch, the batch counts, and nothing is moved
    m.store(of.running_mean + channel, moved(m.load(of.running_mean + channel), mean, of.factor));
    const float unbiased = scaled(var, of.correction);
    m.store(of.running_var + channel, moved(m.load(of.running_var + channel), unbiased, of.factor));
  }
  if (channel == 0) m.store(of.batches, m.load(of.batches) + 1);
}

// Tasks of kernels whose blocks have some channels each.
DIA_DEVICE int tasks_of_channels(int channels) { return (channels + kNormChannels - 1) / kNormChannels; }

struct BatchStatistics {
  int samples, channels, positions;
  float eps;
  SampleMoments moments;
  const float *gamma, *beta;               // (C), or null for 1 and 0
  float *off, *p;                          // (N, C): the means of (z - shift) - d, and of x
  double* variance;                        // (N, C), or null: see put_variance
  float *shift, *d, *scale, *bias, *rstd;  // (C)
  float *mean, *var;                       // (C), or null
  Tracked tracked;
};

template <class M>
DIA_DEVICE void batch_statistics(M& m, const BatchStatistics& args) {
  const auto scratch = m.template shared<double>(m.warps() * kNormChannels);
  for_channels(m, args.samples, args.channels, [&](int channel, Part samples) {
    const ChannelMoments of =
        join_moments(m, scratch, args.moments, args.samples, args.channels, args.positions, channel, samples,
                     [&](int64_t at, double apart) { m.store(args.off + at, static_cast<float>(apart)); });
    if (channel >= args.channels) return;
    const float shift = static_cast<float>(of.origin + of.off), var = static_cast<float>(of.var);
    // origin + off may itself be rounded: d from the differences.
    const double d = of.origin - static_cast<double>(shift) + of.off;
    const float rstd = 1.0f / M::sqrt(var + args.eps);
    const float scale = scale_of(m, args.gamma, channel, rstd);
    const float bias = args.beta != nullptr ? m.load(args.beta + channel) : 0.0f;
    for (int n = samples.begin; n < samples.end; ++n) {
      const int64_t at = row_at(n, args.channels) + channel;
      m.store(args.p + at, m.load(args.off + at) * scale + bias);
      if (args.variance != nullptr)
        put_variance(m, args.moments, args.variance, at, args.positions, of.var + static_cast<double>(args.eps));
    }
    if (!writes_channel(m)) return;
    m.store(args.shift + channel, shift);
    m.store(args.d + channel, static_cast<float>(d));
    m.store(args.rstd + channel, rstd);
    m.store(args.scale + channel, scale);
    m.store(args.bias + channel, bias);
    if (args.mean != nullptr) m.store(args.mean + channel, shift), m.store(args.var + channel, var);
    if (args.tracked.running_mean != nullptr)
      track(m, args.tracked, args.samples > 0 && args.positions > 0, channel, shift, var);
  });
}

// The statistics of a batch alone, for several processes to join.
struct ChannelStatistics {
  int samples, channels, positions;
  SampleMoments moments;
  double *mean, *var;  // (C)
  double* means;       // (N, C): each sample's
};

template <class M>
DIA_DEVICE void channel_statistics(M& m, const ChannelStatistics& args) {
  const auto scratch = m.template shared<double>(m.warps() * kNormChannels);
  for_channels(m, args.samples, args.channels, [&](int channel, Part samples) {
    const ChannelMoments of =
        join_moments(m, scratch, args.moments, args.samples, args.channels, args.positions, channel, samples,
                     [&](int64_t at, double apart) { m.store(args.means + at, apart); });
    if (channel >= args.channels) return;
    for (int n = samples.begin; n < samples.end; ++n) {
      const int64_t at = row_at(n, args.channels) + channel;
      m.store(args.means + at, of.origin + of.off + m.load(args.means + at));
    }
    if (!writes_channel(m)) return;
    m.store(args.mean + channel, of.origin + of.off);
    m.store(args.var + channel, of.var);
  });
}

// The same of statistics that are given, in float or in double; and of each sample's means or moments, where they are.
struct GivenStatistics {
  int samples, channels, positions;
  float eps;
  const float *mean, *var;             // (C), or null:
  const double *wide_mean, *wide_var;  // (C)
  const double* means;                 // (N, C), or null
  SampleMoments moments;               // null: not there
  const float *gamma, *beta;           // (C), or null for 1 and 0
  float *shift, *d, *scale, *bias, *rstd;
  float *off, *p;    // (N, C), as in BatchStatistics, with `means` or `moments`
  double* variance;  // (N, C), or null

  // Values that a thread each makes.
  DIA_DEVICE int64_t count() const { return off != nullptr ? row_at(samples, channels) : channels; }
};

template <class M>
DIA_DEVICE void given_statistics(M& m, const GivenStatistics& args) {
  for_elements(m, args.count(), [&](int64_t k) {
    const int channel = static_cast<int>(k % args.channels);
    const bool wide = args.wide_mean != nullptr;
    const double mean = wide ? m.load(args.wide_mean + channel) : static_cast<double>(m.load(args.mean + channel));
    const double var = wide ? m.load(args.wide_var + channel) : static_cast<double>(m.load(args.var + channel));
    const float rstd = 1.0f / M::sqrt(static_cast<float>(var + static_cast<double>(args.eps)));
    const float scale = scale_of(m, args.gamma, channel, rstd);
    const float bias = args.beta != nullptr ? m.load(args.beta + channel) : 0.0f;
    if (args.off != nullptr) {
      const double of_sample =
          args.means != nullptr ? m.load(args.means + k) : mean_of(m, args.moments, k, args.positions);
      const float off = static_cast<float>(of_sample - mean);
      m.store(args.off + k, off);
      m.store(args.p + k, off * scale + bias);
      if (args.variance != nullptr)
        put_variance(m, args.moments, args.variance, k, args.positions, var + static_cast<double>(args.eps));
    }
    if (k >= args.channels) return;
    const float shift = static_cast<float>(mean);
    m.store(args.shift + channel, shift);
    m.store(args.d + channel, static_cast<float>(mean - static_cast<double>(shift)));
    m.store(args.rstd + channel, rstd);
    m.store(args.scale + channel, scale);
    m.store(args.bias + channel, bias);
  });
}

// Gradients of gamma and beta, and what the second sweep of the gradient applies: dz = g factor + (z - shift) slope +
// offset. The slope is there with the statistics of a batch (`batch`), through which all samples are tied together, and
// where there is a variance's gradient; with that it is each sample's own.
//
// With zn = (z - mean) rstd and u the gradient of that but for what comes by way of the batch,
//
//     u = gamma (g h' + dp / HW) + 2 dvariance / (HW - 1) (zn - its mean) + dextreme in one place
//     dz = rstd (u - mean(u) - zn mean(u zn))
struct NormGradients {
  int samples, channels, positions;
  bool batch;
  const float *sum, *product, *dp, *off, *new_h;  // (N, C): sums of g and g ((z - shift) - d), dp, means, h'
  const double *dvariance, *variance;             // (N, C), or null
  const float *dextreme, *extreme;                // (N, C), or null
  const float *d, *rstd, *gamma;                  // (C); gamma null: 1
  float *dgamma, *dbeta;                          // (C)
  float *factor, *offset, *slope;                 // (N, C), (N, C), (C) or (N, C), each null where it is not wanted
};

template <class M>
DIA_DEVICE void norm_gradients(M& m, const NormGradients& args) {
  const auto scratch = m.template shared<double>(m.warps() * kNormChannels);
  for_channels(m, args.samples, args.channels, [&](int channel, Part samples) {
    float by_scale = 0, by_bias = 0;
    for (int n = samples.begin; n < samples.end; ++n) {
      const int64_t at = row_at(n, args.channels) + channel;
      const float h = m.load(args.new_h + at), dp = m.load(args.dp + at);
      by_scale += h * m.load(args.product + at) + dp * m.load(args.off + at);
      by_bias += h * m.load(args.sum + at) + dp;
    }
    const bool there = channel < args.channels, first = there && writes_channel(m);
    const float rstd = there ? m.load(args.rstd + channel) : 1.0f;
    const float dgamma = sum_of_channel(m, scratch, by_scale) * rstd, dbeta = sum_of_channel(m, scratch, by_bias);
    if (first) {
      m.store(args.dgamma + channel, dgamma);
      m.store(args.dbeta + channel, dbeta);
    }
    if (args.offset == nullptr) return;
    const bool has_variance = args.dvariance != nullptr, has_extreme = args.dextreme != nullptr;
    float of_u = 0, of_u_zn = 0;  // what the statistics add to the sums of u and u zn
    if (args.batch && (has_variance || has_extreme)) {
      DIA_NO_UNROLL
      for (int n = samples.begin; n < samples.end; ++n) {
        const int64_t at = row_at(n, args.channels) + channel;
        const float sent = has_extreme ? m.load(args.dextreme + at) : 0.0f;
        of_u += sent;
        if (has_extreme) of_u_zn += sent * m.load(args.extreme + at);
        if (has_variance)
          of_u_zn +=
              2.0f * static_cast<float>(m.load(args.dvariance + at)) * static_cast<float>(m.load(args.variance + at));
      }
      of_u = sum_of_channel(m, scratch, of_u), of_u_zn = sum_of_channel(m, scratch, of_u_zn);
    }
    if (!there) return;
    const float positions = static_cast<float>(args.positions), scale = scale_of(m, args.gamma, channel, rstd);
    const float d = m.load(args.d + channel);
    float common = 0, slope = 0;
    if (args.batch) {
      const float count = positions * static_cast<float>(args.samples);
      slope = -rstd * (scale * dgamma + rstd * of_u_zn) / count;
      common = -(scale * dbeta + rstd * of_u) / count - slope * d;
      if (first && !has_variance) m.store(args.slope + channel, slope);
    }
    const float twice = 2.0f / (positions > 1.0f ? positions - 1.0f : 1.0f) * rstd * rstd;
    for (int n = samples.begin; n < samples.end; ++n) {
      const int64_t at = row_at(n, args.channels) + channel;
      float offset = scale * m.load(args.dp + at) / positions + common;
      if (has_variance) {
        const float own = twice * static_cast<float>(m.load(args.dvariance + at));
        offset -= own * (m.load(args.off + at) + d);
        m.store(args.slope + at, slope + own);
      }
      m.store(args.offset + at, offset);
      if (args.factor != nullptr) m.store(args.factor + at, scale * m.load(args.new_h + at));
    }
  });
}

// What the second sweep applies to a map behind a norm, y = act((z - shift) factor + added + shortcut), from a scale
// that no kernel here made.
struct NormFactors {
  int samples, channels;
  const float* h;                        // (N, C)
  const float *d, *rstd, *gamma, *beta;  // (C); gamma and beta null: 1 and 0
  float *factor, *added;                 // (N, C)
};

template <class M>
DIA_DEVICE void norm_factors(M& m, const NormFactors& args) {
  for_elements(m, row_at(args.samples, args.channels), [&](int64_t k) {
    const int channel = static_cast<int>(k % args.channels);
    const float h = m.load(args.h + k), factor = scale_of(m, args.gamma, channel, m.load(args.rstd + channel)) * h;
    const float bias = args.beta != nullptr ? m.load(args.beta + channel) : 0.0f;
    m.store(args.factor + k, factor);
    m.store(args.added + k, bias * h - m.load(args.d + channel) * factor);
  });
}

// The gradient of such a scale, from the first sweep's sums, of g and of g (z - shift): of the latter the product about
// the mean is left in its place. The second sweep needs the scale too: it is put beside them.
struct ScaleGradients {
  int samples, channels;
  const float *h, *sum;                  // (N, C): the scale; sums of g
  const float *d, *rstd, *gamma, *beta;  // (C); gamma and beta null: 1 and 0
  float *product, *dscale, *h_again;     // (N, C)
};

template <class M>
DIA_DEVICE void scale_gradients(M& m, const ScaleGradients& args) {
  for_elements(m, row_at(args.samples, args.channels), [&](int64_t k) {
    const int channel = static_cast<int>(k % args.channels);
    const float scale = scale_of(m, args.gamma, channel, m.load(args.rstd + channel));
    const float bias = args.beta != nullptr ? m.load(args.beta + channel) : 0.0f;
    float product = m.load(args.product + k);
    m.store(args.dscale + k, map_gradient(m.load(args.d + channel), scale, bias, m.load(args.sum + k), product));
    m.store(args.product + k, product);
    m.store(args.h_again + k, m.load(args.h + k));
  });
}

// What the second sweep of a gradient applies, dz = g factor + (z - shift) slope + offset, behind a norm of several
// processes: from the gradients of beta and gamma by all of them, divided by the number of values.
struct SharedNormGradients {
  int samples, channels, positions;
  const float *new_h, *dp;          // (N, C)
  const float *d, *rstd, *gamma;    // (C); gamma null: 1
  const float *of_beta, *of_gamma;  // (C)
  float *factor, *offset, *slope;   // (N, C), (N, C), (C)
};

template <class M>
DIA_DEVICE void shared_norm_gradients(M& m, const SharedNormGradients& args) {
  for_elements(m, row_at(args.samples, args.channels), [&](int64_t k) {
    const int channel = static_cast<int>(k % args.channels);
    const float rstd = m.load(args.rstd + channel);
    const float scale = scale_of(m, args.gamma, channel, rstd);
    const float slope = -scale * rstd * m.load(args.of_gamma + channel);
    const float common = -scale * m.load(args.of_beta + channel) - slope * m.load(args.d + channel);
    m.store(args.factor + k, scale * m.load(args.new_h + k));
    m.store(args.offset + k, scale * m.load(args.dp + k) / static_cast<float>(args.positions) + common);
    if (k < args.channels) m.store(args.slope + channel, slope);
  });
}

}  // namespace dia::kernels
