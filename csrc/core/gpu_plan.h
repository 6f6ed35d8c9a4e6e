// How the GPU step is laid out for a problem: as one kernel of teams that keep the map on chip, or as sweeps over the
// map with the cell between them. A pure function of the problem and of a GPU's limits. Plain C++, no torch, no CUDA
// headers.
//
// Every layout that fits is priced by a model of its time, and the cheapest is taken. The model is coarse (bytes over
// bandwidth, floating-point operations over rate, barriers, launches); docs/kernels.md says what it has been held to.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "gates.h"

namespace dia {

// What a GPU offers. Rates are what kernels reach, in bytes, operations and seconds.
struct GpuLimits {
  const char* name;
  int architecture;              // 90 for compute capability 9.0
  int multiprocessors, threads;  // of a multiprocessor
  int64_t shared_per_block, shared_per_multiprocessor;
  int cluster;  // the most blocks of a cluster; 1: none
  int64_t l2_bytes;
  double memory, l2, flops, tf32;
  double barrier, cluster_barrier, launch;
};

// One GPU of each supported architecture, by NVIDIA's data sheets; memory and tf32 at 0.87 and 0.6 of the peak. Of the
// H100 the memory's rate is measured, and with it the time of a launch, which is taken for all.
inline constexpr GpuLimits kGpus[] = {
    {"t4", 75, 40, 1024, 64 << 10, 64 << 10, 1, 4 << 20, 0.28e12, 1.0e12, 8.1e12, 8.1e12, 1.5e-6, 0, 5e-6},
    {"a100", 80, 108, 2048, 163 << 10, 164 << 10, 1, 40 << 20, 1.35e12, 4.0e12, 19.5e12, 94e12, 1.5e-6, 0, 5e-6},
    {"a10", 86, 72, 1536, 99 << 10, 100 << 10, 1, 6 << 20, 0.52e12, 2.0e12, 31e12, 37e12, 1.5e-6, 0, 5e-6},
    {"l4", 89, 58, 1536, 99 << 10, 100 << 10, 1, 48 << 20, 0.26e12, 2.0e12, 30e12, 36e12, 1.5e-6, 0, 5e-6},
    {"h100", 90, 132, 2048, 227 << 10, 228 << 10, 8, 50 << 20, 2.8e12, 5.5e12, 67e12, 297e12, 1.5e-6, 0.5e-6, 5e-6},
    {"b200", 100, 148, 2048, 227 << 10, 228 << 10, 8, 126 << 20, 6.9e12, 10e12, 75e12, 660e12, 1.5e-6, 0.5e-6, 5e-6},
    {"rtx5090", 120, 170, 1536, 99 << 10, 100 << 10, 8, 96 << 20, 1.55e12, 6.0e12, 105e12, 125e12, 1.5e-6, 0.5e-6,
     5e-6},
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
};

// Who makes the cell: with the map on chip teams of blocks; between sweeps kernels of tiles, or a BLAS.
enum class GpuTeam { block, cluster, grid, tiles, products };

// Which plans may be taken: any, or for tests and measurements of one kind alone (sweeps: with tiles). Where none of
// the kind fits, and where a team does not fit on the device after all, there are sweeps with tiles.
enum class GpuLayouts { any, on_chip, sweeps, products };

// What a block of a sweep takes at a time, see kernels/walk.h. Planar: rows, `lanes` threads each. Interleaved:
// channels of a sample, and of a spread some positions.
struct GpuTile {
  int channels = 1, positions = 1, lanes = 1;
};

struct GpuPlan {
  // Whether the map stays on chip: one kernel. Else there are sweeps, `chunk` samples at a time, with the cell between.
  bool on_chip = false;
  GpuTeam team = GpuTeam::tiles;
  int ranks = 1, teams = 1;    // blocks of a team, and teams
  int group = 1, quantum = 1;  // samples at a time; an owner's channels begin at multiples of it
  int resident = 1;            // blocks of a multiprocessor
  int64_t shared_bytes = 0;    // of a block of the team
  int64_t chunk = 0;
  int64_t launches = 0;
  double passes = 0;  // over the map, and its bytes in all
  double bytes = 0;
  double seconds = 0, ideal = 0;  // modelled; and of the passes that nobody can avoid
};

constexpr int kGpuThreads = 512;
// Of the sweeps, and how many such blocks a multiprocessor holds.
constexpr int kSweepThreads = 256, kSweepResident = 3;
// Shared memory that the system keeps of each resident block.
constexpr int64_t kReservedShared = 1 << 10;

// --- shared memory of the kernels in csrc/kernels ------------------------------------------------------

// Samples whose sums a warp makes at once, for each weight that it reads.
constexpr int kChunk = 8;

DIA_HOST_DEVICE constexpr int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Floats of scratch for `values` sums over positions, and down columns.
DIA_HOST_DEVICE constexpr int position_scratch(int warps, int values) {
  return values > 32 * warps ? values : 32 * warps;
}
DIA_HOST_DEVICE constexpr int column_scratch(int warps, int values) {
  return values > 32 * kChunk * warps ? values : 32 * kChunk * warps;
}

// Floats of both bottlenecks of a group of samples, in whole chunks.
DIA_HOST_DEVICE constexpr int gathered(int group, int bottleneck) {
  return (group + kChunk - 1) / kChunk * kChunk * 2 * bottleneck;
}

// Elements of the image of one sample's owned channels.
DIA_HOST_DEVICE constexpr int64_t image_elements(int64_t owned, int64_t positions, bool interleaved, bool aligned,
                                                 int pack) {
  const int64_t length = interleaved ? owned : owned * positions;
  return (interleaved ? positions : 1) * rounded_up(aligned ? length : length + pack - 1, pack);
}

constexpr int64_t floats(int64_t count) { return rounded_up(4 * count, 16); }

// `affine`: with a norm of given statistics in front.
constexpr int64_t forward_shared_bytes(int64_t image, int element_bytes, int64_t owned, int64_t bottleneck,
                                       int64_t group, int warps, bool affine) {
  return rounded_up(group * image * element_bytes, 16) +
         floats(position_scratch(warps, static_cast<int>(group * owned))) + 2 * floats(group * owned) +
         floats(gathered(static_cast<int>(group), static_cast<int>(bottleneck))) +
         (affine ? floats(group * owned) + floats(owned) : 0);
}

constexpr int64_t backward_shared_bytes(int64_t image, int element_bytes, int64_t owned, int64_t bottleneck,
                                        int64_t group, int warps, bool affine) {
  const int64_t most = group * std::max(owned, 2 * bottleneck);
  return rounded_up(group * image * element_bytes, 16) + rounded_up(image * element_bytes, 16) +
         floats(column_scratch(warps, static_cast<int>(most))) + 2 * floats(group * owned) + floats(4 * group * owned) +
         floats(2 * group * bottleneck) + (affine ? floats(group * owned) : 0);
}

// Of the sweep that sums: a sum of each value of each thread's packs, twice for moments.
constexpr int64_t reduce_shared_bytes(const GpuTile& tile, bool interleaved, int element_bytes) {
  if (!interleaved) return 8 * (kSweepThreads / 32);
  return 8 * (static_cast<int64_t>(kSweepThreads) * (16 / element_bytes) + tile.channels);
}

// --- the plan -----------------------------------------------------------------------------------------------

namespace detail {

inline int64_t parts(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

// Products reach this part of the peak: in the loops of teams, in tiles, by a BLAS. Teams are slow for the latency of
// their loops; measured on an H100 (docs/kernels.md), as is the part of the bandwidth that they draw.
constexpr double kLoopRate = 0.03, kTileRate = 0.2, kBlasRate = 0.3;
constexpr double kTeamBandwidth = 0.45;
// Of a group of a team, whatever its size.
constexpr double kTeamLatency = 40e-6;

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
  work.weight_bytes = 40 * c * m;
  work.sample_flops = 20 * c * m;
  if (p.backward) {
    const double flops = n * work.sample_flops, rate = p.tf32 ? gpu.tf32 : gpu.flops;
    work.rest = std::max(flops / (kTileRate * rate), (n * (5 * c + 4 * m) * 8 + work.weight_bytes) / gpu.l2);
  }
  return work;
}

// One group of every team: its map, if that stays on chip, and the cell.
inline double team_seconds(const GpuPlan& plan, const GpuProblem& p, const GpuLimits& gpu, const Work& work) {
  const double blocks = static_cast<double>(plan.ranks) * plan.teams;
  const double share = std::min(1.0, blocks / gpu.multiprocessors);
  const double group = static_cast<double>(std::min<int64_t>(plan.group, p.samples)), teams = plan.teams;
  const double groups = static_cast<double>(parts(parts(p.samples, plan.group), plan.teams));
  // A multiprocessor alone draws half as much again as its share of the bandwidth.
  const double map =
      teams * group * work.sample_bytes * work.passes / (kTeamBandwidth * gpu.memory * std::min(1.0, 1.5 * share));
  // What blocks of a team tell each other: parts of both bottlenecks are written and read once, the whole by each.
  const double shared = blocks * group * 6 * static_cast<double>(p.bottleneck) * 4;
  const double weights =
      (teams * work.weight_bytes * static_cast<double>(parts(plan.group, kChunk)) + shared) / (gpu.l2 * share);
  const double flops = teams * group * work.sample_flops / (kLoopRate * gpu.flops * share);
  const double barrier = plan.team == GpuTeam::grid      ? gpu.barrier
                         : plan.team == GpuTeam::cluster ? gpu.cluster_barrier
                                                         : 0.1e-6;
  const double other = std::max(weights, flops) + 2 * barrier + kTeamLatency;
  // Two resident blocks of different teams hide each other's waiting.
  const double one =
      plan.resident > 1 && plan.teams > 1 ? std::max(map, other) + 0.25 * std::min(map, other) : map + other;
  return groups * one;
}

// Threads that share a row of a planar map, so that each has `packs` of it under way; more where there are so few rows
// that multiprocessors would idle.
inline int lanes_of(const GpuProblem& p, const GpuLimits& gpu, int64_t packs) {
  const int64_t pack = 16 / p.element_bytes,
                row = parts(p.positions, pack) + (p.aligned && p.positions % pack == 0 ? 0 : 1);
  const int64_t threads = static_cast<int64_t>(gpu.multiprocessors) * kSweepThreads * kSweepResident;
  int lanes = 1;
  while (lanes < kSweepThreads && lanes * packs < row && (lanes < 32 || p.samples * p.channels * lanes < threads))
    lanes *= 2;
  return lanes;
}

// Channels of an interleaved map: many, as what lies together is read together, fewer where multiprocessors would idle.
inline GpuTile reduce_tile_of(const GpuProblem& p, const GpuLimits& gpu) {
  GpuTile tile;
  tile.lanes = lanes_of(p, gpu, 4);
  const int64_t wanted = kSweepResident * static_cast<int64_t>(gpu.multiprocessors);
  int64_t channels = std::clamp<int64_t>(p.channels, 1, kSweepThreads);
  while (channels > 32 && p.samples * parts(p.channels, channels) < wanted) channels = rounded_up(channels / 2, 8);
  tile.channels = static_cast<int>(channels);
  return tile;
}

// Sixteen positions for each row of threads, fewer where multiprocessors would idle.
inline GpuTile spread_tile_of(const GpuProblem& p, const GpuLimits& gpu) {
  GpuTile tile;
  tile.lanes = lanes_of(p, gpu, 2);
  const int64_t channels = std::clamp(p.channels, int64_t{1}, static_cast<int64_t>(kSweepThreads));
  const int64_t pack = p.aligned ? 16 / p.element_bytes : 1, rows = kSweepThreads / parts(channels, pack);
  const int64_t wanted = 2 * static_cast<int64_t>(gpu.multiprocessors) * kSweepResident;
  int64_t positions = 16 * rows;
  while (positions > 2 * rows && p.samples * parts(p.channels, channels) * parts(p.positions, positions) < wanted)
    positions /= 2;
  tile.channels = static_cast<int>(channels), tile.positions = static_cast<int>(positions);
  return tile;
}

// Of the norm's tables: statistics forward; what they were and their gradients backward.
inline int norm_launches(const GpuProblem& p) { return p.norm == GpuNorm::none ? 0 : p.backward ? 2 : 1; }

// Sweeps with the cell between them, whose kernel `plan` says, `cell_seconds` for all samples together.
inline void add_sweeps(GpuPlan& plan, const GpuProblem& p, const GpuLimits& gpu, const Work& work, double cell_seconds,
                       int cell_launches) {
  const double map = static_cast<double>(p.samples) * work.sample_bytes;
  // Read again: forward x. Backward g, and with the batch's statistics z too.
  const bool batch = p.norm == GpuNorm::batch;
  const double again = p.backward && batch ? 2 : 1;
  plan.on_chip = false;
  plan.passes = work.passes + again;
  plan.bytes = plan.passes * map;
  // What the second sweep finds in the second-level cache: all of a chunk of samples that is small enough, or the last
  // part of a larger one, as it goes backwards. A batch's statistics need all samples first, and every chunk its
  // launches.
  const double sample_kept = std::max(1.0, work.sample_bytes * (work.passes + again - 1));
  const double room = 0.5 * static_cast<double>(gpu.l2_bytes);
  const auto with_chunk = [&](int64_t chunk) {
    const double kept = std::min(1.0, room / (sample_kept * static_cast<double>(std::max<int64_t>(chunk, 1))));
    const int64_t chunks = chunk > 0 ? parts(p.samples, chunk) : 0;
    const int64_t launches = chunks * (2 + cell_launches) + norm_launches(p) + (p.backward ? 1 : 0);
    const double seconds = map * ((work.passes + again * (1 - kept)) / gpu.memory + again * kept / gpu.l2) +
                           cell_seconds + static_cast<double>(launches) * gpu.launch + work.rest;
    if (plan.chunk > 0 && seconds >= plan.seconds) return;
    plan.chunk = chunk, plan.launches = launches, plan.seconds = seconds;
  };
  plan.chunk = 0;
  with_chunk(p.samples);
  const int64_t small = static_cast<int64_t>(room / sample_kept);
  if (!batch && small >= 1 && small < p.samples) with_chunk(small);
}

}  // namespace detail

// The plan for a problem on a GPU. One with no elements has sweeps: its kernels know what to do.
inline GpuPlan plan_step(const GpuProblem& p, const GpuLimits& gpu, GpuLayouts layouts = GpuLayouts::any) {
  const detail::Work work = detail::work_of(p, gpu);
  const double map_bytes = static_cast<double>(p.samples) * work.sample_bytes;
  const double rate = p.tf32 ? gpu.tf32 : gpu.flops;
  const double cell_flops = static_cast<double>(p.samples) * work.sample_flops;
  const auto sweeps = [&](GpuTeam team) {
    GpuPlan plan;
    plan.team = team;
    const bool blas = team == GpuTeam::products;
    // Each product reads its weights once.
    detail::add_sweeps(
        plan, p, gpu, work,
        std::max(cell_flops / ((blas ? detail::kBlasRate : detail::kTileRate) * rate), work.weight_bytes / gpu.l2),
        blas ? (p.backward ? 11 : 12) : (p.backward ? 4 : 3));  // with those of sums split among blocks
    return plan;
  };
  GpuPlan best = sweeps(layouts == GpuLayouts::products ? GpuTeam::products : GpuTeam::tiles);
  if (layouts == GpuLayouts::any)
    if (const GpuPlan blas = sweeps(GpuTeam::products); blas.seconds < best.seconds) best = blas;
  const auto with_ideal = [&](GpuPlan plan) {
    plan.ideal = work.passes * map_bytes / gpu.memory;
    return plan;
  };
  if (layouts == GpuLayouts::products || layouts == GpuLayouts::sweeps) return with_ideal(best);
  // The statistics of a batch are known only when all of it has been read.
  if (p.samples == 0 || p.positions == 0 || p.norm == GpuNorm::batch || p.channels > INT32_MAX / 8 ||
      p.samples > INT32_MAX / 8 || p.channels * p.positions > INT32_MAX / 8 || p.bottleneck > INT32_MAX / 8)
    return with_ideal(best);

  const int pack = 16 / p.element_bytes, warps = kGpuThreads / 32;
  const bool affine = p.norm != GpuNorm::none;
  // Owners begin at whole packs: of positions in a planar map, of channels in an interleaved one.
  const int64_t quantum = p.interleaved ? pack : pack / std::gcd(p.positions, static_cast<int64_t>(pack));
  const int64_t quanta = detail::parts(p.channels, quantum);
  const auto consider = [&](GpuTeam team, int64_t ranks, int64_t teams, int resident) {
    if (ranks < 1 || teams < 1 || ranks > quanta) return;
    const int64_t owned = std::min(detail::parts(quanta, ranks) * quantum, p.channels);
    const int64_t image = image_elements(owned, p.positions, p.interleaved, p.aligned, pack);
    const int64_t room = std::min(gpu.shared_per_block, gpu.shared_per_multiprocessor / resident - kReservedShared);
    for (int64_t group = 1; group <= std::min<int64_t>(p.samples, 64); group *= 2) {
      if (group * image > INT32_MAX / 4) return;
      const int64_t shared =
          p.backward ? backward_shared_bytes(image, p.element_bytes, owned, p.bottleneck, group, warps, affine)
                     : forward_shared_bytes(image, p.element_bytes, owned, p.bottleneck, group, warps, affine);
      if (shared > room) return;
      GpuPlan plan;
      plan.on_chip = true;
      plan.team = team;
      plan.ranks = static_cast<int>(ranks);
      plan.teams = static_cast<int>(std::min(teams, detail::parts(p.samples, group)));
      plan.group = static_cast<int>(group), plan.quantum = static_cast<int>(quantum);
      plan.resident = resident;
      plan.shared_bytes = shared;
      plan.launches = (p.backward ? 2 : 1) + detail::norm_launches(p);
      plan.passes = work.passes;
      plan.bytes = plan.passes * map_bytes;
      plan.seconds =
          detail::team_seconds(plan, p, gpu, work) + static_cast<double>(plan.launches) * gpu.launch + work.rest;
      if (plan.seconds < best.seconds || (layouts == GpuLayouts::on_chip && !best.on_chip)) best = plan;
    }
  };
  for (int resident = 1; resident <= 2 && resident * kGpuThreads <= gpu.threads; ++resident) {
    const int64_t blocks = static_cast<int64_t>(gpu.multiprocessors) * resident;
    consider(GpuTeam::block, 1, blocks, resident);
    for (int ranks = 2; ranks <= gpu.cluster; ranks *= 2) consider(GpuTeam::cluster, ranks, blocks / ranks, resident);
    for (int64_t teams = 1; teams <= blocks / 2; teams = teams < 4 ? teams + 1 : teams * 2)
      consider(GpuTeam::grid, std::min(blocks / teams, quanta), teams, resident);
  }
  return with_ideal(best);
}

}  // namespace dia
