// How the CPU path shares out samples: whether to threads, and how many it takes at a time. Pure functions. Plain C++,
// no torch.
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

// Whether each thread takes samples of its own through the whole step, and waits for no other in between. With fewer
// samples than threads some would idle; and each reads all of the cell's weights, which threads that share every
// sample read once between them. So larger ones than the cache are shared.
inline bool threads_take_samples(int64_t samples, int64_t weight_bytes, int64_t cache_bytes, int64_t threads) {
  return samples >= threads && (threads <= 1 || weight_bytes <= cache_bytes);
}

}  // namespace dia
