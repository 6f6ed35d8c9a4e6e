// How the operators on the CPU walk their samples: chunks, threads, and the kernels for a map's type.
#pragma once

#include <algorithm>

#if defined(__linux__)
#include <unistd.h>
#endif

#include "../core/plan.h"
#include "../cpu/dispatch.h"
#include "tensors.h"

namespace dia::ops {
namespace {

using namespace dia::cpu;
using torch::stable::parallel_for;

// With a mask forward and backward took as long as from y (docs/kernels.md, tried and left).
inline void check_no_mask(bool keep_mask) {
  check(!keep_mask, "keep_mask: expected false, the CPU's kernels keep none");
}

// Elements below which a second thread costs more than it saves.
constexpr int64_t kGrain = 16384;

template <class T>
const MapKernels<T>& map_kernels() {
  if constexpr (std::is_same_v<T, double>)
    return kernels().f64;
  else if constexpr (std::is_same_v<T, BFloat16>)
    return kernels().bf16;
  else if constexpr (std::is_same_v<T, Float16>)
    return kernels().f16;
  else
    return kernels().f32;
}

template <class A>
const CellKernels<A>& cell_kernels() {
  if constexpr (std::is_same_v<A, double>)
    return kernels().cell64;
  else
    return kernels().cell32;
}

// A part of the shared last-level cache: the other threads' data and the streams want room too. Not more than 8 MB: in
// a virtual machine the system may tell the caches of all the processor's dies, 384 MB where 32 MB are to be had.
int64_t cache_bytes() {
  static const int64_t bytes = [] {
    constexpr int64_t most = int64_t{8} << 20;
    int64_t size = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    size = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return size > 0 ? std::min(size / 4, most) : most;
  }();
  return bytes;
}

// Samples [first, first + count) of a batch.
struct Chunk {
  int64_t first, count;
};

// Splits the batch into chunks and calls `body` on each: either each thread takes samples of its own (parallel loops
// inside `body` are then serial), or the chunks come one after the other and threads share each.
template <class Body>
void for_chunks(int64_t samples, int64_t sample_bytes, int64_t weight_bytes, Body body) {
  const int64_t threads = torch::stable::get_num_threads();
  const bool own = threads_take_samples(samples, weight_bytes, cache_bytes(), threads);
  const auto run = [&](int64_t begin, int64_t end) {
    const int64_t size = samples_per_chunk(end - begin, sample_bytes, weight_bytes,
                                           own ? cache_bytes() / threads : cache_bytes(), own ? 1 : threads);
    for (int64_t first = begin; first < end; first += size) body(Chunk{first, std::min(size, end - first)});
  };
  if (own)
    parallel_for(0, samples, std::max<int64_t>(kGrain * 4 / std::max<int64_t>(sample_bytes, 1), 1), run);
  else
    run(0, samples);
}

// Spreads `per_sample` units of each sample of the chunk over threads; calls body(sample, begin, end).
template <class Body>
void for_units(Chunk chunk, int64_t per_sample, int64_t grain, Body body) {
  parallel_for(0, chunk.count * per_sample, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t sample = begin / per_sample, unit = begin % per_sample;
      const int64_t stop = std::min(per_sample, unit + end - begin);
      body(chunk.first + sample, unit, stop);
      begin += stop - unit;
    }
  });
}

// Rows of the map, for kernels that write row by row.
template <class Body>
void for_rows(const MapShape& shape, Chunk chunk, Body body) {
  for_units(chunk, shape.rows(), kGrain / std::max<int64_t>(shape.row_length(), 1), body);
}

// Ranges of channels, for reductions. Interleaved rows are cut only as far as threads would idle, and
// at cache lines.
template <class Body>
void for_channel_ranges(const MapShape& shape, Chunk chunk, Body body) {
  if (!shape.interleaved) return for_rows(shape, chunk, body);
  if (chunk.count == 0 || shape.channels == 0) return;
  constexpr int64_t line = 32;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = (threads + chunk.count - 1) / std::max<int64_t>(chunk.count, 1);
  const int64_t width = (shape.channels + wanted * line - 1) / (wanted * line) * line;
  const int64_t ranges = (shape.channels + width - 1) / width;
  for_units(chunk, ranges, kGrain / std::max<int64_t>(shape.positions * width, 1),
            [&](int64_t sample, int64_t begin, int64_t end) {
              body(sample, begin * width, std::min(end * width, shape.channels));
            });
}

// Rows of a table of `width` values a sample.
template <class Body>
void for_samples(Chunk chunk, int64_t width, Body body) {
  parallel_for(chunk.first, chunk.first + chunk.count, std::max<int64_t>(kGrain / 8 / std::max<int64_t>(width, 1), 1),
               body);
}

template <class T>
void run_pool(const Pool<T>& args, Chunk chunk) {
  for_channel_ranges(args.shape, chunk, [&](int64_t n, int64_t a, int64_t b) { map_kernels<T>().pool(args, n, a, b); });
}

template <class T>
void run_rescale(const Rescale<T>& args, Chunk chunk) {
  for_rows(args.shape, chunk, [&](int64_t n, int64_t a, int64_t b) { map_kernels<T>().rescale(args, n, a, b); });
}

template <class T>
void run_reduce_gradient(const ReduceGradient<T>& args, Chunk chunk) {
  for_channel_ranges(args.shape, chunk,
                     [&](int64_t n, int64_t a, int64_t b) { map_kernels<T>().reduce_gradient(args, n, a, b); });
}

template <class T>
void run_spread_gradient(const SpreadGradient<T>& args, Chunk chunk) {
  for_rows(args.shape, chunk,
           [&](int64_t n, int64_t a, int64_t b) { map_kernels<T>().spread_gradient(args, n, a, b); });
}

}  // namespace
}  // namespace dia::ops
