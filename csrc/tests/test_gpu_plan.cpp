// core/gpu_plan.h: every plan fits its GPU, covers every channel and sample once, and promises what the kernels do.
#include "check.h"
#include "core/gpu_plan.h"

namespace {

using namespace dia;

using detail::kReservedShared;

double least_passes(const GpuProblem& p) { return p.backward ? (p.combined ? 5 : 3) : (p.combined ? 3 : 2); }

// A sweep's tile is one that blocks of so many threads can take.
void check_tile(const GpuProblem& p, const GpuTile& tile, int threads) {
  const int64_t pack = 16 / p.element_bytes;
  if (p.interleaved) {
    CHECK(tile.channels >= 1 && tile.channels <= std::max<int64_t>(p.channels, 1));
    CHECK(tile.channels <= threads * (p.aligned ? pack : 1));
    CHECK(tile.channels % pack == 0 || tile.channels >= p.channels);
  } else {
    CHECK_EQUAL(tile.channels * tile.lanes, threads);
  }
  CHECK(tile.positions >= 1);
  CHECK(tile.lanes >= 1 && tile.lanes <= threads && (tile.lanes & (tile.lanes - 1)) == 0);
}

// Of the plan that is taken, and of one by clusters wherever they can make the step.
void check_clusters(const GpuProblem& p, const GpuLimits& gpu, const GpuPlan& plan) {
  const GpuPlan forced = plan_step(p, gpu, GpuLayouts::clusters);
  const bool possible = forced.cell == GpuCell::clusters;
  CHECK_EQUAL(possible, gpu.clusters > 0 && detail::clusters_can(p, gpu));
  CHECK(!possible || gpu.architecture >= 90);
  if (plan.cell == GpuCell::clusters) {
    CHECK(possible && plan.together == forced.together);
    // All of them run at a time, and the cache holds their maps.
    CHECK(detail::parts(p.samples, plan.together) <= gpu.clusters);
    CHECK(2 * p.samples * p.channels * p.positions * p.element_bytes <= gpu.l2_bytes);
    CHECK(plan.seconds < plan_step(p, gpu, GpuLayouts::sweeps).seconds);
  }
  CHECK_EQUAL(forced.together > 0, possible);
  if (!possible) return;
  CHECK(forced.together <= kMostTogether && forced.chunk == p.samples);
  CHECK(detail::cluster_shared_bytes(p, forced.together) + kReservedShared <= gpu.shared_per_multiprocessor);
  // One kernel forward; with its gradient, two more; a norm's tables, and forward the sweep before a batch's.
  const bool batch = p.norm == GpuNorm::batch;
  CHECK_EQUAL(forced.launches, (p.backward ? 3 : batch ? 2 : 1) + (p.norm != GpuNorm::none ? 1 : 0));
  for (bool sums : {true, false}) check_tile(p, detail::cluster_tile_of(p, forced.together, sums), kClusterThreads);
}

// What must hold of any plan: sweeps cover every channel, position and sample, in tiles that fit.
void check_plan(const GpuProblem& p, const GpuLimits& gpu) {
  const GpuPlan plan = plan_step(p, gpu);
  check_clusters(p, gpu, plan);
  CHECK(plan.seconds >= 0.999 * plan.ideal);
  const bool twice = p.backward && p.norm == GpuNorm::batch;
  CHECK_EQUAL(plan.passes, least_passes(p) + (twice ? 2 : 1));
  CHECK(plan.chunk >= std::min<int64_t>(p.samples, 1) && plan.chunk <= std::max<int64_t>(p.samples, 1));
  CHECK(p.norm != GpuNorm::batch || plan.chunk == p.samples);
  for (const GpuTile& tile : {detail::reduce_tile_of(p, gpu, true), detail::reduce_tile_of(p, gpu, false)}) {
    CHECK(!p.interleaved || tile.channels <= kMostSummed);
    CHECK((gpu.architecture == 75 ? 2 : kSweepResident) *
              (reduce_shared_bytes(tile, p.interleaved, p.element_bytes) + kReservedShared) <=
          gpu.shared_per_multiprocessor);
  }
  for (const GpuTile& tile :
       {detail::reduce_tile_of(p, gpu, true), detail::reduce_tile_of(p, gpu, false), detail::spread_tile_of(p, gpu)}) {
    check_tile(p, tile, kSweepThreads);
  }
}

void thousands_of_problems() {
  int64_t count = 0;
  for (const GpuLimits& gpu : kGpus)
    for (int64_t samples : {0, 1, 3, 32, 128, 257})
      for (int64_t channels : {1, 12, 25, 64, 102, 256, 2048})
        for (int64_t positions : {0, 1, 49, 64, 196, 1024, 3136, 200704})
          for (int element_bytes : {2, 4})
            for (int64_t reduction : {4, 20})
              for (int flags = 0; flags < 48; ++flags, ++count) {
                const GpuProblem problem{samples,
                                         channels,
                                         positions,
                                         std::max<int64_t>(channels / reduction, 1),
                                         element_bytes,
                                         (flags & 1) != 0,
                                         (flags & 2) != 0,
                                         (flags & 4) != 0,
                                         (flags & 8) != 0,
                                         true,
                                         static_cast<GpuNorm>(flags / 16)};
                check_plan(problem, gpu);
              }
  CHECK(count > 50000);
}

void sizes_around_what_32_bits_hold() {
  const GpuLimits& h100 = kGpus[4];
  for (int64_t size : {(int64_t{1} << 31) - 1, int64_t{1} << 31, (int64_t{1} << 31) + 1})
    for (bool backward : {false, true}) {
      check_plan({size, 4, 4, 1, 4, false, true, true, backward, true}, h100);
      check_plan({2, 4, size, 1, 4, false, true, true, backward, true}, h100);
      check_plan({2, size, 1, 1, 4, true, true, true, backward, true}, h100);
      check_plan({2, 4, 4, size, 4, true, true, true, backward, true}, h100);
    }
}

// Many tasks, or large ones, have a block each; else as many blocks as are resident take them. Never more than tasks.
void blocks_of_a_sweep() {
  const GpuLimits& h100 = kGpus[4];
  const int64_t resident = detail::resident_blocks(h100);
  CHECK_EQUAL(resident, 132 * kSweepResident);
  for (bool large : {false, true}) {
    CHECK_EQUAL(detail::sweep_blocks(7, large, h100), 7);
    CHECK_EQUAL(detail::sweep_blocks(4 * resident, large, h100), 4 * resident);
    CHECK_EQUAL(detail::sweep_blocks(int64_t{1} << 40, large, h100), 16 * resident);
  }
  CHECK_EQUAL(detail::sweep_blocks(2 * resident, false, h100), resident);
  CHECK_EQUAL(detail::sweep_blocks(2 * resident, true, h100), 2 * resident);
}

// A wave of blocks that is complete, or large enough to draw the memory's bandwidth, is no time lost.
void few_multiprocessors_idle() {
  CHECK_EQUAL(detail::busy_part(390, 390), 1.0);
  CHECK_EQUAL(detail::busy_part(256, 390), 1.0);
  CHECK(detail::busy_part(512, 390) < 0.83);
  CHECK(detail::busy_part(1024, 390) > 0.99);
  CHECK_EQUAL(detail::busy_part(0, 390), 1.0);
  GpuLimits h100 = kGpus[4];
  h100.multiprocessors = 130;
  const auto channels = [&](int64_t samples, int64_t width, int64_t positions) {
    const GpuProblem p{samples, width, positions, 16, 2, true, true, true, true, false};
    const int found = detail::reduce_tile_of(p, h100, true).channels;
    CHECK_EQUAL(detail::reduce_tile_of(p, h100, false).channels, found);
    return found;
  };
  CHECK_EQUAL(channels(256, 256, 3136), 256);
  CHECK_EQUAL(channels(256, 512, 784), 512);
  CHECK_EQUAL(channels(256, 1024, 196), 1024);
  CHECK_EQUAL(channels(256, 2048, 49), 512);
  CHECK_EQUAL(channels(32, 256, 3136), 32);
  CHECK_EQUAL(channels(128, 64, 1024), 32);
  // Nothing but packs: a thread has one channel.
  const GpuProblem odd{256, 511, 784, 16, 2, true, false, true, true, false};
  CHECK(detail::reduce_tile_of(odd, h100, true).channels <= kSweepThreads);
}

// What was faster on an H100 (docs/kernels.md).
void large_cells_are_left_to_a_blas() {
  for (bool backward : {false, true}) {
    const GpuLimits& h100 = kGpus[4];
    CHECK(plan_step({256, 2048, 49, 512, 2, false, false, true, backward, false}, h100).cell == GpuCell::products);
    CHECK(plan_step({256, 256, 3136, 64, 2, false, true, true, backward, false}, h100).cell == GpuCell::tiles);
    const GpuProblem small{128, 64, 1024, 16, 2, false, true, true, backward, false};
    CHECK(plan_step(small, h100).cell == GpuCell::clusters);
    const GpuPlan tail =
        plan_step({128, 64, 1024, 16, 2, false, true, true, backward, false, GpuNorm::batch}, h100, GpuLayouts::sweeps);
    CHECK(tail.cell == GpuCell::tiles);
    CHECK_EQUAL(tail.launches, backward ? 7 : 5);
    CHECK_EQUAL(tail.passes, backward ? 7 : 4);
  }
}

// Rows of a block begin packs, and none lies over another.
void memory_of_a_cluster() {
  for (int channels : {1, 3, 25, 64, 102, 256, 512})
    for (int bottleneck : {1, 4, 25, 64, 128})
      for (int together : {1, 5, 16}) {
        const ClusterMemory of(channels, bottleneck, together);
        CHECK(of.units * kClusterBlocks >= bottleneck && of.channels * kClusterBlocks >= channels);
        CHECK(of.reduce_pitch >= channels && of.expand_pitch >= bottleneck);
        CHECK(of.reduce_pitch % 4 == 0 && of.expand_pitch % 4 == 0 && of.expand_weight(0, 0, 0) % 4 == 0);
        CHECK(of.table(0, 0, of.reduce_pitch) % 4 == 0);
        CHECK(of.reduce_weight(1, of.units - 1) + of.reduce_pitch <= of.expand_weight(0, 0, 0));
        CHECK(of.expand_weight(1, 3, of.channels - 1) + of.expand_pitch <= of.table(0, 0, of.reduce_pitch));
        for (int pitch : {of.reduce_pitch, of.expand_pitch})
          CHECK(of.table(1, together - 1, pitch) + pitch <= of.reduce_bias(0, 0));
        CHECK(of.reduce_bias(1, of.units - 1) < of.expand_bias(0, 0, 0));
        CHECK(of.expand_bias(1, 3, of.channels - 1) < of.old_c(0, 0));
        CHECK(of.old_c(together - 1, of.channels - 1) < of.floats());
      }
}

void memory_of_a_clusters_gradient() {
  for (int channels : {1, 3, 25, 64, 102, 256, 512})
    for (int bottleneck : {1, 4, 25, 64, 128})
      for (int together : {1, 5, 16}) {
        const ClusterGradientMemory of(channels, bottleneck, together);
        CHECK(of.channels * kClusterBlocks >= channels && of.sample_pitch >= together && of.sample_pitch % 8 == 0);
        CHECK(of.expand_pitch >= bottleneck && of.column_pitch >= of.channels);
        CHECK(of.expand_pitch % 4 == 0 && of.column_pitch % 4 == 0);
        CHECK(of.expand_weight(1, 3, of.channels - 1) + of.expand_pitch <= of.reduce_column(0, 0));
        CHECK(of.reduce_column(1, bottleneck - 1) + of.column_pitch <= of.dz(0, 0));
        CHECK(of.dz(1, together - 1) + of.expand_pitch <= of.du(0, 0));
        CHECK(of.du(3, of.channels - 1) + of.sample_pitch <= of.meeting());
        CHECK(of.dz(0, 0) % 4 == 0 && of.du(0, 0) % 4 == 0);
        CHECK_EQUAL(of.floats(), of.meeting() + 8 * kClusterThreads);
      }
}

// A cluster's tasks: as many as leave its blocks about as much to do each.
void tasks_of_a_cluster() {
  for (int64_t together : {8, 7, 16}) CHECK_EQUAL(detail::cluster_split(together), 1);
  CHECK_EQUAL(detail::cluster_split(4), 2);
  CHECK_EQUAL(detail::cluster_split(3), 2);
  CHECK_EQUAL(detail::cluster_split(2), 4);
  CHECK_EQUAL(detail::cluster_split(1), 8);
  CHECK_EQUAL(detail::cluster_split(9), 2);
}

// Of one kind alone that kind is taken, of any the faster one.
void plans_of_one_kind() {
  const GpuLimits& h100 = kGpus[4];
  for (bool backward : {false, true})
    for (int64_t positions : {49, 3136}) {
      const GpuProblem problem{256, 2048, positions, 512, 2, true, true, true, backward, false};
      const GpuPlan tiles = plan_step(problem, h100, GpuLayouts::sweeps);
      const GpuPlan products = plan_step(problem, h100, GpuLayouts::products);
      CHECK(tiles.cell == GpuCell::tiles && products.cell == GpuCell::products);
      CHECK(tiles.launches < products.launches);
      CHECK_EQUAL(plan_step(problem, h100).seconds, std::min(tiles.seconds, products.seconds));
    }
}

}  // namespace

int main() {
  thousands_of_problems();
  sizes_around_what_32_bits_hold();
  blocks_of_a_sweep();
  few_multiprocessors_idle();
  large_cells_are_left_to_a_blas();
  memory_of_a_cluster();
  memory_of_a_clusters_gradient();
  tasks_of_a_cluster();
  plans_of_one_kind();
  return dia::test::failures == 0 ? 0 : 1;
}
