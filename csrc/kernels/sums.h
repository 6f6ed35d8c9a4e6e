// Sums that the warps of a block share: over positions, along rows of a weight, down its columns. Each has a fixed
// order, so the same bits come out every time. Where there are fewer tasks than warps, several warps take a part of one
// task's terms each, and the parts are added in order.
#pragma once

#include "../core/gpu_plan.h"
#include "image.h"

namespace dia::kernels {

// Parts of a task that has `terms` terms, when `tasks` of them are shared by `warps`.
DIA_DEVICE int parts_of(int warps, int tasks, int terms) {
  const int parts = tasks > 0 && tasks < warps ? warps / tasks : 1;
  return parts < terms ? parts : (terms > 1 ? terms : 1);
}

// Sums over the positions of each owned channel of `count` samples: `value(index, channel, position)` summed goes to
// sums[first * owned + k] with k = index * owned + channel, channels counted from the first owned one. Begins with a
// block barrier. Thread k modulo the block's threads writes sum k; whoever else reads it needs a barrier.
template <class M, class T, class Array, class Value>
DIA_DEVICE void sum_positions(M& m, const Image<T>& image, int count, const Array& scratch, const Array& sums,
                              int first, Value value) {
  const int owned = image.channels.size();
  // Neighbouring lanes take what is adjacent in the image: positions, or channels.
  int wide = 1;
  while (image.interleaved && wide < 32 && wide < owned) wide *= 2;
  const int groups = (owned + wide - 1) / wide, tasks = count * groups, apart = 32 / wide;
  const int parts = parts_of(m.warps(), tasks, (image.positions + apart - 1) / apart);
  m.sync_block();
  for (int number = m.warp(); number < tasks * parts; number += m.warps()) {
    const int part = number / tasks, task = number - part * tasks, index = task / groups;
    const int channel = (task - index * groups) * wide + m.lane() % wide;
    const Part range = part_of(image.positions, part, parts);
    float sum = 0;
    if (channel < owned)
      for (int k = range.begin + m.lane() / wide; k < range.end; k += apart) sum += value(index, channel, k);
    sum = m.warp_sum(sum, wide);
    if (channel < owned && m.lane() < wide) scratch[(part * count + index) * owned + channel] = sum;
  }
  m.sync_block();
  for (int k = m.thread(); k < count * owned; k += m.threads()) {
    float sum = 0;
    for (int part = 0; part < parts; ++part) sum += scratch[part * count * owned + k];
    sums[first * owned + k] = sum;
  }
}

// Loads of a weight that a lane has in flight at once: a sum over a row is as long as its loads' latency.
constexpr int kBatch = 4;

// Sums along the own columns of each row of a dense weight of `columns`: for each of `rows` and each of `count`
// samples, done(index, row, sum over k < own.size() of weight[row][own.begin + k] value(index, k)). A warp takes as
// many rows at once as it takes lanes to have a row's own columns in, for a chunk of samples.
template <class M, class Value, class Done>
DIA_DEVICE void sum_rows(M& m, int rows, Part own, int columns, const float* weight, int count, Value value,
                         Done done) {
  int wide = 1;
  while (wide < 32 && wide < own.size()) wide *= 2;
  const int at_once = 32 / wide, chunks = (count + kChunk - 1) / kChunk;
  const int tasks = (rows + at_once - 1) / at_once * chunks;
  for (int task = m.warp(); task < tasks; task += m.warps()) {
    const int row = task / chunks * at_once + m.lane() % at_once, first = task % chunks * kChunk;
    const float* at = weight + row_at(row, columns) + own.begin;
    float sums[kChunk] = {};
    for (int k = m.lane() / at_once; k < own.size() && row < rows; k += kBatch * wide) {
      float w[kBatch];
      DIA_UNROLL
      for (int b = 0; b < kBatch; ++b) w[b] = k + b * wide < own.size() ? m.load(at + k + b * wide) : 0.0f;
      DIA_UNROLL
      for (int s = 0; s < kChunk; ++s) {
        if (first + s >= count) continue;
        DIA_UNROLL
        for (int b = 0; b < kBatch; ++b)
          if (k + b * wide < own.size()) sums[s] += w[b] * value(first + s, k + b * wide);
      }
    }
    DIA_UNROLL
    for (int s = 0; s < kChunk; ++s) {
      const float sum = m.warp_sum(sums[s], at_once);
      if (row < rows && first + s < count && m.lane() / at_once == s % wide) done(first + s, row, sum);
    }
  }
}

// Sums down columns: for each of `columns` and each of `count` samples, done(index, column, sum over r < rows of
// value(index, r) at(r)[column]), where at(r) is a row of weights. Neighbouring lanes take neighbouring columns. Begins
// with a block barrier; after `done` the caller needs one.
template <class M, class Array, class Value, class At, class Done>
DIA_DEVICE void sum_columns(M& m, int columns, int rows, int count, const Array& scratch, Value value, At at,
                            Done done) {
  const int groups = (columns + 31) / 32, chunks = (count + kChunk - 1) / kChunk, tasks = groups * chunks;
  const int parts = parts_of(m.warps(), tasks, rows);
  m.sync_block();
  for (int number = m.warp(); number < tasks * parts; number += m.warps()) {
    const int part = number / tasks, task = number - part * tasks;
    const int column = task / chunks * 32 + m.lane(), first = task % chunks * kChunk;
    if (column >= columns) continue;
    const Part range = part_of(rows, part, parts);
    float sums[kChunk] = {};
    for (int row = range.begin; row < range.end; row += kBatch) {
      float w[kBatch];
      DIA_UNROLL
      for (int b = 0; b < kBatch; ++b) w[b] = row + b < range.end ? m.load(at(row + b) + column) : 0.0f;
      DIA_UNROLL
      for (int s = 0; s < kChunk; ++s) {
        if (first + s >= count) continue;
        DIA_UNROLL
        for (int b = 0; b < kBatch; ++b)
          if (row + b < range.end) sums[s] += w[b] * value(first + s, row + b);
      }
    }
    DIA_UNROLL
    for (int s = 0; s < kChunk; ++s)
      if (first + s < count) scratch[(part * count + first + s) * columns + column] = sums[s];
  }
  m.sync_block();
  for (int k = m.thread(); k < count * columns; k += m.threads()) {
    float sum = 0;
    for (int part = 0; part < parts; ++part) sum += scratch[part * count * columns + k];
    done(k / columns, k % columns, sum);
  }
}

}  // namespace dia::kernels
