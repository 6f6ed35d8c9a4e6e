// The sweeps over a map: what the split step and the folded batch norm consist of, but for the small tables between
// them (docs/kernels.md). Two kernels with optional parts:
//
//   reduce   sums over each channel's positions          pool, moments, and the first sweeps of both gradients
//   spread   a value of each sample and channel, applied   rescale, normalise, and the second sweeps of both gradients
//
// A block takes tiles in turn: some channels of a sample, and of a large map some positions of one channel. `reduce`
// stages a tile in shared memory, wide accesses on one side and sums by channel on the other. Each map is read or
// written once; a planar tile is one run, so that odd channels cost no sector twice but at its ends. `spread` goes from
// the last tile to the first: what the second-level cache still holds of the first sweep is met first.
#pragma once

#include "gradient.h"
#include "image.h"
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
  float* first;            // (N, C): instead, a sample's first value of each channel is its shift, and is written here
  // (N, C): sums of g and of g (x - shift). Without dy of x - shift, and of squares about each sample's own mean, which
  // takes the first. Null: not wanted.
  float *sum, *product;
};

template <class T>
struct Spread {
  MapSize size;
  Tile tile;
  Samples<const T> dy, y;        // g, as above; no dy: no such term
  Samples<const T> x, shortcut;  // no data: no such term
  Samples<T> out;
  const float *scale, *offset;  // (N, C); null: 0, where nothing is to be scaled by it
  const float *shift, *slope;   // (C), null: 0. With slope out += (x - shift) slope, else (x - shift) scale.
  bool relu;
};

// Calls `body(sample, channels)` for the tiles of this block. `backwards`: from the last to the first.
template <class M, class Body>
DIA_DEVICE void for_tiles(M& m, const MapSize& size, const Tile& tile, bool backwards, Body body) {
  const int across = (size.channels + tile.channels - 1) / tile.channels;
  const int64_t tasks = static_cast<int64_t>(size.samples) * across;
  for (int64_t task = m.team(); task < tasks; task += m.teams()) {
    const int64_t number = backwards ? tasks - 1 - task : task, sample = number / across;
    const int begin = static_cast<int>(number - sample * across) * tile.channels;
    body(sample, Part{begin, begin + tile.channels < size.channels ? begin + tile.channels : size.channels});
  }
}

// Positions [begin, ...) of the tile.
DIA_DEVICE Part range_of(const MapSize& size, const Tile& tile, int begin) {
  return {begin, size.positions - begin > tile.positions ? begin + tile.positions : size.positions};
}

// g of a tile into the stage, with the phases of dy, and into memory.
template <class M, class T, class Array>
DIA_DEVICE void stage_gradient(M& m, const Reduce<T>& args, const Image<T>& image, int64_t sample, const Array& stage) {
  const bool masked = args.y.data != nullptr, written = args.g.data != nullptr;
  for_slots(
      m, image, args.dy, sample, 1, (!masked || alike(args.dy, args.y)) && (!written || alike(args.dy, args.g)),
      [&](const Place& at) {
        Pack<T> g = m.load_pack(at.in(args.dy, sample));
        if (masked) mask_pack<M>(g, m.load_pack(at.in(args.y, sample)));
        stage.set_pack(at.place, g);
        if (written) m.store_pack(at.in(args.g, sample), g);
      },
      [&](const Place& at) {
        T g = m.load(at.in(args.dy, sample));
        if (masked) mask<M>(g, m.load(at.in(args.y, sample)));
        stage[at.place] = g;
        if (written) m.store(at.in(args.g, sample), g);
      });
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
  // Of the positions at hand: a sum, and for squares the means and the squares about them.
  const bool centred = !with_g && args.product != nullptr;
  const auto part = m.template shared<float>(args.tile.channels);
  const auto means = m.template shared<float>(centred ? args.tile.channels : 0);
  const auto squares = m.template shared<float>(centred ? args.tile.channels : 0);
  const auto totals = m.template shared<float>(2 * args.tile.channels);
  const auto shift = m.template shared<float>(args.tile.channels);

  for_tiles(m, size, args.tile, false, [&](int64_t sample, Part channels) {
    const int owned = channels.size();
    for (int k = m.thread(); k < owned && args.first == nullptr; k += m.threads())
      shift[k] = args.shift != nullptr ? m.load(args.shift + channels.begin + k) : 0.0f;
    for (int begin = 0; begin < size.positions || begin == 0; begin += args.tile.positions) {
      const Part range = range_of(size, args.tile, begin);
      const T* x = with_x ? args.x.data + sample * args.x.stride : nullptr;
      const T* dy = with_g ? args.dy.data + sample * args.dy.stride : nullptr;
      const bool aligned = (!with_x || aligned_runs(size, channels, range, args.x.data, args.x.stride)) &&
                           (!with_g || aligned_runs(size, channels, range, args.dy.data, args.dy.stride));
      const Image<T> image(size, channels, range, aligned);
      if (with_x) copy_in(m, image, args.x, sample, 1, x_stage);
      if (with_g) stage_gradient(m, args, image, sample, g_stage);
      const auto x_at = [&](int channel, int position) {
        return M::widen(static_cast<T>(x_stage[image.place_of(x, channels.begin + channel, position)])) -
               shift[channel];
      };
      const auto g_at = [&](int channel, int position) {
        return M::widen(static_cast<T>(g_stage[image.place_of(dy, channels.begin + channel, position)]));
      };
      if (args.first != nullptr && begin == 0) {
        m.sync_block();
        for (int k = m.thread(); k < owned; k += m.threads()) {
          const float value = M::widen(static_cast<T>(x_stage[image.place_of(x, channels.begin + k, 0)]));
          shift[k] = value;
          m.store(args.first + sample * size.channels + channels.begin + k, value);
        }
      }
      // Adds what `part` has to what the positions before had; `joined(before, channel)` is what they have in common.
      const auto add_up = [&](int which, const auto& part, float* wanted, auto joined) {
        for (int k = m.thread(); k < owned; k += m.threads()) {
          float sum = part[k];
          if (begin > 0) sum += joined(static_cast<float>(totals[which * args.tile.channels + k]), k);
          totals[which * args.tile.channels + k] = sum;
          if (range.end == size.positions) m.store(wanted + sample * size.channels + channels.begin + k, sum);
        }
      };
      const auto plain = [](float before, int) { return before; };
      const float count = static_cast<float>(range.size()), before = static_cast<float>(begin);
      if (with_g) {
        if (args.sum != nullptr) {
          sum_positions(m, image, 1, scratch, part, 0, [&](int, int c, int position) { return g_at(c, position); });
          add_up(0, part, args.sum, plain);
        }
        if (args.product != nullptr) {
          sum_positions(m, image, 1, scratch, part, 0,
                        [&](int, int c, int position) { return g_at(c, position) * x_at(c, position); });
          add_up(1, part, args.product, plain);
        }
        continue;
      }
      sum_positions(m, image, 1, scratch, part, 0, [&](int, int c, int position) { return x_at(c, position); });
      if (centred) {
        // About the mean of the positions at hand; two such sums differ by what their means do (Chan, Golub, LeVeque
        // 1979, formula 2.1).
        const auto joined = [&](float squares, int k) {
          const float apart = means[k] - totals[k] / before;
          return squares + apart * apart * (before * count / (before + count));
        };
        for (int k = m.thread(); k < owned; k += m.threads()) means[k] = part[k] / count;
        sum_positions(m, image, 1, scratch, squares, 0, [&](int, int c, int position) {
          const float d = x_at(c, position) - means[c];
          return d * d;
        });
        add_up(1, squares, args.product, joined);
      }
      add_up(0, part, args.sum, plain);
    }
  });
}

template <class M, class T>
DIA_DEVICE void spread(M& m, const Spread<T>& args) {
  const MapSize& size = args.size;
  const bool has_g = args.dy.data != nullptr, masked = has_g && args.y.data != nullptr;
  const bool has_x = args.x.data != nullptr, added = args.shortcut.data != nullptr;
  const bool packs = (!has_g || alike(args.out, args.dy)) && (!masked || alike(args.out, args.y)) &&
                     (!has_x || alike(args.out, args.x)) && (!added || alike(args.out, args.shortcut));
  for_tiles(m, size, args.tile, true, [&](int64_t sample, Part channels) {
    // Of a channel, in registers while a pack's elements belong to it.
    struct Factors {
      float g, x, shift, offset;
    };
    const auto factors_of = [&](int own) {
      const int channel = channels.begin + own;
      const int64_t at = sample * size.channels + channel;
      Factors of{};
      if (args.scale != nullptr) of.g = m.load(args.scale + at);
      of.x = args.slope != nullptr ? m.load(args.slope + channel) : of.g;
      if (has_x && args.shift != nullptr) of.shift = m.load(args.shift + channel);
      if (args.offset != nullptr) of.offset = m.load(args.offset + at);
      return of;
    };
    const auto value = [&](const Factors& of, T g, T x, T shortcut) {
      float sum = of.offset;
      if (has_g) sum += M::widen(g) * of.g;
      if (has_x) sum += (M::widen(x) - of.shift) * of.x;
      if (added) sum += M::widen(shortcut);
      return M::template narrow<T>(args.relu && sum <= 0.0f ? 0.0f : sum);  // not a maximum: NaN passes
    };
    for (int begin = 0; begin < size.positions; begin += args.tile.positions) {
      const Part range = range_of(size, args.tile, begin);
      const Image<T> image(size, channels, range,
                           aligned_runs(size, channels, range, static_cast<const T*>(args.out.data), args.out.stride));
      for_slots(
          m, image, args.out, sample, 1, packs,
          [&](const Place& at) {
            Pack<T> g{}, x{}, shortcut{};
            if (has_g) g = m.load_pack(at.in(args.dy, sample));
            if (has_x) x = m.load_pack(at.in(args.x, sample));
            if (added) shortcut = m.load_pack(at.in(args.shortcut, sample));
            if (masked) mask_pack<M>(g, m.load_pack(at.in(args.y, sample)));
            ChannelWalk walk(image, at.element);
            Factors of = factors_of(walk.channel);
            DIA_UNROLL
            for (int k = 0; k < Pack<T>::size; ++k) {
              x.set(k, value(of, g[k], x[k], shortcut[k]));
              if (k + 1 < Pack<T>::size && walk.next()) of = factors_of(walk.channel);
            }
            m.store_pack(at.in(args.out, sample), x);
          },
          [&](const Place& at) {
            T g{}, x{}, shortcut{};
            if (has_g) g = m.load(at.in(args.dy, sample));
            if (has_x) x = m.load(at.in(args.x, sample));
            if (added) shortcut = m.load(at.in(args.shortcut, sample));
            if (masked) mask<M>(g, m.load(at.in(args.y, sample)));
            m.store(at.in(args.out, sample), value(factors_of(image.channel_at(at.element)), g, x, shortcut));
          });
    }
  });
}

}  // namespace dia::kernels
