// core/gpu_plan.h: every plan fits its GPU, covers every channel and sample once, and promises what the kernels do.
#include "check.h"
#include "core/gpu_plan.h"

namespace {

using namespace dia;

double least_passes(const GpuProblem& p) { return p.backward ? (p.combined ? 5 : 3) : (p.combined ? 3 : 2); }

// Sweeps cover every channel, position and sample, in tiles that fit.
void check_sweeps(const GpuPlan& plan, const GpuProblem& p, const GpuLimits& gpu) {
  const bool twice = p.backward && p.norm == GpuNorm::batch;
  CHECK_EQUAL(plan.passes, least_passes(p) + (twice ? 2 : 1));
  CHECK(plan.chunk >= std::min<int64_t>(p.samples, 1) && plan.chunk <= std::max<int64_t>(p.samples, 1));
  CHECK(p.norm != GpuNorm::batch || plan.chunk == p.samples);
  const int64_t pack = 16 / p.element_bytes;
  for (const GpuTile& tile : {detail::reduce_tile_of(p, gpu), detail::spread_tile_of(p, gpu)}) {
    CHECK(tile.channels >= 1 && tile.channels <= std::min<int64_t>(std::max<int64_t>(p.channels, 1), kSweepThreads));
    CHECK(tile.channels % pack == 0 || tile.channels >= p.channels);
    CHECK(tile.positions >= 1);
    CHECK(tile.lanes >= 1 && tile.lanes <= kSweepThreads && (tile.lanes & (tile.lanes - 1)) == 0);
    CHECK(2 * (reduce_shared_bytes(tile, p.interleaved, p.element_bytes) + kReservedShared) <=
          gpu.shared_per_multiprocessor);
  }
}

// A kernel's teams are resident together and own every channel once. The owners' ranges are those of kernels/machine.h,
// part_of.
void check_teams(const GpuPlan& plan, const GpuProblem& p, const GpuLimits& gpu) {
  CHECK(plan.ranks >= 1 && plan.teams >= 1 && plan.group >= 1 && plan.resident >= 1);
  // In shared memory and threads.
  CHECK(static_cast<int64_t>(plan.ranks) * plan.teams <= static_cast<int64_t>(gpu.multiprocessors) * plan.resident);
  CHECK(plan.resident * kGpuThreads <= gpu.threads);
  CHECK(plan.shared_bytes <= gpu.shared_per_block);
  CHECK(plan.resident * (plan.shared_bytes + kReservedShared) <= gpu.shared_per_multiprocessor);
  CHECK(plan.team != GpuTeam::block || plan.ranks == 1);
  CHECK(plan.team != GpuTeam::cluster || (plan.ranks <= gpu.cluster && gpu.architecture >= 90));
  // No team is idle from the start.
  CHECK(static_cast<int64_t>(plan.teams - 1) * plan.group < p.samples);
  // Owners cover the channels once, each with one at least, and begin at whole packs.
  const int pack = 16 / p.element_bytes;
  const int64_t quanta = (p.channels + plan.quantum - 1) / plan.quantum;
  int64_t end = 0, most = 0;
  for (int64_t rank = 0; rank < plan.ranks; ++rank) {
    const int64_t first = std::min(quanta * rank / plan.ranks * plan.quantum, p.channels);
    const int64_t last = std::min(quanta * (rank + 1) / plan.ranks * plan.quantum, p.channels);
    CHECK_EQUAL(first, end);
    CHECK(last > first);
    CHECK_EQUAL(first * (p.interleaved ? 1 : p.positions) % pack, 0);
    end = last, most = std::max(most, last - first);
  }
  CHECK_EQUAL(end, p.channels);
  // The shared memory is what the kernels ask for.
  const int64_t image = image_elements(most, p.positions, p.interleaved, p.aligned, pack);
  const bool affine = p.norm != GpuNorm::none;
  const int warps = kGpuThreads / 32;
  CHECK(plan.shared_bytes >=
        (p.backward ? backward_shared_bytes(image, p.element_bytes, most, p.bottleneck, plan.group, warps, affine)
                    : forward_shared_bytes(image, p.element_bytes, most, p.bottleneck, plan.group, warps, affine)));
}

// What must hold of any plan.
void check_plan(const GpuProblem& p, const GpuLimits& gpu, GpuLayouts layouts = GpuLayouts::any) {
  const GpuPlan plan = plan_step(p, gpu, layouts);
  CHECK(plan.seconds >= 0.999 * plan.ideal);
  CHECK(plan.on_chip == (plan.team != GpuTeam::tiles && plan.team != GpuTeam::products));
  if (!plan.on_chip) return check_sweeps(plan, p, gpu);
  check_teams(plan, p, gpu);
  CHECK(p.norm != GpuNorm::batch);
  CHECK_EQUAL(plan.passes, least_passes(p));
  CHECK_EQUAL(plan.launches, (p.backward ? 2 : 1) * (p.norm == GpuNorm::none ? 1 : 2));
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
                check_plan(problem, gpu), check_plan(problem, gpu, GpuLayouts::on_chip);
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

// What was faster on an H100 (docs/kernels.md).
void large_cells_are_left_to_a_blas() {
  for (bool backward : {false, true}) {
    const GpuLimits& h100 = kGpus[4];
    CHECK(plan_step({256, 2048, 49, 512, 2, false, false, true, backward, false}, h100).team == GpuTeam::products);
    CHECK(plan_step({256, 256, 3136, 64, 2, false, true, true, backward, false}, h100).team == GpuTeam::tiles);
    CHECK(plan_step({128, 64, 1024, 16, 2, false, true, true, backward, false}, h100).team == GpuTeam::tiles);
    const GpuPlan tail = plan_step({128, 64, 1024, 16, 2, false, true, true, backward, false, GpuNorm::batch}, h100);
    CHECK(tail.team == GpuTeam::tiles);
    CHECK_EQUAL(tail.launches, backward ? 9 : 6);
    CHECK_EQUAL(tail.passes, backward ? 7 : 4);
  }
}

}  // namespace

int main() {
  thousands_of_problems();
  sizes_around_what_32_bits_hold();
  large_cells_are_left_to_a_blas();
  return dia::test::failures == 0 ? 0 : 1;
}
