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

// In tiles of kTile x kTile: 64 where there are enough of them for all multiprocessors, else 32.
template <int kTile>
struct WeightGradients {
  int samples, count;
  WeightGradient products[kWeightGradients];

  using Tile = TileProduct<kTile, kTile>;
  static constexpr int64_t kSharedBytes = 4 * Tile::kFloats;

  DIA_DEVICE static int tiles_of(const WeightGradient& product) {
    return tiles_along(product.rows, kTile) * tiles_along(product.columns, kTile);
  }
};

// By blocks of kTableThreads.
template <class M, int kTile>
DIA_DEVICE void weight_gradients(M& m, const WeightGradients<kTile>& args) {
  using Tile = typename WeightGradients<kTile>::Tile;
  const auto memory = m.template shared<float>(Tile::kFloats);
  const int block = m.team() * m.ranks() + m.rank(), blocks = m.teams() * m.ranks();
  int passed = 0;
  for (int number = 0; number < args.count; ++number) {
    const WeightGradient& product = args.products[number];
    const int across = tiles_along(product.columns, kTile), tiles = args.tiles_of(product);
    const bool ones = product.right == nullptr;
    const float* right = ones ? product.left : product.right;
    // Tiles are dealt to the blocks over all products, so that none stands idle.
    int tile = (block - passed % blocks + blocks) % blocks;
    passed += tiles;
    for (; tile < tiles; tile += blocks) {
      const int first = tile / across * kTile, column = tile % across * kTile;
      Tile sums(m);
      sums.template add<false, false>(
          m, memory, {0, args.samples},
          Plain{first, product.rows, [&](int i, int n) { return m.load(product.left + row_at(n, product.rows) + i); }},
          Plain{column, product.columns, [&](int j, int n) {
                  const float value = m.load(right + row_at(n, product.columns) + j);
                  return ones ? 1.0f : value;
                }});
      sums.finish(m, memory, [&](int i, int j, const auto& values) {
        DIA_UNROLL
        for (int k = 0; k < Tile::kThread; ++k)
          if (first + i < product.rows && column + j + k < product.columns)
            m.store(product.out + row_at(first + i, product.columns) + column + j + k, values[k]);
      });
    }
  }
}

}  // namespace dia::kernels
