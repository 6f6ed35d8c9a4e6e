// Products of tables, in tiles: out(r, c) = sum over k of left(r, k) right(k, c).
//
// A block makes a tile; a stage of kInner terms of both sides lies in shared memory while the next one is on its way in
// registers, so there is one barrier a stage. What the sides are, and what becomes of the results, the caller says: the
// cell's products need no launch of their own for what lies between them. A thread adds up its elements in the terms'
// order: the same bits every time.
#pragma once

#include "machine.h"

namespace dia::kernels {

// Threads of a block of kernels that make tables.
constexpr int kTableThreads = 256;
// Terms of a stage.
constexpr int kInner = 32;

// Floats of shared memory for a tile: two stages, each side's rows four apart from bank to bank.
template <int kRows, int kColumns>
constexpr int kTileFloats = 2 * kInner * (kRows + kColumns + 8);

// One side's part of a stage. Neighbouring lanes read what is adjacent in memory: terms if kAlong, in runs of eight,
// which also keeps their banks apart; else elements.
template <int kSize, bool kAlong>
struct Side {
  static constexpr int kCount = kSize * kInner / kTableThreads, kPitch = kSize + 4;
  float values[kCount];

  DIA_DEVICE static int element_of(int item) { return kAlong ? item / 8 % kSize : item % kSize; }
  DIA_DEVICE static int term_of(int item) { return kAlong ? item % 8 + item / 8 / kSize * 8 : item / kSize; }

  template <class M, class Value>
  DIA_DEVICE void fetch(M& m, int first, int end, Value value) {
    DIA_UNROLL
    for (int t = 0; t < kCount; ++t) {
      const int item = m.thread() + t * kTableThreads, term = first + term_of(item);
      values[t] = term < end ? value(element_of(item), term) : 0.0f;
    }
  }
  template <class M, class Array>
  DIA_DEVICE void put(M& m, const Array& memory, int begin) const {
    DIA_UNROLL
    for (int t = 0; t < kCount; ++t) {
      const int item = m.thread() + t * kTableThreads;
      memory[begin + term_of(item) * kPitch + element_of(item)] = values[t];
    }
  }
};

// `kCount` neighbours from shared memory.
template <int kCount, class Array>
DIA_DEVICE void read_neighbours(const Array& memory, int begin, float (&to)[kCount]) {
  if constexpr (kCount == 4) {
    const Pack<float> pack = memory.pack(begin);
    DIA_UNROLL
    for (int k = 0; k < 4; ++k) to[k] = pack[k];
  } else {
    DIA_UNROLL
    for (int k = 0; k < kCount; ++k) to[k] = memory[begin + k];
  }
}

// The product over the terms of `inner`, by kTableThreads threads that all come here. left(row, term) and
// right(column, term) are asked once for each of the tile; done(row, column, values) gets kColumns / 16 neighbours.
template <int kRows, int kColumns, bool kLeftAlong, bool kRightAlong, class M, class Array, class Left, class Right,
          class Done>
DIA_DEVICE void tile_product(M& m, const Array& memory, Part inner, Left left, Right right, Done done) {
  constexpr int kDown = kRows / 16, kAcross = kColumns / 16, kStage = kTileFloats<kRows, kColumns> / 2;
  Side<kRows, kLeftAlong> left_side;
  Side<kColumns, kRightAlong> right_side;
  constexpr int kBehind = kInner * Side<kRows, kLeftAlong>::kPitch;
  const int row = m.thread() / 16 * kDown, column = m.thread() % 16 * kAcross;
  float sums[kDown][kAcross] = {};
  m.sync_block();  // the product before may still be read
  left_side.fetch(m, inner.begin, inner.end, left), right_side.fetch(m, inner.begin, inner.end, right);
  int stage = 0;
  for (int first = inner.begin; first < inner.end; first += kInner, stage = kStage - stage) {
    left_side.put(m, memory, stage), right_side.put(m, memory, stage + kBehind);
    m.sync_block();
    left_side.fetch(m, first + kInner, inner.end, left), right_side.fetch(m, first + kInner, inner.end, right);
    DIA_UNROLL
    for (int k = 0; k < kInner; ++k) {
      float a[kDown], b[kAcross];
      read_neighbours(memory, stage + k * Side<kRows, kLeftAlong>::kPitch + row, a);
      read_neighbours(memory, stage + kBehind + k * Side<kColumns, kRightAlong>::kPitch + column, b);
      DIA_UNROLL
      for (int i = 0; i < kDown; ++i) {
        DIA_UNROLL
        for (int j = 0; j < kAcross; ++j) sums[i][j] += a[i] * b[j];
      }
    }
  }
  DIA_UNROLL
  for (int i = 0; i < kDown; ++i) done(row + i, column, sums[i]);
}

DIA_DEVICE int tiles_along(int size, int tile) { return (size + tile - 1) / tile; }

// Calls `body(task)` for this block's share of `tasks`.
template <class M, class Body>
DIA_DEVICE void for_tasks(M& m, int tasks, Body body) {
  for (int task = m.team() * m.ranks() + m.rank(); task < tasks; task += m.teams() * m.ranks()) body(task);
}

}  // namespace dia::kernels
