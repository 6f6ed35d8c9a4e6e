// core/gpu_plan.h: every plan fits its GPU, covers every channel and sample once, and promises what the kernels do.
#include "check.h"
#include "core/gpu_plan.h"
#include "kernels/flow.h"

namespace {

using namespace dia;

// Shared memory that the system keeps of each resident block.
constexpr int64_t kReservedShared = 1 << 10;

double least_passes(const GpuProblem& p) { return p.backward ? (p.combined ? 5 : 3) : (p.combined ? 3 : 2); }

// Sweeps cover every channel, position and sample, in tiles that fit.
void check_sweeps(const GpuPlan& plan, const GpuProblem& p, const GpuLimits& gpu) {
  const bool twice = p.backward && p.norm == GpuNorm::batch;
  CHECK_EQUAL(plan.passes, least_passes(p) + (twice ? 2 : 1));
  CHECK(plan.chunk >= std::min<int64_t>(p.samples, 1) && plan.chunk <= std::max<int64_t>(p.samples, 1));
  CHECK(p.norm != GpuNorm::batch || plan.chunk == p.samples);
  const int64_t pack = 16 / p.element_bytes;
  for (const GpuTile& tile : {detail::reduce_tile_of(p, gpu, true), detail::reduce_tile_of(p, gpu, false), detail::spread_tile_of(p, gpu)}) {
    if (p.interleaved) {
      CHECK(tile.channels >= 1 && tile.channels <= std::min<int64_t>(std::max<int64_t>(p.channels, 1), kSweepThreads));
      CHECK(tile.channels % pack == 0 || tile.channels >= p.channels);
    } else {
      CHECK_EQUAL(tile.channels * tile.lanes, kSweepThreads);
    }
    CHECK(tile.positions >= 1);
    CHECK(tile.lanes >= 1 && tile.lanes <= kSweepThreads && (tile.lanes & (tile.lanes - 1)) == 0);
    CHECK(2 * (reduce_shared_bytes(tile, p.interleaved, p.element_bytes) + kReservedShared) <=
          gpu.shared_per_multiprocessor);
  }
}

// A flow's chunks cover the samples, its tasks are not too many to count, and its blocks fit a multiprocessor.
void check_flow(const GpuPlan& plan, const GpuProblem& p, const GpuLimits& gpu) {
  CHECK(p.samples > 0 && p.positions > 0);
  CHECK(plan.chunk >= 1 && plan.chunk <= p.samples);
  CHECK(p.norm != GpuNorm::batch || plan.chunk == p.samples);
  CHECK(plan.chunk < 8 || plan.chunk == p.samples || plan.chunk % 8 == 0);
  const bool batch = p.norm == GpuNorm::batch;
  if (batch)
    CHECK_EQUAL(plan.passes, least_passes(p) + (p.backward ? 2 : 1));
  else
    CHECK(plan.passes >= least_passes(p) && plan.passes < least_passes(p) + 1);
  // All chunks that are under way lie in the second-level cache, unless a sample alone is too large.
  const double sample = static_cast<double>(p.channels * p.positions * p.element_bytes);
  const double under_way = static_cast<double>(detail::flow_task_bytes(gpu) * kFlowResident * gpu.multiprocessors);
  const double room = 0.8 * static_cast<double>(gpu.l2_bytes) - under_way;
  CHECK(room > 0.4 * static_cast<double>(gpu.l2_bytes));
  CHECK(batch || plan.chunk == 1 || 3 * sample * static_cast<double>(plan.chunk) <= room);
  if (!batch) CHECK_EQUAL(plan.passes == least_passes(p), 3 * sample <= room);
  const int of_norm[] = {0, p.backward ? 2 : 1, p.backward ? 1 : 0};
  CHECK_EQUAL(plan.launches, 2 + (p.backward ? 1 : 0) + of_norm[static_cast<int>(p.norm)]);
  const int64_t pack = 16 / p.element_bytes;
  for (int64_t maps : {1, 4}) {
    const GpuTile tile = detail::flow_tile_of(p, gpu, maps == 1 ? 4 : 2, maps);
    CHECK(tile.lanes >= 1 && tile.lanes <= 32 && (tile.lanes & (tile.lanes - 1)) == 0);
    CHECK(tile.channels >= 1 && tile.positions >= 1);
    if (p.interleaved)
      CHECK(tile.channels % pack == 0 || tile.channels >= p.channels);
    else
      CHECK_EQUAL(tile.channels % (kSweepThreads / tile.lanes), 0);  // no thread idles in the middle of a task
    const int64_t sums = reduce_shared_bytes(tile, p.interleaved, p.element_bytes);
    const int64_t room = gpu.shared_per_multiprocessor;
    CHECK(kFlowResident * (kernels::flow_shared_bytes<GpuNorm::none>(sums) + kReservedShared) <= room);
    // The larger tiles of a batch: a T4 holds one block.
    const int resident = gpu.architecture < 80 ? 1 : kFlowResident;
    CHECK(resident * (kernels::flow_shared_bytes<GpuNorm::batch>(sums) + kReservedShared) <= room);
  }
}

// What must hold of any plan.
void check_plan(const GpuProblem& p, const GpuLimits& gpu, GpuLayouts layouts = GpuLayouts::any) {
  const GpuPlan plan = plan_step(p, gpu, layouts);
  CHECK(plan.seconds >= 0.999 * plan.ideal);
  if (!plan.flow) return check_sweeps(plan, p, gpu);
  CHECK(layouts == GpuLayouts::flow);
  check_flow(plan, p, gpu);
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
                check_plan(problem, gpu), check_plan(problem, gpu, GpuLayouts::flow);
              }
  CHECK(count > 50000);
}

void sizes_around_what_32_bits_hold() {
  const GpuLimits& h100 = kGpus[4];
  for (int64_t size : {(int64_t{1} << 31) - 1, int64_t{1} << 31, (int64_t{1} << 31) + 1})
    for (bool backward : {false, true})
      for (GpuLayouts layouts : {GpuLayouts::any, GpuLayouts::flow}) {
        check_plan({size, 4, 4, 1, 4, false, true, true, backward, true}, h100, layouts);
        check_plan({2, 4, size, 1, 4, false, true, true, backward, true}, h100, layouts);
        check_plan({2, size, 1, 1, 4, true, true, true, backward, true}, h100, layouts);
        check_plan({2, 4, 4, size, 4, true, true, true, backward, true}, h100, layouts);
      }
}

// What was faster on an H100 (docs/kernels.md).
void large_cells_are_left_to_a_blas() {
  for (bool backward : {false, true}) {
    const GpuLimits& h100 = kGpus[4];
    CHECK(plan_step({256, 2048, 49, 512, 2, false, false, true, backward, false}, h100).cell == GpuCell::products);
    CHECK(plan_step({256, 256, 3136, 64, 2, false, true, true, backward, false}, h100).cell == GpuCell::tiles);
    CHECK(plan_step({128, 64, 1024, 16, 2, false, true, true, backward, false}, h100).cell == GpuCell::tiles);
    const GpuPlan tail = plan_step({128, 64, 1024, 16, 2, false, true, true, backward, false, GpuNorm::batch}, h100);
    CHECK(tail.cell == GpuCell::tiles);
    CHECK_EQUAL(tail.launches, backward ? 9 : 6);
    CHECK_EQUAL(tail.passes, backward ? 7 : 4);
  }
}

// The map's second reading comes from the second-level cache, and that is what a flow is for.
void a_flow_moves_each_map_once() {
  for (bool backward : {false, true}) {
    const GpuLimits& h100 = kGpus[4];
    const GpuProblem problem{256, 256, 3136, 64, 2, true, true, true, backward, false};
    const GpuPlan flow = plan_step(problem, h100, GpuLayouts::flow), sweeps = plan_step(problem, h100);
    CHECK(flow.flow && !sweeps.flow);
    CHECK_EQUAL(flow.passes, backward ? 5 : 3);
    CHECK(flow.chunk >= 2 && flow.chunk <= 8);
    CHECK(flow.seconds < sweeps.seconds);
  }
}

}  // namespace

int main() {
  thousands_of_problems();
  sizes_around_what_32_bits_hold();
  large_cells_are_left_to_a_blas();
  a_flow_moves_each_map_once();
  return dia::test::failures == 0 ? 0 : 1;
}
