// The whole step by clusters of blocks, for maps that the second-level cache holds: one launch where sweeps with the
// cell between them take four.
//
// A cluster takes a few samples through all of it. Its blocks share the tasks of both sweeps (sweeps.h), and each owns
// some units of the bottlenecks and some channels of the state: its rows of the weights, and of what else the cell
// needs, are copied to its shared memory while the map is read. Means, bottlenecks and new state go to where they
// belong in global memory, and from there, by the second-level cache, to the blocks that need them:
//
//     copy weights | reduce | cluster | means: own units of the bottlenecks | cluster | bottlenecks: own channels of
//     the state | cluster | spread
//
// Bytes: those of the sweeps, the second reading of x from a cache; the weights once a cluster. Barriers: three of the
// cluster; of a block two, and two for each task of an interleaved map's sums.
//
// The products are plain multiply-adds: of eight samples, 256 channels and a bottleneck of 64 a thread has some 320.
#pragma once

#include "row_copies.h"
#include "sweeps.h"
#include "tile_cell.h"

namespace dia::kernels {

template <class T, bool kAffine>
struct ClusterStep {
  int together;  // samples of a cluster
  // Of all samples.
  Reduce<T> reduce;  // no p: the means are there already
  Spread<T> spread;
  CellStates<kAffine> states;
};

// The part of the cell that a block of a cluster makes: own units of both bottlenecks, own channels of the state.
template <class M, class Array, bool kAffine>
class ClusterCell {
 public:
  // `states`: of all samples. (Those of its own are made where they are needed: they would be held in registers while
  // the map is streamed.)
  DIA_DEVICE ClusterCell(const CellStates<kAffine>& states, const ClusterShare& share, const ClusterMemory& place,
                         const Array& memory)
      : states_(states),
        first_(share.first),
        count_(share.count),
        units_(part_of(states.cell.bottleneck, share.rank, kClusterBlocks)),
        channels_(part_of(states.cell.channels, share.rank, kClusterBlocks)),
        place_(place),
        memory_(memory) {}

  // Begins to copy the weights and biases.
  DIA_DEVICE void copy_parameters(M& m) const {
    const CellWeights& weights = states_.cell.weights;
    const int channels = states_.cell.channels, bottleneck = states_.cell.bottleneck, own = channels_.size();
    DIA_UNROLL
    for (int path = 0; path < 2; ++path) {
      const float* reduce = path == 0 ? weights.input_reduce : weights.hidden_reduce;
      const float* expand = path == 0 ? weights.input_expand : weights.hidden_expand;
      const float* reduce_bias = path == 0 ? weights.input_reduce_bias : weights.hidden_reduce_bias;
      const float* expand_bias = path == 0 ? weights.input_expand_bias : weights.hidden_expand_bias;
      const RowCopies of_reduce(m, channels, values_together(reduce, channels));
      of_reduce.copy(m, memory_, place_.reduce_weight(path, 0), place_.reduce_pitch, units_.size(),
                     [&](int unit) { return reduce + row_at(units_.begin + unit, channels); });
      for (int k = m.thread(); k < units_.size(); k += m.threads())
        m.template copy<1>(memory_, place_.reduce_bias(path, k), reduce_bias + units_.begin + k, 1);
      const RowCopies of_expand(m, bottleneck, values_together(expand, bottleneck));
      DIA_UNROLL
      for (int gate = 0; gate < 4; ++gate) {
        const int begin = gate * channels + channels_.begin;
        of_expand.copy(m, memory_, place_.expand_weight(path, gate, 0), place_.expand_pitch, own,
                       [&](int row) { return expand + row_at(begin + row, bottleneck); });
        for (int k = m.thread(); k < own; k += m.threads())
          m.template copy<1>(memory_, place_.expand_bias(path, gate, k), expand_bias + begin + k, 1);
      }
    }
  }

  // Begins to copy the old state: h of all channels, c of its own.
  DIA_DEVICE void copy_state(M& m) const {
    const CellForward cell = of_samples(states_.cell, first_, count_);
    const int channels = cell.channels;
    if (cell.h != nullptr) copy_table(m, 1, cell.h, channels, place_.reduce_pitch);
    if (cell.c == nullptr) return;
    for (int sample = m.warp(); sample < count_; sample += m.warps())
      for (int channel = m.lane(); channel < channels_.size(); channel += 32)
        m.template copy<1>(memory_, place_.old_c(sample, channel),
                           cell.c + row_at(sample, channels) + channels_.begin + channel, 1);
  }

  // From the means, which all blocks of the cluster have put: the bottlenecks, a unit of one of them to a warp.
  DIA_DEVICE void make_bottlenecks(M& m) const {
    const CellForward cell = of_samples(states_.cell, first_, count_);
    copy_table(m, 0, cell.tables.p, cell.channels, place_.reduce_pitch);
    finish_copies(m);
    const int own = units_.size();
    for (int k = m.warp(); k < 2 * own; k += m.warps()) {
      const int path = k / own, unit = k - path * own;
      const float bias = memory_[place_.reduce_bias(path, unit)];
      float* z = (path == 0 ? cell.tables.zx : cell.tables.zh) + units_.begin + unit;
      for (int first = 0; first < count_; first += kBatch) {
        float sums[kBatch] = {};
        if (path == 0 || cell.h != nullptr) add_unit(m, path, unit, first, sums);
        float sum = 0;
        DIA_UNROLL
        for (int s = 0; s < kBatch; ++s) {
          const float all = m.warp_sum(sums[s]);
          if (m.lane() == s) sum = all + bias;
        }
        const int sample = first + m.lane();
        if (m.lane() < kBatch && sample < count_) m.store(z + row_at(sample, cell.bottleneck), rectified(sum, sum));
      }
    }
  }

  // From the bottlenecks, likewise: gates and state, a channel of a sample to one thread, or to several that share the
  // terms.
  DIA_DEVICE void make_states(M& m) const {
    const CellStates<kAffine> states = of_samples(states_, first_, count_);
    const CellForward& cell = states.cell;
    copy_table(m, 0, cell.tables.zx, cell.bottleneck, place_.expand_pitch);
    copy_table(m, 1, cell.tables.zh, cell.bottleneck, place_.expand_pitch);
    finish_copies(m);
    const int own = channels_.size();
    int samples = 1, ways = 1;  // lanes for samples, and for terms
    while (samples < count_) samples *= 2;
    while (samples * ways < 32 && 2 * ways * samples * own <= m.threads()) ways *= 2;
    const int lanes = samples * ways, at_once = m.threads() / lanes;
    const int place = m.thread() % lanes, sample = place % samples, way = place / samples;
    for (int first = 0; first < own; first += at_once) {
      const int channel = first + m.thread() / lanes;
      const bool there = channel < own && sample < count_;
      float u[4] = {};
      if (there)
        for (int path = 0; path < 2; ++path) add_gates(path, channel, sample, 4 * way, 4 * ways, u);
      DIA_UNROLL
      for (int gate = 0; gate < 4; ++gate) {
        u[gate] = m.warp_sum(u[gate], samples, lanes);
        if (there)
          u[gate] += memory_[place_.expand_bias(0, gate, channel)] + memory_[place_.expand_bias(1, gate, channel)];
      }
      if (there && way == 0)
        put_state(m, states, sample, channels_.begin + channel,
                  cell.c != nullptr ? memory_[place_.old_c(sample, channel)] : 0.0f, {u[0], u[1], u[2], u[3]});
    }
  }

 private:
  static constexpr int kBatch = 8;  // samples whose sums a warp makes at once

  // The samples' rows of a table, of one path.
  DIA_DEVICE void copy_table(M& m, int path, const float* table, int width, int pitch) const {
    RowCopies(m, width, values_together(table, width))
        .copy(m, memory_, place_.table(path, 0, pitch), pitch, count_,
              [&](int sample) { return table + row_at(sample, width); });
  }
  // A lane's share of a unit's sums, of kBatch samples.
  DIA_DEVICE void add_unit(M& m, int path, int unit, int first, float (&sums)[kBatch]) const {
    for (int k = 4 * m.lane(); k < states_.cell.channels; k += 128) {
      const Pack<float> weight = memory_.pack(place_.reduce_weight(path, unit) + k);
      DIA_UNROLL
      for (int s = 0; s < kBatch; ++s) {
        if (first + s >= count_) continue;
        const Pack<float> value = memory_.pack(place_.table(path, first + s, place_.reduce_pitch) + k);
        DIA_UNROLL
        for (int j = 0; j < 4; ++j) sums[s] += weight[j] * value[j];
      }
    }
  }
  // Terms `term`, `term` + `step`, ..., four at a time, of a channel's gates.
  DIA_DEVICE void add_gates(int path, int channel, int sample, int term, int step, float (&u)[4]) const {
    const int z_at = place_.table(path, sample, place_.expand_pitch);
    DIA_UNROLL_BY(2)
    for (int k = term; k < states_.cell.bottleneck; k += step) {
      const Pack<float> z = memory_.pack(z_at + k);
      DIA_UNROLL
      for (int gate = 0; gate < 4; ++gate) {
        const Pack<float> weight = memory_.pack(place_.expand_weight(path, gate, channel) + k);
        DIA_UNROLL
        for (int j = 0; j < 4; ++j) u[gate] += weight[j] * z[j];
      }
    }
  }

  const CellStates<kAffine>& states_;
  int first_, count_;
  Part units_, channels_;
  const ClusterMemory& place_;
  Array memory_;
};

template <class M, class T, bool kAffine>
DIA_DEVICE void cluster_step(M& m, const ClusterStep<T, kAffine>& args) {
  const ClusterShare share(m, args.spread.size.samples, args.together);
  const ClusterMemory place(args.states.cell.channels, args.states.cell.bottleneck, args.together);
  const auto memory = m.template shared<float>(place.floats());
  const ClusterCell<M, std::remove_const_t<decltype(memory)>, kAffine> cell(args.states, share, place, memory);
  cell.copy_parameters(m);
  cell.copy_state(m);
  if (args.reduce.means.p != nullptr) {
    reduce<WithinCluster<Sweeping::means>>(m, of_samples(args.reduce, share.first, share.count));
    m.sync_cluster();
  }
  cell.make_bottlenecks(m);
  m.sync_cluster();
  cell.make_states(m);
  m.sync_cluster();
  spread<WithinCluster<Sweeping::means>>(m, of_samples(args.spread, share.first, share.count));
}

}  // namespace dia::kernels
