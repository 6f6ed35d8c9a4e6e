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

// The sums, table by table, of a tile of channels of an interleaved map.
template <class A, int sums>
struct SumTables {
  A values[sums][kTile];
};

// `sums` sums over the rows of an interleaved map for channels [begin, end); `finish(channel, totals)` takes them.
// `add_rows(row, count, first, last, tables)` adds `count` rows (1 or 2: with 4 the many streams cost a quarter of the
// bandwidth) of channels [first, last) to tables.values[sum][channel - first].
template <class A, int sums, class AddRows, class Finish>
inline void sum_columns(int64_t rows, int64_t begin, int64_t end, AddRows add_rows, Finish finish) {
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t last = least(first + kTile, end), width = last - first;
    SumTables<A, sums> tables;
    double totals[kTile][sums];
    for (int64_t c = 0; c < width; ++c)
      for (int s = 0; s < sums; ++s) totals[c][s] = 0;
    for (int64_t row = 0; row < rows;) {
      const int64_t stop = least(row + kRowBlock, rows);
      for (int s = 0; s < sums; ++s)
        for (int64_t c = 0; c < width; ++c) tables.values[s][c] = 0;
      for (; row + 2 <= stop; row += 2) add_rows(row, std::integral_constant<int, 2>{}, first, last, tables);
      for (; row < stop; ++row) add_rows(row, std::integral_constant<int, 1>{}, first, last, tables);
      for (int s = 0; s < sums; ++s)
        for (int64_t c = 0; c < width; ++c) totals[c][s] += tables.values[s][c];
    }
    for (int64_t c = 0; c < width; ++c) finish(first + c, totals[c]);
  }
}

// --- the gradient behind a ReLU: what it let through, along a row and those after it ---
// Made from a kernel's arguments; `lanes(v, k, r)` are those of v, the gradient of the result at places k.. of the r-th
// row, that go on, and `scalar(v, k, r)` that of one place.

struct AllPasses {
  template <class Args>
  AllPasses(const Args&, int64_t, int64_t, int64_t = 0) {}
  template <class V>
  V lanes(V v, int64_t, int64_t) const {
    return v;
  }
  template <class A>
  A scalar(A v, int64_t, int64_t) const {
    return v;
  }
};

// By the result y of the ReLU.
template <class T>
struct PassesByResult {
  using A = Compute<T>;
  const T* y;
  int64_t stride;

  template <class Args>
  PassesByResult(const Args& args, int64_t sample, int64_t row, int64_t first = 0)
      : y(row_of(args.y, sample, row, first)), stride(args.y.strides.row) {}
  Vector<A> lanes(Vector<A> v, int64_t k, int64_t r) const { return masked<A>(v, load(y + r * stride + k)); }
  A scalar(A v, int64_t k, int64_t r) const { return masked<A>(v, widen(y[r * stride + k])); }
};

// By the bits of its mask. Rows, and `first`, are multiples of eight.
template <class T>
struct PassesByMask {
  using A = Compute<T>;
  const uint8_t* bits;
  int64_t stride;

  template <class Args>
  PassesByMask(const Args& args, int64_t sample, int64_t row, int64_t first = 0)
      : bits(row_of(args.mask, sample, row, first / 8)), stride(args.mask.strides.row) {}
  Vector<A> lanes(Vector<A> v, int64_t k, int64_t r) const { return where_bits<A>(v, bits + r * stride, k); }
  A scalar(A v, int64_t k, int64_t r) const { return bits[r * stride + k / 8] >> (k % 8) & 1 ? v : A(0); }
};

// Calls `body` with a value of what tells what passes, as std::type_identity.
template <class T, class Args, class Body>
inline void with_relu_of(const Args& args, Body body) {
  if (args.mask.data != nullptr)
    body(std::type_identity<PassesByMask<T>>{});
  else if (args.y.data != nullptr)
    body(std::type_identity<PassesByResult<T>>{});
  else
    body(std::type_identity<AllPasses>{});
}

// g at one place of the r-th row, written down if asked for; dy and g are of that row.
template <class T, bool write, class Relu>
inline Vector<Compute<T>> gradient_vector(const T* dy, const Relu& relu, T* g, int64_t k, int64_t r = 0) {
  const Vector<Compute<T>> v = relu.lanes(load(dy + k), k, r);
  if constexpr (write) store(v, g + k);
  return v;
}
template <class T, bool write, class Relu>
inline Compute<T> gradient_scalar(const T* dy, const Relu& relu, T* g, int64_t k, int64_t r = 0) {
  const Compute<T> v = relu.scalar(widen(dy[k]), k, r);
  if constexpr (write) narrow(v, g + k);
  return v;
}

// Writes the bits of a row of a ReLU's results, which were just written.
template <class T>
inline void write_bits(const T* y, int64_t length, uint8_t* bits) {
  int64_t k = 0;
  if constexpr (sizeof(T) == 2) {
    for (; k < length; k += 8) bits[k / 8] = static_cast<uint8_t>(passed_bits_of_eight(y + k));
  } else {
    constexpr int lanes = Lanes<T>::count, most = lanes > 8 ? lanes : 8;
    for (; k + most <= length; k += most) {
      unsigned word = 0;
      for (int part = 0; part < most; part += lanes) word |= passed_bits<T>(load(y + k + part)) << part;
      for (int byte = 0; byte < most / 8; ++byte) bits[k / 8 + byte] = static_cast<uint8_t>(word >> (8 * byte));
    }
  }
  for (; k < length; k += 8) {
    unsigned word = 0;
    for (int lane = 0; lane < 8; ++lane) word |= (widen(y[k + lane]) <= 0 ? 0u : 1u) << lane;
    bits[k / 8] = static_cast<uint8_t>(word);
  }
}

}  // namespace
}  // namespace dia::cpu::DIA_ISA
