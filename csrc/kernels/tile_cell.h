// The cell between two sweeps, by products of ours: what lies between them happens as their results are put away.
//
//     forward    bottleneck_sums: both products W1 p and V1 h, through bias and ReLU; or parts of them
//                join_parts, if there are parts: through bias and ReLU, an element to a thread
//                cell_states: W2 zx + V2 zh, gates, state, what the sweep applies
//     backward   split_gate_gradients (split_cell.h), an element to a thread
//                bottleneck_gradient_sums: both products du W2 and du V2 through the ReLU; or parts of them
//                join_parts, if there are parts: through the ReLU
//                cell_gradients: dp = dzx W1 and dh = dzh V1
//
// Two or three launches and three or four, where a BLAS takes seven and those that it splits its sums into. Parts are
// there where the first products have few results and many terms: blocks would be too few otherwise. Tables move
// through the second-level cache: each side once for every tile of the other. (Parts joined as the next product fetched
// them saved a launch, but every tile did it again: twice the instructions of the product itself.)
#pragma once

#include <algorithm>

#include "cell.h"
#include "norm.h"
#include "products.h"
#include "split_cell.h"

namespace dia::kernels {

// Samples of a tile, and results of the bottlenecks' products, of the states' (channels, all gates of each) and of the
// gradients'.
struct CellTiles {
  static constexpr int kSamples = 32, kBottleneck = 32, kChannels = 16, kGradients = 64;
  using Bottleneck = TileProduct<kSamples, kBottleneck>;
  using State = TileProduct<kSamples, 4 * kChannels>;
  using Gradient = TileProduct<kSamples, kGradients>;
  // Shared memory of a block, for the largest of them.
  static constexpr int64_t kBytes = 4 * std::max({Bottleneck::kFloats, State::kFloats, Gradient::kFloats});
};

// Parts of a sum, at most.
constexpr int kMostParts = 8;

// Where parts of both bottlenecks' sums are: (parts, N, 2 m), the input's first. A sum in one part goes where it
// belongs at once, and needs none.
struct BottleneckParts {
  float* data;
  int count;

  // Tiles of both sides, or of the input's alone.
  DIA_DEVICE int tiles(int samples, int bottleneck, bool both) const {
    return (both ? 2 : 1) * tiles_along(samples, CellTiles::kSamples) * tiles_along(bottleneck, CellTiles::kBottleneck);
  }
};

// One side of the bottleneck from its parts: through `bias` and its own ReLU, or through the ReLU that let z through.
struct JoinedSide {
  const float *bias, *z;  // (m), (N, m); null: none
  float* out;             // (N, m)
  bool summed;            // whether there are parts: else zero
};

struct JoinParts {
  int samples, bottleneck;
  BottleneckParts parts;
  JoinedSide input, hidden;
};

// What joins the parts of both bottlenecks, and of their gradients.
DIA_DEVICE JoinParts join_of(const CellForward& cell, const BottleneckParts& parts) {
  return {cell.samples,
          cell.bottleneck,
          parts,
          {cell.weights.input_reduce_bias, nullptr, cell.tables.zx, true},
          {cell.weights.hidden_reduce_bias, nullptr, cell.tables.zh, cell.h != nullptr}};
}
DIA_DEVICE JoinParts join_of(const CellBackward& cell, const BottleneckParts& parts) {
  return {cell.samples,
          cell.bottleneck,
          parts,
          {nullptr, cell.tables.zx, cell.dzx, true},
          {nullptr, cell.tables.zh, cell.dzh, true}};
}

// An element of a side from its sum.
template <class M>
DIA_DEVICE void put_joined(M& m, const JoinedSide& side, int64_t at, int column, float sum) {
  if (side.bias != nullptr) sum += m.load(side.bias + column);
  m.store(side.out + at, rectified(sum, side.z != nullptr ? m.load(side.z + at) : sum));
}

template <class M>
DIA_DEVICE void join_parts(M& m, const JoinParts& args) {
  const int width = 2 * args.bottleneck;
  for_elements(m, row_at(args.samples, width), [&](int64_t k) {
    const int64_t row = k / width;
    const int column = static_cast<int>(k - row * width);
    const bool hidden = column >= args.bottleneck;
    const JoinedSide side = hidden ? args.hidden : args.input;
    const int j = hidden ? column - args.bottleneck : column;
    float sum = 0;
    if (side.summed) {
      DIA_UNROLL
      for (int part = 0; part < kMostParts; ++part)
        if (part < args.parts.count) sum += m.load(args.parts.data + row_at(part, args.samples) * width + k);
    }
    put_joined(m, side, row_at(row, args.bottleneck) + j, j, sum);
  });
}

// A task of products into parts: which side, tile and part.
struct PartTask {
  bool hidden;
  int sample, column, part;

  DIA_DEVICE static PartTask of(int task, int samples, int bottleneck, int parts) {
    const int across = tiles_along(bottleneck, CellTiles::kBottleneck),
              down = tiles_along(samples, CellTiles::kSamples);
    const int tile = task / parts;
    return {tile / across / down > 0, tile / across % down * CellTiles::kSamples,
            tile % across * CellTiles::kBottleneck, task % parts};
  }
};

// A tile of a part of both bottlenecks' sums over `terms` terms: of left (N, terms), and of `right`.
template <bool kAlong, class M, class Array, class Right>
DIA_DEVICE void part_product(M& m, const Array& memory, const PartTask& task, const JoinParts& join, int terms,
                             const float* left, const Right& right) {
  using Tile = CellTiles::Bottleneck;
  const int bottleneck = join.bottleneck, parts = join.parts.count;
  const Part fours = part_of((terms + 3) / 4, task.part, parts);
  Tile tile(m);
  const auto of_left = [&](int) {
    return Operand{task.sample, join.samples, values_together(left, terms),
                   [=](int sample, int k) { return left + row_at(sample, terms) + k; }};
  };
  tile.template add<true, kAlong>(m, memory, {4 * fours.begin, 4 * fours.end < terms ? 4 * fours.end : terms}, 1,
                                  of_left, [&](int) { return right; });
  tile.finish(m, memory, [&](int row, int column, const auto& values) {
    const int sample = task.sample + row;
    if (sample >= join.samples) return;
    DIA_UNROLL
    for (int j = 0; j < Tile::kThread; ++j) {
      const int at = task.column + column + j;
      if (at >= bottleneck) continue;
      const int64_t joined = row_at(sample, bottleneck) + at;
      if (parts > 1) {
        float* to = join.parts.data + (row_at(task.part, join.samples) + sample) * 2 * bottleneck;
        m.store(to + (task.hidden ? bottleneck : 0) + at, values[j]);
      } else {
        put_joined(m, task.hidden ? join.hidden : join.input, joined, at, values[j]);
        if (!join.hidden.summed) put_joined(m, join.hidden, joined, at, 0.0f);
      }
    }
  });
}

// --- forward -------------------------------------------------------------------------------------------------

struct BottleneckSums {
  CellForward cell;
  JoinParts join;
};

template <class M>
DIA_DEVICE void bottleneck_sums(M& m, const BottleneckSums& args) {
  const CellForward& cell = args.cell;
  const auto memory = m.template shared<float>(CellTiles::Bottleneck::kFloats);
  const int channels = cell.channels, parts = args.join.parts.count;
  const int tiles = args.join.parts.tiles(cell.samples, cell.bottleneck, cell.h != nullptr);
  for_tasks(m, tiles * parts, [&](int number) {
    const PartTask task = PartTask::of(number, cell.samples, cell.bottleneck, parts);
    const float* weight = task.hidden ? cell.weights.hidden_reduce : cell.weights.input_reduce;
    part_product<true>(m, memory, task, args.join, channels, task.hidden ? cell.h : cell.tables.p,
                       Operand{task.column, cell.bottleneck, values_together(weight, channels),
                               [&](int j, int channel) { return weight + row_at(j, channels) + channel; }});
  });
}

template <bool kAffine>
struct CellStates {
  CellForward cell;
  ChannelAffine affine;   // with kAffine; and (N, C):
  float *factor, *added;  // y = act((x - shift) factor + added + shortcut)
};

// The arguments of samples [first, first + count).
template <bool kAffine>
DIA_DEVICE CellStates<kAffine> of_samples(CellStates<kAffine> states, int64_t first, int count) {
  const int64_t width = states.cell.channels;
  states.cell = of_samples(states.cell, first, count);
  states.factor = rows_from(states.factor, first, width), states.added = rows_from(states.added, first, width);
  return states;
}

// Gates and state of one channel of one sample, and what the second sweep applies.
template <class M, bool kAffine>
DIA_DEVICE void put_state(M& m, const CellStates<kAffine>& args, int sample, int channel, float c,
                          const Gates<float>& u) {
  const float h = make_state(m, args.cell, sample, channel, c, u);
  if constexpr (kAffine) {
    const int64_t at = row_at(sample, args.cell.channels) + channel;
    m.store(args.factor + at, m.load(args.affine.scale + channel) * h);
    m.store(args.added + at, added_of(m, args.affine, channel, h));
  }
}

template <class M, bool kAffine>
DIA_DEVICE void cell_states(M& m, const CellStates<kAffine>& args) {
  using Tile = CellTiles::State;
  const CellForward& cell = args.cell;
  const auto memory = m.template shared<float>(Tile::kFloats);
  const int channels = cell.channels, bottleneck = cell.bottleneck,
            across = tiles_along(channels, CellTiles::kChannels);
  for_tasks(m, across * tiles_along(cell.samples, CellTiles::kSamples), [&](int task) {
    const int first = task / across * CellTiles::kSamples, channel = task % across * CellTiles::kChannels;
    // This thread's channel of the results, and what they need beside the products: loaded ahead of them.
    const int own = channel + m.thread() % CellTiles::kChannels, of = own < channels ? own : channels - 1;
    float biases[4];
    DIA_UNROLL
    for (int gate = 0; gate < 4; ++gate) biases[gate] = expand_bias(m, cell, gate, of);
    Tile tile(m);
    const auto of_z = [&](int path) {
      const float* z = path == 0 ? cell.tables.zx : cell.tables.zh;
      return Operand{first, cell.samples, values_together(z, bottleneck),
                     [=](int sample, int k) { return z + row_at(sample, bottleneck) + k; }};
    };
    const auto of_weight = [&](int path) {
      const float* weight = path == 0 ? cell.weights.input_expand : cell.weights.hidden_expand;
      // A channel's four gates are neighbours here.
      return Operand{4 * channel, 4 * channels, values_together(weight, bottleneck),
                     [=](int row, int k) { return weight + row_at(row % 4 * channels + row / 4, bottleneck) + k; }};
    };
    tile.template add<true, true>(m, memory, {0, bottleneck}, 2, of_z, of_weight);
    tile.finish(m, memory, [&](int row, int, const auto& products) {
      const int sample = first + row;
      if (sample >= cell.samples || own >= channels) return;
      put_state(m, args, sample, own, old_c(m, cell, sample, own),
                {products[0] + biases[0], products[1] + biases[1], products[2] + biases[2], products[3] + biases[3]});
    });
  });
}

// --- backward ------------------------------------------------------------------------------------------------

struct BottleneckGradientSums {
  CellBackward cell;
  JoinParts join;
};

template <class M>
DIA_DEVICE void bottleneck_gradient_sums(M& m, const BottleneckGradientSums& args) {
  const CellBackward& cell = args.cell;
  const auto memory = m.template shared<float>(CellTiles::Bottleneck::kFloats);
  const int rows = 4 * cell.channels, parts = args.join.parts.count;
  for_tasks(m, args.join.parts.tiles(cell.samples, cell.bottleneck, true) * parts, [&](int number) {
    const PartTask task = PartTask::of(number, cell.samples, cell.bottleneck, parts);
    const float* weight = task.hidden ? cell.weights.hidden_expand : cell.weights.input_expand;
    part_product<false>(m, memory, task, args.join, rows, cell.du,
                        Operand{task.column, cell.bottleneck, values_together(weight, cell.bottleneck),
                                [&](int j, int row) { return weight + row_at(row, cell.bottleneck) + j; }});
  });
}

// Where the gradient of the means goes, (N, C) each or null: `dp`, and `offset` = dp scale / HW, which is what the
// second sweep adds for it.
struct MeanGradient {
  float *dp, *offset;

  template <class M>
  DIA_DEVICE void put(M& m, int64_t at, float value, float scale, int positions) const {
    if (dp != nullptr) m.store(dp + at, value);
    if (offset != nullptr) m.store(offset + at, scale * value / static_cast<float>(positions));
  }
  DIA_DEVICE bool wanted() const { return dp != nullptr || offset != nullptr; }
};
DIA_DEVICE MeanGradient from_sample(const MeanGradient& means, int64_t first, int channels) {
  return {rows_from(means.dp, first, channels), rows_from(means.offset, first, channels)};
}

struct CellGradients {
  CellBackward cell;
  MeanGradient means;
  const float* scale;  // (C), of a norm; or null, for 1
  int positions;

  // Tiles of one side, and how many there are of the input's.
  DIA_DEVICE int tiles() const {
    return tiles_along(cell.samples, CellTiles::kSamples) * tiles_along(cell.channels, CellTiles::kGradients);
  }
  DIA_DEVICE int inputs() const { return means.wanted() ? tiles() : 0; }
  DIA_DEVICE int tasks() const { return inputs() + (cell.old_dh != nullptr ? tiles() : 0); }
};

template <class M>
DIA_DEVICE void cell_gradients(M& m, const CellGradients& args) {
  using Tile = CellTiles::Gradient;
  const CellBackward& cell = args.cell;
  const auto memory = m.template shared<float>(Tile::kFloats);
  const int channels = cell.channels, bottleneck = cell.bottleneck,
            across = tiles_along(channels, CellTiles::kGradients);
  const int inputs = args.inputs();
  for_tasks(m, args.tasks(), [&](int task) {
    const bool hidden = task >= inputs;
    const int of_side = hidden ? task - inputs : task;
    const int first = of_side / across * CellTiles::kSamples, channel = of_side % across * CellTiles::kGradients;
    const float* weight = hidden ? cell.weights.hidden_reduce : cell.weights.input_reduce;
    const float* dz = hidden ? cell.dzh : cell.dzx;
    Tile tile(m);
    const auto of_dz = [&](int) {
      return Operand{first, cell.samples, values_together(dz, bottleneck),
                     [=](int sample, int j) { return dz + row_at(sample, bottleneck) + j; }};
    };
    const auto of_weight = [&](int) {
      return Operand{channel, channels, values_together(weight, channels),
                     [=](int column, int j) { return weight + row_at(j, channels) + column; }};
    };
    tile.template add<true, false>(m, memory, {0, bottleneck}, 1, of_dz, of_weight);
    tile.finish(m, memory, [&](int row, int column, const auto& values) {
      DIA_UNROLL
      for (int k = 0; k < Tile::kThread; ++k) {
        const int own = channel + column + k;
        if (first + row >= cell.samples || own >= channels) continue;
        const int64_t at = row_at(first + row, channels) + own;
        if (hidden) {
          m.store(cell.old_dh + at, values[k]);
          continue;
        }
        args.means.put(m, at, values[k], args.scale != nullptr ? m.load(args.scale + own) : 1.0f, args.positions);
      }
    });
  });
}

}  // namespace dia::kernels
