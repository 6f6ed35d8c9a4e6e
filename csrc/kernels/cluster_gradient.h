// The gradient of a step by clusters of blocks, up to its second sweep: one launch where sweeps with the cell between
// them take four or five.
//
// As forward (cluster_step.h) a cluster takes a few samples, its blocks share the tasks of the first sweep, and each
// owns some channels, of which its shared memory holds the weights of both layers:
//
//     copy weights | reduce | cluster | own channels: gates, and what they send to all units of the bottlenecks |
//     cluster | all units, joined from the blocks' parts: own channels of dp and dh
//
// The second sweep is a kernel of its own: it runs beside the weights' gradients.
//
// Bytes: those of the first sweep; the weights once a cluster; 16 m N floats of parts, written once and read by each
// block of their cluster. Barriers: two of the cluster; of a block two, two for each task of an interleaved map's sums,
// and one for eight samples where threads share the sums of a unit, with another between.
#pragma once

#include "row_copies.h"
#include "sweeps.h"
#include "tile_cell.h"

namespace dia::kernels {

template <class T, bool kAffine>
struct ClusterGradient {
  int together;  // samples of a cluster
  // Of all samples.
  Reduce<T> reduce;  // no dy: nothing comes from the map
  SplitGateGradients<kAffine> gates;
  float* parts;  // (kClusterBlocks, N, 2 m)
  MeanGradient means;
};

// The part of the cell's gradient that a block of a cluster makes.
template <class M, class Array, class T, bool kAffine>
class ClusterCellGradient {
 public:
  // `args`: of all samples. (Those of its own are made where they are needed: they would be held in registers while
  // the map is streamed.)
  DIA_DEVICE ClusterCellGradient(const ClusterGradient<T, kAffine>& args, const ClusterShare& share,
                                 const ClusterGradientMemory& place, const Array& memory)
      : args_(args),
        first_(share.first),
        count_(share.count),
        rank_(share.rank),
        channels_(part_of(args.gates.cell.channels, share.rank, kClusterBlocks)),
        place_(place),
        memory_(memory) {}

  // Begins to copy the weights: rows of the layers that expand, columns of those that reduce.
  DIA_DEVICE void copy_parameters(M& m) const {
    const CellBackward& cell = args_.gates.cell;
    const CellWeights& weights = cell.weights;
    const int channels = cell.channels, bottleneck = cell.bottleneck, own = channels_.size();
    DIA_UNROLL
    for (int path = 0; path < 2; ++path) {
      const float* expand = path == 0 ? weights.input_expand : weights.hidden_expand;
      const float* reduce = (path == 0 ? weights.input_reduce : weights.hidden_reduce) + channels_.begin;
      const RowCopies of_expand(m, bottleneck, values_together(expand, bottleneck));
      DIA_UNROLL
      for (int gate = 0; gate < 4; ++gate)
        of_expand.copy(m, memory_, place_.expand_weight(path, gate, 0), place_.expand_pitch, own,
                       [&](int row) { return expand + row_at(gate * channels + channels_.begin + row, bottleneck); });
      if (own == 0 || !wanted(path)) continue;
      RowCopies(m, own, values_together(reduce, channels))
          .copy(m, memory_, place_.reduce_column(path, 0), place_.column_pitch, bottleneck,
                [&](int unit) { return reduce + row_at(unit, channels); });
    }
  }

  // From the sums over the map: the gradients of own channels' pre-activations, and their part of the bottlenecks'.
  DIA_DEVICE void make_gates(M& m) const {
    const SplitGateGradients<kAffine> gates = of_samples(args_.gates, first_, count_);
    const int own = channels_.size();
    for (int k = m.thread(); k < place_.sample_pitch * own; k += m.threads()) {
      const int sample = k / own, channel = k - sample * own;
      float du[4] = {};
      if (sample < count_) put_gate_gradients(m, gates, sample, channels_.begin + channel, du);
      DIA_UNROLL
      for (int gate = 0; gate < 4; ++gate) memory_[place_.du(gate, channel) + sample] = du[gate];
    }
    finish_copies(m);
    // A unit to a thread, or to several that share the channels.
    const int units = 2 * bottleneck(), across = units < m.threads() ? units : m.threads();
    const int ways = m.threads() / across, way = m.thread() / across, column = m.thread() - way * across;
    for (int begin = 0; begin < units; begin += across) {
      const int unit = begin + column;
      const bool there = unit < units && way < ways;
      for (int first = 0; first < count_; first += kBatch) {
        float sums[kBatch] = {};
        if (there) add_unit(unit, part_of(own, way, ways), first, sums);
        put_parts(m, unit, there, first, {way, ways, column, across}, sums);
      }
    }
  }

  // From all blocks' parts: the bottlenecks' gradients; and of own channels those of the means and of the old h.
  DIA_DEVICE void make_means(M& m) const {
    const CellBackward cell = of_samples(args_.gates.cell, first_, count_);
    const int bottleneck = cell.bottleneck, units = 2 * bottleneck;
    const Part own_units = part_of(units, rank_, kClusterBlocks);
    for (int k = m.thread(); k < count_ * units; k += m.threads()) {
      const int sample = k / units, unit = k - sample * units, path = unit >= bottleneck ? 1 : 0;
      const int of_path = unit - path * bottleneck;
      const int64_t at = row_at(sample, bottleneck) + of_path;
      const float z = m.load((path == 0 ? cell.tables.zx : cell.tables.zh) + at);
      float parts[kClusterBlocks], sum = 0;
      DIA_UNROLL
      for (int rank = 0; rank < kClusterBlocks; ++rank) parts[rank] = m.load(part_at(rank, sample) + unit);
      DIA_UNROLL
      for (int rank = 0; rank < kClusterBlocks; ++rank) sum += parts[rank];
      const float dz = rectified(sum, z);
      memory_[place_.dz(path, sample) + of_path] = dz;
      if (unit >= own_units.begin && unit < own_units.end) m.store((path == 0 ? cell.dzx : cell.dzh) + at, dz);
    }
    m.sync_block();
    const int own = channels_.size(), all = count_ * own;
    const MeanGradient means = from_sample(args_.means, first_, cell.channels);
    for (int k = m.thread(); k < 2 * all; k += m.threads()) {
      const int path = k >= all ? 1 : 0, of_path = k - path * all;
      if (!wanted(path)) continue;
      const int sample = of_path / own, of_own = of_path - sample * own, channel = channels_.begin + of_own;
      const float value = sum_of_units(path, sample, of_own);
      const int64_t at = row_at(sample, cell.channels) + channel;
      if (path == 1) {
        m.store(cell.old_dh + at, value);
        continue;
      }
      float scale = 1;
      if constexpr (kAffine)
        if (means.offset != nullptr) scale = args_.gates.norm.scale_of(m, channel);
      means.put(m, at, value, scale, args_.reduce.size.positions);
    }
  }

 private:
  static constexpr int kBatch = 8;  // samples whose sums a thread makes at once

  // Which of `ways` threads of a unit this is, and its place among so many units.
  struct Sharing {
    int way, ways, column, across;
  };

  DIA_DEVICE int bottleneck() const { return args_.gates.cell.bottleneck; }
  // Whether the first layer's gradient of a path's input is wanted.
  DIA_DEVICE bool wanted(int path) const {
    return path == 0 ? args_.means.wanted() : args_.gates.cell.old_dh != nullptr;
  }
  DIA_DEVICE float* part_at(int rank, int sample) const {
    return args_.parts + row_at(row_at(rank, args_.gates.cell.samples) + first_ + sample, 2 * bottleneck());
  }

  // Own channels' terms of a unit's sums, of kBatch samples.
  DIA_DEVICE void add_unit(int unit, Part channels, int first, float (&sums)[kBatch]) const {
    const int path = unit >= bottleneck() ? 1 : 0, of_path = unit - path * bottleneck();
    for (int gate = 0; gate < 4; ++gate) {
      DIA_UNROLL_BY(2)
      for (int channel = channels.begin; channel < channels.end; ++channel) {
        const float weight = memory_[place_.expand_weight(path, gate, channel) + of_path];
        DIA_UNROLL
        for (int four = 0; four < kBatch / 4; ++four) {
          const Pack<float> du = memory_.pack(place_.du(gate, channel) + first + 4 * four);
          DIA_UNROLL
          for (int j = 0; j < 4; ++j) sums[4 * four + j] += weight * du[j];
        }
      }
    }
  }
  // Puts the block's sums of a unit, once those of all threads that share it are added up in order.
  DIA_DEVICE void put_parts(M& m, int unit, bool there, int first, Sharing of, const float (&sums)[kBatch]) const {
    const int left = count_ - first;
    if (of.ways == 1) {
      DIA_UNROLL
      for (int s = 0; s < kBatch; ++s)
        if (there && s < left) m.store(part_at(rank_, first + s) + unit, sums[s]);
      return;
    }
    const auto at = [&](int sample, int way) {
      return place_.meeting() + (sample * of.ways + way) * of.across + of.column;
    };
    DIA_UNROLL
    for (int s = 0; s < kBatch; ++s)
      if (there) memory_[at(s, of.way)] = sums[s];
    m.sync_block();
    for (int s = of.way; there && s < kBatch && s < left; s += of.ways) {
      float sum = 0;
      for (int way = 0; way < of.ways; ++way) sum += memory_[at(s, way)];
      m.store(part_at(rank_, first + s) + unit, sum);
    }
    if (first + kBatch < count_) m.sync_block();  // the next samples' sums come to the same place
  }
  // What all units of a path send to one of its own channels.
  DIA_DEVICE float sum_of_units(int path, int sample, int channel) const {
    const int dz_at = place_.dz(path, sample);
    float sum = 0;
    int unit = 0;
    DIA_UNROLL_BY(2)
    for (; unit + 4 <= bottleneck(); unit += 4) {
      const Pack<float> dz = memory_.pack(dz_at + unit);
      DIA_UNROLL
      for (int j = 0; j < 4; ++j) sum += dz[j] * memory_[place_.reduce_column(path, unit + j) + channel];
    }
    for (; unit < bottleneck(); ++unit)
      sum += memory_[dz_at + unit] * memory_[place_.reduce_column(path, unit) + channel];
    return sum;
  }

  const ClusterGradient<T, kAffine>& args_;
  int first_, count_, rank_;
  Part channels_;
  const ClusterGradientMemory& place_;
  Array memory_;
};

template <class M, class T, bool kAffine>
DIA_DEVICE void cluster_gradient(M& m, const ClusterGradient<T, kAffine>& args) {
  const ClusterShare share(m, args.gates.cell.samples, args.together);
  const ClusterGradientMemory place(args.gates.cell.channels, args.gates.cell.bottleneck, args.together);
  const auto memory = m.template shared<float>(place.floats());
  const ClusterCellGradient<M, std::remove_const_t<decltype(memory)>, T, kAffine> cell(args, share, place, memory);
  cell.copy_parameters(m);
  if (args.reduce.dy.data != nullptr) {
    reduce<WithinCluster<Sweeping::gradients>>(m, of_samples(args.reduce, share.first, share.count));
    m.sync_cluster();
  }
  cell.make_gates(m);
  m.sync_cluster();
  cell.make_means(m);
}

}  // namespace dia::kernels
