// The gradients of the cell's parameters, once over all samples, from what the step's kernels left: for each weight
// out[i][j] = sum over n of left[n][i] right[n][j], for each bias the sums of a table's columns.
//
// A block makes tiles of 32 x 32 in turn, staging 32 samples of both tables at a time; a thread adds up its elements in
// the samples' order, so the same bits come out every time. Each table is read once for each 32 columns of the other.
#pragma once

#include "machine.h"

namespace dia::kernels {

// One product. A bias is one whose right table is of ones.
struct WeightGradient {
  const float *left, *right;  // (N, rows), (N, columns); right null: ones, columns = 1
  float* out;                 // (rows, columns)
  int rows, columns;
};

constexpr int kWeightGradients = 8;

struct WeightGradients {
  int samples, count;
  WeightGradient products[kWeightGradients];
};

constexpr int kTile = 32;

DIA_DEVICE int tiles_of(const WeightGradient& product) {
  return ((product.rows + kTile - 1) / kTile) * ((product.columns + kTile - 1) / kTile);
}

// Shared memory of a block.
constexpr int64_t kWeightGradientBytes = 2 * kTile * kTile * static_cast<int64_t>(sizeof(float));

// Of a block of kernels that make tables.
constexpr int kTableThreads = 256;

// By blocks of kTableThreads.
template <class M>
DIA_DEVICE void weight_gradients(M& m, const WeightGradients& args) {
  const auto left = m.template shared<float>(kTile * kTile), right = m.template shared<float>(kTile * kTile);
  const int block = m.team() * m.ranks() + m.rank(), blocks = m.teams() * m.ranks();
  int passed = 0;
  for (int number = 0; number < args.count; ++number) {
    const WeightGradient& product = args.products[number];
    const int across = (product.columns + kTile - 1) / kTile, tiles = tiles_of(product);
    // Tiles are dealt to the blocks over all products, so that none stands idle.
    int tile = (block - passed % blocks + blocks) % blocks;
    passed += tiles;
    for (; tile < tiles; tile += blocks) {
      const int row = tile / across * kTile, column = tile % across * kTile;
      constexpr int kElements = kTile * kTile / kTableThreads;  // of a thread
      float sums[kElements] = {};
      for (int sample = 0; sample < args.samples; sample += kTile) {
        m.sync_block();
        for (int k = m.thread(); k < kTile * kTile; k += kTableThreads) {
          const int64_t n = sample + k / kTile;
          const int i = row + k % kTile, j = column + k % kTile;
          const bool there = n < args.samples;
          left[k] = there && i < product.rows ? m.load(product.left + n * product.rows + i) : 0.0f;
          if (product.right != nullptr)
            right[k] = there && j < product.columns ? m.load(product.right + n * product.columns + j) : 0.0f;
          else
            right[k] = 1.0f;
        }
        m.sync_block();
        DIA_UNROLL
        for (int e = 0; e < kElements; ++e) {
          const int k = m.thread() + e * kTableThreads;
          for (int n = 0; n < kTile; ++n)
            sums[e] +=
                static_cast<float>(left[n * kTile + k / kTile]) * static_cast<float>(right[n * kTile + k % kTile]);
        }
      }
      DIA_UNROLL
      for (int e = 0; e < kElements; ++e) {
        const int k = m.thread() + e * kTableThreads;
        const int i = row + k / kTile, j = column + k % kTile;
        if (i < product.rows && j < product.columns)
          m.store(product.out + static_cast<int64_t>(i) * product.columns + j, sums[e]);
      }
    }
  }
}

}  // namespace dia::kernels
