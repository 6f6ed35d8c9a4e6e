// How many samples the CPU path takes at a time. A pure function. Plain C++, no torch.
#pragma once

#include <cstdint>

namespace dia {

// The step reads a map twice (to pool it, then to rescale it; backward, to reduce it, then to spread
// the gradient). A chunk of samples whose map stays in the cache makes the second read cheap. But each
// chunk reads the cell's weights anew, which is worth it only while they are smaller than its map.
//
//   samples       N
//   sample_bytes  bytes of one sample of the map that is read twice
//   weight_bytes  bytes of the weights that every chunk reads
//   cache_bytes   what may be assumed to stay in the cache
//   threads       a chunk has at least a sample per thread
inline int64_t samples_per_chunk(int64_t samples, int64_t sample_bytes, int64_t weight_bytes, int64_t cache_bytes,
                                 int64_t threads) {
  if (samples <= 1 || sample_bytes <= 0 || samples * sample_bytes <= cache_bytes) return samples;
  int64_t chunk = cache_bytes / sample_bytes;
  if (chunk < threads) chunk = threads;
  if (chunk >= samples || weight_bytes > chunk * sample_bytes) return samples;
  const int64_t chunks = (samples + chunk - 1) / chunk;
  return (samples + chunks - 1) / chunks;
}

}  // namespace dia
