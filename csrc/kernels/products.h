// Products of tables, in tiles: out(r, c) = sum over k of left(r, k) right(k, c).
//
// A block of kTableThreads makes a tile of kRows x kColumns, a warp a part of it in pieces of 16 x 8 (multiply(), see
// machine.h: on the tensor cores, as exact as in float32). Tiles so small that four warps are enough for all pieces
// have two groups of warps, which take the terms in turns and add up at the end, in order. Stages of terms of both
// sides lie in shared memory, where they are copied to without a register between, the next ones while one is used:
// one barrier a stage. Each stage has sums of its own, which are added to those of all: tensor cores round their sums
// towards zero.
//
// Where the memory allows it two or four neighbouring values are copied at once. What lies outside of a table is not
// read, and zero.
//
// Before, values were loaded a stage ahead into registers, one by one, and stored from there: of some 450 instructions
// of a warp for a stage of `CellStates` 290 were for that, a dozen for each of the tensor cores'. Before that, each
// thread had 4 x 4 results and multiplied in float32: 10 to 17 TFLOP/s of an H100's 67, as two reads of shared memory
// went with sixteen multiply-adds.
#pragma once

#include "machine.h"

namespace dia::kernels {

// Threads of a block of kernels that make tables.
constexpr int kTableThreads = 256;

// A side of `size` elements, of which the tile's begin at `first`: at(element, term) is where a value lies. It grows
// evenly with the term, and with every fourth element. `together`: how many neighbours in memory may be copied at once,
// the first of them a multiple of so many.
template <class At>
struct Operand {
  int first, size, together;
  At at;
};
template <class At>
Operand(int, int, int, At) -> Operand<At>;

// How many of the values of a table's rows, each of so many, begin at a multiple of their bytes: four, two or one.
DIA_DEVICE int values_together(const float* table, int row) {
  const auto begins =
      static_cast<unsigned>(reinterpret_cast<uintptr_t>(table) / sizeof(float)) | static_cast<unsigned>(row);
  return begins % 4 == 0 ? 4 : begins % 2 == 0 ? 2 : 1;
}

// One side of a product, as a thread copies its share of a stage. What is adjacent in memory, terms if kAlong, else
// elements, is so in shared memory too; rows have a gap that keeps their banks apart. A thread's items lie in the same
// column, some rows apart: where it copies from is found out once, and then moved on.
template <int kSize, int kTerms, bool kAlong>
class Side {
  static constexpr int kNear = kAlong ? kTerms : kSize, kFar = kAlong ? kSize : kTerms;
  static constexpr int kPitch = kNear + (kAlong ? 4 : 8);
  // Rows from one item to the next, of so many values.
  template <int kValues>
  static constexpr int kStep = kTableThreads * kValues / kNear;

 public:
  static constexpr int kFloats = kFar * kPitch;
  // From one element to the next in shared memory, and from one term.
  static constexpr int kElement = kAlong ? kPitch : 1, kTerm = kAlong ? 1 : kPitch;

  // From term `first` on.
  template <class M, class At>
  DIA_DEVICE Side(M& m, int first, const Operand<At>& of)
      : together_(of.together),
        near_(m.thread() * together_ % kNear),
        far_(m.thread() * together_ / kNear),
        elements_(of.size - of.first) {
    const int element = of.first + (kAlong ? far_ : near_), term = first + (kAlong ? near_ : far_);
    const int step = together_ * kStep<1>;
    from_ = of.at(element, term);
    by_item_ = (kAlong ? of.at(element + step, term) : of.at(element, term + step)) - from_;
    by_stage_ = kAlong ? kTerms : of.at(element, term + kTerms) - from_;
  }

  // Begins to copy the next stage to `begin` in shared memory; `terms` are left.
  template <class M, class Array>
  DIA_DEVICE void copy(M& m, const Array& memory, int begin, int terms) {
    if (together_ == 4)
      copy_by<4>(m, memory, begin, terms);
    else if (together_ == 2)
      copy_by<2>(m, memory, begin, terms);
    else
      copy_by<1>(m, memory, begin, terms);
    from_ += by_stage_;
  }

 private:
  template <int kValues, class M, class Array>
  DIA_DEVICE void copy_by(M& m, const Array& memory, int begin, int terms) const {
    static_assert(kFar % kStep<kValues> == 0);
    const int left = (kAlong ? terms : elements_) - near_, rows = (kAlong ? elements_ : terms) - far_;
    const int there = left < 0 ? 0 : left < kValues ? left : kValues;
    DIA_UNROLL
    for (int t = 0; t < kFar / kStep<kValues>; ++t)
      m.template copy<kValues>(memory, begin + (far_ + t * kStep<kValues>)*kPitch + near_, from_ + t * by_item_,
                               t * kStep<kValues> < rows ? there : 0);
  }

  int together_, near_, far_, elements_;
  const float* from_;
  int64_t by_item_, by_stage_;
};

// A tile. `add` products, then `finish`; all threads of the block come to both.
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
  static constexpr int kResultPitch = kColumns + 8;
  static constexpr int most(int a, int b) { return a > b ? a : b; }

 public:
  static constexpr int kTerms = kGroups > 1 ? 64 : 32;

 private:
  template <bool kAlong>
  using Left = Side<kRows, kTerms, kAlong>;
  template <bool kAlong>
  using Right = Side<kColumns, kTerms, kAlong>;
  // Of the left side, and of both, in floats: the larger of both ways to lie.
  static constexpr int kLeft = most(Left<true>::kFloats, Left<false>::kFloats);
  static constexpr int kStage = kLeft + most(Right<true>::kFloats, Right<false>::kFloats);
  // Stages in shared memory at a time. Of the largest tile two: a stage of it takes longer than a copy.
  static constexpr int kStages = kRows > 32 ? 2 : 3;

 public:
  static constexpr int kFloats = kStages * kStage;  // of shared memory
  static_assert(kGroups * kRows * kResultPitch <= kFloats);

  template <class M>
  DIA_DEVICE explicit TileProduct(M& m) {
    const int own = m.warp() % (kWarpRows * kWarpColumns);
    group_ = m.warp() / (kWarpRows * kWarpColumns);
    row_ = own / kWarpColumns * (kDown * kPieceRows), column_ = own % kWarpColumns * (kAcross * kPieceColumns);
  }

  // `count` products over the terms of `inner`, whose begin is a multiple of four: left(number) and right(number) are
  // the operands of each; the kernel before makes none of the right ones. kLeftAlong: terms are neighbours in the left
  // side's memory, else its elements are.
  template <bool kLeftAlong, bool kRightAlong, class M, class Array, class OfLeft, class OfRight>
  DIA_DEVICE void add(M& m, const Array& memory, Part inner, int count, const OfLeft& left, const OfRight& right) {
    const int terms = inner.size(), stages = (terms + kTerms - 1) / kTerms, all = stages * count;
    Left<kLeftAlong> left_side(m, inner.begin, left(0));
    Right<kRightAlong> right_side(m, inner.begin, right(0));
    // The next stage to be copied: of which product, after how many terms, and where to.
    struct Next {
      int number = 0, copied = 0, to = 0;
    };
    const auto copy = [&](Next& next, bool of_left, bool of_right) {
      const bool another = next.copied >= terms;
      if (another) ++next.number, next.copied = 0;
      if (of_left) {
        if (another) left_side = Left<kLeftAlong>(m, inner.begin, left(next.number));
        left_side.copy(m, memory, next.to, terms - next.copied);
      }
      if (of_right) {
        if (another) right_side = Right<kRightAlong>(m, inner.begin, right(next.number));
        right_side.copy(m, memory, next.to + kLeft, terms - next.copied);
      }
      next.copied += kTerms, next.to = next.to + kStage < kFloats ? next.to + kStage : 0;
    };
    m.sync_block();  // what was there may still be read
    // The right sides of the first stages, weights, while the kernel before still runs.
    Next of_right, next;
    DIA_UNROLL
    for (int stage = 0; stage < kStages - 1; ++stage)
      if (stage < all) copy(of_right, false, true);
    m.wait_for_kernel();
    DIA_UNROLL
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (stage < all) copy(next, true, false);
      m.commit_copies();
    }
    int added = 0, from = 0;
    for (int stage = 0; stage < all; ++stage) {
      m.template wait_copies<kStages - 2>();
      m.sync_block();
      if (stage + kStages - 1 < all) copy(next, true, true);
      m.commit_copies();
      add_stage<Left<kLeftAlong>, Right<kRightAlong>>(m, memory, from, terms - added);
      added = added + kTerms < terms ? added + kTerms : 0, from = from + kStage < kFloats ? from + kStage : 0;
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
  // A stage that begins at `begin`, of which the first `terms` are not zero.
  template <class LeftSide, class RightSide, class M, class Array>
  DIA_DEVICE void add_stage(M& m, const Array& memory, int begin, int terms) {
    float large[kDown][kAcross][4] = {}, small[kDown][kAcross][4] = {};
    DIA_UNROLL_BY(2)
    for (int step = 0; step < kTerms / (kPieceTerms * kGroups); ++step) {
      const int term = (step * kGroups + group_) * kPieceTerms;
      if (term >= terms) break;
      typename M::Left a[kDown];
      typename M::Right b[kAcross];
      DIA_UNROLL
      for (int i = 0; i < kDown; ++i)
        a[i] = m.left(memory, begin + term * LeftSide::kTerm + (row_ + i * kPieceRows) * LeftSide::kElement,
                      LeftSide::kElement, LeftSide::kTerm);
      DIA_UNROLL
      for (int j = 0; j < kAcross; ++j)
        b[j] = m.right(memory,
                       begin + kLeft + term * RightSide::kTerm + (column_ + j * kPieceColumns) * RightSide::kElement,
                       RightSide::kElement, RightSide::kTerm);
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

  int group_, row_, column_;
  float sums_[kDown][kAcross][4] = {};
};

DIA_DEVICE int tiles_along(int size, int tile) { return (size + tile - 1) / tile; }

// Calls `body(task)` for this block's share of `tasks`.
template <class M, class Body>
DIA_DEVICE void for_tasks(M& m, int tasks, Body body) {
  for (int task = m.block(); task < tasks; task += m.blocks()) body(task);
}

}  // namespace dia::kernels
