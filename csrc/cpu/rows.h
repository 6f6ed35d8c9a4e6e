// Walking the rows of a map, and sums over them: what the kernels of the step and of the tail share.
//
// Sums of float lanes run over short blocks whose totals are added in double: as exact as pairwise
// summation at no cost. The order of additions depends on the shape only.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace dia::cpu::DIA_ISA {
namespace {

// Where a row (from its element `first` on) begins; null in a map that is absent.
template <class T>
inline T* row_of(const Map<T>& map, int64_t sample, int64_t row, int64_t first = 0) {
  if (map.data == nullptr) return nullptr;
  return map.data + sample * map.strides.sample + row * map.strides.row + first;
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// relu(NaN) is NaN: zero only where v <= 0.
template <class A>
inline Vector<A> relu(Vector<A> v) {
  return select<A>(v <= A(0), Vector<A>{}, v);
}
template <class A>
inline A relu(A v) {
  return v <= A(0) ? A(0) : v;
}

// The gradient through a ReLU whose result was y.
template <class A>
inline Vector<A> masked(Vector<A> dy, Vector<A> y) {
  return select<A>(y <= A(0), Vector<A>{}, dy);
}
template <class A>
inline A masked(A dy, A y) {
  return y <= A(0) ? A(0) : dy;
}

// Vectors per block of a planar sum, per accumulator; rows per block of an interleaved one.
constexpr int64_t kBlock = 16;
constexpr int kAccumulators = 4;
constexpr int64_t kRowBlock = 32;
// Channels of an interleaved reduction done together: their sums fill half a first-level cache.
constexpr int64_t kTile = 1024;
// Vectors of channels whose sums are kept in registers, and of how many channels that is done.
constexpr int kStrip = 4;
constexpr int64_t kNarrow = 16;

// Adds `sums` sums over a planar row to totals: `add(k, parts)` adds the terms of the lanes at positions k.. to
// parts[0], parts[1], ..., and `add_scalar(k, totals)` those of one position. Terms may also write.
template <class A, int sums, class Add, class AddScalar>
inline void sum_row(int64_t length, double (&totals)[sums], Add add, AddScalar add_scalar) {
  constexpr int64_t lanes = Lanes<A>::count;
  constexpr int64_t step = lanes * kAccumulators;
  int64_t k = 0;
  while (k + step <= length) {
    const int64_t end = least(k + step * kBlock, k + (length - k) / step * step);
    Vector<A> parts[kAccumulators][sums] = {};
    for (; k < end; k += step)
      for (int a = 0; a < kAccumulators; ++a) add(k + a * lanes, parts[a]);
    for (int s = 0; s < sums; ++s) totals[s] += sum_lanes<A>((parts[0][s] + parts[1][s]) + (parts[2][s] + parts[3][s]));
  }
  if (k + lanes <= length) {
    Vector<A> parts[sums] = {};
    for (; k + lanes <= length; k += lanes) add(k, parts);
    for (int s = 0; s < sums; ++s) totals[s] += sum_lanes<A>(parts[s]);
  }
  for (; k < length; ++k) add_scalar(k, totals);
}

// Applies `vector_body(k)` to whole vectors of a row and `scalar_body(k)` to what is left over.
template <class A, class VectorBody, class ScalarBody>
inline void for_row(int64_t begin, int64_t end, VectorBody vector_body, ScalarBody scalar_body) {
  constexpr int64_t lanes = Lanes<A>::count;
  int64_t k = begin;
  for (; k + 2 * lanes <= end; k += 2 * lanes) {
    vector_body(k);
    vector_body(k + lanes);
  }
  if (k + lanes <= end) {
    vector_body(k);
    k += lanes;
  }
  for (; k < end; ++k) scalar_body(k);
}

// Values of V, a vector or one: for what is written once for both.
template <class V, class T>
inline V values_at(const T* from) {
  if constexpr (std::is_same_v<V, Compute<T>>)
    return widen(*from);
  else
    return load(from);
}

// Channels [0, width) of the rows [row, stop) into `tables`, a table for each sum. `of_row(r)` makes what adds a row:
// it is called with a channel and the sums there, of a vector of channels or of one.
template <class A, int sums, class OfRow>
inline void add_block(int64_t row, int64_t stop, int64_t width, A (&tables)[sums][kTile], OfRow of_row) {
  constexpr int64_t lanes = Lanes<A>::count, strip = kStrip * lanes;
  // Few channels: strips of them, whose sums stay in registers, since sums in memory would wait for one another. Of
  // many a strip would read a little here and a little there.
  const int64_t strips = width < kNarrow * lanes ? width / strip * strip : 0;
  for (int64_t c = 0; c < strips; c += strip) {
    Vector<A> parts[kStrip][sums] = {};
    for (int64_t r = row; r < stop; ++r) {
      const auto add = of_row(r);
      for (int v = 0; v < kStrip; ++v) add(c + v * lanes, parts[v]);
    }
    for (int v = 0; v < kStrip; ++v)
      for (int s = 0; s < sums; ++s) store<A>(parts[v][s], tables[s] + c + v * lanes);
  }
  if (strips == width) return;
  for (int s = 0; s < sums; ++s)
    for (int64_t c = strips; c < width; ++c) tables[s][c] = 0;
  const auto add_rows = [&](auto... adds) {
    for_row<A>(
        strips, width,
        [&](int64_t c) {
          Vector<A> parts[sums];
          for (int s = 0; s < sums; ++s) parts[s] = load(tables[s] + c);
          (adds(c, parts), ...);
          for (int s = 0; s < sums; ++s) store<A>(parts[s], tables[s] + c);
        },
        [&](int64_t c) {
          A parts[sums];
          for (int s = 0; s < sums; ++s) parts[s] = tables[s][c];
          (adds(c, parts), ...);
          for (int s = 0; s < sums; ++s) tables[s][c] = parts[s];
        });
  };
  // By twos: with four the many streams cost a quarter of the bandwidth.
  for (; row + 2 <= stop; row += 2) add_rows(of_row(row), of_row(row + 1));
  for (; row < stop; ++row) add_rows(of_row(row));
}

// `sums` sums over the rows of an interleaved map for channels [begin, end); `finish(channel, totals)` takes them.
// `of_row(row, first)` makes what adds that row: it is called with a channel, counted from `first` on, and the sums
// there.
template <class A, int sums, class OfRow, class Finish>
inline void sum_columns(int64_t rows, int64_t begin, int64_t end, OfRow of_row, Finish finish) {
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t width = least(kTile, end - first);
    A tables[sums][kTile];
    double totals[sums][kTile];
    for (int s = 0; s < sums; ++s)
      for (int64_t c = 0; c < width; ++c) totals[s][c] = 0;
    for (int64_t row = 0; row < rows; row += kRowBlock) {
      add_block<A, sums>(row, least(row + kRowBlock, rows), width, tables, [&](int64_t r) { return of_row(r, first); });
      for (int s = 0; s < sums; ++s)
        for (int64_t c = 0; c < width; ++c) totals[s][c] += tables[s][c];
    }
    for (int64_t c = 0; c < width; ++c) {
      double of_channel[sums];
      for (int s = 0; s < sums; ++s) of_channel[s] = totals[s][c];
      finish(first + c, of_channel);
    }
  }
}

// g at one place, written down if asked for.
template <class T, bool with_relu, bool write>
inline Vector<Compute<T>> gradient_vector(const T* dy, const T* y, T* g, int64_t k) {
  Vector<Compute<T>> v = load(dy + k);
  if constexpr (with_relu) v = masked<Compute<T>>(v, load(y + k));
  if constexpr (write) store(v, g + k);
  return v;
}
template <class T, bool with_relu, bool write>
inline Compute<T> gradient_scalar(const T* dy, const T* y, T* g, int64_t k) {
  Compute<T> v = widen(dy[k]);
  if constexpr (with_relu) v = masked<Compute<T>>(v, widen(y[k]));
  if constexpr (write) narrow(v, g + k);
  return v;
}

template <class V, class T, bool with_relu, bool write>
inline V gradient_at(const T* dy, const T* y, T* g, int64_t k) {
  if constexpr (std::is_same_v<V, Compute<T>>)
    return gradient_scalar<T, with_relu, write>(dy, y, g, k);
  else
    return gradient_vector<T, with_relu, write>(dy, y, g, k);
}

}  // namespace
}  // namespace dia::cpu::DIA_ISA
