// The sweeps of the tail with its batch norm folded in: two forward, two backward, each map read or written once in
// each. The algebra is in docs/kernels.md; here are the loops over a map, and what is small (statistics, cell) is not.
//
// Bytes: forward reads z, then z and the shortcut, and writes y. Backward reads dy, y and z and writes g (the
// shortcut's gradient), then reads g and z and writes dz.
#pragma once

#include "../core/shift.h"
#include "rows.h"

namespace dia::cpu::DIA_ISA {
namespace {

// A table read at a channel: one value for a planar row, lanes of it for an interleaved one.
template <class A, bool interleaved>
struct PerChannel {
  const A* table;  // at the row's first channel
  Vector<A> constant;

  // Interleaved, there may be no channel.
  explicit PerChannel(const A* at) : table(at), constant(splat(interleaved ? A(0) : *at)) {}
  Vector<A> lanes(int64_t k) const {
    if constexpr (interleaved) return load(table + k);
    return constant;
  }
  A scalar(int64_t k) const { return interleaved ? table[k] : *table; }
};

// What the moments are taken about: a value of each channel, out of three samples (core/shift.h).
template <class T>
void choose_shift(const Map<const T>& z, const MapShape& shape, Compute<T>* shift) {
  for (int64_t c = 0; c < shape.channels; ++c) {
    shift[c] = 0;
    if (shape.samples == 0 || shape.positions == 0) continue;
    Compute<T> values[3];
    for (int k = 0; k < 3; ++k) {
      const int64_t sample = (shape.samples - 1) * k / 2, place = shift_place(shape.positions, k);
      const T* at = z.data + sample * z.strides.sample;
      values[k] = widen(shape.interleaved ? at[place * z.strides.row + c] : at[c * z.strides.row + place]);
    }
    shift[c] = shift_of(values[0], values[1], values[2]);
  }
}

template <class T>
void split_mean(const double* mean, int64_t channels, Compute<T>* shift, Compute<T>* d) {
  using A = Compute<T>;
  for (int64_t c = 0; c < channels; ++c) {
    T rounded;
    narrow(static_cast<A>(mean[c]), &rounded);
    shift[c] = widen(rounded);
    // A mean from elsewhere may lie beyond the range of float16.
    if (!(shift[c] - shift[c] == 0)) shift[c] = static_cast<A>(mean[c]);
    d[c] = static_cast<A>(mean[c] - static_cast<double>(shift[c]));
  }
}

template <class T, bool squares>
inline void moments_of_channels(const Moments<T>& k, int64_t sample, int64_t begin, int64_t end) {
  using A = Compute<T>;
  constexpr int count = squares ? 2 : 1;
  const int64_t table = sample * k.shape.channels;
  const A* about = k.own != nullptr ? k.own + table : k.shift;
  // From sums about the own shift, which is `apart` from the common one.
  const auto finish = [&](int64_t c, const double* totals) {
    const double apart = static_cast<double>(about[c]) - static_cast<double>(k.shift[c]);
    const double mean = totals[0] / static_cast<double>(k.shape.positions);
    k.d1[table + c] = apart + mean;
    if constexpr (squares) {
      const double about_mean = totals[1] - totals[0] * mean;
      k.m2[table + c] = about_mean < 0 ? 0 : about_mean;
    }
  };
  if (!k.shape.interleaved) {
    for (int64_t c = begin; c < end; ++c) {
      const T* z = row_of(k.z, sample, c);
      const A shift = about[c];
      double totals[count] = {};
      sum_row<A, count>(
          k.shape.positions, totals,
          [&](int64_t i, Vector<A>* sums) {
            const Vector<A> v = load(z + i) - shift;
            sums[0] += v;
            if constexpr (squares) sums[1] += v * v;
          },
          [&](int64_t i, double* sums) {
            const double v = widen(z[i]) - shift;
            sums[0] += v;
            if constexpr (squares) sums[1] += v * v;
          });
      finish(c, totals);
    }
    return;
  }
  sum_columns<A, count>(
      k.shape.positions, begin, end,
      [&](int64_t row, int64_t first) {
        const T* z = row_of(k.z, sample, row, first);
        const A* shift = about + first;
        return [=](int64_t c, auto* sums) {
          using V = std::remove_pointer_t<decltype(sums)>;
          const V v = values_at<V>(z + c) - values_at<V>(shift + c);
          sums[0] += v;
          if constexpr (squares) sums[1] += v * v;
        };
      },
      finish);
}

template <class T>
void moments(const Moments<T>& k, int64_t sample, int64_t begin, int64_t end) {
  k.m2 != nullptr ? moments_of_channels<T, true>(k, sample, begin, end)
                  : moments_of_channels<T, false>(k, sample, begin, end);
}

template <class T, bool interleaved, bool has_shortcut, bool with_relu>
inline void normalise_rows(const Normalise<T>& k, int64_t sample, int64_t begin, int64_t end) {
  using A = Compute<T>;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t channel = interleaved ? 0 : row, entry = sample * k.shape.channels + channel;
    const PerChannel<A, interleaved> shift(k.shift + channel), scale(k.scale + entry), offset(k.offset + entry);
    const T *z = row_of(k.z, sample, row), *shortcut = has_shortcut ? row_of(k.shortcut, sample, row) : nullptr;
    T* y = row_of(k.y, sample, row);
    for_row<A>(
        0, k.shape.row_length(),
        [&](int64_t i) {
          Vector<A> v = (load(z + i) - shift.lanes(i)) * scale.lanes(i) + offset.lanes(i);
          if constexpr (has_shortcut) v += load(shortcut + i);
          if constexpr (with_relu) v = relu<A>(v);
          store(v, y + i);
        },
        [&](int64_t i) {
          A v = (widen(z[i]) - shift.scalar(i)) * scale.scalar(i) + offset.scalar(i);
          if constexpr (has_shortcut) v += widen(shortcut[i]);
          if constexpr (with_relu) v = relu<A>(v);
          narrow(v, y + i);
        });
  }
}

// Calls `body` with the flags as constants.
template <class Body>
inline void with_flags(bool a, bool b, bool c, Body body) {
  const auto with_two = [&](auto first) {
    const auto with_one = [&](auto second) {
      c ? body(first, second, std::true_type{}) : body(first, second, std::false_type{});
    };
    b ? with_one(std::true_type{}) : with_one(std::false_type{});
  };
  a ? with_two(std::true_type{}) : with_two(std::false_type{});
}

template <class T>
void normalise(const Normalise<T>& k, int64_t sample, int64_t begin, int64_t end) {
  if (begin == end) return;
  with_flags(k.shape.interleaved, k.shortcut.data != nullptr, k.relu,
             [&](auto interleaved, auto has_shortcut, auto with_relu) {
               normalise_rows<T, interleaved(), has_shortcut(), with_relu()>(k, sample, begin, end);
             });
}

template <class T, bool with_relu, bool write>
inline void reduce_norm_channels(const ReduceNormGradient<T>& k, int64_t sample, int64_t begin, int64_t end) {
  using A = Compute<T>;
  A *s0 = k.s0 + sample * k.shape.channels, *s1 = k.s1 + sample * k.shape.channels;
  if (!k.shape.interleaved) {
    for (int64_t c = begin; c < end; ++c) {
      const T *dy = row_of(k.dy, sample, c), *y = row_of(k.y, sample, c), *z = row_of(k.z, sample, c);
      T* to = row_of(k.g, sample, c);
      const A shift = k.shift[c];
      double totals[2] = {};
      sum_row<A, 2>(
          k.shape.positions, totals,
          [&](int64_t i, Vector<A>* sums) {
            const Vector<A> g = gradient_vector<T, with_relu, write>(dy, y, to, i);
            sums[0] += g;
            sums[1] += g * (load(z + i) - shift);
          },
          [&](int64_t i, double* sums) {
            const A g = gradient_scalar<T, with_relu, write>(dy, y, to, i);
            sums[0] += g;
            sums[1] += g * (widen(z[i]) - shift);
          });
      s0[c] = static_cast<A>(totals[0]);
      s1[c] = static_cast<A>(totals[1]);
    }
    return;
  }
  sum_columns<A, 2>(
      k.shape.positions, begin, end,
      [&](int64_t row, int64_t first) {
        const T *dy = row_of(k.dy, sample, row, first), *y = row_of(k.y, sample, row, first);
        const T* z = row_of(k.z, sample, row, first);
        T* to = row_of(k.g, sample, row, first);
        const A* shift = k.shift + first;
        return [=](int64_t c, auto* sums) {
          using V = std::remove_pointer_t<decltype(sums)>;
          const V g = gradient_at<V, T, with_relu, write>(dy, y, to, c);
          sums[0] += g;
          sums[1] += g * (values_at<V>(z + c) - values_at<V>(shift + c));
        };
      },
      [&](int64_t c, const double* totals) {
        s0[c] = static_cast<A>(totals[0]);
        s1[c] = static_cast<A>(totals[1]);
      });
}

template <class T>
void reduce_norm_gradient(const ReduceNormGradient<T>& k, int64_t sample, int64_t begin, int64_t end) {
  const bool write = k.g.data != nullptr;
  if (k.y.data != nullptr)
    write ? reduce_norm_channels<T, true, true>(k, sample, begin, end)
          : reduce_norm_channels<T, true, false>(k, sample, begin, end);
  else
    write ? reduce_norm_channels<T, false, true>(k, sample, begin, end)
          : reduce_norm_channels<T, false, false>(k, sample, begin, end);
}

template <class T, bool interleaved, bool has_dy, bool with_relu>
inline void spread_norm_rows(const SpreadNormGradient<T>& k, int64_t sample, int64_t begin, int64_t end) {
  using A = Compute<T>;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t channel = interleaved ? 0 : row, entry = sample * k.shape.channels + channel;
    const PerChannel<A, interleaved> shift(k.shift + channel), slope(k.slope + sample * k.slope_stride + channel);
    const PerChannel<A, interleaved> scale(k.scale + entry), offset(k.offset + entry);
    const T *dy = row_of(k.dy, sample, row), *y = row_of(k.y, sample, row), *z = row_of(k.z, sample, row);
    T* dz = row_of(k.dz, sample, row);
    for_row<A>(
        0, k.shape.row_length(),
        [&](int64_t i) {
          Vector<A> v = (load(z + i) - shift.lanes(i)) * slope.lanes(i) + offset.lanes(i);
          if constexpr (has_dy) v += gradient_vector<T, with_relu, false>(dy, y, nullptr, i) * scale.lanes(i);
          store(v, dz + i);
        },
        [&](int64_t i) {
          A v = (widen(z[i]) - shift.scalar(i)) * slope.scalar(i) + offset.scalar(i);
          if constexpr (has_dy) v += gradient_scalar<T, with_relu, false>(dy, y, nullptr, i) * scale.scalar(i);
          narrow(v, dz + i);
        });
  }
}

template <class T>
void spread_norm_gradient(const SpreadNormGradient<T>& k, int64_t sample, int64_t begin, int64_t end) {
  if (begin == end) return;
  with_flags(k.shape.interleaved, k.dy.data != nullptr, k.y.data != nullptr,
             [&](auto interleaved, auto has_dy, auto with_relu) {
               spread_norm_rows<T, interleaved(), has_dy(), has_dy() && with_relu()>(k, sample, begin, end);
             });
}

}  // namespace
}  // namespace dia::cpu::DIA_ISA
