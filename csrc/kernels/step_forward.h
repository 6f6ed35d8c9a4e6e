// The step forward, in one launch: p = mean(x); (h', c') = cell(p, h, c); y = act(x h' + shortcut).
//
// A team's block copies its own channels of a group of samples into shared memory, so that the map is read once and
// written once: 2 passes, 3 with a shortcut. Two barriers of the team a group, both the cell's (cell_forward.h). With a
// norm of given statistics in front (kAffine) y = act(norm(x) h' + shortcut) at the same passes.
#pragma once

#include "step.h"

namespace dia::kernels {

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
          pack.set(k, value(pack[k], shortcut[k], at.index, walk.channel));
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
  const Image<T> image(size, owned, aligned_runs(size, owned, args.x.data, args.x.stride));
  const int group = args.teams.group;
  const auto memory = m.template shared<T>(static_cast<int64_t>(group) * image.elements());
  const auto scratch = m.template shared<float>(position_scratch(m.warps(), group * owned.size()));
  const auto means = m.template shared<float>(group * owned.size());   // sums at first
  const auto hidden = m.template shared<float>(group * owned.size());  // h', and then x's factor
  const auto z = m.template shared<float>(gathered(group, args.cell.bottleneck));
  const auto added = m.template shared<float>(kAffine ? group * owned.size() : 0);
  const auto shift = m.template shared<float>(kAffine ? owned.size() : 0);
  if constexpr (kAffine)
    for (int k = m.thread(); k < owned.size(); k += m.threads())
      shift[k] = m.load(args.norm.affine.shift + owned.begin + k);

  for (int sample = m.team() * group; sample < size.samples; sample += m.teams() * group) {
    const int count = size.samples - sample < group ? size.samples - sample : group;
    copy_in(m, image, args.x, sample, count, memory);
    sum_positions(m, image, count, scratch, means, 0, [&](int index, int channel, int position) {
      const T* at = args.x.data + (sample + index) * args.x.stride;
      const float x = M::widen(
          static_cast<T>(memory[index * image.elements() + image.place_of(at, owned.begin + channel, position)]));
      if constexpr (kAffine) return x - shift[channel];
      return x;
    });
    for (int k = m.thread(); k < count * owned.size(); k += m.threads()) {
      const int channel = owned.begin + k % owned.size();
      const int64_t at = row_at(sample + k / owned.size(), size.channels) + channel;
      float p = static_cast<float>(means[k]) / static_cast<float>(size.positions);
      if constexpr (kAffine) p = normed_mean(m, args.norm, channel, at, p);
      means[k] = p;
      m.store(args.cell.tables.p + at, p);
    }
    forward_cell(m, args.cell, args.teams, owned, sample, count, means, hidden, z);
    if constexpr (kAffine) {
      for (int k = m.thread(); k < count * owned.size(); k += m.threads()) {
        const int channel = owned.begin + k % owned.size();
        const float h = hidden[k];
        hidden[k] = m.load(args.norm.affine.scale + channel) * h;
        added[k] = added_of(m, args.norm.affine, channel, h);
      }
      m.sync_block();
    }
    // The next group needs no barrier: a thread copies into the slots that it has just read.
    rescale(m, args, image, sample, count, memory, hidden, added, shift);
  }
}

}  // namespace dia::kernels
