// What a kernel may ask of its Machine. machines/cuda.cuh is a GPU, machines/simt.h one simulated on the CPU.
//
//   thread() threads() lane() warp() warps()      of this block; 32 lanes a warp
//   block() blocks()                              of the grid
//   sync_warp() sync_block()                      barriers; what was written before is seen by all who were there
//   warp_sum(value, stride = 1, width = 32)       sum over the lanes that lie a multiple of `stride` apart, of a group
//                                                 of `width` neighbours (powers of two)
//   shared<T>(count)                              the next array in shared memory: [i], pack(i), set_pack(i, pack)
//   load(p) store(p, v) load_pack(p) store_pack   global memory; a pack is sixteen aligned bytes
//   widen(element) narrow<T>(float)               conversions
//   exp(x) tanh(x) sqrt(x)
//   left(array, at, pitch) right(array, at, pitch)
//                                                 what a lane needs of eight terms (rows of `pitch` floats in shared
//                                                 memory from `at` on) of sixteen elements, and of eight
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
// columns, of all eight terms.
struct PlainSide {
  float values[2][8];
};
template <class Array>
DIA_DEVICE PlainSide plain_side(const Array& memory, int at, int pitch, int first, int second) {
  PlainSide side;
  DIA_UNROLL
  for (int term = 0; term < 8; ++term) {
    side.values[0][term] = memory[at + term * pitch + first];
    side.values[1][term] = memory[at + term * pitch + second];
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

}  // namespace dia::kernels
