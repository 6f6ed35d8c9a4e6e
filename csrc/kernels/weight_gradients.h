// The gradients of the cell's parameters, once over all samples, from what the step's kernels left: for each weight
// out[i][j] = sum over n of left[n][i] right[n][j], for each bias the sums of a table's columns.
//
// Each table is read once for each tile of the other (products.h), all from the second-level cache.
#pragma once

#include "products.h"

namespace dia::kernels {

// One product; of a bias, which has no right table and no columns, the sums of the left one's columns.
struct WeightGradient {
  const float *left, *right;  // (N, rows), (N, columns)
  float* out;                 // (rows, columns), or (rows)
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

  DIA_DEVICE static int across(const WeightGradient& product) {
    return product.columns > 0 ? tiles_along(product.columns, kTile) : 1;
  }
  DIA_DEVICE static int tiles_of(const WeightGradient& product) {
    return tiles_along(product.rows, kTile) * across(product);
  }
};

// The sums over all samples of `kTile` columns of a bias's table, from `first` on.
template <int kTile, class M, class Array>
DIA_DEVICE void column_sums(M& m, const Array& memory, int samples, const WeightGradient& product, int first) {
  constexpr int kParts = kTableThreads / kTile, kBatch = 8;
  const int own = m.thread() % kTile, part = m.thread() / kTile;
  const int column = first + own < product.rows ? first + own : product.rows - 1;
  float sum = 0;
  for (int n = part; n < samples; n += kBatch * kParts) {
    float values[kBatch];
    DIA_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int sample = n + b * kParts;
      values[b] = m.load(product.left + row_at(sample < samples ? sample : samples - 1, product.rows) + column);
    }
    DIA_UNROLL
    for (int b = 0; b < kBatch; ++b) sum += n + b * kParts < samples ? values[b] : 0.0f;
  }
  m.sync_block();  // the tile before may still be read
  memory[part * kTile + own] = sum;
  m.sync_block();
  if (m.thread() >= kTile || first + own >= product.rows) return;
  sum = 0;
  for (int k = 0; k < kParts; ++k) sum += memory[k * kTile + own];
  m.store(product.out + first + own, sum);
}

// By blocks of kTableThreads.
template <class M, int kTile>
DIA_DEVICE void weight_gradients(M& m, const WeightGradients<kTile>& args) {
  using Tile = typename WeightGradients<kTile>::Tile;
  const auto memory = m.template shared<float>(Tile::kFloats);
  const int block = m.block(), blocks = m.blocks();
  int passed = 0;
  for (int number = 0; number < args.count; ++number) {
    const WeightGradient& product = args.products[number];
    const int across = args.across(product), tiles = args.tiles_of(product);
    // Tiles are dealt to the blocks over all products, so that none stands idle.
    int tile = (block - passed % blocks + blocks) % blocks;
    passed += tiles;
    for (; tile < tiles; tile += blocks) {
      const int first = tile / across * kTile, column = tile % across * kTile;
      if (product.columns == 0) {
        column_sums<kTile>(m, memory, args.samples, product, first);
        continue;
      }
      Tile sums(m);
      const auto of = [&](const float* table, int width, int first) {
        return [=](int) {
          return Operand{first, width, values_together(table, width),
                         [=](int element, int n) { return table + row_at(n, width) + element; }};
        };
      };
      sums.template add<false, false>(m, memory, {0, args.samples}, 1, of(product.left, product.rows, first),
                                      of(product.right, product.columns, column));
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
