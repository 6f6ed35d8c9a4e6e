// The cell between two sweeps, by products of ours: everything that lies between the products happens as their sides
// are fetched and their results put away.
//
//     forward    bottleneck_sums: means, both products W1 p and V1 h, in parts of their terms
//                cell_states: the parts through bias and ReLU, W2 zx + V2 zh, gates, state, what the sweep applies
//     backward   split_gate_gradients (split_cell.h), an element to a thread
//                bottleneck_gradient_sums: both products du W2 and du V2, in parts
//                cell_gradients: the parts through the ReLU, dp = dzx W1 and dh = dzh V1
//
// Two launches and three, where a BLAS takes ten and nine. Parts are there because the first products have few results
// and many terms: blocks would be too few otherwise. Tables move through the second-level cache: each side once for
// every tile of the other.
#pragma once

#include "cell.h"
#include "norm.h"
#include "products.h"

namespace dia::kernels {

// Samples of a tile, and results of the bottlenecks' products, of the states' (channels, all gates of each) and of the
// gradients'.
constexpr int kTileSamples = 32, kTileBottleneck = 32, kTileChannels = 16, kTileGradients = 64;
// Shared memory of a block, for the largest of them.
constexpr int64_t kCellTileBytes = 4 * kTileFloats<kTileSamples, kTileGradients>;

// Where parts of both bottlenecks' sums are: (parts, N, 2 m), the input's first.
struct BottleneckParts {
  float* data;
  int count;

  template <class M>
  DIA_DEVICE float sum(M& m, int samples, int width, int64_t row, int column) const {
    float sum = 0;
    for (int part = 0; part < count; ++part) sum += m.load(data + (row_at(part, samples) + row) * width + column);
    return sum;
  }
  // The tasks of `one_side` tiles of each side, or of the input's alone.
  DIA_DEVICE int tasks(int samples, int bottleneck, bool both) const {
    return (both ? 2 : 1) * count * tiles_along(samples, kTileSamples) * tiles_along(bottleneck, kTileBottleneck);
  }
};

// A task of products into parts: which side, tile and part.
struct PartTask {
  bool hidden;
  int sample, column, part;

  DIA_DEVICE PartTask(int task, int samples, int bottleneck, int parts) {
    const int across = tiles_along(bottleneck, kTileBottleneck), down = tiles_along(samples, kTileSamples);
    column = task % across * kTileBottleneck, task /= across;
    sample = task % down * kTileSamples, task /= down;
    part = task % parts, hidden = task / parts > 0;
  }
};

// A tile of both bottlenecks' parts: the sum over `inner` of left(sample, k) weight(j, k).
template <bool kAlong, class M, class Array, class Left, class Right>
DIA_DEVICE void part_product(M& m, const Array& memory, const PartTask& task, const BottleneckParts& parts, int samples,
                             int bottleneck, Part inner, Left left, Right right) {
  tile_product<kTileSamples, kTileBottleneck, true, kAlong>(
      m, memory, inner, [&](int row, int k) { return task.sample + row < samples ? left(task.sample + row, k) : 0.0f; },
      [&](int column, int k) { return task.column + column < bottleneck ? right(task.column + column, k) : 0.0f; },
      [&](int row, int column, const auto& values) {
        const int sample = task.sample + row;
        DIA_UNROLL
        for (int j = 0; j < kTileBottleneck / 16; ++j) {
          const int at = task.column + column + j;
          if (sample < samples && at < bottleneck)
            m.store(parts.data + (row_at(task.part, samples) + sample) * 2 * bottleneck +
                        (task.hidden ? bottleneck : 0) + at,
                    values[j]);
        }
      });
}

// --- forward -------------------------------------------------------------------------------------------------

template <bool kAffine>
struct BottleneckSums {
  CellForward cell;
  int positions;
  const float* sum;  // (N, C), over the positions, of x or with kAffine of x - shift
  NormedMeans norm;  // with kAffine
  BottleneckParts parts;
};

template <class M, bool kAffine>
DIA_DEVICE void bottleneck_sums(M& m, const BottleneckSums<kAffine>& args) {
  const CellForward& cell = args.cell;
  const auto memory = m.template shared<float>(kTileFloats<kTileSamples, kTileBottleneck>);
  const int channels = cell.channels;
  for_tasks(m, args.parts.tasks(cell.samples, cell.bottleneck, cell.h != nullptr), [&](int number) {
    const PartTask task(number, cell.samples, cell.bottleneck, args.parts.count);
    const bool keeps = !task.hidden && task.column == 0;
    const float* weight = task.hidden ? cell.weights.hidden_reduce : cell.weights.input_reduce;
    part_product<true>(
        m, memory, task, args.parts, cell.samples, cell.bottleneck, part_of(channels, task.part, args.parts.count),
        [&](int sample, int channel) {
          const int64_t at = row_at(sample, channels) + channel;
          if (task.hidden) return m.load(cell.h + at);
          float p = m.load(args.sum + at) / static_cast<float>(args.positions);
          if constexpr (kAffine) {
            const float off = p - m.load(args.norm.affine.d + channel);
            if (keeps) m.store(args.norm.off + at, off);
            p = normed_mean(m, args.norm.affine, channel, off);
          }
          if (keeps) m.store(cell.tables.p + at, p);
          return p;
        },
        [&](int j, int channel) { return m.load(weight + row_at(j, channels) + channel); });
  });
}

template <bool kAffine>
struct CellStates {
  CellForward cell;
  BottleneckParts parts;
  ChannelAffine affine;   // with kAffine; and (N, C):
  float *factor, *added;  // y = act((x - shift) factor + added + shortcut)
};

template <class M, bool kAffine>
DIA_DEVICE void cell_states(M& m, const CellStates<kAffine>& args) {
  const CellForward& cell = args.cell;
  const auto memory = m.template shared<float>(kTileFloats<kTileSamples, 4 * kTileChannels>);
  const int channels = cell.channels, bottleneck = cell.bottleneck, across = tiles_along(channels, kTileChannels);
  for_tasks(m, across * tiles_along(cell.samples, kTileSamples), [&](int task) {
    const int first = task / across * kTileSamples, channel = task % across * kTileChannels;
    tile_product<kTileSamples, 4 * kTileChannels, true, true>(
        m, memory, {0, 2 * bottleneck},
        [&](int row, int k) {
          const int sample = first + row;
          if (sample >= cell.samples) return 0.0f;
          const bool hidden = k >= bottleneck;
          const int j = hidden ? k - bottleneck : k;
          float z = m.load((hidden ? cell.weights.hidden_reduce_bias : cell.weights.input_reduce_bias) + j);
          if (!hidden || cell.h != nullptr) z += args.parts.sum(m, cell.samples, 2 * bottleneck, sample, k);
          z = rectified(z, z);
          if (channel == 0) m.store((hidden ? cell.tables.zh : cell.tables.zx) + row_at(sample, bottleneck) + j, z);
          return z;
        },
        [&](int column, int k) {
          const int of = channel + column / 4, gate = column % 4;
          if (of >= channels) return 0.0f;
          const bool hidden = k >= bottleneck;
          return m.load((hidden ? cell.weights.hidden_expand : cell.weights.input_expand) +
                        (row_at(gate, channels) + of) * bottleneck + (hidden ? k - bottleneck : k));
        },
        [&](int row, int column, const auto& products) {
          const int sample = first + row, of = channel + column / 4;
          if (sample >= cell.samples || of >= channels) return;
          const float h = make_state(m, cell, sample, of, {products[0], products[1], products[2], products[3]});
          if constexpr (kAffine) {
            const int64_t at = row_at(sample, channels) + of;
            m.store(args.factor + at, m.load(args.affine.scale + of) * h);
            m.store(args.added + at, added_of(m, args.affine, of, h));
          }
        });
  });
}

// --- backward ------------------------------------------------------------------------------------------------

struct BottleneckGradientSums {
  CellBackward cell;
  BottleneckParts parts;
};

template <class M>
DIA_DEVICE void bottleneck_gradient_sums(M& m, const BottleneckGradientSums& args) {
  const CellBackward& cell = args.cell;
  const auto memory = m.template shared<float>(kTileFloats<kTileSamples, kTileBottleneck>);
  const int rows = 4 * cell.channels;
  for_tasks(m, args.parts.tasks(cell.samples, cell.bottleneck, true), [&](int number) {
    const PartTask task(number, cell.samples, cell.bottleneck, args.parts.count);
    const float* weight = task.hidden ? cell.weights.hidden_expand : cell.weights.input_expand;
    part_product<false>(
        m, memory, task, args.parts, cell.samples, cell.bottleneck, part_of(rows, task.part, args.parts.count),
        [&](int sample, int row) { return m.load(cell.du + row_at(sample, rows) + row); },
        [&](int j, int row) { return m.load(weight + row_at(row, cell.bottleneck) + j); });
  });
}

struct CellGradients {
  CellBackward cell;
  BottleneckParts parts;
  float* dp;    // (N, C), or null
  float scale;  // of dp
};

template <class M>
DIA_DEVICE void cell_gradients(M& m, const CellGradients& args) {
  const CellBackward& cell = args.cell;
  const auto memory = m.template shared<float>(kTileFloats<kTileSamples, kTileGradients>);
  const int channels = cell.channels, bottleneck = cell.bottleneck, down = tiles_along(cell.samples, kTileSamples);
  const int across = tiles_along(channels, kTileGradients);
  // Of a side whose result is not wanted one tile across, for the bottleneck's own gradient.
  const int inputs = args.dp != nullptr ? across : 1, hiddens = cell.old_dh != nullptr ? across : 1;
  for_tasks(m, down * (inputs + hiddens), [&](int task) {
    const bool hidden = task >= down * inputs;
    const int of_side = hidden ? task - down * inputs : task, width = hidden ? hiddens : inputs;
    const int first = of_side / width * kTileSamples, channel = of_side % width * kTileGradients;
    const float* weight = hidden ? cell.weights.hidden_reduce : cell.weights.input_reduce;
    const float* z = hidden ? cell.tables.zh : cell.tables.zx;
    float *dz = hidden ? cell.dzh : cell.dzx, *out = hidden ? cell.old_dh : args.dp;
    tile_product<kTileSamples, kTileGradients, true, false>(
        m, memory, {0, bottleneck},
        [&](int row, int j) {
          const int sample = first + row;
          if (sample >= cell.samples) return 0.0f;
          const int64_t at = row_at(sample, bottleneck) + j;
          const float value = rectified(
              args.parts.sum(m, cell.samples, 2 * bottleneck, sample, hidden ? bottleneck + j : j), m.load(z + at));
          if (channel == 0) m.store(dz + at, value);
          return value;
        },
        [&](int column, int j) {
          return channel + column < channels ? m.load(weight + row_at(j, channels) + channel + column) : 0.0f;
        },
        [&](int row, int column, const auto& values) {
          DIA_UNROLL
          for (int k = 0; k < kTileGradients / 16; ++k) {
            if (out == nullptr || first + row >= cell.samples || channel + column + k >= channels) continue;
            const int64_t at = row_at(first + row, channels) + channel + column + k;
            m.store(out + at, hidden ? values[k] : values[k] * args.scale);
          }
        });
  });
}

}  // namespace dia::kernels
