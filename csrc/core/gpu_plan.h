// How the GPU step is laid out for a problem: how many samples the sweeps over the map take at a time, and who makes
// the cell between them. A pure function of the problem and of a GPU's limits. Plain C++, no torch, no CUDA headers.
//
// Plans are priced by a model of their time. The model is coarse (bytes over bandwidth, floating-point operations
// over rate, launches); docs/kernels.md says what it has been held to.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "gates.h"

namespace dia {

// What a GPU offers. Rates are what kernels reach, in bytes, operations and seconds.
struct GpuLimits {
  const char* name;
  int architecture;  // 90 for compute capability 9.0
  int multiprocessors;
  int64_t shared_per_multiprocessor, l2_bytes;
  double memory, l2, flops, tf32;
  double launch;
  int clusters;  // of kClusterBlocks blocks, with a multiprocessor each, that run at a time
};

// One GPU of each supported architecture, by NVIDIA's data sheets; memory and tf32 at 0.87 and 0.6 of the peak. Of the
// H100 the memory's rate is measured, and with it the time of a launch, which is taken for all. Clusters: two of each
// of at least eight groups of multiprocessors.
inline constexpr GpuLimits kGpus[] = {
    {"t4", 75, 40, 64 << 10, 4 << 20, 0.28e12, 1.0e12, 8.1e12, 8.1e12, 5e-6, 0},
    {"a100", 80, 108, 164 << 10, 40 << 20, 1.35e12, 4.0e12, 19.5e12, 94e12, 5e-6, 0},
    {"a10", 86, 72, 100 << 10, 6 << 20, 0.52e12, 2.0e12, 31e12, 37e12, 5e-6, 0},
    {"l4", 89, 58, 100 << 10, 48 << 20, 0.26e12, 2.0e12, 30e12, 36e12, 5e-6, 0},
    {"h100", 90, 132, 228 << 10, 50 << 20, 2.9e12, 5.5e12, 67e12, 297e12, 5e-6, 16},
    {"b200", 100, 148, 228 << 10, 126 << 20, 6.9e12, 10e12, 75e12, 660e12, 5e-6, 16},
    {"rtx5090", 120, 170, 100 << 10, 96 << 20, 1.55e12, 6.0e12, 105e12, 125e12, 5e-6, 16},
};

// What lies before the step: nothing, a norm of given statistics, or one of the batch's own.
enum class GpuNorm { none, given, batch };

struct GpuProblem {
  int64_t samples, channels, positions, bottleneck;
  int element_bytes;
  bool interleaved;
  bool aligned;   // every run of the maps begins at sixteen bytes
  bool combined;  // with shortcut and activation
  bool backward;
  bool tf32;  // whether products may be in tf32
  GpuNorm norm = GpuNorm::none;
  bool masked = false;  // whether a mask of bits tells the gradient what the activation let through
};

// Who makes the cell: kernels of tiles, or a BLAS, between two sweeps; or clusters, which take the first sweep along,
// unless a batch's statistics come between, and forward the second.
enum class GpuCell { tiles, products, clusters };

// Which plans may be taken: any; or for tests and measurements of one kind alone, sweeps with tiles or with products,
// or clusters wherever they can make a step.
enum class GpuLayouts { any, sweeps, products, clusters };
inline constexpr const char* kLayoutNames[] = {"any", "sweeps", "products", "clusters"};

// What a block of a sweep takes at a time, a task (kernels/sweeps.h). Planar: `channels` rows, each one channel of a
// sample, by `lanes` threads each. Interleaved: channels and positions of a sample.
struct GpuTile {
  int channels = 1, positions = INT32_MAX, lanes = 1;
};

struct GpuPlan {
  GpuCell cell = GpuCell::tiles;
  int64_t chunk = 0;     // samples that the sweeps take at a time
  int64_t together = 0;  // samples of a cluster, where there are clusters
  int64_t launches = 0;
  double passes = 0;  // over the map, and their bytes in all
  double bytes = 0;
  double seconds = 0, ideal = 0;  // modelled; and of the passes that nobody can avoid
};

// Packs of each map that a thread of a sweep has under way: of one map that is summed; where there are more; of two of
// which one has a mask; and of those that `spread` reads, where a thread has one channel.
constexpr int kPacksAlone = 8, kPacksOfEach = 2, kPacksMasked = 3, kPacksPlanar = 4;

// Threads of a block of the sweeps, and how many such blocks a multiprocessor holds.
constexpr int kSweepThreads = 256, kSweepResident = 3;

// Blocks of a cluster, their threads, and samples that a cluster takes, at most (kernels/cluster_step.h).
constexpr int kClusterBlocks = 8, kClusterThreads = 512, kMostTogether = 16;

// Channels of an interleaved map that a block sums at a time, at most: of more, sums of moments would not leave three
// blocks their shared memory on every GPU.
constexpr int64_t kMostSummed = 1024;

// Sums of so many terms are made in one go, longer ones in parts by several blocks, which are then to be joined.
constexpr int64_t kTermsInOnePart = 256;

DIA_HOST_DEVICE constexpr int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Of the sweep that sums: a sum of each value of each thread's packs, and a gap (sweeps.h, MeetingPlace); for moments
// the totals of a task's channels.
constexpr int64_t reduce_shared_bytes(const GpuTile& tile, bool interleaved, int element_bytes) {
  if (!interleaved) return 8 * (kSweepThreads / 32);
  return 8 * (static_cast<int64_t>(kSweepThreads) * (16 / element_bytes + 1) + tile.channels);
}
// Of the sweep that looks for extremes: a value and a position of each value of each thread's packs, of a planar map of
// each thread.
constexpr int64_t extreme_shared_bytes(bool interleaved, int element_bytes) {
  return 8 * static_cast<int64_t>(kSweepThreads) * (interleaved ? 16 / element_bytes + 1 : 1);
}
// Of one within a cluster, which makes no moments.
constexpr int64_t cluster_reduce_bytes(bool interleaved, int element_bytes) {
  if (!interleaved) return 8 * (kClusterThreads / 32);
  return 4 * static_cast<int64_t>(kClusterThreads) * (16 / element_bytes + 1);
}

// From one row of so many values to the next: whole packs, and a gap of one.
DIA_HOST_DEVICE constexpr int pitch_of(int width) { return (width + 3) / 4 * 4 + 4; }

// What a block of a cluster keeps of the cell in shared memory, in floats: the rows of the weights that belong to its
// units of both bottlenecks (`path` 0: the input's, 1: the hidden one's) and to its channels, biases, its channels' old
// c, and the samples' rows of a table of each path. Rows of weights and tables begin packs, a gap apart that keeps
// neighbours in other banks.
struct ClusterMemory {
  int units, channels, samples;  // most that a block has
  int reduce_pitch, expand_pitch;

  DIA_HOST_DEVICE constexpr ClusterMemory(int of_channels, int bottleneck, int together)
      : units((bottleneck + kClusterBlocks - 1) / kClusterBlocks),
        channels((of_channels + kClusterBlocks - 1) / kClusterBlocks),
        samples(together),
        reduce_pitch(pitch_of(of_channels)),
        expand_pitch(pitch_of(bottleneck)) {}

  DIA_HOST_DEVICE constexpr int reduce_weight(int path, int unit) const { return (path * units + unit) * reduce_pitch; }
  DIA_HOST_DEVICE constexpr int expand_weight(int path, int gate, int channel) const {
    return reduce_weight(2, 0) + ((path * 4 + gate) * channels + channel) * expand_pitch;
  }
  DIA_HOST_DEVICE constexpr int table(int path, int sample, int pitch) const {
    return expand_weight(2, 0, 0) + (path * samples + sample) * pitch;
  }
  DIA_HOST_DEVICE constexpr int reduce_bias(int path, int unit) const {
    return table(2, 0, reduce_pitch > expand_pitch ? reduce_pitch : expand_pitch) + path * units + unit;
  }
  DIA_HOST_DEVICE constexpr int expand_bias(int path, int gate, int channel) const {
    return reduce_bias(2, 0) + (path * 4 + gate) * channels + channel;
  }
  DIA_HOST_DEVICE constexpr int old_c(int sample, int channel) const {
    return expand_bias(2, 0, 0) + sample * channels + channel;
  }
  DIA_HOST_DEVICE constexpr int floats() const { return old_c(samples, 0); }
};

// The same for a gradient: of its channels the rows of the weights that expand (pre-activations to units) and the
// columns of those that reduce, the gradients of all units and of its pre-activations, and a place where threads' sums
// meet.
struct ClusterGradientMemory {
  int channels, bottleneck, samples;
  int expand_pitch, column_pitch, sample_pitch;

  DIA_HOST_DEVICE constexpr ClusterGradientMemory(int of_channels, int units, int together)
      : channels((of_channels + kClusterBlocks - 1) / kClusterBlocks),
        bottleneck(units),
        samples(together),
        expand_pitch(pitch_of(units)),
        column_pitch(pitch_of(channels)),
        sample_pitch((together + 7) / 8 * 8) {}

  DIA_HOST_DEVICE constexpr int expand_weight(int path, int gate, int channel) const {
    return ((path * 4 + gate) * channels + channel) * expand_pitch;
  }
  DIA_HOST_DEVICE constexpr int reduce_column(int path, int unit) const {
    return expand_weight(2, 0, 0) + (path * bottleneck + unit) * column_pitch;
  }
  DIA_HOST_DEVICE constexpr int dz(int path, int sample) const {
    return reduce_column(2, 0) + (path * samples + sample) * expand_pitch;
  }
  DIA_HOST_DEVICE constexpr int du(int gate, int channel) const {
    return dz(2, 0) + (gate * channels + channel) * sample_pitch;
  }
  DIA_HOST_DEVICE constexpr int meeting() const { return du(4, 0); }
  DIA_HOST_DEVICE constexpr int floats() const { return meeting() + 8 * kClusterThreads; }
};

// --- the plan -----------------------------------------------------------------------------------------------

namespace detail {

inline int64_t parts(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

// Products reach this part of the float32 peak: in tiles, and by a BLAS, whose kernels, and those between them, take
// this part of another launch besides. Measured on an H100 (docs/kernels.md), but for tiles without tensor cores.
constexpr double kTileRate = 0.36, kPlainTileRate = 0.08, kBlasRate = 0.42;
constexpr double kBlasLaunch = 0.6;
inline double tile_rate(const GpuLimits& gpu) { return gpu.architecture < 80 ? kPlainTileRate : kTileRate; }

// What a cluster's cell takes, its meetings with it; and what a block draws from memory, in bytes a second.
constexpr double kClusterCell = 6e-6, kBlockRate = 45e9;

// Shared memory that the system keeps of each block.
constexpr int64_t kReservedShared = 1 << 10;

// Bytes of maps that the second-level cache keeps.
inline double held_by_cache(const GpuLimits& gpu) { return 0.5 * static_cast<double>(gpu.l2_bytes); }

// Times of what does not depend on the layout.
struct Work {
  double sample_bytes;  // of one map
  double passes;
  double weight_bytes;  // of the cell
  double sample_flops;  // of its products, for one sample
  double rest;          // backward: the weights' gradients
};

inline Work work_of(const GpuProblem& p, const GpuLimits& gpu) {
  const double c = static_cast<double>(p.channels), m = static_cast<double>(p.bottleneck);
  const double n = static_cast<double>(p.samples);
  Work work{};
  work.sample_bytes = c * static_cast<double>(p.positions) * p.element_bytes;
  work.passes = p.backward ? (p.combined ? 5 : 3) : (p.combined ? 3 : 2);
  // Of a map of 16 bits the mask has a sixteenth. Forward it comes on top, backward in place of the result.
  if (p.masked) work.passes += 1.0 / 16 - (p.backward ? 1 : 0);
  work.weight_bytes = 40 * c * m;
  work.sample_flops = 20 * c * m;
  if (p.backward) {
    const double flops = n * work.sample_flops, rate = p.tf32 ? gpu.tf32 : gpu.flops;
    work.rest = std::max(flops / (tile_rate(gpu) * rate), (n * (5 * c + 4 * m) * 8 + work.weight_bytes) / gpu.l2);
  }
  return work;
}

// Threads that share a row of a planar map, so that each has `packs` of it under way; more where there are so few rows
// that multiprocessors would idle.
inline int lanes_of(const GpuProblem& p, const GpuLimits& gpu, int64_t packs) {
  const int64_t pack = 16 / p.element_bytes,
                row = parts(p.positions, pack) + (p.aligned && p.positions % pack == 0 ? 0 : 1);
  const int64_t threads = static_cast<int64_t>(gpu.multiprocessors) * kSweepThreads * kSweepResident;
  int lanes = row > 4 ? 2 : 1;  // a row each would be too many places at once for a warp's load
  while (lanes < kSweepThreads && lanes * packs < row && (lanes < 32 || p.samples * p.channels * lanes < threads))
    lanes *= 2;
  return lanes;
}

// Blocks of sweeps that a GPU holds.
inline int64_t resident_blocks(const GpuLimits& gpu) {
  return static_cast<int64_t>(gpu.multiprocessors) * kSweepResident;
}

// Blocks of a sweep. The device hands out many tasks, or large ones, best: blocks that stay and take tasks in turns
// drift apart, and in the end all wait for those that had one more. Few small tasks are taken by blocks that stay.
inline int64_t sweep_blocks(int64_t tasks, bool large, const GpuLimits& gpu) {
  const int64_t resident = resident_blocks(gpu);
  return std::min(tasks, large || tasks >= 4 * resident ? 16 * resident : resident);
}

// The part of a sweep's time in which `tasks` blocks of one size keep the memory busy, where so many are resident. The
// last wave takes as long as its blocks are a part of a wave, but no less than kLeastWave of one: fewer do not draw all
// of the memory's bandwidth.
inline double busy_part(int64_t tasks, int64_t resident) {
  constexpr double kLeastWave = 0.6;
  const double waves = static_cast<double>(tasks) / static_cast<double>(resident), full = std::floor(waves);
  return waves > full ? waves / (full + std::max(waves - full, kLeastWave)) : 1;
}

// Channels of an interleaved map: many, as what lies together is read together; fewer where the multiprocessors are
// busier so. (On an H100 a sweep of 512 tasks, 1.3 waves, drew 77 % of a copy's bandwidth, one of 256 tasks 92 %.)
inline GpuTile reduce_tile_of(const GpuProblem& p, const GpuLimits& gpu, bool alone) {
  GpuTile tile;
  tile.lanes = lanes_of(p, gpu, alone ? kPacksAlone : 2 * kPacksOfEach);
  tile.channels = kSweepThreads / tile.lanes;
  if (!p.interleaved) return tile;
  // A thread sums the channels of a pack.
  const int64_t most = std::min<int64_t>(kSweepThreads * (p.aligned ? 16 / p.element_bytes : 1), kMostSummed);
  double busiest = -1;
  for (int64_t channels = std::clamp<int64_t>(p.channels, 1, most);; channels = rounded_up(channels / 2, 8)) {
    const double busy = busy_part(p.samples * parts(p.channels, channels), resident_blocks(gpu));
    if (busy > busiest) tile.channels = static_cast<int>(channels), busiest = busy;
    if (busiest >= 0.95 || channels <= 32) return tile;
  }
}

// Rows of threads that a block makes of the channels of an interleaved map.
inline int64_t rows_of(const GpuProblem& p, int64_t channels) {
  return kSweepThreads / parts(channels, p.aligned ? 16 / p.element_bytes : 1);
}

// Eight positions for each row of threads, fewer where multiprocessors would idle.
inline GpuTile spread_tile_of(const GpuProblem& p, const GpuLimits& gpu) {
  GpuTile tile;
  // Rows of seven or eight packs (7 x 7, 8 x 8) by four threads: by two, a warp's load would be in twice as many
  // places, and 7 x 7 took an H100 longer.
  tile.lanes = lanes_of(p, gpu, parts(p.positions * p.element_bytes, 16) > 8 ? kPacksPlanar : kPacksOfEach);
  tile.channels = kSweepThreads / tile.lanes;
  if (!p.interleaved) return tile;
  const int64_t channels = std::clamp<int64_t>(p.channels, 1, kSweepThreads * (p.aligned ? 16 / p.element_bytes : 1));
  const int64_t rows = rows_of(p, channels);
  const int64_t wanted = 2 * resident_blocks(gpu);
  int64_t positions = 8 * rows;
  while (positions > 2 * rows && p.samples * parts(p.channels, channels) * parts(p.positions, positions) < wanted)
    positions /= 2;
  tile.channels = static_cast<int>(channels), tile.positions = static_cast<int>(positions);
  return tile;
}

// Terms of the sums of the cell's first products.
inline int64_t first_terms(const GpuProblem& p) { return (p.backward ? 4 : 1) * p.channels; }

// Of the norm's tables: statistics forward, their gradients backward.
inline int norm_launches(const GpuProblem& p) { return p.norm == GpuNorm::none ? 0 : 1; }

// Passes that read a map again: forward x. Backward g, and with the batch's statistics z too.
inline double read_again(const GpuProblem& p) { return p.backward && p.norm == GpuNorm::batch ? 2 : 1; }

// Parts of each of a cluster's samples that are tasks, so that its blocks have as much to do; each costs a meeting of
// its threads.
inline int cluster_split(int64_t together) {
  int best = 1;
  const auto cost = [&](int split) {
    return static_cast<double>(parts(together * split, kClusterBlocks)) * (1.0 / split + 0.25);
  };
  for (int split = 2; split <= kClusterBlocks; split *= 2)
    if (cost(split) < cost(best)) best = split;
  return best;
}

// Threads that share a planar row, as in lanes_of; more where a cluster has so few rows that threads would idle.
inline int cluster_lanes(const GpuProblem& p, int64_t together, int64_t packs) {
  const int64_t row = parts(p.positions * p.element_bytes, 16), rows = together * p.channels;
  const auto idle = [&](int lanes) { return rows * lanes < kClusterBlocks * kClusterThreads; };
  int lanes = row > 4 ? 2 : 1;
  while (lanes < kClusterThreads && 2 * lanes <= row && (idle(lanes) || (lanes < 32 && lanes * packs < row)))
    lanes *= 2;
  return lanes;
}

// Tasks of a cluster's sweeps: of an interleaved map parts of a sample, of its channels where it is summed and of its
// positions where it is scaled.
inline GpuTile cluster_tile_of(const GpuProblem& p, int64_t together, bool sums) {
  GpuTile tile;
  tile.lanes = cluster_lanes(p, together, !sums ? kPacksOfEach : p.backward ? 2 * kPacksOfEach : kPacksAlone);
  tile.channels = kClusterThreads / tile.lanes;
  if (!p.interleaved) return tile;
  const int split = cluster_split(together);
  const int64_t most = kClusterThreads * (p.aligned ? 16 / p.element_bytes : 1);
  const int64_t channels = sums ? rounded_up(parts(p.channels, split), 8) : p.channels;
  tile.channels = static_cast<int>(std::clamp<int64_t>(channels, 1, std::min(most, std::max<int64_t>(p.channels, 1))));
  if (!sums) tile.positions = static_cast<int>(std::max<int64_t>(parts(p.positions, split), 1));
  return tile;
}

// Of a block; the sweep's sums come on top of the cell.
inline int64_t cluster_shared_bytes(const GpuProblem& p, int64_t together) {
  const int c = static_cast<int>(p.channels), m = static_cast<int>(p.bottleneck), n = static_cast<int>(together);
  const int floats = p.backward ? ClusterGradientMemory(c, m, n).floats() : ClusterMemory(c, m, n).floats();
  return rounded_up(4 * static_cast<int64_t>(floats), 16) + cluster_reduce_bytes(p.interleaved, p.element_bytes);
}

// Samples of each cluster: as few as all clusters together can take at once, but not more than the second-level cache
// holds of those under way.
inline int64_t samples_together(const GpuProblem& p, const GpuLimits& gpu, double sample_bytes) {
  int64_t together = std::clamp<int64_t>(parts(p.samples, gpu.clusters), 1, kMostTogether);
  while (together > 1 && static_cast<double>(gpu.clusters * together) * sample_bytes > held_by_cache(gpu))
    together /= 2;
  return together;
}

// Whether a block of a cluster has room for its part of the cell.
inline bool clusters_can(const GpuProblem& p, const GpuLimits& gpu) {
  // Beyond this a row of the weights would not find room.
  constexpr int64_t kMostChannels = 1 << 12;
  if (gpu.clusters == 0 || std::max(p.channels, p.bottleneck) > kMostChannels) return false;
  return cluster_shared_bytes(p, kMostTogether) + kReservedShared <= gpu.shared_per_multiprocessor;
}

// A step or its gradient by clusters.
inline GpuPlan cluster_plan(const GpuProblem& p, const GpuLimits& gpu, const Work& work) {
  GpuPlan plan;
  plan.cell = GpuCell::clusters;
  plan.chunk = p.samples, plan.together = samples_together(p, gpu, work.sample_bytes);
  const int64_t groups = parts(p.samples, plan.together), waves = parts(groups, gpu.clusters);
  // A sweep is left to a kernel of its own behind a batch's statistics, or beside the weights' gradients.
  const bool batch = p.norm == GpuNorm::batch, whole = !p.backward && !batch;
  plan.launches = (whole ? 1 : 2) + norm_launches(p) + (p.backward ? 1 : 0);
  const double again = read_again(p);
  plan.passes = work.passes + again;
  const double map = static_cast<double>(p.samples) * work.sample_bytes;
  plan.bytes = plan.passes * map;
  const double at_a_time = static_cast<double>(std::min<int64_t>(groups, gpu.clusters));
  const double rate = std::max(1.0, std::min(gpu.memory, at_a_time * kClusterBlocks * kBlockRate));
  plan.seconds = static_cast<double>(plan.launches) * gpu.launch + static_cast<double>(waves) * kClusterCell +
                 map * (work.passes / rate + again / std::min(gpu.l2, rate)) +
                 static_cast<double>(groups) * work.weight_bytes / gpu.l2 + work.rest;
  return plan;
}

// Whether all clusters of a plan run at a time, and the cache holds all maps.
inline bool at_once(const GpuPlan& plan, const GpuProblem& p, const GpuLimits& gpu, const Work& work) {
  return parts(p.samples, plan.together) <= gpu.clusters &&
         static_cast<double>(p.samples) * work.sample_bytes <= held_by_cache(gpu);
}

// Sweeps with the cell between them, `cell_seconds` for all samples together.
inline void add_sweeps(GpuPlan& plan, const GpuProblem& p, const GpuLimits& gpu, const Work& work, double cell_seconds,
                       int cell_launches, double cell_launch) {
  const double map = static_cast<double>(p.samples) * work.sample_bytes;
  const bool batch = p.norm == GpuNorm::batch;
  const double again = read_again(p);
  plan.passes = work.passes + again;
  plan.bytes = plan.passes * map;
  // What the second sweep finds in the second-level cache: all of a chunk of samples that is small enough, or the last
  // part of a larger one, as it goes backwards. A batch's statistics need all samples first, and every chunk its
  // launches.
  const double sample_kept = std::max(1.0, work.sample_bytes * (work.passes + again - 1));
  const double room = held_by_cache(gpu);
  const auto with_chunk = [&](int64_t chunk) {
    const double kept = std::min(1.0, room / (sample_kept * static_cast<double>(std::max<int64_t>(chunk, 1))));
    const int64_t chunks = chunk > 0 ? parts(p.samples, chunk) : 0;
    const int64_t others = chunks * 2 + norm_launches(p) + (p.backward ? 1 : 0);
    const double seconds = map * ((work.passes + again * (1 - kept)) / gpu.memory + again * kept / gpu.l2) +
                           cell_seconds + static_cast<double>(others) * gpu.launch +
                           static_cast<double>(chunks * cell_launches) * cell_launch + work.rest;
    if (plan.chunk > 0 && seconds >= plan.seconds) return;
    plan.chunk = chunk, plan.launches = others + chunks * cell_launches, plan.seconds = seconds;
  };
  plan.chunk = 0;
  with_chunk(p.samples);
  const int64_t small = static_cast<int64_t>(room / sample_kept);
  if (!batch && small >= 1 && small < p.samples) with_chunk(small);
}

}  // namespace detail

// The plan for a problem on a GPU.
inline GpuPlan plan_step(const GpuProblem& p, const GpuLimits& gpu, GpuLayouts layouts = GpuLayouts::any) {
  const detail::Work work = detail::work_of(p, gpu);
  const double rate = p.tf32 ? gpu.tf32 : gpu.flops;
  const double cell_flops = static_cast<double>(p.samples) * work.sample_flops;
  const auto sweeps = [&](GpuCell cell) {
    GpuPlan plan;
    plan.cell = cell;
    const bool blas = cell == GpuCell::products;
    // Of a BLAS with those of sums split among blocks.
    const int launches = blas ? 11 : (p.backward ? 3 : 2) + (detail::first_terms(p) > kTermsInOnePart ? 1 : 0);
    // Each product reads its weights once.
    const double products =
        std::max(cell_flops / ((blas ? detail::kBlasRate : detail::tile_rate(gpu)) * rate), work.weight_bytes / gpu.l2);
    detail::add_sweeps(plan, p, gpu, work, products, launches, (blas ? detail::kBlasLaunch : 1) * gpu.launch);
    return plan;
  };
  GpuPlan best = sweeps(layouts == GpuLayouts::products ? GpuCell::products : GpuCell::tiles);
  if (layouts == GpuLayouts::any)
    if (const GpuPlan blas = sweeps(GpuCell::products); blas.seconds < best.seconds) best = blas;
  if ((layouts == GpuLayouts::any || layouts == GpuLayouts::clusters) && detail::clusters_can(p, gpu)) {
    const GpuPlan plan = detail::cluster_plan(p, gpu, work);
    if (layouts == GpuLayouts::clusters || (detail::at_once(plan, p, gpu, work) && plan.seconds < best.seconds))
      best = plan;
  }
  best.ideal = work.passes * static_cast<double>(p.samples) * work.sample_bytes / gpu.memory;
  return best;
}

}  // namespace dia
