// The gradients of the cell's parameters, once over all samples of one step, or of several that share them, from what
// their kernels left: for each weight out[i][j] = sum over steps and n of left[n][i] right[n][j], for each bias the
// sums of a table's columns.
//
// Each table is read once for each tile of the other (products.h), all from the second-level cache. A tile's products
// follow each other without a gap: the next step's tables are copied while those of the one before are multiplied.
#pragma once

#include "products.h"

namespace dia::kernels {

// What a step left: gradients of its products, its own tables, and the state that it was given.
struct StepTables {
  const float *factors, *tables, *h;
};

// One product; of a bias, which has no right table and no columns, the sums of the left one's columns.
struct WeightGradient {
  int64_t left;   // where (N, rows) begins in a step's factors
  int64_t right;  // where (N, columns) begins in a step's tables; kState: it is h
  float* out;     // (rows, columns), or (rows)
  int rows, columns;

  static constexpr int64_t kState = -1;
  DIA_DEVICE const float* left_of(const StepTables& step) const { return step.factors + left; }
  DIA_DEVICE const float* right_of(const StepTables& step) const {
    return right == kState ? step.h : step.tables + right;
  }
};

constexpr int kWeightGradients = 8;
// Of a launch: a kernel's arguments have room for 4 KB.
constexpr int kMostSteps = 64;

// In tiles of kTile x kTile: 64 where there are enough of them for all multiprocessors, else 32.
template <int kTile>
struct WeightGradients {
  int samples, steps, count;
  bool add;  // to what is there
  StepTables of[kMostSteps];
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

// The sums over all steps and samples of `kTile` columns of a bias's table, from `first` on.
template <class M, int kTile, class Array>
DIA_DEVICE void column_sums(M& m, const WeightGradients<kTile>& args, const Array& memory,
                            const WeightGradient& product, int first) {
  constexpr int kParts = kTableThreads / kTile, kBatch = 8;
  const int own = m.thread() % kTile, part = m.thread() / kTile;
  const int column = first + own < product.rows ? first + own : product.rows - 1;
  const int samples = args.samples;
  float sum = 0;
  for (int step = 0; step < args.steps; ++step) {
    const float* const table = product.left_of(args.of[step]);
    for (int n = part; n < samples; n += kBatch * kParts) {
      float values[kBatch];
      DIA_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const int sample = n + b * kParts;
        values[b] = m.load(table + row_at(sample < samples ? sample : samples - 1, product.rows) + column);
      }
      DIA_UNROLL
      for (int b = 0; b < kBatch; ++b) sum += n + b * kParts < samples ? values[b] : 0.0f;
    }
  }
  m.sync_block();  // the tile before may still be read
  memory[part * kTile + own] = sum;
  m.sync_block();
  if (m.thread() >= kTile || first + own >= product.rows) return;
  float* const out = product.out + first + own;
  sum = args.add ? m.load(out) : 0.0f;
  for (int k = 0; k < kParts; ++k) sum += memory[k * kTile + own];
  m.store(out, sum);
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
        column_sums(m, args, memory, product, first);
        continue;
      }
      Tile sums(m);
      const auto of = [](const float* table, int width, int first) {
        return Operand{first, width, values_together(table, width),
                       [=](int element, int n) { return table + row_at(n, width) + element; }};
      };
      sums.template add<false, false>(
          m, memory, {0, args.samples}, args.steps,
          [&](int step) { return of(product.left_of(args.of[step]), product.rows, first); },
          [&](int step) { return of(product.right_of(args.of[step]), product.columns, column); });
      sums.finish(m, memory, [&](int i, int j, const auto& values) {
        DIA_UNROLL
        for (int k = 0; k < Tile::kThread; ++k) {
          if (first + i >= product.rows || column + j + k >= product.columns) continue;
          float* const out = product.out + row_at(first + i, product.columns) + column + j + k;
          m.store(out, args.add ? m.load(out) + values[k] : values[k]);
        }
      });
    }
  }
}

}  // namespace dia::kernels
