// What a kernel may ask of its Machine. machines/cuda.cuh is a GPU, machines/simt.h one simulated on the CPU.
//
//   thread() threads() lane() warp() warps()      of this block; 32 lanes a warp
//   block() blocks()                              of the grid
//   sync_warp() sync_block() sync_cluster()       barriers; what was written before is seen by all who were there. Some
//                                                 kernels' blocks come in clusters of kClusterBlocks neighbours
//   warp_sum(value, stride = 1, width = 32)       sum over the lanes that lie a multiple of `stride` apart, of a group
//                                                 of `width` neighbours (powers of two)
//   shared<T>(count)                              the next array in shared memory: [i], pack(i)
//   load(p) store(p, v) load_pack(p) store_pack   global memory; a pack is sixteen aligned bytes
//   wait_for_kernel()                             until the kernel before this one is done, and what it wrote is seen;
//                                                 what those before that one wrote is there at once
//   widen(element) narrow<T>(float)               conversions
//   exp(x) tanh(x) sqrt(x)
//   copy<count>(array, i, from, there)            begins to copy one, two or four floats of global memory to [i] of
//                                                 shared memory, of which the first `there` are read, the others zero
//   commit_copies()                               those begun since the last time are a group
//   wait_copies<n>()                              until this thread's groups are there, but for the last n
//   left(array, at, element, term) right(...)     what a lane needs of eight terms of sixteen elements, and of eight,
//                                                 in shared memory from `at` on, so many floats apart each
//   multiply(large, small, left, right)           adds the product, sixteen by eight, to four sums of each lane, of
//                                                 piece_row(m, k) and piece_column(m, k). Both arrays of sums together
//                                                 are the result; the whole warp comes here together
//
// All threads of a block ask for the same arrays in the same order, and all that a barrier or sum covers come to it.
#pragma once

#include <cstdint>

#include "../core/elements.h"
#include "../core/gates.h"

#if defined(__CUDACC__)
#define DIA_DEVICE __device__ __forceinline__
#define DIA_UNROLL _Pragma("unroll")
#define DIA_UNROLL_BY(count) DIA_PRAGMA(unroll count)
#define DIA_PRAGMA(text) _Pragma(#text)
#define DIA_NO_UNROLL _Pragma("unroll 1")
#else
#define DIA_DEVICE inline
#define DIA_UNROLL
#define DIA_UNROLL_BY(count)
#define DIA_NO_UNROLL
#endif

namespace dia::kernels {

// The gates' functions on a Machine.
template <class M>
struct MachineMaths {
  using Value = float;
  DIA_DEVICE static float sigmoid(float x) { return 1.0f / (1.0f + M::exp(-x)); }
  DIA_DEVICE static float tanh(float x) { return M::tanh(x); }
};

// Entries [begin, end) of a range that several share.
struct Part {
  int begin, end;
  DIA_DEVICE int size() const { return end - begin; }
};

// Part `number` of `count` entries in `parts`.
DIA_DEVICE Part part_of(int count, int number, int parts) {
  return {static_cast<int>(static_cast<int64_t>(count) * number / parts),
          static_cast<int>(static_cast<int64_t>(count) * (number + 1) / parts)};
}

// Where sum k of a lane lies in a product of sixteen by eight.
template <class M>
DIA_DEVICE int piece_row(const M& m, int k) {
  return m.lane() / 4 + k / 2 * 8;
}
template <class M>
DIA_DEVICE int piece_column(const M& m, int k) {
  return m.lane() % 4 * 2 + k % 2;
}

// The sides of such a product in plain arithmetic, for a Machine without tensor cores: a lane's two rows, or two
// columns, from `first` and `second` on, of all eight terms.
struct PlainSide {
  float values[2][8];
};
template <class Array>
DIA_DEVICE PlainSide plain_side(const Array& memory, int first, int second, int term) {
  PlainSide side;
  DIA_UNROLL
  for (int k = 0; k < 8; ++k) {
    side.values[0][k] = memory[first + k * term];
    side.values[1][k] = memory[second + k * term];
  }
  return side;
}
DIA_DEVICE void plain_multiply(float (&sums)[4], const PlainSide& left, const PlainSide& right) {
  DIA_UNROLL
  for (int term = 0; term < 8; ++term) {
    DIA_UNROLL
    for (int k = 0; k < 4; ++k) sums[k] += left.values[k / 2][term] * right.values[k % 2][term];
  }
}

// Where row `row` of a table begins: 64 bits, as tables may be larger than 32 bits can count.
DIA_DEVICE int64_t row_at(int64_t row, int width) { return row * width; }

// Values that a thread each makes.
template <class M, class Body>
DIA_DEVICE void for_elements(M& m, int64_t count, Body body) {
  const int64_t threads = static_cast<int64_t>(m.blocks()) * m.threads();
  for (int64_t k = static_cast<int64_t>(m.block()) * m.threads() + m.thread(); k < count; k += threads) body(k);
}

}  // namespace dia::kernels
