// A map as kernels see it.
#pragma once

#include "machine.h"

namespace dia::kernels {

// The samples lie `stride` elements apart, each dense by itself. An absent map has no data.
template <class T>
struct Samples {
  T* data = nullptr;
  int64_t stride = 0;
};

// Which values of a map a ReLU let through: a bit for each, in the order of the map's memory, the samples `stride`
// bytes apart. A byte is a pack of 16-bit values; only such maps have a mask, and only if their rows are whole packs.
using Mask = Samples<const uint8_t>;

struct MapSize {
  int samples, channels, positions;
  bool interleaved;
};

// Where an element lies in its pack of sixteen aligned bytes.
template <class T>
DIA_DEVICE int phase_of(const T* at) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(at) / sizeof(T) % Pack<T>::size);
}

// The samples from `first` on, of a map; and the rows of a table, which may be absent.
template <class T>
DIA_DEVICE Samples<T> from_sample(const Samples<T>& map, int64_t first) {
  return map.data == nullptr ? map : Samples<T>{map.data + first * map.stride, map.stride};
}
template <class T>
DIA_DEVICE T* rows_from(T* table, int64_t first, int64_t width) {
  return table == nullptr ? nullptr : table + first * width;
}

}  // namespace dia::kernels
