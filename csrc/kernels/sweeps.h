// The sweeps over a map: what the split step and the folded batch norm consist of, but for the small tables between
// them (docs/kernels.md). Two kernels with optional parts:
//
//   reduce   sums over each channel's positions          pool, moments, and the first sweeps of both gradients
//   spread   a value of each sample and channel, applied   rescale, normalise, and the second sweeps of both gradients
//
// A block takes tiles in turn: some channels of a sample, and of a large map some positions of one channel. `reduce`
// stages a tile in shared memory, wide accesses on one side and sums by channel on the other. Each map is read or
// written once; a planar tile is one run, so that odd channels cost no sector twice but at its ends.
#pragma once

#include "sums.h"

namespace dia::kernels {

// A tile: channels at a time, positions at a time (fewer than all only with a single planar channel).
struct Tile {
  int channels, positions;
};

template <class T>
struct Reduce {
  MapSize size;
  Tile tile;
  Samples<const T> x;      // (x - shift) is what is summed, alone or times g
  Samples<const T> dy, y;  // g = dy, where y > 0 if there is y; no dy: no g
  Samples<T> g;            // no data: not wanted
  const float* shift;      // (C), or null for 0
  float *sum,
      *product;  // (N, C): sums of g and of g (x - shift); without dy of x - shift and its square. Null: not wanted
};

template <class T>
struct Spread {
  MapSize size;
  Tile tile;
  Samples<const T> dy, y;        // g, as above; no dy: no such term
  Samples<const T> x, shortcut;  // no data: no such term
  Samples<T> out;
  const float *scale, *offset;  // (N, C); offset null: 0
  const float *shift, *slope;   // (C), null: 0. With slope out += (x - shift) slope, else (x - shift) scale.
  bool relu;
};

// Calls `body(sample, channels)` for the tiles of this block.
template <class M, class Body>
DIA_DEVICE void for_tiles(M& m, const MapSize& size, const Tile& tile, Body body) {
  const int across = (size.channels + tile.channels - 1) / tile.channels;
  const int64_t tasks = static_cast<int64_t>(size.samples) * across;
  for (int64_t task = m.team(); task < tasks; task += m.teams()) {
    const int64_t sample = task / across;
    const int begin = static_cast<int>(task - sample * across) * tile.channels;
    body(sample, Part{begin, begin + tile.channels < size.channels ? begin + tile.channels : size.channels});
  }
}

// Positions [begin, ...) of the tile.
DIA_DEVICE Part range_of(const MapSize& size, const Tile& tile, int begin) {
  return {begin, size.positions - begin > tile.positions ? begin + tile.positions : size.positions};
}

template <class M, class T>
DIA_DEVICE void reduce(M& m, const Reduce<T>& args) {
  constexpr int kPack = Pack<T>::size;
  const MapSize& size = args.size;
  const bool with_g = args.dy.data != nullptr, with_x = args.x.data != nullptr;
  const int most = size.interleaved ? args.tile.positions * round_up(args.tile.channels + kPack - 1, kPack)
                                    : round_up(args.tile.channels * args.tile.positions + kPack - 1, kPack);
  const auto x_stage = m.template shared<T>(with_x ? most : 0);
  const auto g_stage = m.template shared<T>(with_g ? most : 0);
  const auto scratch = m.template shared<float>(position_scratch(m.warps(), args.tile.channels));
  const auto part = m.template shared<float>(args.tile.channels);
  const auto totals = m.template shared<float>(2 * args.tile.channels);

  for_tiles(m, size, args.tile, [&](int64_t sample, Part channels) {
    const int owned = channels.size();
    for (int begin = 0; begin < size.positions || begin == 0; begin += args.tile.positions) {
      const Part range = range_of(size, args.tile, begin);
      const T* x = with_x ? args.x.data + sample * args.x.stride : nullptr;
      const T* dy = with_g ? args.dy.data + sample * args.dy.stride : nullptr;
      const bool aligned = (!with_x || aligned_runs(size, channels, range, args.x.data, args.x.stride)) &&
                           (!with_g || aligned_runs(size, channels, range, args.dy.data, args.dy.stride));
      const Image<T> image(size, channels, range, aligned);
      if (with_x) copy_in(m, image, args.x, sample, 1, x_stage);
      if (with_g) {
        const T* y = args.y.data != nullptr ? args.y.data + sample * args.y.stride : nullptr;
        T* g = args.g.data != nullptr ? args.g.data + sample * args.g.stride : nullptr;
        for (int number = m.thread(); number < image.slots(); number += m.threads()) {
          const Slot slot = slot_of(image, dy, number);
          const Pack<T> pack = masked_slot(m, image, dy, dy, y, slot);
          set_image_slot(g_stage, 0, slot, pack);
          if (g != nullptr) store_slot(m, image, dy, g, slot, pack);
        }
      }
      const auto value = [&](int channel, int position, bool second) {
        const int at = channels.begin + channel;
        float d = 0;
        if (with_x && (second || !with_g))
          d = M::widen(static_cast<T>(x_stage[image.place_of(x, at, position)])) -
              (args.shift != nullptr ? m.load(args.shift + at) : 0.0f);
        if (!with_g) return second ? d * d : d;
        const float g = M::widen(static_cast<T>(g_stage[image.place_of(dy, at, position)]));
        return second ? g * d : g;
      };
      DIA_UNROLL
      for (int which = 0; which < 2; ++which) {
        float* wanted = which == 0 ? args.sum : args.product;
        if (wanted == nullptr) continue;
        sum_positions(m, image, 1, scratch, part, 0,
                      [&](int, int channel, int position) { return value(channel, position, which == 1); });
        for (int k = m.thread(); k < owned; k += m.threads()) {
          const float before = begin == 0 ? 0.0f : static_cast<float>(totals[which * args.tile.channels + k]);
          const float sum = before + part[k];
          totals[which * args.tile.channels + k] = sum;
          if (range.end == size.positions) m.store(wanted + sample * size.channels + channels.begin + k, sum);
        }
      }
    }
  });
}

template <class M, class T>
DIA_DEVICE void spread(M& m, const Spread<T>& args) {
  const MapSize& size = args.size;
  for_tiles(m, size, args.tile, [&](int64_t sample, Part channels) {
    const T* like = args.out.data + sample * args.out.stride;
    for (int begin = 0; begin < size.positions; begin += args.tile.positions) {
      const Part range = range_of(size, args.tile, begin);
      const Image<T> image(size, channels, range,
                           aligned_runs(size, channels, range, static_cast<const T*>(args.out.data), args.out.stride));
      for (int number = m.thread(); number < image.slots(); number += m.threads()) {
        const Slot slot = slot_of(image, like, number);
        Pack<T> x, g, added;
        if (args.x.data != nullptr) x = load_slot(m, image, like, args.x.data + sample * args.x.stride, slot);
        if (args.dy.data != nullptr)
          g = masked_slot(m, image, like, args.dy.data + sample * args.dy.stride,
                          args.y.data != nullptr ? args.y.data + sample * args.y.stride : nullptr, slot);
        if (args.shortcut.data != nullptr)
          added = load_slot(m, image, like, args.shortcut.data + sample * args.shortcut.stride, slot);
        DIA_UNROLL
        for (int k = 0; k < Pack<T>::size; ++k) {
          if (slot.begin + k >= slot.end) continue;
          const int channel = channels.begin + image.channel_at(slot.begin + k);
          const int64_t at = sample * size.channels + channel;
          float value = args.offset != nullptr ? m.load(args.offset + at) : 0.0f;
          if (args.dy.data != nullptr) value += M::widen(g.values[k]) * m.load(args.scale + at);
          if (args.x.data != nullptr) {
            const float d = M::widen(x.values[k]) - (args.shift != nullptr ? m.load(args.shift + channel) : 0.0f);
            value += d * (args.slope != nullptr ? m.load(args.slope + channel) : m.load(args.scale + at));
          }
          if (args.shortcut.data != nullptr) value += M::widen(added.values[k]);
          if (args.relu && value <= 0.0f) value = 0.0f;  // not a maximum: NaN passes
          x.values[k] = M::template narrow<T>(value);
        }
        store_slot(m, image, like, args.out.data + sample * args.out.stride, slot, x);
      }
    }
  });
}

}  // namespace dia::kernels
