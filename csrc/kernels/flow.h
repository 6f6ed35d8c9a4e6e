// A whole step or tail, or its gradient, as one kernel: its tasks in one order, each taken by the next block that is
// free.
//
// Samples go in chunks so small that the second-level cache still holds what the second sweep reads again; behind a
// norm of the batch's own statistics, where all samples must have been read first, in one. A chunk has these phases,
// and their tasks are those of the kernels that sweeps are made of, some with an end that the last one of a group sees
// to:
//
//     forward    reduce       sums of x of a piece of the map, or moments  | the last piece: the means p
//                statistics   of the batch, some channels; p
//                bottleneck   a part of W1 p and V1 h, in tiles            | the last part: through bias and ReLU
//                cell         W2 zx + V2 zh, gates, state
//                spread       y = act(x h' + s)
//     backward   reduce       g, sums of g x of a piece                    | the last piece: through the gates
//                bottleneck   a part of du W2 and du V2                    | the last part: through the ReLU
//                cell         dp = dzx W1 and dh = dzh V1
//                norm         of the batch: the gradients of its parameters, some channels
//                spread       dx = g h' + dp / HW
//
// The order is by turns: turn t has the first phases of chunk t, the bottleneck of t - 1, the spread of t - 2, the cell
// of t - 1, so that nearly always what a task waits for was begun long before, and the cell's latency hides behind the
// sweeps of other chunks. A task waits for tasks before it only, and blocks take them in order: whoever holds the first
// unfinished one can go on, however few blocks are resident. So no cooperative launch is needed, nor an occupancy
// query.
//
// Bytes: those of the sweeps, of which the second reading comes from the second-level cache. Barriers of a block: three
// a task, one or two more at its end. Between blocks: counters (kernels/machine.h); how many tasks have been taken, of
// each chunk and phase how much is done, of each group how many.
//
// Not measured on a GPU yet (docs/kernels.md). Before it there were teams of blocks that kept the map in shared memory
// and met at barriers: slower than sweeps wherever they were measured.
#pragma once

#include "sweeps.h"
#include "tile_cell.h"

namespace dia::kernels {

enum FlowPhase { kReducePhase, kStatisticsPhase, kBottleneckPhase, kCellPhase, kNormPhase, kSpreadPhase, kFlowPhases };

// Tiles of the cell: of few samples where a chunk has few.
template <GpuNorm kNorm>
using FlowTiles = CellTiles<32>;

// What a block keeps in shared memory: what its first thread says to the others (its ticket, and how many counted
// before it), then groups and members of each phase, of a whole chunk and of the last one.
constexpr int kFlowKept = 2 + 2 * 2 * kFlowPhases;

// Shared memory of a block whose sums take so much.
template <GpuNorm kNorm>
constexpr int64_t flow_shared_bytes(int64_t of_sums) {
  return rounded_up(4 * kFlowKept, 16) + std::max(of_sums, FlowTiles<kNorm>::kBytes);
}

// Counters, all zero at first: of tasks taken; and of each chunk, how much of each phase is done that others wait for,
// and of the groups of the first two phases.
struct FlowCounters {
  unsigned* data;
  int reduce_groups, bottleneck_groups;  // with a counter, at most, of a chunk

  DIA_DEVICE static int64_t count(int64_t chunks, int64_t reduce_groups, int64_t bottleneck_groups) {
    return 1 + chunks * (kAwaited + reduce_groups + bottleneck_groups);
  }
  DIA_DEVICE unsigned* taken() const { return data; }
  DIA_DEVICE unsigned* done(int chunk, int phase) const { return of(chunk) + (kAwaited - 1 - phase); }
  DIA_DEVICE unsigned* group(int chunk, int phase, int number) const {
    return of(chunk) + kAwaited + (phase == kReducePhase ? number : reduce_groups + number);
  }

 private:
  static constexpr int kAwaited = kSpreadPhase;  // phases that others wait for
  DIA_DEVICE unsigned* of(int64_t chunk) const { return data + count(chunk, reduce_groups, bottleneck_groups); }
};

struct FlowOrder {
  int samples, chunk;
  FlowCounters counters;

  DIA_DEVICE int chunks() const { return (samples + chunk - 1) / chunk; }
  DIA_DEVICE Part samples_of(int number) const {
    const int first = number * chunk;
    return {first, samples - first < chunk ? samples : first + chunk};
  }
};

DIA_DEVICE MapSize of_so_many(MapSize size, int samples) {
  size.samples = samples;
  return size;
}

// Tasks of a group, and groups; of those whose end nobody sees to, a group is a task.
struct FlowTasks {
  int groups, members;
  DIA_DEVICE int64_t all() const { return static_cast<int64_t>(groups) * members; }
  // Groups that need a counter.
  DIA_DEVICE int counted() const { return members > 1 ? groups : 0; }
};
// Of either sweep over `samples`; of a spread that is not wanted, none.
template <class T>
DIA_DEVICE FlowTasks tasks_of(const Reduce<T>& reduce, int samples) {
  const int pieces = reduce.pieces();
  return {static_cast<int>(tasks_of(of_so_many(reduce.size, samples), reduce.tile) / pieces), pieces};
}
template <class T>
DIA_DEVICE FlowTasks tasks_of(const Spread<T>& spread, int samples) {
  if (spread.out.data == nullptr) return {0, 1};
  return {static_cast<int>(tasks_of(of_so_many(spread.size, samples), spread.tile)), 1};
}

// Sets how many groups have a counter, of a flow whose order, tiles and parts are known; returns how many counters it
// needs.
template <class Flow>
DIA_DEVICE int64_t lay_out_counters(Flow& flow) {
  FlowCounters& counters = flow.order.counters;
  counters.reduce_groups = flow.tasks(kReducePhase, flow.order.chunk).counted();
  counters.bottleneck_groups = flow.tasks(kBottleneckPhase, flow.order.chunk).counted();
  return FlowCounters::count(flow.order.chunks(), counters.reduce_groups, counters.bottleneck_groups);
}

// The entries (N, C) of the samples at hand that a group of sums is of.
template <class T>
DIA_DEVICE Part entries_of(const Reduce<T>& reduce, int group) {
  const int channels = reduce.size.channels, tile = reduce.tile.channels;
  if (!reduce.size.interleaved) {
    const int all = reduce.size.samples * channels, begin = group * tile;
    return {begin, all - begin < tile ? all : begin + tile};
  }
  const int across = reduce.across(), sample = group / across, begin = (group - sample * across) * tile;
  return {sample * channels + begin, sample * channels + (channels - begin < tile ? channels : begin + tile)};
}

// The sum of a table of sums over its pieces.
template <class M, class T>
DIA_DEVICE float sum_of_pieces(M& m, const Reduce<T>& reduce, const float* table, int entry) {
  const int pieces = reduce.pieces();
  const int64_t step = row_at(reduce.size.samples, reduce.size.channels);
  float sum = 0;
  DIA_UNROLL_BY(8)
  for (int piece = 0; piece < pieces; ++piece) sum += m.load(table + piece * step + entry);
  return sum;
}

// The first phase's arguments of some samples.
template <class T>
DIA_DEVICE Reduce<T> of_samples(Reduce<T> reduce, int64_t first, int count) {
  const int64_t width = static_cast<int64_t>(reduce.pieces()) * reduce.size.channels;
  reduce.size.samples = count;
  reduce.x = from_sample(reduce.x, first), reduce.dy = from_sample(reduce.dy, first);
  reduce.y = from_sample(reduce.y, first), reduce.g = from_sample(reduce.g, first);
  reduce.first = rows_from(reduce.first, first, width), reduce.rest = rows_from(reduce.rest, first, width);
  reduce.sum = rows_from(reduce.sum, first, width), reduce.product = rows_from(reduce.product, first, width);
  return reduce;
}
// The last one's.
template <class T>
DIA_DEVICE Spread<T> of_samples(Spread<T> spread, int64_t first, int count) {
  spread.size.samples = count;
  spread.dy = from_sample(spread.dy, first), spread.y = from_sample(spread.y, first);
  spread.x = from_sample(spread.x, first), spread.shortcut = from_sample(spread.shortcut, first);
  spread.out = from_sample(spread.out, first);
  spread.scale = rows_from(spread.scale, first, spread.size.channels);
  spread.offset = rows_from(spread.offset, first, spread.size.channels);
  return spread;
}
DIA_DEVICE JoinParts of_samples(JoinParts join, int64_t first, int count) {
  const int64_t m = join.bottleneck;
  join.samples = count;
  join.parts.data += first * join.parts.count * 2 * m;
  const auto move = [&](JoinedSide& side) {
    side.z = rows_from(side.z, first, m), side.out = rows_from(side.out, first, m);
  };
  move(join.input), move(join.hidden);
  return join;
}

// Joins the parts of a tile; `other`: of the other side's too, of which there are none.
template <class Tiles, class M>
DIA_DEVICE void join_tile(M& m, const JoinParts& args, const PartTask& task, bool other) {
  const int rows = args.samples - task.sample, columns = args.bottleneck - task.column;
  const int width = columns < Tiles::kBottleneck ? columns : Tiles::kBottleneck;
  const int count = (rows < Tiles::kSamples ? rows : Tiles::kSamples) * width;
  for (int k = m.thread(); k < count; k += m.threads()) {
    const int row = k / width, column = task.column + k - row * width;
    join(m, args, task.hidden, task.sample + row, column);
    if (other) join(m, args, !task.hidden, task.sample + row, column);
  }
}

// The moments of one entry from those of its pieces, each about the sample's first value (norm.h).
template <class M, class T>
DIA_DEVICE void join_moments(M& m, const Reduce<T>& reduce, const BatchStatistics& to, int entry) {
  const int64_t step = row_at(reduce.size.samples, reduce.size.channels);
  const double positions = reduce.size.positions;
  double total = 0, squares = 0;
  DIA_UNROLL_BY(4)
  for (int piece = 0; piece < reduce.pieces(); ++piece) {
    const int64_t at = piece * step + entry;
    const int begin = piece * reduce.tile.positions, left = reduce.size.positions - begin;
    const double sum = static_cast<double>(m.load(reduce.sum + at)) + static_cast<double>(m.load(reduce.rest + at));
    total += sum;
    squares += static_cast<double>(m.load(reduce.product + at)) +
               sum * sum / static_cast<double>(left < reduce.tile.positions ? left : reduce.tile.positions);
  }
  const double about_mean = squares - total * total / positions;
  const float sum = static_cast<float>(total);
  m.store(to.first + entry, m.load(reduce.first + entry));
  m.store(to.sum + entry, sum);
  m.store(to.rest + entry, static_cast<float>(total - static_cast<double>(sum)));
  m.store(to.squares + entry, about_mean < 0 ? 0.0f : static_cast<float>(about_mean));  // not a maximum: NaN passes
}

// --- forward -------------------------------------------------------------------------------------------------

template <class T, GpuNorm kNorm>
struct StepForward {
  static constexpr GpuNorm kBehind = kNorm;
  static constexpr bool kAffine = kNorm != GpuNorm::none, kBatch = kNorm == GpuNorm::batch;
  using Tiles = FlowTiles<kNorm>;

  FlowOrder order;
  Reduce<T> reduce;            // into pieces
  BatchStatistics statistics;  // of a batch; where there is one piece, its tables are those of `reduce`
  CellForward cell;
  NormedMeans norm;  // with kAffine; and (N, C):
  float *factor, *added;
  JoinParts join;
  Spread<T> spread;

  // Of the sums behind the bottlenecks.
  DIA_DEVICE int terms() const { return cell.channels; }
  DIA_DEVICE FlowTasks tasks(int phase, int count) const {
    switch (phase) {
      case kReducePhase:
        return tasks_of(reduce, count);
      case kStatisticsPhase:
        return {kBatch ? tasks_of_channels(cell.channels) : 0, 1};
      case kBottleneckPhase:
        return {join.parts.template tiles<Tiles>(count, cell.bottleneck, cell.h != nullptr), join.parts.count};
      case kCellPhase:
        return {tiles_along(count, Tiles::kSamples) * tiles_along(cell.channels, Tiles::kChannels), 1};
      case kSpreadPhase:
        return tasks_of(spread, count);
      default:
        return {0, 1};
    }
  }

  template <class M>
  DIA_DEVICE void run(M& m, int phase, Part samples) const {
    const int first = samples.begin, count = samples.size();
    if (phase == kReducePhase) return kernels::reduce(m, of_samples(reduce, first, count));
    if (phase == kSpreadPhase) return kernels::spread(m, of_samples(spread, first, count));
    if constexpr (kBatch)
      if (phase == kStatisticsPhase) return batch_statistics(m, statistics);
    const CellForward own = of_samples(cell, first, count);
    if (phase == kCellPhase)
      return cell_states<Tiles>(m, CellStates<kAffine>{own, norm.affine, rows_from(factor, first, own.channels),
                                                       rows_from(added, first, own.channels)});
    const auto memory = m.template shared<float>(Tiles::Bottleneck::kFloats);
    const PartTask part = PartTask::of(Tiles(), m.block(), count, own.bottleneck, join.parts.count);
    const float* weight = part.hidden ? own.weights.hidden_reduce : own.weights.input_reduce;
    const float* left = part.hidden ? own.h : own.tables.p;
    const int channels = own.channels;
    part_product<Tiles, true>(
        m, memory, part, of_samples(join, first, count).parts, count, own.bottleneck,
        part_of(channels, part.part, join.parts.count),
        Plain{part.sample, count,
              [&](int sample, int channel) { return m.load(left + row_at(sample, channels) + channel); }},
        [&](int j, int channel) { return m.load(weight + row_at(j, channels) + channel); });
  }

  template <class M>
  DIA_DEVICE void end(M& m, int phase, int group, Part samples) const {
    const int first = samples.begin, count = samples.size();
    if (phase == kBottleneckPhase) {
      const PartTask task = PartTask::of(Tiles(), group * join.parts.count, count, cell.bottleneck, join.parts.count);
      return join_tile<Tiles>(m, of_samples(join, first, count), task, cell.h == nullptr);
    }
    const Reduce<T> own = of_samples(reduce, first, count);
    if (kBatch && own.pieces() == 1) return;
    const int channels = own.size.channels;
    const int64_t before = row_at(first, channels);
    const Part entries = entries_of(own, group);
    for (int k = entries.begin + m.thread(); k < entries.end; k += m.threads()) {
      if constexpr (kBatch) {
        join_moments(m, own, statistics, k);
        continue;
      }
      const float mean = sum_of_pieces(m, own, own.sum, k) / static_cast<float>(own.size.positions);
      m.store(cell.tables.p + before + k, kAffine ? normed_mean(m, norm, k % channels, before + k, mean) : mean);
    }
  }
};

// --- backward ------------------------------------------------------------------------------------------------

template <class T, GpuNorm kNorm>
struct StepBackward {
  static constexpr GpuNorm kBehind = kNorm;
  static constexpr bool kAffine = kNorm != GpuNorm::none, kBatch = kNorm == GpuNorm::batch;
  using Tiles = FlowTiles<kNorm>;

  FlowOrder order;
  Reduce<T> reduce;  // into pieces
  CellBackward cell;
  ChannelAffine affine;     // with kAffine; and what the gradients of scale and bias are made of, (N, C) each:
  float *sum, *product;     // sums of g and of g ((x - shift) - d)
  float *dp, *offset;       // see CellGradients; null: not wanted
  float *factor, *new_h;    // (N, C); null: not wanted
  NormGradients gradients;  // of a batch
  JoinParts join;
  Spread<T> spread;  // no out: not wanted

  DIA_DEVICE CellGradients cell_gradients_of(int64_t first, int count) const {
    return {of_samples(cell, first, count), rows_from(dp, first, cell.channels),
            rows_from(offset, first, cell.channels), affine.scale, reduce.size.positions};
  }

  DIA_DEVICE int terms() const { return 4 * cell.channels; }
  DIA_DEVICE FlowTasks tasks(int phase, int count) const {
    switch (phase) {
      case kReducePhase:
        return tasks_of(reduce, count);
      case kBottleneckPhase:
        return {join.parts.template tiles<Tiles>(count, cell.bottleneck, true), join.parts.count};
      case kCellPhase:
        return {cell_gradients_of(0, count).template tasks<Tiles>(), 1};
      case kNormPhase:
        return {kBatch ? tasks_of_channels(cell.channels) : 0, 1};
      case kSpreadPhase:
        return tasks_of(spread, count);
      default:
        return {0, 1};
    }
  }

  template <class M>
  DIA_DEVICE void run(M& m, int phase, Part samples) const {
    const int first = samples.begin, count = samples.size();
    if (phase == kReducePhase) return kernels::reduce(m, of_samples(reduce, first, count));
    if (phase == kSpreadPhase) return kernels::spread(m, of_samples(spread, first, count));
    if constexpr (kBatch)
      if (phase == kNormPhase) return norm_gradients(m, gradients);
    if (phase == kCellPhase) return cell_gradients<Tiles>(m, cell_gradients_of(first, count));
    bottleneck_gradient_sums<Tiles>(
        m, BottleneckGradientSums{of_samples(cell, first, count), of_samples(join, first, count).parts});
  }

  template <class M>
  DIA_DEVICE void end(M& m, int phase, int group, Part samples) const {
    const int first = samples.begin, count = samples.size();
    if (phase == kBottleneckPhase) {
      const PartTask task = PartTask::of(Tiles(), group * join.parts.count, count, cell.bottleneck, join.parts.count);
      return join_tile<Tiles>(m, of_samples(join, first, count), task, false);
    }
    const Reduce<T> own = of_samples(reduce, first, count);
    const int channels = own.size.channels;
    const int64_t before = row_at(first, channels);
    const Part entries = entries_of(own, group);
    for (int k = entries.begin + m.thread(); k < entries.end; k += m.threads()) {
      const int row = first + k / channels, channel = k % channels;
      float dh = sum_of_pieces(m, own, own.product, k);
      if constexpr (kAffine) {
        float about_mean = dh;
        const float of_g = sum_of_pieces(m, own, own.sum, k);
        dh = map_gradient(m, affine, of_g, about_mean, channel);
        m.store(sum + before + k, of_g);
        m.store(product + before + k, about_mean);
      }
      const float h = gate_gradient(m, cell, row, channel, dh);
      if (kBatch) m.store(new_h + before + k, h);
      if (factor != nullptr) m.store(factor + before + k, kAffine ? h * m.load(affine.scale + channel) : h);
    }
  }
};

// --- the order -----------------------------------------------------------------------------------------------

template <class M, class Array, class Flow>
DIA_DEVICE void keep_tasks(M& m, const Array& kept, const Flow& flow) {
  const int phase = m.thread() % kFlowPhases, last = m.thread() / kFlowPhases;
  if (last > 1) return;
  const FlowOrder& order = flow.order;
  const FlowTasks tasks = flow.tasks(phase, order.samples_of(last == 1 ? order.chunks() - 1 : 0).size());
  kept[2 + 2 * m.thread()] = tasks.groups, kept[3 + 2 * m.thread()] = tasks.members;
}

// Which tasks a ticket is of: the tickets of a phase of a chunk follow each other.
template <class Array>
class FlowTurn {
 public:
  DIA_DEVICE FlowTurn(const FlowOrder& order, const Array& kept) : chunks_(order.chunks()), kept_(kept) { enter(); }

  // Goes on to the phase and chunk of a ticket that is not before the last one. False: there is none.
  DIA_DEVICE bool reach(unsigned ticket) {
    while (ticket - begin_ >= count_) {
      if (chunk_ + 1 >= chunks_ && phase_ == kSpreadPhase) return false;
      begin_ += count_;
      ++number_;
      enter();
    }
    return true;
  }
  DIA_DEVICE int phase() const { return phase_; }
  DIA_DEVICE int chunk() const { return chunk_; }
  DIA_DEVICE int task(unsigned ticket) const { return static_cast<int>(ticket - begin_); }
  DIA_DEVICE int tasks() const { return static_cast<int>(count_); }
  // The phase that this one waits for: the last before it that has tasks.
  DIA_DEVICE int before() const {
    int phase = phase_ - 1;
    while (groups(phase) == 0) --phase;
    return phase;
  }
  DIA_DEVICE unsigned groups(int phase) const { return kept_[at(phase)]; }
  DIA_DEVICE unsigned members(int phase) const { return kept_[at(phase) + 1]; }

 private:
  // Of each turn: the first two phases, the third of the chunk before, the last of the one before that, the others.
  DIA_DEVICE void enter() {
    const int turn = number_ / kFlowPhases, place = number_ % kFlowPhases;
    const bool spread = place == kBottleneckPhase + 1;
    phase_ = spread ? kSpreadPhase : place - (place > kBottleneckPhase ? 1 : 0);
    chunk_ = turn - (spread ? 2 : place < kBottleneckPhase ? 0 : 1);
    count_ = chunk_ >= 0 && chunk_ < chunks_ ? groups(phase_) * members(phase_) : 0;
  }
  DIA_DEVICE int at(int phase) const { return 2 + 2 * (phase + (chunk_ + 1 == chunks_ ? kFlowPhases : 0)); }

  int chunks_;
  Array kept_;
  unsigned begin_ = 0, count_ = 0;
  int number_ = 0, phase_ = 0, chunk_ = 0;
};

template <class M, class Flow>
DIA_DEVICE void run_flow(M& m, const Flow& flow) {
  const FlowCounters& counters = flow.order.counters;
  const auto said = m.template shared<unsigned>(kFlowKept);
  keep_tasks(m, said, flow);
  m.sync_block();
  FlowTurn turn(flow.order, said);
  // Each ticket is asked for a task ahead: by the time it is needed it has come.
  unsigned next = 0;
  if (m.thread() == 0) next = m.take(counters.taken());
  while (true) {
    if (m.thread() == 0) {
      said[0] = next;
      next = m.take(counters.taken());
    }
    m.sync_block();
    const unsigned ticket = said[0];
    if (!turn.reach(ticket)) return;
    const int phase = turn.phase(), chunk = turn.chunk();
    const Part samples = flow.order.samples_of(chunk);
    if (phase > kReducePhase && m.thread() == 0)
      m.await(counters.done(chunk, turn.before()), turn.groups(turn.before()));
    m.sync_block();
    auto&& task = m.as_block(turn.task(ticket), turn.tasks());
    flow.run(task, phase, samples);
    if (phase == kSpreadPhase) continue;
    m.sync_block();
    if (phase == kReducePhase || phase == kBottleneckPhase) {
      const int members = static_cast<int>(turn.members(phase)), group = turn.task(ticket) / members;
      if (members > 1) {
        if (m.thread() == 0) said[1] = m.release(counters.group(chunk, phase, group));
        m.sync_block();
        if (static_cast<unsigned>(said[1]) + 1 < static_cast<unsigned>(members)) continue;
      }
      flow.end(m, phase, group, samples);
      m.sync_block();
    }
    if (m.thread() == 0) m.release(counters.done(chunk, phase));
  }
}

}  // namespace dia::kernels
