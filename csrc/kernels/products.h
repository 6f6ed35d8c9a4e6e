// Products of tables, in tiles: out(r, c) = sum over k of left(r, k) right(k, c).
//
// A block of kTableThreads makes a tile of kRows x kColumns, a thread sixteen elements for its share of the terms: the
// smaller the tile, the more groups of threads there are, which take the terms in turns and add up at the end, in
// order. A stage of terms of both sides lies in shared memory while the next one is on its way in registers, so there
// is one barrier a stage.
//
// What the sides are, and what becomes of the results, the caller says: the cell's products need no launch of their own
// for what lies between them. A side is asked twice: for what it loads, and, when the stage before is done, for what it
// makes of that. In one go every load would be waited for before the next. Loads know no conditions: what lies outside
// of a table is loaded from its edge and made zero of. (With a branch around each of them, products were two to three
// times as slow on an H100.)
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
  static constexpr int kCount = kSize * kTerms / kTableThreads, kPitch = kSize + 4;
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
  static constexpr int kThread = 4;  // rows and columns of a thread
  static constexpr int kGroups = kThread * kThread * kTableThreads / (kRows * kColumns);
  static constexpr int kTerms = kGroups == 4 ? 64 : 32;
  static constexpr int kStage = kTerms * (kRows + kColumns + 8);  // floats
  static constexpr int kFloats = 2 * kStage;                      // of shared memory

  template <class M>
  DIA_DEVICE explicit TileProduct(M& m) {
    const int own = m.thread() % (kTableThreads / kGroups);
    group_ = m.thread() / (kTableThreads / kGroups);
    row_ = own / (kColumns / kThread) * kThread, column_ = own % (kColumns / kThread) * kThread;
    m.sync_block();  // the tile before may still be read
  }

  // The product over the terms of `inner`. `left` has load(row, term) and make(raw, row, term, there), `right` the same
  // of columns; what is not there is asked for at the edge.
  template <bool kLeftAlong, bool kRightAlong, class M, class Array, class Left, class Right>
  DIA_DEVICE void add(M& m, const Array& memory, Part inner, const Left& left, const Right& right) {
    using LeftSide = Side<kRows, kTerms, kLeftAlong, typename Left::Raw>;
    using RightSide = Side<kColumns, kTerms, kRightAlong, typename Right::Raw>;
    constexpr int kRight = kTerms * LeftSide::kPitch;
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
      const int terms = inner.end - first < kTerms ? inner.end - first : kTerms;
      const int steps = (terms + kGroups - 1) / kGroups;
      DIA_UNROLL_BY(8)
      for (int step = 0; step < steps; ++step) {
        const int term = step * kGroups + group_;
        const Pack<float> a = memory.pack(stage_ + term * LeftSide::kPitch + row_);
        const Pack<float> b = memory.pack(stage_ + kRight + term * RightSide::kPitch + column_);
        DIA_UNROLL
        for (int i = 0; i < kThread; ++i) {
          DIA_UNROLL
          for (int j = 0; j < kThread; ++j) sums_[i][j] += a[i] * b[j];
        }
      }
    }
  }

  // done(row, column, four neighbours) for the elements of the tile.
  template <class M, class Array, class Done>
  DIA_DEVICE void finish(M& m, const Array& memory, Done done) {
    if constexpr (kGroups == 1) {
      DIA_UNROLL
      for (int i = 0; i < kThread; ++i) done(row_ + i, column_, sums_[i]);
    } else {
      constexpr int kPitch = kColumns + 4, kAcross = kColumns / kThread;
      m.sync_block();
      DIA_UNROLL
      for (int i = 0; i < kThread; ++i) {
        Pack<float> pack{};
        DIA_UNROLL
        for (int j = 0; j < kThread; ++j) pack.set(j, sums_[i][j]);
        memory.set_pack((group_ * kRows + row_ + i) * kPitch + column_, pack);
      }
      m.sync_block();
      DIA_UNROLL
      for (int t = 0; t < kRows * kAcross / kTableThreads; ++t) {
        const int item = m.thread() + t * kTableThreads, row = item / kAcross, column = item % kAcross * kThread;
        float sums[kThread] = {};
        DIA_UNROLL
        for (int group = 0; group < kGroups; ++group) {
          const Pack<float> pack = memory.pack((group * kRows + row) * kPitch + column);
          DIA_UNROLL
          for (int j = 0; j < kThread; ++j) sums[j] += pack[j];
        }
        done(row, column, sums);
      }
    }
  }

 private:
  int group_, row_, column_, stage_ = 0;
  float sums_[kThread][kThread] = {};
};

DIA_DEVICE int tiles_along(int size, int tile) { return (size + tile - 1) / tile; }

// Calls `body(task)` for this block's share of `tasks`.
template <class M, class Body>
DIA_DEVICE void for_tasks(M& m, int tasks, Body body) {
  for (int task = m.block(); task < tasks; task += m.blocks()) body(task);
}

}  // namespace dia::kernels
