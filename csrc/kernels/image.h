// The part of a map that a block owns, and its image in shared memory.
//
// A block owns channels [begin, end) of a sample. In memory these are runs of adjacent elements: one run of whole
// channels in a planar map, a run a position in an interleaved one. The image of a run keeps the phase that the run has
// in memory modulo sixteen bytes, so that whole packs lie aligned in both, whatever the number of channels or the
// offset of a view. A run is cut into slots of a pack; the first and the last may be incomplete.
#pragma once

#include "machine.h"

namespace dia::kernels {

// A map as kernels see it: the samples lie `stride` elements apart, each dense by itself. An absent one has no data.
template <class T>
struct Samples {
  T* data = nullptr;
  int64_t stride = 0;
};

struct MapSize {
  int samples, channels, positions;
  bool interleaved;
};

template <class T>
struct Image {
  static constexpr int kPack = Pack<T>::size;

  Part channels;  // owned
  int positions;  // of each
  bool interleaved;
  int runs, length;     // of one sample, in elements
  int64_t first, step;  // where a sample's first run begins, and how far apart runs are
  int pitch;            // of runs in the image: whole packs

  // `aligned`: all runs of the maps begin at whole packs (see `aligned_runs`); the image then has no slot too many.
  DIA_DEVICE Image(const MapSize& size, Part channels, bool aligned)
      : Image(size, channels, {0, size.positions}, aligned) {}
  // The same of some positions only; of a planar map then of a single channel.
  DIA_DEVICE Image(const MapSize& size, Part channels, Part range, bool aligned)
      : channels(channels),
        positions(range.size()),
        interleaved(size.interleaved),
        runs(interleaved ? positions : 1),
        length(interleaved ? channels.size() : channels.size() * positions),
        first(first_run(size, channels, range)),
        step(interleaved ? size.channels : 0),
        pitch(round_up(aligned ? length : length + kPack - 1, kPack)) {}

  DIA_DEVICE static int64_t first_run(const MapSize& size, Part channels, Part range) {
    return size.interleaved ? static_cast<int64_t>(range.begin) * size.channels + channels.begin
                            : static_cast<int64_t>(channels.begin) * size.positions + range.begin;
  }
  DIA_DEVICE int elements() const { return runs * pitch; }
  DIA_DEVICE int slots() const { return elements() / kPack; }

  DIA_DEVICE static int phase(const T* at) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(at) / sizeof(T) % kPack);
  }
  template <class E>
  DIA_DEVICE E* run(E* sample, int number) const {
    return sample + first + number * step;
  }
  // Place in the image of element `index` of a run, of the sample at `sample`.
  DIA_DEVICE int place(const T* sample, int number, int index) const {
    return number * pitch + phase(run(sample, number)) + index;
  }
  // Place of a channel's value at a position.
  DIA_DEVICE int place_of(const T* sample, int channel, int position) const {
    const int own = channel - channels.begin;
    return interleaved ? place(sample, position, own) : place(sample, 0, own * positions + position);
  }
  // The owned channel that element `index` of a run belongs to, counted from the first owned one.
  DIA_DEVICE int channel_at(int index) const { return interleaved ? index : index / positions; }
};

// Whether all runs of a part of the map begin at whole packs, in every sample.
template <class T>
DIA_DEVICE bool aligned_runs(const MapSize& size, Part channels, Part range, const T* data, int64_t stride) {
  constexpr int kPack = Pack<T>::size;
  const int64_t step = size.interleaved ? size.channels : 0;
  return Image<T>::phase(data) == 0 && stride % kPack == 0 && step % kPack == 0 &&
         Image<T>::first_run(size, channels, range) % kPack == 0;
}
template <class T>
DIA_DEVICE bool aligned_runs(const MapSize& size, Part channels, const T* data, int64_t stride) {
  return aligned_runs(size, channels, {0, size.positions}, data, stride);
}

// A slot of a sample's image: elements [begin, end) of run `number`, of which the pack at `place` begins with `begin`
// unless it is incomplete.
struct Slot {
  int run, begin, end, place;
  bool whole;
};

template <class T>
DIA_DEVICE Slot slot_of(const Image<T>& image, const T* sample, int number) {
  const int packs = image.pitch / Image<T>::kPack;
  const int run = number / packs, pack = number - run * packs;
  const int phase = Image<T>::phase(image.run(sample, run));
  const int from = pack * Image<T>::kPack - phase, to = from + Image<T>::kPack;
  const int begin = from > 0 ? from : 0, end = to < image.length ? to : image.length;
  return {run, begin, end, run * image.pitch + phase + begin, from >= 0 && to <= image.length};
}

// Whether packs of `other` lie where those of `sample` do.
template <class T>
DIA_DEVICE bool same_phase(const Image<T>& image, const T* sample, const T* other, int run) {
  return Image<T>::phase(image.run(sample, run)) == Image<T>::phase(image.run(other, run));
}

// Elements of `from` in a slot of the image of `like`, the first ones of the result.
template <class M, class T>
DIA_DEVICE Pack<T> load_slot(M& m, const Image<T>& image, const T* like, const T* from, const Slot& slot) {
  const T* at = image.run(from, slot.run) + slot.begin;
  if (slot.whole && same_phase(image, like, from, slot.run)) return m.load_pack(at);
  Pack<T> pack;
  DIA_UNROLL
  for (int k = 0; k < Image<T>::kPack; ++k)
    if (slot.begin + k < slot.end) pack.values[k] = m.load(at + k);
  return pack;
}

// The same of g = dy, where y > 0 if there is a y: the gradient before the ReLU that made y. NaN in y passes it.
template <class M, class T>
DIA_DEVICE Pack<T> masked_slot(M& m, const Image<T>& image, const T* like, const T* dy, const T* y, const Slot& slot) {
  Pack<T> pack = load_slot(m, image, like, dy, slot);
  if (y == nullptr) return pack;
  const Pack<T> mask = load_slot(m, image, like, y, slot);
  DIA_UNROLL
  for (int k = 0; k < Image<T>::kPack; ++k)
    if (slot.begin + k < slot.end && M::widen(mask.values[k]) <= 0.0f) pack.values[k] = M::template narrow<T>(0.0f);
  return pack;
}

template <class M, class T>
DIA_DEVICE void store_slot(M& m, const Image<T>& image, const T* like, T* to, const Slot& slot, const Pack<T>& pack) {
  T* at = image.run(to, slot.run) + slot.begin;
  if (slot.whole && same_phase(image, like, static_cast<const T*>(to), slot.run)) return m.store_pack(at, pack);
  DIA_UNROLL
  for (int k = 0; k < Image<T>::kPack; ++k)
    if (slot.begin + k < slot.end) m.store(at + k, pack.values[k]);
}

template <class Array, class T>
DIA_DEVICE Pack<T> image_slot(const Array& memory, int base, const Slot& slot, const Image<T>&) {
  if (slot.whole) return memory.pack(base + slot.place);
  Pack<T> pack;
  DIA_UNROLL
  for (int k = 0; k < Image<T>::kPack; ++k)
    if (slot.begin + k < slot.end) pack.values[k] = memory[base + slot.place + k];
  return pack;
}

template <class Array, class T>
DIA_DEVICE void set_image_slot(const Array& memory, int base, const Slot& slot, const Pack<T>& pack) {
  if (slot.whole) return memory.set_pack(base + slot.place, pack);
  DIA_UNROLL
  for (int k = 0; k < Pack<T>::size; ++k)
    if (slot.begin + k < slot.end) memory[base + slot.place + k] = pack.values[k];
}

// Copies the owned part of `count` samples of `map`, from `sample` on, into `memory`, an image after the other.
// Loads come in batches before the first of them is used.
template <class M, class T, class Array>
DIA_DEVICE void copy_in(M& m, const Image<T>& image, const Samples<const T>& map, int64_t sample, int count,
                        const Array& memory) {
  constexpr int kBatch = 4;
  const int slots = image.slots(), total = count * slots;
  for (int first = m.thread(); first < total; first += kBatch * m.threads()) {
    Pack<T> packs[kBatch];
    DIA_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int number = first + b * m.threads();
      if (number >= total) continue;
      const T* at = map.data + (sample + number / slots) * map.stride;
      packs[b] = load_slot(m, image, at, at, slot_of(image, at, number % slots));
    }
    DIA_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int number = first + b * m.threads();
      if (number >= total) continue;
      const int index = number / slots;
      const T* at = map.data + (sample + index) * map.stride;
      set_image_slot(memory, index * image.elements(), slot_of(image, at, number % slots), packs[b]);
    }
  }
}

}  // namespace dia::kernels
