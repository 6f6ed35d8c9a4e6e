// The extreme values of a map's channels, their positions, and the gradient that goes there.
//
// A planar row has a candidate in each lane, an interleaved one in each channel; either takes its next value if that is
// larger, so that the first of equal ones stays. Where the smallest is wanted values change their sign, which is exact.
// Bytes: the map once, which the moments' sweep has left in the cache; of the gradient one value a channel.
#pragma once

#include "rows.h"

namespace dia::cpu::DIA_ISA {
namespace {

// Which lanes of `next` are beyond those of `best`: larger, or NaN where that is none.
template <class A>
inline typename Lanes<A>::IntVector beyond(Vector<A> next, Vector<A> best) {
  return (next > best) | ((next != next) & (best == best));
}
template <class A>
inline bool beyond(A next, A best) {
  return next > best || (next != next && best == best);
}

// An extreme value, times the sign that makes it the largest, and where it is.
template <class A>
struct Extreme {
  A value;
  int64_t where;

  // Takes one that may lie before this one.
  void take(A other, int64_t at) {
    const bool same = other == value || (other != other && value != value);
    if (beyond(other, value) || (same && at < where)) value = other, where = at;
  }
};

// The candidates of a row's lanes, each with the number of its vector. Two such take turns: one would wait for itself.
template <class A>
struct ExtremeLanes {
  typename Lanes<A>::IntVector turns{}, turn{};
  Vector<A> values;

  void take(Vector<A> next, typename Lanes<A>::Int step) {
    turn += step;
    const auto taken = beyond<A>(next, values);
    values = select<A>(taken, next, values);
    turns = (taken & turn) | (~taken & turns);
  }
  void give(Extreme<A>* best) const {
    for (int64_t lane = 0; lane < Lanes<A>::count; ++lane)
      best->take(values[lane], static_cast<int64_t>(turns[lane]) * Lanes<A>::count + lane);
  }
};

template <class T>
Extreme<Compute<T>> extreme_of_row(const T* z, int64_t length, Compute<T> sign) {
  using A = Compute<T>;
  constexpr int64_t lanes = Lanes<A>::count;
  Extreme<A> best{widen(z[0]) * sign, 0};
  int64_t k = 0;
  if (length >= 2 * lanes) {
    ExtremeLanes<A> even, odd;
    even.values = load(z) * sign, odd.values = load(z + lanes) * sign;
    odd.turns += 1, odd.turn += 1;
    for (k = 2 * lanes; k + 2 * lanes <= length; k += 2 * lanes) {
      even.take(load(z + k) * sign, 2);
      odd.take(load(z + k + lanes) * sign, 2);
    }
    even.give(&best), odd.give(&best);
  }
  for (; k < length; ++k) best.take(widen(z[k]) * sign, k);
  return best;
}

// Positions of an interleaved map, of at most kTile channels from `first` on.
template <class T>
struct ExtremeTables {
  Compute<T> sign[kTile], values[kTile];
  typename Lanes<Compute<T>>::Int where[kTile];

  void take(const T* z, int64_t position, int64_t width) {
    using A = Compute<T>;
    using IntVector = typename Lanes<A>::IntVector;
    const IntVector at = IntVector{} + static_cast<typename Lanes<A>::Int>(position);
    for_row<A>(
        0, width,
        [&](int64_t c) {
          const Vector<A> next = load(z + c) * load(sign + c), best = load(values + c);
          const IntVector taken = beyond<A>(next, best);
          IntVector places;
          __builtin_memcpy(&places, where + c, sizeof(places));
          places = (taken & at) | (~taken & places);
          store<A>(select<A>(taken, next, best), values + c);
          __builtin_memcpy(where + c, &places, sizeof(places));
        },
        [&](int64_t c) {
          const A next = widen(z[c]) * sign[c];
          if (!beyond(next, values[c])) return;
          values[c] = next;
          where[c] = static_cast<typename Lanes<A>::Int>(position);
        });
  }
};

// Every channel has at least one position.
template <class T>
void extremes(const Extremes<T>& k, int64_t sample, int64_t begin, int64_t end) {
  using A = Compute<T>;
  A* value = k.value + sample * k.shape.channels;
  int64_t* where = k.where + sample * k.shape.channels;
  const auto sign_of = [&](int64_t c) { return k.gamma != nullptr && k.gamma[c] < 0 ? A(-1) : A(1); };
  if (!k.shape.interleaved) {
    for (int64_t c = begin; c < end; ++c) {
      const A sign = sign_of(c);
      const Extreme<A> of = extreme_of_row(row_of(k.z, sample, c), k.shape.positions, sign);
      value[c] = of.value * sign;
      where[c] = of.where;
    }
    return;
  }
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t width = least(kTile, end - first);
    ExtremeTables<T> tables;
    for (int64_t c = 0; c < width; ++c) {
      tables.sign[c] = sign_of(first + c);
      tables.values[c] = widen(row_of(k.z, sample, 0, first)[c]) * tables.sign[c];
      tables.where[c] = 0;
    }
    for (int64_t row = 1; row < k.shape.positions; ++row) tables.take(row_of(k.z, sample, row, first), row, width);
    for (int64_t c = 0; c < width; ++c) {
      value[first + c] = tables.values[c] * tables.sign[c];
      where[first + c] = tables.where[c];
    }
  }
}

template <class T>
void spread_extreme_gradient(const SpreadExtremeGradient<T>& args, int64_t sample, int64_t begin, int64_t end) {
  using A = Compute<T>;
  const SpreadNormGradient<T>& k = args.sweep;
  for (int64_t c = begin; c < end; ++c) {
    const int64_t entry = sample * k.shape.channels + c, position = args.where[entry];
    if (position < 0 || position >= k.shape.positions) continue;  // whoever calls the operator may ask for anything
    const int64_t row = k.shape.interleaved ? position : c, column = k.shape.interleaved ? c : position;
    A v = k.offset[entry] + args.added[entry];
    if (k.slope != nullptr)
      v += (widen(row_of(k.z, sample, row)[column]) - k.shift[c]) * k.slope[sample * k.slope_stride + c];
    if (k.dy.data != nullptr) {
      const T *dy = row_of(k.dy, sample, row), *y = row_of(k.y, sample, row);
      A g = widen(dy[column]);
      if (y != nullptr) g = masked<A>(g, widen(y[column]));
      v += g * k.scale[entry];
    }
    narrow(v, row_of(k.dz, sample, row) + column);
  }
}

}  // namespace
}  // namespace dia::cpu::DIA_ISA
