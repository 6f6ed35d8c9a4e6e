// The gradients of the cell's parameters, once over all samples, from what the step's kernels left: for each weight
// out[i][j] = sum over n of left[n][i] right[n][j], for each bias the sums of a table's columns.
//
// Each table is read once for each tile of the other (products.h), all from the second-level cache.
#pragma once

#include "products.h"

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

constexpr int kWeightTile = 64;

DIA_DEVICE int tiles_of(const WeightGradient& product) {
  return tiles_along(product.rows, kWeightTile) * tiles_along(product.columns, kWeightTile);
}

// Shared memory of a block.
constexpr int64_t kWeightGradientBytes = 4 * kTileFloats<kWeightTile, kWeightTile>;

// By blocks of kTableThreads.
template <class M>
DIA_DEVICE void weight_gradients(M& m, const WeightGradients& args) {
  const auto memory = m.template shared<float>(kTileFloats<kWeightTile, kWeightTile>);
  const int block = m.team() * m.ranks() + m.rank(), blocks = m.teams() * m.ranks();
  int passed = 0;
  for (int number = 0; number < args.count; ++number) {
    const WeightGradient& product = args.products[number];
    const int across = tiles_along(product.columns, kWeightTile), tiles = tiles_of(product);
    // Tiles are dealt to the blocks over all products, so that none stands idle.
    int tile = (block - passed % blocks + blocks) % blocks;
    passed += tiles;
    for (; tile < tiles; tile += blocks) {
      const int first = tile / across * kWeightTile, column = tile % across * kWeightTile;
      tile_product<kWeightTile, kWeightTile, false, false>(
          m, memory, {0, args.samples},
          [&](int i, int n) {
            return first + i < product.rows ? m.load(product.left + row_at(n, product.rows) + first + i) : 0.0f;
          },
          [&](int j, int n) {
            if (column + j >= product.columns) return 0.0f;
            return product.right != nullptr ? m.load(product.right + row_at(n, product.columns) + column + j) : 1.0f;
          },
          [&](int i, int j, const auto& values) {
            DIA_UNROLL
            for (int k = 0; k < kWeightTile / 16; ++k)
              if (first + i < product.rows && column + j + k < product.columns)
                m.store(product.out + row_at(first + i, product.columns) + column + j + k, values[k]);
          });
    }
  }
}

}  // namespace dia::kernels
