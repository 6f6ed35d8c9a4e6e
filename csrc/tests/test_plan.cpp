// core/plan.h: chunks cover the batch, fit the cache where they can, and never cost more than they save.
#include "check.h"
#include "core/plan.h"

namespace {

constexpr int64_t kCache = int64_t{8} << 20;

void every_plan_covers_the_batch_within_the_cache() {
  for (int64_t samples : {0, 1, 2, 3, 7, 32, 128, 1000})
    for (int64_t sample_bytes : {int64_t{0}, int64_t{4}, int64_t{100000}, int64_t{3211264}, int64_t{1} << 33})
      for (int64_t weight_bytes : {int64_t{0}, int64_t{655360}, int64_t{41943040}})
        for (int64_t threads : {1, 2, 64}) {
          const int64_t chunk = dia::samples_per_chunk(samples, sample_bytes, weight_bytes, kCache, threads);
          CHECK(chunk >= 0 && chunk <= samples);
          CHECK(samples == 0 || chunk > 0);
          if (chunk == samples) continue;
          // A chunk is what fits, or a sample a thread; and its weights are no more than its map.
          CHECK(chunk * sample_bytes <= kCache || chunk <= threads);
          CHECK(weight_bytes <= (chunk * sample_bytes > kCache ? chunk * sample_bytes : kCache));
        }
}

void examples() {
  // A batch that fits is not cut; neither is one whose weights outweigh a chunk.
  CHECK_EQUAL(dia::samples_per_chunk(128, 65536, 655360, kCache, 2), 128);
  CHECK_EQUAL(dia::samples_per_chunk(32, 802816, 10485760, kCache, 2), 32);
  // 32 x 256 x 56 x 56 in float32: two samples fit, chunks are of one size.
  CHECK_EQUAL(dia::samples_per_chunk(32, 3211264, 655360, kCache, 2), 2);
  CHECK_EQUAL(dia::samples_per_chunk(5, 3211264, 655360, 3 * kCache, 2), 5);
  CHECK_EQUAL(dia::samples_per_chunk(9, 3211264, 655360, 3 * kCache, 2), 5);
}

void each_thread_reads_the_weights_only_if_the_cache_holds_them() {
  CHECK(dia::threads_take_samples(32, 655360, kCache, 2));
  CHECK(dia::threads_take_samples(2, kCache, kCache, 2));
  CHECK(!dia::threads_take_samples(32, kCache + 1, kCache, 2));
  CHECK(dia::threads_take_samples(32, kCache + 1, kCache, 1));
  CHECK(!dia::threads_take_samples(1, 0, kCache, 2));
  CHECK(!dia::threads_take_samples(0, 0, kCache, 2));
}

}  // namespace

int main() {
  every_plan_covers_the_batch_within_the_cache();
  examples();
  each_thread_reads_the_weights_only_if_the_cache_holds_them();
  return dia::test::failures == 0 ? 0 : 1;
}
