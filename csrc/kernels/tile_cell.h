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

#include <algorithm>

#include "cell.h"
#include "norm.h"
#include "products.h"

namespace dia::kernels {

// Samples of a tile, and results of the bottlenecks' products, of the states' (channels, all gates of each) and of the
// gradients'.
constexpr int kTileSamples = 32, kTileBottleneck = 32, kTileChannels = 16, kTileGradients = 64;
using BottleneckTile = TileProduct<kTileSamples, kTileBottleneck>;
using StateTile = TileProduct<kTileSamples, 4 * kTileChannels>;
using GradientTile = TileProduct<kTileSamples, kTileGradients>;
// Shared memory of a block, for the largest of them.
constexpr int64_t kCellTileBytes = 4 * std::max({BottleneckTile::kFloats, StateTile::kFloats, GradientTile::kFloats});

// Parts of a sum, at most.
constexpr int kMostParts = 4;

// Where parts of both bottlenecks' sums are: (parts, N, 2 m), the input's first.
struct BottleneckParts {
  float* data;
  int count;

  // All parts of a sum; zero those that there are not.
  struct Loaded {
    float of[kMostParts];
    DIA_DEVICE float sum() const { return (of[0] + of[1]) + (of[2] + of[3]); }
  };
  template <class M>
  DIA_DEVICE Loaded load(M& m, int samples, int width, int64_t row, int column) const {
    Loaded parts{};
    DIA_UNROLL
    for (int part = 0; part < kMostParts; ++part)
      if (part < count) parts.of[part] = m.load(data + (row_at(part, samples) + row) * width + column);
    return parts;
  }
  // Tiles of both sides, or of the input's alone.
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

// A side of samples, from `first` on: what is loaded of a sample and term, the value made of it, and where that is kept
// if `keeps`.
template <class RawOf, class Load, class Value, class Keep>
struct SampleSide {
  using Raw = RawOf;
  int first, samples;
  bool keeps;
  Load load_of;
  Value value_of;
  Keep keep;

  DIA_DEVICE Raw load(int row, int k) const { return load_of(first + row < samples ? first + row : samples - 1, k); }
  DIA_DEVICE float make(const Raw& raw, int row, int k, bool there) const {
    const float value = value_of(raw, k);
    if (keeps && there && first + row < samples) keep(value, raw, first + row, k);
    return first + row < samples ? value : 0.0f;
  }
};
template <class Raw, class Load, class Value, class Keep>
DIA_DEVICE SampleSide<Raw, Load, Value, Keep> sample_side(int first, int samples, bool keeps, Load load, Value value,
                                                          Keep keep) {
  return {first, samples, keeps, load, value, keep};
}

// A tile of both bottlenecks' parts: the sum over `inner` of left(sample, k) weight(j, k).
template <bool kAlong, class M, class Array, class Left, class Right>
DIA_DEVICE void part_product(M& m, const Array& memory, const PartTask& task, const BottleneckParts& parts, int samples,
                             int bottleneck, Part inner, const Left& left, Right right) {
  BottleneckTile tile(m);
  tile.template add<true, kAlong>(m, memory, inner, left, Plain{task.column, bottleneck, right});
  tile.finish(m, memory, [&](int row, int column, const auto& values) {
    const int sample = task.sample + row;
    DIA_UNROLL
    for (int j = 0; j < BottleneckTile::kThread; ++j) {
      const int at = task.column + column + j;
      if (sample < samples && at < bottleneck)
        m.store(
            parts.data + (row_at(task.part, samples) + sample) * 2 * bottleneck + (task.hidden ? bottleneck : 0) + at,
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

// What a mean is made of, see norm.h; or a state's own value.
template <bool kAffine>
struct MeanOrState {
  float value;
  DIA_DEVICE float mean(int positions) const { return value / static_cast<float>(positions); }
};
template <>
struct MeanOrState<true> {
  float value, d, scale, bias;
  DIA_DEVICE float off(int positions) const { return value / static_cast<float>(positions) - d; }
  DIA_DEVICE float mean(int positions) const { return off(positions) * scale + bias; }
};

template <class M, bool kAffine>
DIA_DEVICE void bottleneck_sums(M& m, const BottleneckSums<kAffine>& args) {
  const CellForward& cell = args.cell;
  const auto memory = m.template shared<float>(BottleneckTile::kFloats);
  const int channels = cell.channels;
  for_tasks(m, args.parts.tasks(cell.samples, cell.bottleneck, cell.h != nullptr), [&](int number) {
    const PartTask task(number, cell.samples, cell.bottleneck, args.parts.count);
    const bool keeps = !task.hidden && task.column == 0;
    const float* weight = task.hidden ? cell.weights.hidden_reduce : cell.weights.input_reduce;
    part_product<true>(
        m, memory, task, args.parts, cell.samples, cell.bottleneck, part_of(channels, task.part, args.parts.count),
        sample_side<MeanOrState<kAffine>>(
            task.sample, cell.samples, !task.hidden && task.column == 0,
            [&](int sample, int channel) {
              MeanOrState<kAffine> raw{};
              raw.value = m.load((task.hidden ? cell.h : args.sum) + row_at(sample, channels) + channel);
              if constexpr (kAffine) {
                raw.d = m.load(args.norm.affine.d + channel);
                raw.scale = m.load(args.norm.affine.scale + channel);
                raw.bias = m.load(args.norm.affine.bias + channel);
              }
              return raw;
            },
            [&](const MeanOrState<kAffine>& raw, int) { return task.hidden ? raw.value : raw.mean(args.positions); },
            [&](float mean, const MeanOrState<kAffine>& raw, int sample, int channel) {
              const int64_t at = row_at(sample, channels) + channel;
              m.store(cell.tables.p + at, mean);
              if constexpr (kAffine) m.store(args.norm.off + at, raw.off(args.positions));
            }),
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

// Of a bottleneck: its parts and its bias.
struct BottleneckRaw {
  BottleneckParts::Loaded parts;
  float bias;
};

template <class M, bool kAffine>
DIA_DEVICE void cell_states(M& m, const CellStates<kAffine>& args) {
  const CellForward& cell = args.cell;
  const auto memory = m.template shared<float>(StateTile::kFloats);
  const int channels = cell.channels, bottleneck = cell.bottleneck, across = tiles_along(channels, kTileChannels);
  for_tasks(m, across * tiles_along(cell.samples, kTileSamples), [&](int task) {
    const int first = task / across * kTileSamples, channel = task % across * kTileChannels;
    // This thread's channel of the results, and what they need beside the products: loaded ahead of them.
    const int own = channel + m.thread() % kTileChannels, of = own < channels ? own : channels - 1;
    float biases[4];
    DIA_UNROLL
    for (int gate = 0; gate < 4; ++gate) biases[gate] = expand_bias(m, cell, gate, of);
    StateTile tile(m);
    tile.template add<true, true>(
        m, memory, {0, 2 * bottleneck},
        sample_side<BottleneckRaw>(
            first, cell.samples, channel == 0,
            [&](int sample, int k) {
              const float* bias = k < bottleneck ? cell.weights.input_reduce_bias + k
                                                 : cell.weights.hidden_reduce_bias + (k - bottleneck);
              return BottleneckRaw{args.parts.load(m, cell.samples, 2 * bottleneck, sample, k), m.load(bias)};
            },
            [&](const BottleneckRaw& raw, int k) {
              const float sum = (k < bottleneck || cell.h != nullptr ? raw.parts.sum() : 0.0f) + raw.bias;
              return rectified(sum, sum);
            },
            [&](float z, const BottleneckRaw&, int sample, int k) {
              float* to = k < bottleneck ? cell.tables.zx + k : cell.tables.zh + (k - bottleneck);
              m.store(to + row_at(sample, bottleneck), z);
            }),
        Plain{4 * channel, 4 * channels, [&](int row, int k) {
                const float* weight =
                    k < bottleneck ? cell.weights.input_expand + k : cell.weights.hidden_expand + (k - bottleneck);
                return m.load(weight + (row_at(row % 4, channels) + row / 4) * bottleneck);
              }});
    tile.finish(m, memory, [&](int row, int, const auto& products) {
      const int sample = first + row;
      if (sample >= cell.samples || own >= channels) return;
      const float h = make_state(
          m, cell, sample, own,
          {products[0] + biases[0], products[1] + biases[1], products[2] + biases[2], products[3] + biases[3]});
      if constexpr (kAffine) {
        const int64_t at = row_at(sample, channels) + own;
        m.store(args.factor + at, m.load(args.affine.scale + own) * h);
        m.store(args.added + at, added_of(m, args.affine, own, h));
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
  const auto memory = m.template shared<float>(BottleneckTile::kFloats);
  const int rows = 4 * cell.channels;
  for_tasks(m, args.parts.tasks(cell.samples, cell.bottleneck, true), [&](int number) {
    const PartTask task(number, cell.samples, cell.bottleneck, args.parts.count);
    const float* weight = task.hidden ? cell.weights.hidden_expand : cell.weights.input_expand;
    part_product<false>(m, memory, task, args.parts, cell.samples, cell.bottleneck,
                        part_of(rows, task.part, args.parts.count),
                        sample_side<float>(
                            task.sample, cell.samples, false,
                            [&](int sample, int row) { return m.load(cell.du + row_at(sample, rows) + row); },
                            [](float raw, int) { return raw; }, [](float, float, int, int) {}),
                        [&](int j, int row) { return m.load(weight + row_at(row, cell.bottleneck) + j); });
  });
}

// Of a bottleneck's gradient: its parts, and the value that its ReLU let through or not.
struct GradientParts {
  BottleneckParts::Loaded parts;
  float z;
};

struct CellGradients {
  CellBackward cell;
  BottleneckParts parts;
  float* dp;    // (N, C), or null
  float scale;  // of dp
};

template <class M>
DIA_DEVICE void cell_gradients(M& m, const CellGradients& args) {
  const CellBackward& cell = args.cell;
  const auto memory = m.template shared<float>(GradientTile::kFloats);
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
    GradientTile tile(m);
    tile.template add<true, false>(
        m, memory, {0, bottleneck},
        sample_side<GradientParts>(
            first, cell.samples, channel == 0,
            [&](int sample, int j) {
              return GradientParts{
                  args.parts.load(m, cell.samples, 2 * bottleneck, sample, hidden ? bottleneck + j : j),
                  m.load(z + row_at(sample, bottleneck) + j)};
            },
            [&](const GradientParts& raw, int) { return rectified(raw.parts.sum(), raw.z); },
            [&](float value, const GradientParts&, int sample, int j) {
              m.store(dz + row_at(sample, bottleneck) + j, value);
            }),
        Plain{channel, channels, [&](int column, int j) { return m.load(weight + row_at(j, channels) + column); }});
    tile.finish(m, memory, [&](int row, int column, const auto& values) {
      DIA_UNROLL
      for (int k = 0; k < GradientTile::kThread; ++k) {
        if (out == nullptr || first + row >= cell.samples || channel + column + k >= channels) continue;
        const int64_t at = row_at(first + row, channels) + channel + column + k;
        m.store(out + at, hidden ? values[k] : values[k] * args.scale);
      }
    });
  });
}

}  // namespace dia::kernels
