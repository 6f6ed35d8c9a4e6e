// The cell forward by teams of blocks, from each sample's means to h'. A part of the step's kernel, and a kernel of its
// own between two sweeps over the map: pool | cell | rescale, or moments | statistics | cell | normalise.
//
// Each block owns some channels of a group of samples and makes their part of both bottlenecks. Two barriers of the
// team a group: behind the first every block adds up some columns of these parts, in the owners' order; behind the
// second all have the bottlenecks whole, and make the gates of their own channels. So a block reads the columns and
// rows of the weights that are its own, once for a chunk of eight samples, and of other blocks 6 m values a sample.
// (Rows of the bottlenecks dealt to the blocks, each reading all means, were 2 C + 2 m values a sample, and rows as
// long as their loads' latency.)
#pragma once

#include "cell.h"
#include "norm.h"
#include "sums.h"

namespace dia::kernels {

// Both bottlenecks of `count` samples on chip, for chunks of samples: those of a chunk side by side, so that a row of a
// weight meets them all at one place. Samples that are not there are 0.
template <class M, class Array>
DIA_DEVICE void gather_bottlenecks(M& m, const CellForward& args, int sample, int count, const Array& z) {
  const int bottleneck = args.bottleneck, all = (count + kChunk - 1) / kChunk * kChunk;
  for (int k = m.thread(); k < all * 2 * bottleneck; k += m.threads()) {
    const int index = k / (2 * bottleneck), column = k % (2 * bottleneck);
    const bool input = column < bottleneck;
    const int64_t at = row_at(sample + index, bottleneck) + (input ? column : column - bottleneck);
    z[(index / kChunk * 2 * bottleneck + column) * kChunk + index % kChunk] =
        index < count ? m.load((input ? args.tables.zx : args.tables.zh) + at) : 0.0f;
  }
}

// The state of the owned channels of `count` samples from both bottlenecks; h' also into `hidden`, by index and owned
// channel. Two gates at a time: sums of four for eight samples are more than the registers hold.
template <class M, class Array>
DIA_DEVICE void make_states(M& m, const CellForward& args, Part owned, int sample, int count, const Array& z,
                            const Array& hidden) {
  constexpr int kPack = Pack<float>::size;
  const int channels = args.channels, bottleneck = args.bottleneck;
  const int chunks = (count + kChunk - 1) / kChunk;
  for (int task = m.warp(); task < owned.size() * chunks; task += m.warps()) {
    const int channel = owned.begin + task / chunks, chunk = task % chunks;
    float products[4] = {};  // of the lane's sample of the chunk
    DIA_UNROLL
    for (int pair = 0; pair < 4; pair += 2) {
      float sums[2][kChunk] = {};
      for (int path = 0; path < 2; ++path) {
        const float* weight = (path == 0 ? args.weights.input_expand : args.weights.hidden_expand) +
                              (static_cast<int64_t>(pair) * channels + channel) * bottleneck;
        const int64_t apart = row_at(channels, bottleneck);  // from a gate's row to the next gate's
        const auto weight_at = [&](int gate, int k) {
          return k < bottleneck ? m.load(weight + gate * apart + k) : 0.0f;
        };
        float next_first = weight_at(0, m.lane()), next_second = weight_at(1, m.lane());
        // With several turns at once sums and weights are more than the registers hold.
        DIA_NO_UNROLL
        for (int k = m.lane(); k < bottleneck; k += 32) {
          const float first = next_first, second = next_second;
          next_first = weight_at(0, k + 32), next_second = weight_at(1, k + 32);
          DIA_UNROLL
          for (int part = 0; part < kChunk; part += kPack) {
            const auto values = z.pack(((chunk * 2 + path) * bottleneck + k) * kChunk + part);
            DIA_UNROLL
            for (int s = 0; s < kPack; ++s) {
              sums[0][part + s] += first * values[s];
              sums[1][part + s] += second * values[s];
            }
          }
        }
      }
      DIA_UNROLL
      for (int s = 0; s < kChunk; ++s) {
        DIA_UNROLL
        for (int gate = 0; gate < 2; ++gate) {
          const float sum = m.warp_sum(sums[gate][s]);
          if (m.lane() == s) products[pair + gate] = sum;
        }
      }
    }
    const int index = chunk * kChunk + m.lane();
    if (m.lane() < kChunk && index < count) {
      const auto u = [&](int gate) { return products[gate] + expand_bias(m, args, gate, channel); };
      hidden[index * owned.size() + channel - owned.begin] =
          make_state(m, args, sample + index, channel, {u(0), u(1), u(2), u(3)});
    }
  }
}

// The cell of a group's `count` samples, from the means of the owned channels in `means`, which belong to the block's
// threads one by one. Ends with a block barrier: h' of the owned channels is then in `hidden`. `z` is of `gathered`
// floats.
template <class M, class Array>
DIA_DEVICE void forward_cell(M& m, const CellForward& args, const Teams& teams, Part owned, int sample, int count,
                             const Array& means, const Array& hidden, const Array& z) {
  const int channels = args.channels, bottleneck = args.bottleneck, width = owned.size();
  const TeamParts<M> parts(m, args.partial, teams.group, bottleneck);
  for (int k = m.thread(); k < count * width && args.h != nullptr; k += m.threads())
    hidden[k] = m.load(args.h + row_at(sample + k / width, channels) + owned.begin + k % width);
  m.sync_block();
  const auto own_part = [&](const float* weight, const Array& values, int column) {
    sum_rows(
        m, bottleneck, owned, channels, weight, count,
        [&](int index, int k) { return static_cast<float>(values[index * width + k]); },
        [&](int index, int row, float sum) { m.store(parts.at(m.rank(), index, column + row), sum); });
  };
  own_part(args.weights.input_reduce, means, 0);
  if (args.h != nullptr)
    own_part(args.weights.hidden_reduce, hidden, bottleneck);
  else
    for (int k = m.thread(); k < count * bottleneck; k += m.threads())
      m.store(parts.at(m.rank(), k / bottleneck, bottleneck + k % bottleneck), 0.0f);
  m.sync_team();
  parts.add_up(m, count, [&](int index, bool input, int row, float sum) {
    const float z = sum + m.load((input ? args.weights.input_reduce_bias : args.weights.hidden_reduce_bias) + row);
    m.store((input ? args.tables.zx : args.tables.zh) + row_at(sample + index, bottleneck) + row, rectified(z, z));
  });
  m.sync_team();
  gather_bottlenecks(m, args, sample, count, z);
  m.sync_block();
  make_states(m, args, owned, sample, count, z, hidden);
  m.sync_block();
}

}  // namespace dia::kernels
