// Products of tables, in tiles: out(r, c) = sum over k of left(r, k) right(k, c).
//
// A block of kTableThreads makes a tile of kRows x kColumns, a warp a part of it in pieces of 16 x 8 (multiply(), see
// machine.h: on the tensor cores, as exact as in float32). Tiles so small that four warps are enough for all pieces
// have two groups of warps, which take the terms in turns and add up at the end, in order. A stage of terms of both
// sides lies in shared memory while the next one is on its way in registers, so there is one barrier a stage. Each
// stage has sums of its own, which are added to those of all: tensor cores round their sums towards zero.
//
// What the sides are, and what becomes of the results, the caller says: the cell's products need no launch of their own
// for what lies between them. A side is asked twice: for what it loads, and, when the stage before is done, for what it
// makes of that. In one go every load would be waited for before the next. Loads know no conditions: what lies outside
// of a table is loaded from its edge and made zero of. (With a branch around each of them, products were two to three
// times as slow on an H100.)
//
// Before, each thread had 4 x 4 results and multiplied in float32: 10 to 17 TFLOP/s of an H100's 67, as two reads of
// shared memory went with sixteen multiply-adds.
#pragma once

#include "machine.h"

namespace dia::kernels {

// Threads of a block of kernels that make tables.
constexpr int kTableThreads = 256;

// A side whose values are loaded as they are: `load(element, term)` of `size` elements from `first` on, zero behind
// them.
template <class Load>
struct Plain {
  using Raw = float;
  int first, size;
  Load at;
  DIA_DEVICE Raw load(int element, int term) const { return at(least(first + element, size - 1), term); }
  DIA_DEVICE float make(Raw raw, int element, int, bool) const { return first + element < size ? raw : 0.0f; }

 private:
  DIA_DEVICE static int least(int a, int b) { return a < b ? a : b; }
};
template <class Load>
Plain(int, int, Load) -> Plain<Load>;

// One side's part of a stage. Neighbouring lanes read what is adjacent in memory: terms if kAlong, in runs of eight,
// which also keeps their banks apart; else elements.
template <int kSize, int kTerms, bool kAlong, class Raw>
struct Side {
  static constexpr int kCount = kSize * kTerms / kTableThreads, kPitch = kSize + 8;
  Raw raws[kCount]{};

  DIA_DEVICE static int element_of(int item) { return kAlong ? item / 8 % kSize : item % kSize; }
  DIA_DEVICE static int term_of(int item) { return kAlong ? item % 8 + item / 8 / kSize * 8 : item / kSize; }

  template <class M, class Of>
  DIA_DEVICE void fetch(M& m, int first, int end, const Of& of) {
    DIA_UNROLL
    for (int t = 0; t < kCount; ++t) {
      const int item = m.thread() + t * kTableThreads, term = first + term_of(item);
      raws[t] = of.load(element_of(item), term < end ? term : end - 1);
    }
  }
  template <class M, class Array, class Of>
  DIA_DEVICE void put(M& m, const Array& memory, int begin, int first, int end, const Of& of) const {
    DIA_UNROLL
    for (int t = 0; t < kCount; ++t) {
      const int item = m.thread() + t * kTableThreads, term = first + term_of(item);
      const bool there = term < end;
      const float value = of.make(raws[t], element_of(item), there ? term : end - 1, there);
      memory[begin + term_of(item) * kPitch + element_of(item)] = there ? value : 0.0f;
    }
  }
};

// A tile. `add` a product, or several of the same shape, then `finish`; all threads of the block come to both.
template <int kRows, int kColumns>
class TileProduct {
 public:
  static constexpr int kThread = 4;  // neighbouring columns that a thread finishes together

 private:
  static constexpr int kPieceRows = 16, kPieceColumns = 8, kPieceTerms = 8;
  static constexpr int kWarps = kTableThreads / 32;
  // Pieces of a warp, and warps along the tile.
  static constexpr int kDown = kRows > 32 ? 2 : 1, kAcross = 2;
  static constexpr int kWarpRows = kRows / (kDown * kPieceRows), kWarpColumns = kColumns / (kAcross * kPieceColumns);
  static constexpr int kGroups = kWarps / (kWarpRows * kWarpColumns);
  static_assert(kGroups * kWarpRows * kWarpColumns == kWarps);
  static constexpr int kLeftPitch = kRows + 8, kRightPitch = kColumns + 8, kResultPitch = kColumns + 8;

 public:
  static constexpr int kTerms = kGroups > 1 ? 64 : 32;
  static constexpr int kStage = kTerms * (kLeftPitch + kRightPitch);  // floats
  static constexpr int kFloats = 2 * kStage;                          // of shared memory
  static_assert(kGroups * kRows * kResultPitch <= kFloats);

  template <class M>
  DIA_DEVICE explicit TileProduct(M& m) {
    const int own = m.warp() % (kWarpRows * kWarpColumns);
    group_ = m.warp() / (kWarpRows * kWarpColumns);
    row_ = own / kWarpColumns * (kDown * kPieceRows), column_ = own % kWarpColumns * (kAcross * kPieceColumns);
    m.sync_block();  // the tile before may still be read
  }

  // The product over the terms of `inner`. `left` has load(row, term) and make(raw, row, term, there), `right` the same
  // of columns; what is not there is asked for at the edge.
  template <bool kLeftAlong, bool kRightAlong, class M, class Array, class Left, class Right>
  DIA_DEVICE void add(M& m, const Array& memory, Part inner, const Left& left, const Right& right) {
    using LeftSide = Side<kRows, kTerms, kLeftAlong, typename Left::Raw>;
    using RightSide = Side<kColumns, kTerms, kRightAlong, typename Right::Raw>;
    static_assert(LeftSide::kPitch == kLeftPitch && RightSide::kPitch == kRightPitch);
    constexpr int kRight = kTerms * kLeftPitch;
    LeftSide left_side;
    RightSide right_side;
    if (inner.begin < inner.end)
      left_side.fetch(m, inner.begin, inner.end, left), right_side.fetch(m, inner.begin, inner.end, right);
    for (int first = inner.begin; first < inner.end; first += kTerms, stage_ = kStage - stage_) {
      left_side.put(m, memory, stage_, first, inner.end, left);
      right_side.put(m, memory, stage_ + kRight, first, inner.end, right);
      m.sync_block();
      if (first + kTerms < inner.end)
        left_side.fetch(m, first + kTerms, inner.end, left), right_side.fetch(m, first + kTerms, inner.end, right);
      add_stage(m, memory, inner.end - first);
    }
  }

  // done(row, column, four neighbours) for the elements of the tile: a thread's column is always the same.
  template <class M, class Array, class Done>
  DIA_DEVICE void finish(M& m, const Array& memory, Done done) {
    constexpr int kQuads = kColumns / kThread;
    m.sync_block();
    DIA_UNROLL
    for (int i = 0; i < kDown; ++i) {
      DIA_UNROLL
      for (int j = 0; j < kAcross; ++j) {
        DIA_UNROLL
        for (int k = 0; k < 4; ++k) {
          const int row = row_ + i * kPieceRows + piece_row(m, k),
                    column = column_ + j * kPieceColumns + piece_column(m, k);
          memory[(group_ * kRows + row) * kResultPitch + column] = sums_[i][j][k];
        }
      }
    }
    m.sync_block();
    DIA_UNROLL
    for (int t = 0; t < kRows * kQuads / kTableThreads; ++t) {
      const int item = m.thread() + t * kTableThreads, row = item / kQuads, column = item % kQuads * kThread;
      float sums[kThread] = {};
      DIA_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        const Pack<float> pack = memory.pack((group * kRows + row) * kResultPitch + column);
        DIA_UNROLL
        for (int j = 0; j < kThread; ++j) sums[j] += pack[j];
      }
      done(row, column, sums);
    }
  }

 private:
  // A stage, of which the first `terms` are not zero.
  template <class M, class Array>
  DIA_DEVICE void add_stage(M& m, const Array& memory, int terms) {
    constexpr int kRight = kTerms * kLeftPitch;
    float large[kDown][kAcross][4] = {}, small[kDown][kAcross][4] = {};
    DIA_UNROLL_BY(2)
    for (int step = 0; step < kTerms / (kPieceTerms * kGroups); ++step) {
      const int term = (step * kGroups + group_) * kPieceTerms;
      if (term >= terms) break;
      typename M::Left a[kDown];
      typename M::Right b[kAcross];
      DIA_UNROLL
      for (int i = 0; i < kDown; ++i)
        a[i] = m.left(memory, stage_ + term * kLeftPitch + row_ + i * kPieceRows, kLeftPitch);
      DIA_UNROLL
      for (int j = 0; j < kAcross; ++j)
        b[j] = m.right(memory, stage_ + kRight + term * kRightPitch + column_ + j * kPieceColumns, kRightPitch);
      DIA_UNROLL
      for (int i = 0; i < kDown; ++i) {
        DIA_UNROLL
        for (int j = 0; j < kAcross; ++j) m.multiply(large[i][j], small[i][j], a[i], b[j]);
      }
    }
    DIA_UNROLL
    for (int i = 0; i < kDown; ++i) {
      DIA_UNROLL
      for (int j = 0; j < kAcross; ++j) {
        DIA_UNROLL
        for (int k = 0; k < 4; ++k) sums_[i][j][k] += large[i][j][k] + small[i][j][k];
      }
    }
  }

  int group_, row_, column_, stage_ = 0;
  float sums_[kDown][kAcross][4] = {};
};

DIA_DEVICE int tiles_along(int size, int tile) { return (size + tile - 1) / tile; }

// Calls `body(task)` for this block's share of `tasks`.
template <class M, class Body>
DIA_DEVICE void for_tasks(M& m, int tasks, Body body) {
  for (int task = m.block(); task < tasks; task += m.blocks()) body(task);
}

}  // namespace dia::kernels
