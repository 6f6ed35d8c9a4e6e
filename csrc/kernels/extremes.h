// The extreme values of a map's channels behind a norm, their positions, and the gradient that goes there.
//
// `extremes` reads the map once, in packs and through registers as `reduce` does: a thread keeps of its values that
// which gamma makes the largest, and its position. Threads that share a channel meet once a task in shared memory: two
// barriers of an interleaved map, of a planar one as often as its threads can be halved.
//
// `spread_extreme_gradient` makes a value of each channel of each sample again, after the second sweep of a gradient
// has written all of them, with what comes to it: so it is rounded once.
//
// Of equal values the first counts: the same position whatever the number of threads. NaN is beyond all.
//
// Of its own, and not a part of the sweep that sums moments: its values and positions would take sixteen registers of a
// thread, and moments are summed where no extreme is wanted.
#pragma once

#include "sweeps.h"

namespace dia::kernels {

template <class T>
struct Extremes {
  MapSize size;
  GpuTile tile;
  Samples<const T> x;
  const float* gamma;             // (C), or null: the largest values are wanted, else the smallest where it is negative
  const float *shift, *d, *rstd;  // (C)
  float* extreme;                 // (N, C): ((x - shift) - d) rstd of it
  int64_t* where;                 // (N, C)

  DIA_DEVICE int across() const { return (size.channels + tile.channels - 1) / tile.channels; }
};

// A value times the sign that makes the wanted one the largest. At first less than any.
struct Extreme {
  static constexpr int kNowhere = 0x7fffffff;

  float value = -INFINITY;
  int where = kNowhere;

  DIA_DEVICE void take(float next, int at) {
    const bool none = value != value, other_none = next != next;
    if (next > value || (other_none && !none) || ((next == value || (other_none && none)) && at < where))
      value = next, where = at;
  }
};

template <class M>
DIA_DEVICE float sign_of(M& m, const float* gamma, int channel) {
  return gamma != nullptr && m.load(gamma + channel) < 0.0f ? -1.0f : 1.0f;
}

template <class M, class T>
DIA_DEVICE void put_extreme(M& m, const Extremes<T>& args, int channel, int64_t at, const Extreme& of, float sign) {
  const float off = (of.value * sign - m.load(args.shift + channel)) - m.load(args.d + channel);
  m.store(args.extreme + at, off * m.load(args.rstd + channel));
  m.store(args.where + at, static_cast<int64_t>(of.where));
}

// Those of a walk, whose pack `number` begins at position `first + number * apart`; of a planar map's packs one for all
// values, which lie behind each other, of an interleaved one's each its own.
template <bool kInterleaved, class M, class T, class W, int kCount>
DIA_DEVICE void find_extremes(M& m, const Extremes<T>& args, const W& walk, int first, int apart,
                              const float (&sign)[kCount], Extreme (&best)[kCount]) {
  for (int begin = 0; begin < walk.count; begin += kPacksPlanar) {
    Pack<T> x[kPacksPlanar]{};
    DIA_UNROLL
    for (int b = 0; b < kPacksPlanar; ++b)
      if (begin + b < walk.count) x[b] = walk.load(m, args.x, begin + b, true);
    DIA_UNROLL
    for (int b = 0; b < kPacksPlanar; ++b) {
      const int number = begin + b;
      if (number >= walk.count) continue;
      DIA_UNROLL
      for (int k = 0; k < W::kValues; ++k) {
        if (!walk.holds(number, k)) continue;
        const int at = kInterleaved ? k : 0;
        best[at].take(M::widen(x[b][k]) * sign[at], first + number * apart + (kInterleaved ? 0 : k));
      }
    }
  }
}

template <bool kWide, class M, class T>
DIA_DEVICE void extremes_planar(M& m, const Extremes<T>& args) {
  using W = Walk<T, kWide, false>;
  const int lanes = args.tile.lanes, lane = m.thread() % lanes;
  const auto values = m.template shared<float>(m.threads());
  const auto places = m.template shared<int>(m.threads());
  const RowPhases<T> phases(args.x);
  for_rows<OwnKernel>(m, args.size, args.tile, false, [&](int64_t row, bool there) {
    const W walk = planar_walk<W>(m, args.size, lanes, row, phases);
    const float sign[1] = {there ? sign_of(m, args.gamma, walk.channel) : 1.0f};
    Extreme best[1];
    find_extremes<false>(m, args, walk, walk.from, static_cast<int>(walk.step), sign, best);
    m.sync_block();  // those of the rows before may still be read
    values[m.thread()] = best[0].value, places[m.thread()] = best[0].where;
    for (int half = lanes / 2; half > 0; half /= 2) {
      m.sync_block();
      if (lane >= half) continue;
      best[0].take(values[m.thread() + half], places[m.thread() + half]);
      values[m.thread()] = best[0].value, places[m.thread()] = best[0].where;
    }
    if (there && lane == 0) put_extreme(m, args, walk.channel, row, best[0], sign[0]);
  });
}

template <bool kWide, class M, class T>
DIA_DEVICE void extremes_interleaved(M& m, const Extremes<T>& args) {
  using W = Walk<T, kWide, true>;
  const MapSize& size = args.size;
  const auto values = m.template shared<float>(MeetingPlace<W>::template kCount<OwnKernel>);
  const auto places = m.template shared<int>(MeetingPlace<W>::template kCount<OwnKernel>);
  const int across = args.across();
  const int64_t tasks = static_cast<int64_t>(size.samples) * across;
  for (int64_t task = m.block(); task < tasks; task += m.blocks()) {
    const int sample = static_cast<int>(task / across);
    const int begin = static_cast<int>(task - static_cast<int64_t>(sample) * across) * args.tile.channels;
    const Part channels{begin, begin + args.tile.channels < size.channels ? begin + args.tile.channels : size.channels};
    const Rows<W> rows(m, channels.size());
    const W walk = interleaved_walk<W>(m, size, sample, channels, {0, size.positions});
    float sign[W::kValues];
    DIA_UNROLL
    for (int k = 0; k < W::kValues; ++k)
      sign[k] = rows.there() && walk.channel + k < channels.end ? sign_of(m, args.gamma, walk.channel + k) : 1.0f;
    Extreme best[W::kValues];
    find_extremes<true>(m, args, walk, rows.row, rows.count, sign, best);
    const MeetingPlace<W> place{rows.across};
    m.sync_block();  // those of the task before may still be read
    DIA_UNROLL
    for (int k = 0; k < W::kValues; ++k)
      if (rows.there()) {
        const int at = place.at(rows.row, rows.column, k);
        values[at] = best[k].value, places[at] = best[k].where;
      }
    m.sync_block();
    for (int j = m.thread(); j < channels.size(); j += m.threads()) {
      Extreme of;
      for (int r = 0; r < rows.count; ++r) {
        const int at = place.at(r, j / W::kValues, j % W::kValues);
        of.take(values[at], places[at]);
      }
      const int channel = channels.begin + j;
      put_extreme(m, args, channel, row_at(sample, size.channels) + channel, of, sign_of(m, args.gamma, channel));
    }
  }
}

// There is at least one position.
template <class M, class T>
DIA_DEVICE void extremes(M& m, const Extremes<T>& args) {
  InPacks<T> packs(args.size, args.tile);
  packs.add(args.x);
  if (args.size.interleaved) {
    if (packs.all())
      extremes_interleaved<true>(m, args);
    else
      extremes_interleaved<false>(m, args);
  } else if (packs.all()) {
    extremes_planar<true>(m, args);
  } else {
    extremes_planar<false>(m, args);
  }
}

// out = dy scale + (x - shift) slope + offset + dextreme rstd, at one position of each channel of each sample.
template <class T>
struct SpreadExtremeGradient {
  MapSize size;
  Samples<const T> dy, x;  // no x: no such term
  Samples<T> out;
  const float *scale, *offset;  // (N, C)
  const float *shift, *rstd;    // (C)
  const float* slope;           // as in Spread
  bool slope_of_samples;
  const float* dextreme;  // (N, C)
  const int64_t* where;   // (N, C)

  DIA_DEVICE int64_t count() const { return row_at(size.samples, size.channels); }
};

template <class M, class T>
DIA_DEVICE void spread_extreme_gradient(M& m, const SpreadExtremeGradient<T>& args) {
  const MapSize& size = args.size;
  for_elements(m, args.count(), [&](int64_t k) {
    const int64_t sample = k / size.channels, position = m.load(args.where + k);
    const int channel = static_cast<int>(k - sample * size.channels);
    if (position < 0 || position >= size.positions) return;  // whoever calls the operator may ask for anything
    const int64_t at =
        size.interleaved ? row_at(position, size.channels) + channel : row_at(channel, size.positions) + position;
    float sum = m.load(args.offset + k) + m.load(args.dextreme + k) * m.load(args.rstd + channel);
    sum += M::widen(m.load(args.dy.data + sample * args.dy.stride + at)) * m.load(args.scale + k);
    if (args.x.data != nullptr) {
      const float slope = m.load(args.slope + (args.slope_of_samples ? k : channel));
      sum += (M::widen(m.load(args.x.data + sample * args.x.stride + at)) - m.load(args.shift + channel)) * slope;
    }
    m.store(args.out.data + sample * args.out.stride + at, M::template narrow<T>(sum));
  });
}

}  // namespace dia::kernels
