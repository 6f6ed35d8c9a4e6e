// The sweeps over a map: what the split step and the folded batch norm consist of, but for the small tables between
// them (docs/kernels.md). Two kernels with optional parts:
//
//   reduce   sums over each channel's positions            pool, moments, and the first sweeps of both gradients
//   spread   a value of each sample and channel, applied   rescale, normalise, and the second sweeps of both gradients
//
// Each map is read or written once and goes through registers only (walk.h), with a few packs of each under way. No
// barrier while a map is streamed; sums meet in shuffles, and of an interleaved map once a task in shared memory.
// `spread` goes from the last tile to the first: what the second-level cache still holds of the first sweep is met
// first.
//
// Tried before, on an H100: tiles staged in shared memory, wide accesses on one side and sums by channel on the other.
// Every tile waited for its loads, then for its sums, and half of the instructions found places; two to five times as
// slow, more with few samples.
#pragma once

#include "../core/shift.h"
#include "gradient.h"
#include "norm.h"
#include "walk.h"

namespace dia::kernels {

template <class T>
struct Reduce {
  MapSize size;
  GpuTile tile;
  Samples<const T> x;      // (x - shift) is what is summed, alone or times g
  Samples<const T> dy, y;  // g = dy, where y > 0 if there is y; no dy: no g
  Mask mask;               // in place of y
  Samples<T> g;            // no data: not wanted
  const float* shift;      // (C), or null for 0
  // (N, C), for the moments of a batch: each sample's shift of each channel, one of its values (core/shift.h), is
  // written here; and what rounding takes off the sum. Then `product` has the squares about each sample's own mean.
  // `centred`: each sample's are wanted for themselves.
  float *first, *rest;
  bool centred;
  // (N, C): sums of g and of g (x - shift), without dy of x - shift. Null: not wanted.
  float *sum, *product;
  Means means;  // of x, if there is no dy; no p: not wanted

  DIA_DEVICE int across() const { return (size.channels + tile.channels - 1) / tile.channels; }
};

template <class T>
struct Spread {
  MapSize size;
  GpuTile tile;
  Samples<const T> dy, y;        // g, as above; no dy: no such term
  Mask mask;                     // in place of y
  Samples<const T> x, shortcut;  // no data: no such term; a shortcut, and the ReLU, only without g
  Samples<T> out;
  Samples<uint8_t> passed;      // where the mask of `out` goes; no data: not wanted
  const float *scale, *offset;  // (N, C); null: 0, where nothing is to be scaled by it
  const float *shift, *slope;   // (C), null: 0. With slope out += (x - shift) slope, else (x - shift) scale.
  bool slope_of_samples;        // the slope is (N, C)
  bool relu;
  bool beside;  // the kernel before, of which it needs nothing: both run at once
};

// The arguments of samples [first, first + count).
template <class T>
DIA_DEVICE Reduce<T> of_samples(Reduce<T> reduce, int64_t first, int count) {
  const int64_t width = reduce.size.channels;
  reduce.size.samples = count;
  reduce.x = from_sample(reduce.x, first), reduce.dy = from_sample(reduce.dy, first);
  reduce.y = from_sample(reduce.y, first), reduce.g = from_sample(reduce.g, first);
  reduce.mask = from_sample(reduce.mask, first);
  reduce.means.p = rows_from(reduce.means.p, first, width),
  reduce.means.off = rows_from(reduce.means.off, first, width);
  reduce.sum = rows_from(reduce.sum, first, width), reduce.product = rows_from(reduce.product, first, width);
  return reduce;
}
template <class T>
DIA_DEVICE Spread<T> of_samples(Spread<T> spread, int64_t first, int count) {
  const int64_t width = spread.size.channels;
  spread.size.samples = count;
  spread.dy = from_sample(spread.dy, first), spread.y = from_sample(spread.y, first);
  spread.x = from_sample(spread.x, first), spread.shortcut = from_sample(spread.shortcut, first);
  spread.out = from_sample(spread.out, first);
  spread.mask = from_sample(spread.mask, first), spread.passed = from_sample(spread.passed, first);
  spread.scale = rows_from(spread.scale, first, width), spread.offset = rows_from(spread.offset, first, width);
  return spread;
}

// Tasks of a sweep over these samples. Planar: some rows, each one channel of a sample. Interleaved: of a sample some
// channels and positions.
DIA_DEVICE int64_t tasks_of(const MapSize& size, const GpuTile& tile) {
  const auto parts = [](int64_t of, int64_t unit) { return (of + unit - 1) / unit; };
  const int64_t across = parts(size.channels, tile.channels);
  if (!size.interleaved) return parts(static_cast<int64_t>(size.samples) * size.channels, tile.channels);
  return size.samples * across * (size.positions > 0 ? parts(size.positions, tile.positions) : 1);
}

// How a sweep is used, and by whom.
enum class Sweeping { anything, means, gradients };

// By a kernel of its own: for whatever its arguments say, and the tasks belong to all blocks.
struct OwnKernel {
  static constexpr Sweeping kWhat = Sweeping::anything;
  static constexpr int kThreads = kSweepThreads;
  template <class M>
  DIA_DEVICE static int first(const M& m) {
    return m.block();
  }
  template <class M>
  DIA_DEVICE static int step(const M& m) {
    return m.blocks();
  }
};
// By a cluster, for a part of what a sweep can do: means alone are summed, and spread without g; or g and its products
// are summed. The tasks belong to the cluster's blocks.
template <Sweeping kPart>
struct WithinCluster {
  static constexpr Sweeping kWhat = kPart;
  static constexpr int kThreads = kClusterThreads;
  template <class M>
  DIA_DEVICE static int first(const M& m) {
    return m.block() % kClusterBlocks;
  }
  template <class M>
  DIA_DEVICE static int step(const M&) {
    return kClusterBlocks;
  }
};

// A block's number in its cluster, and the samples that the cluster takes.
struct ClusterShare {
  int rank, first, count;

  template <class M>
  DIA_DEVICE ClusterShare(const M& m, int samples, int together)
      : rank(m.block() % kClusterBlocks), first(m.block() / kClusterBlocks * together), count(samples - first) {
    if (count > together) count = together;
  }
};

// --- reduce --------------------------------------------------------------------------------------------------

// Packs that are loaded before the first is used. From sm_100 on the compiler takes more registers for the same, and
// would put packs away.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kLoadedAlone = 6, kLoadedMasked = 2, kLoadedPlanar = 3;
#else
constexpr int kLoadedAlone = kPacksAlone, kLoadedMasked = kPacksMasked, kLoadedPlanar = kPacksPlanar;
#endif

// A thread's sums, one of each value of its packs.
template <class W>
struct Sums {
  float shift[W::kValues] = {}, first[W::kValues] = {}, second[W::kValues] = {};
};

// What a sweep sums: x alone, or x and g, which y masks if there is y, or g that has a mask.
enum class Summed { x, g, masked_g };

// Sums of all packs of a walk; writes g where it is wanted. kSecond: whether the products are wanted too.
template <Summed kWhat, bool kSecond, class M, class T, class W>
DIA_DEVICE void sum_up(M& m, const Reduce<T>& args, const W& walk, Sums<W>& sums) {
  constexpr bool kWithG = kWhat != Summed::x, kMask = kWhat == Summed::masked_g;
  constexpr int kBatch = kMask ? kLoadedMasked : kWithG ? kPacksOfEach : kLoadedAlone;
  const bool with_x = args.x.data != nullptr, masked = kWhat == Summed::g && args.y.data != nullptr;
  for (int first = 0; first < walk.count; first += kBatch) {
    Pack<T> x[kBatch]{}, g[kBatch]{}, y[kBatch]{};  // undefined ones would be carried from pass to pass, in memory
    unsigned bits[kBatch]{};
    // Loads alone: what uses one of them would have to be waited for before the next is under way.
    DIA_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int number = first + b;
      if (number >= walk.count) continue;
      if (with_x) x[b] = walk.load(m, args.x, number, true);
      if (kWithG) g[b] = walk.load(m, args.dy, number, true);
      if (masked) y[b] = walk.load(m, args.y, number, true);
      if (kMask) bits[b] = walk.bits(m, args.mask, number);
    }
    DIA_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int number = first + b;
      if (number >= walk.count) continue;
      if (masked) mask_pack<M>(g[b], y[b]);
      if (kMask) mask_pack<M>(g[b], bits[b]);
      if (kWithG && args.g.data != nullptr) walk.store(m, args.g, number, g[b]);
      DIA_UNROLL
      for (int k = 0; k < W::kValues; ++k) {
        if (!walk.holds(number, k)) continue;
        const float value = M::widen(x[b][k]) - sums.shift[k];
        const float factor = kWithG ? M::widen(g[b][k]) : value;
        sums.first[k] += factor;
        if (kSecond) sums.second[k] += factor * value;
      }
    }
  }
}
template <class Use, class M, class T, class W>
DIA_DEVICE void sum_up_for(M& m, const Reduce<T>& args, const W& walk, Sums<W>& sums) {
  if constexpr (Use::kWhat == Sweeping::means) return sum_up<Summed::x, false>(m, args, walk, sums);
  if (sizeof(T) == 2 && args.mask.data != nullptr)
    sum_up<Summed::masked_g, true>(m, args, walk, sums);
  else if (Use::kWhat == Sweeping::gradients || args.dy.data != nullptr)
    sum_up<Summed::g, true>(m, args, walk, sums);
  else if (args.product != nullptr)
    sum_up<Summed::x, true>(m, args, walk, sums);
  else
    sum_up<Summed::x, false>(m, args, walk, sums);
}

// What the moments of a sample's channel are taken about, whose values lie `step` apart from `at` on.
template <class M, class T>
DIA_DEVICE float moments_shift(M& m, const Reduce<T>& args, const T* at, int step) {
  if (args.size.positions == 0) return 0.0f;
  // Of 16 bits the values themselves have fewer digits than an outlier could cost.
  if (sizeof(T) == 2 && !args.centred) {
    const float first = M::widen(m.load(at));
    return first - first == 0.0f ? first : 0.0f;
  }
  float values[3];
  DIA_UNROLL
  for (int k = 0; k < 3; ++k) values[k] = M::widen(m.load(at + shift_place(args.size.positions, k) * step));
  return shift_of(values[0], values[1], values[2]);
}

// Where the first sum of a channel is put.
template <class M, class T>
DIA_DEVICE void put_sum(M& m, const Reduce<T>& args, int channel, int64_t at, float sum) {
  if (args.sum != nullptr) m.store(args.sum + at, sum);
  if (args.means.p != nullptr) put_mean(m, args.means, channel, at, sum / static_cast<float>(args.size.positions));
}

// A sample's moments of a channel over some positions about one of its values, `first`, from those of its threads. In
// double, where the squares about the mean lose nothing.
template <class M, class T>
DIA_DEVICE void put_moments(M& m, const Reduce<T>& args, int64_t at, int positions, float first, double total,
                            double squares) {
  const float sum = static_cast<float>(total);
  const double about_mean = squares - total * total / static_cast<double>(positions);
  m.store(args.first + at, first);
  m.store(args.sum + at, sum);
  m.store(args.rest + at, sum - sum == 0.0f ? static_cast<float>(total - static_cast<double>(sum)) : 0.0f);
  m.store(args.product + at, about_mean < 0 ? 0.0f : static_cast<float>(about_mean));  // not a maximum: NaN passes
}

// The sum over the threads of a row: lanes of a warp by shuffles, and where more warps share it their parts in order.
template <class M, class V, class Array>
DIA_DEVICE V row_sum(M& m, int lanes, const Array& scratch, V value) {
  if (lanes <= 32) return m.warp_sum(value, 1, lanes);
  value = m.warp_sum(value);
  m.sync_block();  // the sum before may still be read
  if (m.lane() == 0) scratch[m.warp()] = value;
  m.sync_block();
  const int first = m.warp() / (lanes / 32) * (lanes / 32);
  V sum = 0;
  for (int warp = first; warp < first + lanes / 32; ++warp) sum += scratch[warp];
  return sum;
}

// Calls `body(row, there)` for the rows of a block's tasks, as many at once as `lanes` threads each allow; all
// threads of the block come along, those for which there is no row beyond all of them. `backwards`: the last task comes
// first.
template <class Use, class M, class Body>
DIA_DEVICE void for_rows(M& m, const MapSize& size, const GpuTile& tile, bool backwards, Body body) {
  const int at_once = m.threads() / tile.lanes;
  const int64_t rows = static_cast<int64_t>(size.samples) * size.channels, tasks = tasks_of(size, tile);
  for (int64_t number = Use::first(m); number < tasks; number += Use::step(m)) {
    const int64_t task = backwards ? tasks - 1 - number : number;
    const int64_t begin = task * tile.channels, left = rows - begin;
    const int count = left < tile.channels ? static_cast<int>(left) : tile.channels;
    for (int first = 0; first < count; first += at_once) {
      const int own = first + m.thread() / tile.lanes;
      body(own < count ? begin + own : rows, own < count);
    }
  }
}

template <class Use, bool kWide, class M, class T>
DIA_DEVICE void reduce_planar(M& m, const Reduce<T>& args) {
  using W = Walk<T, kWide, false>;
  const int lanes = args.tile.lanes;
  const bool moments = Use::kWhat == Sweeping::anything && args.first != nullptr;
  const bool products = Use::kWhat != Sweeping::means && args.product != nullptr;
  const auto scratch = m.template shared<double>(m.warps());
  RowPhases<T> phases(args.dy);  // not by ?:, which would be an address, and keep the arguments in memory
  if (Use::kWhat == Sweeping::means || args.x.data != nullptr) phases = RowPhases<T>(args.x);
  for_rows<Use>(m, args.size, args.tile, false, [&](int64_t row, bool there) {
    const W walk = planar_walk<W>(m, args.size, lanes, row, phases);
    const bool writes = there && m.thread() % lanes == 0;
    float shift = 0;
    if (args.shift != nullptr && there) shift = m.load(args.shift + walk.channel);
    if (moments && there) {
      const int64_t begin = walk.sample * args.x.stride + static_cast<int64_t>(walk.channel) * args.size.positions;
      shift = moments_shift(m, args, args.x.data + begin, 1);
    }
    Sums<W> sums;
    DIA_UNROLL
    for (int k = 0; k < W::kValues; ++k) sums.shift[k] = shift;
    sum_up_for<Use>(m, args, walk, sums);
    float total = 0, product = 0;
    DIA_UNROLL
    for (int k = 0; k < W::kValues; ++k) total += sums.first[k], product += sums.second[k];
    if (moments) {
      const double all = row_sum(m, lanes, scratch, static_cast<double>(total));
      const double squares = row_sum(m, lanes, scratch, static_cast<double>(product));
      if (writes) put_moments(m, args, row, args.size.positions, shift, all, squares);
      return;
    }
    if (args.sum != nullptr || args.means.p != nullptr) total = row_sum(m, lanes, scratch, total);
    if (products) product = row_sum(m, lanes, scratch, product);
    if (!writes) return;
    put_sum(m, args, walk.channel, row, total);
    if (products) m.store(args.product + row, product);
  });
}

// Where the sums of a block's rows of threads meet. A thread's values lie together, and its neighbour's a place further
// than they need to, so that the lanes of a warp meet all banks.
template <class W>
struct MeetingPlace {
  static constexpr int kStep = W::kValues > 1 ? W::kValues + 1 : 1;
  template <class Use>
  static constexpr int kCount = Use::kThreads * kStep;

  int across;
  DIA_DEVICE int at(int row, int column, int k) const { return (row * across + column) * kStep + k; }
};

// Sums of each channel of a task over the block's rows of threads: `value(k)` of this thread's channels, a sum for
// thread j modulo the block's threads goes to done(j, sum). Two barriers.
template <class W, class V, class M, class Array, class Value, class Done>
DIA_DEVICE void sum_of_rows(M& m, const Rows<W>& rows, int owned, const Array& scratch, Value value, Done done) {
  // A row that lies in a warp several times is added up there first.
  const bool within = rows.across <= 16 && (rows.across & (rows.across - 1)) == 0;
  const int count = within ? m.warps() : rows.count, row = within ? m.warp() : rows.row;
  const bool writes = within ? m.lane() < rows.across : rows.there();
  const MeetingPlace<W> place{rows.across};
  m.sync_block();  // the sums before may still be read
  DIA_UNROLL
  for (int k = 0; k < W::kValues; ++k) {
    V sum = value(k);
    if (within) sum = m.warp_sum(sum, rows.across);
    if (writes && rows.column * W::kValues + k < owned) scratch[place.at(row, rows.column, k)] = sum;
  }
  m.sync_block();
  for (int j = m.thread(); j < owned; j += m.threads()) {
    V sum = 0;
    DIA_UNROLL_BY(4)
    for (int r = 0; r < count; ++r) sum += scratch[place.at(r, j / W::kValues, j % W::kValues)];
    done(j, sum);
  }
}

template <class Use, bool kWide, class M, class T>
DIA_DEVICE void reduce_interleaved(M& m, const Reduce<T>& args) {
  using W = Walk<T, kWide, true>;
  const MapSize& size = args.size;
  const int most = args.tile.channels < size.channels ? args.tile.channels : size.channels;
  const bool moments = Use::kWhat == Sweeping::anything && args.first != nullptr;
  const auto scratch = m.template shared<double>(moments ? MeetingPlace<W>::template kCount<Use> : 0);
  const auto totals = m.template shared<double>(moments ? most : 0);
  const auto floats = m.template shared<float>(moments ? 0 : MeetingPlace<W>::template kCount<Use>);
  const int across = args.across();
  const int64_t tasks = static_cast<int64_t>(size.samples) * across;
  for (int64_t task = Use::first(m); task < tasks; task += Use::step(m)) {
    const int sample = static_cast<int>(task / across);
    const int begin = static_cast<int>(task - static_cast<int64_t>(sample) * across) * args.tile.channels;
    const Part channels{begin, begin + args.tile.channels < size.channels ? begin + args.tile.channels : size.channels};
    const Rows<W> rows(m, channels.size());
    const W walk = interleaved_walk<W>(m, size, sample, channels, {0, size.positions});
    const int64_t table = row_at(sample, size.channels) + channels.begin;
    Sums<W> sums;
    if (rows.there()) {
      DIA_UNROLL
      for (int k = 0; k < W::kValues; ++k) {
        if (walk.channel + k >= channels.end) continue;
        if (args.shift != nullptr) sums.shift[k] = m.load(args.shift + walk.channel + k);
        if (moments) {
          const T* at = args.x.data + sample * args.x.stride + walk.channel + k;
          sums.shift[k] = moments_shift(m, args, at, size.channels);
        }
      }
    }
    sum_up_for<Use>(m, args, walk, sums);
    if (moments) {
      sum_of_rows<W, double>(
          m, rows, channels.size(), scratch, [&](int k) { return sums.first[k]; },
          [&](int j, double sum) { totals[j] = sum; });
      sum_of_rows<W, double>(
          m, rows, channels.size(), scratch, [&](int k) { return sums.second[k]; },
          [&](int j, double squares) {
            const T* at = args.x.data + sample * args.x.stride + channels.begin + j;
            put_moments(m, args, table + j, size.positions, moments_shift(m, args, at, size.channels),
                        static_cast<double>(totals[j]), squares);
          });
      continue;
    }
    if (args.sum != nullptr || args.means.p != nullptr)
      sum_of_rows<W, float>(
          m, rows, channels.size(), floats, [&](int k) { return sums.first[k]; },
          [&](int j, float sum) { put_sum(m, args, channels.begin + j, table + j, sum); });
    if (Use::kWhat != Sweeping::means && args.product != nullptr)
      sum_of_rows<W, float>(
          m, rows, channels.size(), floats, [&](int k) { return sums.second[k]; },
          [&](int j, float sum) { m.store(args.product + table + j, sum); });
  }
}

template <class Use, class M, class T>
DIA_DEVICE void reduce(M& m, const Reduce<T>& args) {
  InPacks<T> packs(args.size, args.tile);
  packs.add(args.x), packs.add(args.dy), packs.add(args.y), packs.add(args.g);
  packs.add_mask(args.mask);
  if (args.size.interleaved) {
    if (packs.all())
      reduce_interleaved<Use, true>(m, args);
    else
      reduce_interleaved<Use, false>(m, args);
  } else if (packs.all()) {
    reduce_planar<Use, true>(m, args);
  } else {
    reduce_planar<Use, false>(m, args);
  }
}

// --- spread --------------------------------------------------------------------------------------------------

// What a thread applies to its channels: one in a planar map, those of a pack in an interleaved one.
template <class W, bool kInterleaved>
struct Factors {
  static constexpr int kCount = kInterleaved ? W::kValues : 1;
  float g[kCount] = {}, x[kCount] = {}, shift[kCount] = {}, offset[kCount] = {};

  template <class M, class T>
  DIA_DEVICE Factors(M& m, const Spread<T>& args, const W& walk) {
    const int64_t table = row_at(walk.sample, args.size.channels) + walk.channel;
    if (args.scale != nullptr) load(m, args.scale + table, g);
    if (args.slope != nullptr) load(m, args.slope + (args.slope_of_samples ? table : walk.channel), x);
    DIA_UNROLL
    for (int k = 0; k < kCount; ++k)
      if (args.slope == nullptr) x[k] = g[k];
    if (args.shift != nullptr && args.x.data != nullptr) load(m, args.shift + walk.channel, shift);
    if (args.offset != nullptr) load(m, args.offset + table, offset);
  }

 private:
  template <class M>
  DIA_DEVICE static void load(M& m, const float* from, float* to) {
    if (kCount % 4 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      DIA_UNROLL
      for (int k = 0; k < kCount / 4; ++k) {
        const Pack<float> pack = m.load_pack(from + 4 * k);
        DIA_UNROLL
        for (int j = 0; j < 4; ++j) to[4 * k + j] = pack[j];
      }
    } else {
      DIA_UNROLL
      for (int k = 0; k < kCount; ++k) to[k] = m.load(from + k);
    }
  }
};

// All packs of a walk. With g there is neither shortcut nor ReLU, whose packs would take registers.
template <bool kInterleaved, bool kWithG, class M, class T, class W>
DIA_DEVICE void apply(M& m, const Spread<T>& args, const W& walk) {
  constexpr int kBatch = kInterleaved ? kPacksOfEach : kLoadedPlanar;
  if (walk.count == 0) return;
  const bool masked = kWithG && args.y.data != nullptr;
  const bool has_mask = kWithG && sizeof(T) == 2 && args.mask.data != nullptr;
  const bool has_x = args.x.data != nullptr, added = !kWithG && args.shortcut.data != nullptr;
  // In place, what belongs to other rows is theirs to write meanwhile.
  const bool x_apart = args.x.data != args.out.data, shortcut_apart = args.shortcut.data != args.out.data;
  const Factors<W, kInterleaved> of(m, args, walk);
  for (int first = 0; first < walk.count; first += kBatch) {
    Pack<T> g[kBatch]{}, x[kBatch]{}, shortcut[kBatch]{};
    DIA_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int number = first + b;
      if (number >= walk.count) continue;
      if (kWithG) g[b] = walk.load(m, args.dy, number, args.dy.data != args.out.data);
      if (masked) mask_pack<M>(g[b], walk.load(m, args.y, number, args.y.data != args.out.data));
      if (has_mask) mask_pack<M>(g[b], walk.bits(m, args.mask, number));
      if (has_x) x[b] = walk.load(m, args.x, number, x_apart);
      if (added) shortcut[b] = walk.load(m, args.shortcut, number, shortcut_apart);
    }
    DIA_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int number = first + b;
      if (number >= walk.count) continue;
      Pack<T> out{};
      DIA_UNROLL
      for (int k = 0; k < W::kValues; ++k) {
        const int c = kInterleaved ? k : 0;
        float sum = of.offset[c];
        if (kWithG) sum += M::widen(g[b][k]) * of.g[c];
        if (has_x) sum += (M::widen(x[b][k]) - of.shift[c]) * of.x[c];
        if (added) sum += M::widen(shortcut[b][k]);
        if (!kWithG && args.relu && sum <= 0.0f) sum = 0.0f;  // not a maximum: NaN passes
        out.set(k, M::template narrow<T>(sum));
      }
      walk.store(m, args.out, number, out);
      if constexpr (!kWithG && W::kValues == 8)
        if (args.passed.data != nullptr) walk.set_bits(m, args.passed, number, bits_of<M>(out));
    }
  }
}

template <class Use, bool kInterleaved, class M, class T, class W>
DIA_DEVICE void apply_for(M& m, const Spread<T>& args, const W& walk) {
  if (Use::kWhat != Sweeping::means && args.dy.data != nullptr)
    apply<kInterleaved, true>(m, args, walk);
  else
    apply<kInterleaved, false>(m, args, walk);
}

template <class Use, bool kWide, class M, class T>
DIA_DEVICE void spread_planar(M& m, const Spread<T>& args) {
  using W = Walk<T, kWide, false>;
  const RowPhases<T> phases(args.out);
  for_rows<Use>(m, args.size, args.tile, true, [&](int64_t row, bool) {
    apply_for<Use, false>(m, args, planar_walk<W>(m, args.size, args.tile.lanes, row, phases));
  });
}

template <class Use, bool kWide, class M, class T>
DIA_DEVICE void spread_interleaved(M& m, const Spread<T>& args) {
  using W = Walk<T, kWide, true>;
  const MapSize& size = args.size;
  const int across = (size.channels + args.tile.channels - 1) / args.tile.channels;
  const int along = (size.positions + args.tile.positions - 1) / args.tile.positions;
  const int64_t tasks = static_cast<int64_t>(size.samples) * along * across;
  for (int64_t task = Use::first(m); task < tasks; task += Use::step(m)) {
    const int64_t number = tasks - 1 - task, piece = number / across, sample = piece / along;
    const int channel = static_cast<int>(number - piece * across) * args.tile.channels;
    const int position = static_cast<int>(piece - sample * along) * args.tile.positions;
    const auto end = [](int begin, int length, int most) { return most - begin > length ? begin + length : most; };
    apply_for<Use, true>(
        m, args,
        interleaved_walk<W>(m, size, sample, {channel, end(channel, args.tile.channels, size.channels)},
                            {position, end(position, args.tile.positions, size.positions)}));
  }
}

template <class Use, class M, class T>
DIA_DEVICE void spread(M& m, const Spread<T>& args) {
  InPacks<T> packs(args.size, args.tile);
  packs.add(args.out), packs.add(args.dy), packs.add(args.y), packs.add(args.x), packs.add(args.shortcut);
  packs.add_mask(args.mask), packs.add_mask(args.passed);
  if (args.size.interleaved) {
    if (packs.all())
      spread_interleaved<Use, true>(m, args);
    else
      spread_interleaved<Use, false>(m, args);
  } else if (packs.all()) {
    spread_planar<Use, true>(m, args);
  } else {
    spread_planar<Use, false>(m, args);
  }
}

}  // namespace dia::kernels
