// The cell forward by teams of blocks, from each sample's means to h'. A part of the step's kernel, and a kernel of its
// own between two sweeps over the map: pool | cell | rescale, or moments | statistics | cell | normalise.
//
// A block makes some rows of both bottlenecks and the gates of its own channels, for a group of samples. Two barriers of
// the team a group: behind the first all means are there, behind the second all of the input bottleneck. The hidden
// bottleneck needs no mean and is made before the first. A weight is read once for a chunk of four samples; what others
// have written is read by plain loads, which the barriers' acquire allows, so that a row's values come from the
// multiprocessor's own cache after the first row (through the second-level cache alone they were 4 times the weights).
#pragma once

#include "cell.h"
#include "norm.h"
#include "sums.h"

namespace dia::kernels {

// Products with the expansion weights of the owned channels of `count` samples, and the state from them; h' also into
// `hidden`, by index and owned channel.
template <class M, class Array>
DIA_DEVICE void make_gates(M& m, const CellForward& args, Part owned, int sample, int count, const Array& hidden) {
  const int channels = args.channels, bottleneck = args.bottleneck, chunks = (count + kChunk - 1) / kChunk;
  const float *zx = args.tables.zx + row_at(sample, bottleneck), *zh = args.tables.zh + row_at(sample, bottleneck);
  for (int task = m.warp(); task < owned.size() * chunks; task += m.warps()) {
    const int channel = owned.begin + task / chunks, first = task % chunks * kChunk;
    float sums[4][kChunk] = {};
    for (int k = m.lane(); k < bottleneck; k += 32) {
      float wx[4], wh[4];
      DIA_UNROLL
      for (int gate = 0; gate < 4; ++gate) {
        const int64_t at = (static_cast<int64_t>(gate) * channels + channel) * bottleneck + k;
        wx[gate] = m.load(args.weights.input_expand + at);
        wh[gate] = m.load(args.weights.hidden_expand + at);
      }
      DIA_UNROLL
      for (int s = 0; s < kChunk; ++s) {
        if (first + s >= count) continue;
        const float x = m.load(zx + (first + s) * bottleneck + k), h = m.load(zh + (first + s) * bottleneck + k);
        DIA_UNROLL
        for (int gate = 0; gate < 4; ++gate) sums[gate][s] += wx[gate] * x + wh[gate] * h;
      }
    }
    Gates<float> products{};
    DIA_UNROLL
    for (int s = 0; s < kChunk; ++s) {
      float of[4];
      DIA_UNROLL
      for (int gate = 0; gate < 4; ++gate) of[gate] = m.warp_sum(sums[gate][s]);
      if (m.lane() == s) products = {of[0], of[1], of[2], of[3]};
    }
    const int index = first + m.lane();
    if (m.lane() < kChunk && index < count)
      hidden[index * owned.size() + channel - owned.begin] = make_state(m, args, sample + index, channel, products);
  }
}

// The cell of a group's `count` samples, whose means the team's blocks have stored in the tables. Ends with a block
// barrier: h' of the owned channels is then in `hidden`.
template <class M, class Array>
DIA_DEVICE void forward_cell(M& m, const CellForward& args, Part owned, int sample, int count, const Array& scratch,
                             const Array& hidden) {
  const int channels = args.channels, bottleneck = args.bottleneck;
  const Part rows = part_of(bottleneck, m.rank(), m.ranks());
  const auto reduced = [&](const float* weight, const float* bias, float* to, const float* values) {
    const auto done = [&](int index, int row, float sum) {
      const float z = sum + m.load(bias + row);
      m.store(to + row_at(sample + index, bottleneck) + row, rectified(z, z));
    };
    if (values != nullptr)
      sum_rows(
          m, rows, channels, weight, count, scratch,
          [&](int index, int k) { return m.load(values + row_at(sample + index, channels) + k); }, done);
    else
      for (int k = m.thread(); k < count * rows.size(); k += m.threads())
        done(k / rows.size(), rows.begin + k % rows.size(), 0.0f);
  };
  reduced(args.weights.hidden_reduce, args.weights.hidden_reduce_bias, args.tables.zh, args.h);
  m.sync_team();
  reduced(args.weights.input_reduce, args.weights.input_reduce_bias, args.tables.zx, args.tables.p);
  m.sync_team();
  make_gates(m, args, owned, sample, count, hidden);
  m.sync_block();
}

// The kernel between two sweeps. kAffine: with a norm in front, whose statistics are known.
struct CellForwardLaunch {
  CellForward cell;
  Teams teams;
  int positions;
  const float* sum;  // (N, C), over the positions, of x or with kAffine of x - shift
  NormedMeans norm;  // with kAffine; and (N, C):
  float *factor, *added;  // y = act((x - shift) factor + added + shortcut)
};

template <bool kAffine, class M>
DIA_DEVICE void cell_forward(M& m, const CellForwardLaunch& args) {
  const int group = args.teams.group, channels = args.cell.channels, samples = args.cell.samples;
  const Part owned = part_of(channels, m.rank(), m.ranks(), args.teams.quantum);
  const auto scratch = m.template shared<float>(position_scratch(m.warps(), 0));
  const auto hidden = m.template shared<float>(group * owned.size());
  for (int sample = m.team() * group; sample < samples; sample += m.teams() * group) {
    const int count = samples - sample < group ? samples - sample : group;
    const auto each = [&](auto body) {
      for (int k = m.thread(); k < count * owned.size(); k += m.threads()) {
        const int channel = owned.begin + k % owned.size();
        body(k, channel, row_at(sample + k / owned.size(), channels) + channel);
      }
    };
    each([&](int, int channel, int64_t at) {
      const float mean = m.load(args.sum + at) / static_cast<float>(args.positions);
      m.store(args.cell.tables.p + at, kAffine ? normed_mean(m, args.norm, channel, at, mean) : mean);
    });
    forward_cell(m, args.cell, owned, sample, count, scratch, hidden);
    if constexpr (kAffine) {
      // A thread of the next group's gates writes these h' only behind that group's barriers.
      each([&](int k, int channel, int64_t at) {
        const float h = hidden[k];
        m.store(args.factor + at, m.load(args.norm.affine.scale + channel) * h);
        m.store(args.added + at, added_of(m, args.norm.affine, channel, h));
      });
    }
  }
}

}  // namespace dia::kernels
