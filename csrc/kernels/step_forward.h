// The step forward, in one launch: p = mean(x); (h', c') = cell(p, h, c); y = act(x h' + shortcut).
//
// A team's block copies its own channels of a group of samples into shared memory, so that the map is read once and
// written once: 2 passes, 3 with a shortcut. Two barriers of the team a group: behind the first all means are there,
// behind the second all of the input bottleneck. The hidden bottleneck needs no mean and is made before the first,
// while others still copy. A weight's row is read once for a chunk of four samples. With a
// norm of given statistics in front (kAffine) y = act(norm(x) h' + shortcut) at the same passes.
#pragma once

#include "step.h"

namespace dia::kernels {

// Reads of a group's means and bottlenecks, which other blocks have written.
template <class M>
struct Fresh {
  M& m;
  const float* rows;
  int width;
  DIA_DEVICE float operator()(int index, int k) const { return m.load_fresh(rows + row_at(index, width) + k); }
};

// Gates of the owned channels of `count` samples from `sample` on; h' also into `hidden`, by index and owned channel.
template <class M, class T, bool kAffine, class Array>
DIA_DEVICE void make_gates(M& m, const StepForward<T, kAffine>& args, Part owned, int sample, int count,
                           const Array& hidden) {
  const int channels = args.size.channels, bottleneck = args.bottleneck, chunks = (count + kChunk - 1) / kChunk;
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
        const float x = m.load_fresh(zx + (first + s) * bottleneck + k);
        const float h = m.load_fresh(zh + (first + s) * bottleneck + k);
        DIA_UNROLL
        for (int gate = 0; gate < 4; ++gate) sums[gate][s] += wx[gate] * x + wh[gate] * h;
      }
    }
    Gates<float> u{};
    DIA_UNROLL
    for (int s = 0; s < kChunk; ++s) {
      float of[4];
      DIA_UNROLL
      for (int gate = 0; gate < 4; ++gate) of[gate] = m.warp_sum(sums[gate][s]);
      if (m.lane() == s) u = {of[0], of[1], of[2], of[3]};
    }
    if (m.lane() >= kChunk || first + m.lane() >= count) continue;
    const auto bias = [&](int gate) {
      const int at = gate * channels + channel;
      return m.load(args.weights.input_expand_bias + at) + m.load(args.weights.hidden_expand_bias + at);
    };
    using Maths = Cell<MachineMaths<M>, Output::sigmoid>;  // the gates do not depend on the output's function
    const Gates<float> gates = Maths::activate({u.i + bias(0), u.f + bias(1), u.g + bias(2), u.o + bias(3)});
    const int64_t row = sample + first + m.lane(), at = row_at(row, channels) + channel;
    const float new_c = Maths::next_c(gates, args.c != nullptr ? m.load(args.c + at) : 0.0f);
    const float new_h = hidden_of<M>(gates.o, new_c, args.tanh_output);
    m.store(args.new_c + at, new_c);
    m.store(args.new_h + at, new_h);
    hidden[(first + m.lane()) * owned.size() + channel - owned.begin] = new_h;
    if (args.tables.gates == nullptr) continue;
    float* to = args.tables.gates + row * 4 * channels + channel;
    m.store(to, gates.i);
    m.store(to + channels, gates.f);
    m.store(to + 2 * channels, gates.g);
    m.store(to + 3 * channels, gates.o);
  }
}

// y of the owned channels, from the image of x: x `factor`, or with kAffine (x - shift) factor + `added`. The tables
// are by index and owned channel, the last one by channel.
template <class M, class T, bool kAffine, class Array, class Floats>
DIA_DEVICE void rescale(M& m, const StepForward<T, kAffine>& args, const Image<T>& image, int64_t sample, int count,
                        const Array& memory, const Floats& factor, const Floats& added, const Floats& shift) {
  const int owned = image.channels.size();
  const bool has_shortcut = args.shortcut.data != nullptr;
  const bool packs = alike(args.x, args.y) && (!has_shortcut || alike(args.x, args.shortcut));
  const auto value = [&](T x, T shortcut, int index, int channel) {
    const int at = index * owned + channel;
    float y;
    if constexpr (kAffine)
      y = (M::widen(x) - shift[channel]) * factor[at] + added[at];
    else
      y = M::widen(x) * factor[at];
    if (has_shortcut) y += M::widen(shortcut);
    return M::template narrow<T>(args.relu && y <= 0.0f ? 0.0f : y);  // not a maximum: NaN passes
  };
  for_slots(
      m, image, args.x, sample, count, packs,
      [&](const Place& at) {
        Pack<T> shortcut{};
        if (has_shortcut) shortcut = m.load_pack(at.in(args.shortcut, sample));
        Pack<T> pack = memory.pack(at.place);
        ChannelWalk walk(image, at.element);
        DIA_UNROLL
        for (int k = 0; k < Pack<T>::size; ++k, walk.next())
          pack.values[k] = value(pack.values[k], shortcut.values[k], at.index, walk.channel);
        m.store_pack(at.in(args.y, sample), pack);
      },
      [&](const Place& at) {
        T shortcut{};
        if (has_shortcut) shortcut = m.load(at.in(args.shortcut, sample));
        m.store(at.in(args.y, sample), value(memory[at.place], shortcut, at.index, image.channel_at(at.element)));
      });
}

template <class M, class T, bool kAffine>
DIA_DEVICE void step_forward(M& m, const StepForward<T, kAffine>& args) {
  const MapSize& size = args.size;
  const Part owned = part_of(size.channels, m.rank(), m.ranks(), args.teams.quantum);
  const Part rows = part_of(args.bottleneck, m.rank(), m.ranks());
  const Image<T> image(size, owned, aligned_runs(size, owned, args.x.data, args.x.stride));
  const int group = args.teams.group, channels = size.channels, bottleneck = args.bottleneck;
  const auto memory = m.template shared<T>(static_cast<int64_t>(group) * image.elements());
  const auto scratch = m.template shared<float>(position_scratch(m.warps(), group * owned.size()));
  const auto values = m.template shared<float>(group * owned.size());  // the means' sums, then h' (its factor of x)
  const auto added = m.template shared<float>(kAffine ? group * owned.size() : 0);
  const auto shift = m.template shared<float>(kAffine ? owned.size() : 0);
  if constexpr (kAffine)
    for (int k = m.thread(); k < owned.size(); k += m.threads()) shift[k] = m.load(args.affine.shift + owned.begin + k);

  for (int sample = m.team() * group; sample < size.samples; sample += m.teams() * group) {
    const int count = size.samples - sample < group ? size.samples - sample : group;
    copy_in(m, image, args.x, sample, count, memory);
    sum_positions(m, image, count, scratch, values, 0, [&](int index, int channel, int position) {
      const T* at = args.x.data + (sample + index) * args.x.stride;
      const float x = M::widen(
          static_cast<T>(memory[index * image.elements() + image.place_of(at, owned.begin + channel, position)]));
      if constexpr (kAffine) return x - shift[channel];
      return x;
    });
    for (int k = m.thread(); k < count * owned.size(); k += m.threads()) {
      const int channel = owned.begin + k % owned.size();
      const int64_t at = row_at(sample + k / owned.size(), channels) + channel;
      float p = static_cast<float>(values[k]) / static_cast<float>(size.positions);
      if constexpr (kAffine) {
        p -= m.load(args.affine.d + channel);
        m.store(args.off + at, p);
        p = p * m.load(args.affine.scale + channel) + m.load(args.affine.bias + channel);
      }
      m.store(args.tables.p + at, p);
    }
    const auto bottleneck_rows = [&](const float* weight, const float* bias, float* to, auto value) {
      sum_rows(m, rows, channels, weight, count, value, [&](int index, int row, float sum) {
        const float z = sum + m.load(bias + row);
        m.store(to + row_at(sample + index, bottleneck) + row, z <= 0.0f ? 0.0f : z);
      });
    };
    if (args.h != nullptr)
      bottleneck_rows(args.weights.hidden_reduce, args.weights.hidden_reduce_bias, args.tables.zh,
                      [&](int index, int k) { return m.load(args.h + row_at(sample + index, channels) + k); });
    else
      for (int k = m.thread(); k < count * rows.size(); k += m.threads()) {
        const int row = rows.begin + k % rows.size();
        const float z = m.load(args.weights.hidden_reduce_bias + row);
        m.store(args.tables.zh + row_at(sample + k / rows.size(), bottleneck) + row, z <= 0.0f ? 0.0f : z);
      }
    m.sync_team();
    bottleneck_rows(args.weights.input_reduce, args.weights.input_reduce_bias, args.tables.zx,
                    Fresh<M>{m, args.tables.p + row_at(sample, channels), channels});
    m.sync_team();
    make_gates(m, args, owned, sample, count, values);
    m.sync_block();
    if constexpr (kAffine) {
      for (int k = m.thread(); k < count * owned.size(); k += m.threads()) {
        const int channel = owned.begin + k % owned.size();
        const float hidden = values[k], factor = m.load(args.affine.scale + channel) * hidden;
        values[k] = factor;
        added[k] = m.load(args.affine.bias + channel) * hidden - m.load(args.affine.d + channel) * factor;
      }
      m.sync_block();
    }
    // The next group needs no barrier: a thread copies into the slots that it has just read.
    rescale(m, args, image, sample, count, memory, values, added, shift);
  }
}

}  // namespace dia::kernels
