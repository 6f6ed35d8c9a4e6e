// How the threads of a block walk over a map without staging it: what a thread loads goes straight into its sums, or
// out again, and several loads are under way before the first is used.
//
//   planar        a row, one channel of a sample, is shared by `lanes` neighbouring threads, a pack of sixteen bytes
//                 each in turn. Packs lie where memory has them: the first and the last of a row may be incomplete.
//   interleaved   a thread keeps as many neighbouring channels as a pack has, at every r-th position; the threads of a
//                 block are r rows of the task's channels.
//
// Where packs cannot be had (odd channels in an interleaved map, maps whose packs begin at different elements) a thread
// takes single elements in the same way.
#pragma once

#include "../core/gpu_plan.h"
#include "map.h"

namespace dia::kernels {

// Whether all of these maps can be walked in packs. Planar: packs begin at the same elements of each. Interleaved:
// every position begins one, and so does every task.
template <class T>
class InPacks {
 public:
  DIA_DEVICE InPacks(const MapSize& size, const GpuTile& tile)
      : size_(size),
        so_far_(!size.interleaved ||
                (size.channels % kPack == 0 && (tile.channels % kPack == 0 || tile.channels >= size.channels))) {}
  template <class E>
  DIA_DEVICE void add(const Samples<E>& map) {
    if (map.data == nullptr) return;
    const int phase = phase_of(map.data);
    const int stride = size_.samples > 1 ? static_cast<int>(map.stride % kPack) : 0;
    if (size_.interleaved)
      so_far_ = so_far_ && phase == 0 && stride == 0;
    else
      so_far_ = so_far_ && (phase_ < 0 || (phase == phase_ && stride == stride_));
    phase_ = phase, stride_ = stride;
  }
  // Of a mask the bytes are packs: so all maps must begin with one. Comes after the maps.
  template <class B>
  DIA_DEVICE void add_mask(const Samples<B>& mask) {
    if (mask.data != nullptr) so_far_ = so_far_ && phase_ <= 0 && stride_ == 0;
  }
  DIA_DEVICE bool all() const { return so_far_; }

 private:
  static constexpr int kPack = Pack<T>::size;
  const MapSize& size_;
  bool so_far_;
  int phase_ = -1, stride_ = 0;
};

// A thread's packs of a task: `count` of them, the first at `offset` elements into the sample, `step` apart. `from` is
// the place in its row of a planar map's first pack, negative where that pack begins before the row.
template <class T, bool kWide, bool kInterleaved>
struct Walk {
  static constexpr int kValues = kWide ? Pack<T>::size : 1;

  int64_t sample, offset, step;
  int channel, count, from, length;
  bool inner;  // whether other rows of the sample lie on both sides of a planar map's row, each at least a pack long

  // Whether value k of pack `number` belongs to the row.
  DIA_DEVICE bool holds(int number, int k) const {
    if constexpr (!kWide || kInterleaved) return true;
    return static_cast<unsigned>(from + number * static_cast<int>(step) + k) < static_cast<unsigned>(length);
  }
  DIA_DEVICE bool whole(int number) const {
    if constexpr (!kWide || kInterleaved) return true;
    const int at = from + number * static_cast<int>(step);
    return at >= 0 && at + kValues <= length;
  }
  template <class E>
  DIA_DEVICE E* at(const Samples<E>& map, int number) const {
    return map.data + sample * map.stride + offset + number * step;
  }
  // Pack `number` of a map. What does not belong to the row is zero or, with `straddles`, whatever lies there, which
  // nobody may write meanwhile: element by element a row's ends would be waited for one by one.
  template <class M>
  DIA_DEVICE Pack<T> load(M& m, const Samples<const T>& map, int number, bool straddles) const {
    const T* from = at(map, number);
    if constexpr (!kWide) {
      Pack<T> pack{};
      pack.set(0, m.load(from));
      return pack;
    } else {
      if ((inner && straddles) || whole(number)) return m.load_pack(from);
      Pack<T> pack{};
      DIA_UNROLL
      for (int k = 0; k < kValues; ++k)
        if (holds(number, k)) pack.set(k, m.load(from + k));
      return pack;
    }
  }
  // The bits of pack `number` in a mask.
  template <class M>
  DIA_DEVICE unsigned bits(M& m, const Mask& mask, int number) const {
    const int64_t element = offset + number * step;  // not negative: rows with a mask begin packs
    const unsigned byte = m.load(mask.data + sample * mask.stride + (element >> 3));
    return kWide ? byte : byte >> (element & 7);
  }
  template <class M>
  DIA_DEVICE void set_bits(M& m, const Samples<uint8_t>& mask, int number, unsigned bits) const {
    static_assert(kValues == 8, "a byte has one writer");
    m.store(mask.data + sample * mask.stride + ((offset + number * step) >> 3), static_cast<uint8_t>(bits));
  }
  template <class M>
  DIA_DEVICE void store(M& m, const Samples<T>& map, int number, const Pack<T>& pack) const {
    T* to = at(map, number);
    if constexpr (!kWide) {
      m.store(to, pack[0]);
    } else {
      if (whole(number)) {
        m.store_pack(to, pack);
        return;
      }
      DIA_UNROLL
      for (int k = 0; k < kValues; ++k)
        if (holds(number, k)) m.store(to + k, pack[k]);
    }
  }
};

// The rows of threads that a block makes of a task with `owned` channels, and this thread's place in them. Threads
// that are left over are in no row.
template <class W>
struct Rows {
  int across, count, row, column;

  template <class M>
  DIA_DEVICE Rows(M& m, int owned)
      : across((owned + W::kValues - 1) / W::kValues),
        count(m.threads() / across),
        row(m.thread() / across),
        column(m.thread() - row * across) {}
  DIA_DEVICE bool there() const { return row < count; }
};

// Where the rows of a planar map begin in their packs.
template <class T>
struct RowPhases {
  unsigned first, step;  // of the first sample, and from one to the next

  template <class E>
  DIA_DEVICE explicit RowPhases(const Samples<E>& map)
      : first(static_cast<unsigned>(phase_of(map.data))), step(static_cast<unsigned>(map.stride % Pack<T>::size)) {}
  DIA_DEVICE int of(int64_t sample, int64_t begin) const {
    return static_cast<int>((first + static_cast<unsigned>(sample) * step + static_cast<unsigned>(begin)) %
                            static_cast<unsigned>(Pack<T>::size));
  }
};

// A thread's part of row `row` of all samples' rows; no packs where there is no such row.
template <class W, class M, class T>
DIA_DEVICE W planar_walk(M& m, const MapSize& size, int lanes, int64_t row, const RowPhases<T>& phases) {
  W walk{};
  // In 32 bits where they hold it: a division of 64 costs as much as a pack's sums.
  const int64_t sample =
      row <= INT32_MAX ? static_cast<uint32_t>(row) / static_cast<uint32_t>(size.channels) : row / size.channels;
  if (sample >= size.samples) return walk;
  walk.sample = sample, walk.channel = static_cast<int>(row - sample * size.channels), walk.length = size.positions;
  const int64_t begin = static_cast<int64_t>(walk.channel) * size.positions;
  const int phase = W::kValues > 1 ? phases.of(sample, begin) : 0;
  const int lane = m.thread() % lanes, packs = (phase + size.positions + W::kValues - 1) / W::kValues;
  walk.from = lane * W::kValues - phase, walk.step = static_cast<int64_t>(lanes) * W::kValues;
  walk.offset = begin + walk.from;
  walk.inner = walk.channel > 0 && walk.channel + 1 < size.channels && size.positions >= W::kValues;
  walk.count = packs > lane ? (packs - lane + lanes - 1) / lanes : 0;
  return walk;
}

// A thread's part of the channels and positions of a sample.
template <class W, class M>
DIA_DEVICE W interleaved_walk(M& m, const MapSize& size, int64_t sample, Part channels, Part positions) {
  const Rows<W> rows(m, channels.size());
  W walk{};
  walk.sample = sample, walk.channel = channels.begin + rows.column * W::kValues;
  const int first = positions.begin + rows.row;
  walk.offset = static_cast<int64_t>(first) * size.channels + walk.channel;
  walk.step = static_cast<int64_t>(rows.count) * size.channels;
  walk.count = rows.there() && first < positions.end ? (positions.end - first + rows.count - 1) / rows.count : 0;
  return walk;
}

}  // namespace dia::kernels
