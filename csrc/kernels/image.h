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
      : channels(channels),
        positions(size.positions),
        interleaved(size.interleaved),
        runs(interleaved ? positions : 1),
        length(interleaved ? channels.size() : channels.size() * positions),
        first(first_run(size, channels)),
        step(interleaved ? size.channels : 0),
        pitch(round_up(aligned ? length : length + kPack - 1, kPack)) {}

  DIA_DEVICE static int64_t first_run(const MapSize& size, Part channels) {
    return static_cast<int64_t>(channels.begin) * (size.interleaved ? 1 : size.positions);
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
DIA_DEVICE bool aligned_runs(const MapSize& size, Part channels, const T* data, int64_t stride) {
  constexpr int kPack = Pack<T>::size;
  const int64_t step = size.interleaved ? size.channels : 0;
  return Image<T>::phase(data) == 0 && stride % kPack == 0 && step % kPack == 0 &&
         Image<T>::first_run(size, channels) % kPack == 0;
}

// Whether packs of both maps lie at the same places of every run.
template <class A, class B>
DIA_DEVICE bool alike(const Samples<A>& a, const Samples<B>& b) {
  constexpr int kPack = Pack<A>::size;
  return Image<std::remove_const_t<A>>::phase(a.data) == Image<std::remove_const_t<A>>::phase(b.data) &&
         (a.stride - b.stride) % kPack == 0;
}

// Where an element, or the first one of a pack, is: sample `index` of those at hand, `offset` elements into the sample,
// element `element` of its run, `place` in the image.
struct Place {
  int index;
  int64_t offset;
  int element, place;

  DIA_DEVICE Place next(int k) const { return {index, offset + k, element + k, place + k}; }
  template <class E>
  DIA_DEVICE E* in(const Samples<E>& map, int64_t sample) const {
    return map.data + (sample + index) * map.stride + offset;
  }
};

// A slot: its elements [begin, end) from `place` on, which is where the pack begins if it is whole.
struct Slot {
  Place place;
  int begin, end;
  bool whole;
};

// Slot `number` of the samples from `sample` on. Phases are those of `like`.
template <class T, class Like>
DIA_DEVICE Slot slot_of(const Image<T>& image, const Samples<Like>& like, int64_t sample, int number) {
  const int per_run = image.pitch / Image<T>::kPack, slots = image.slots();
  const int index = number / slots, rest = number - index * slots;
  const int run = rest / per_run, pack = rest - run * per_run;
  const int64_t offset = image.first + run * image.step;
  const int phase = Image<T>::phase(like.data + (sample + index) * like.stride + offset);
  const int from = pack * Image<T>::kPack - phase, left = image.length - from;
  return {{index, offset + from, from, index * image.elements() + run * image.pitch + phase + from},
          from < 0 ? -from : 0,
          left < Image<T>::kPack ? left : Image<T>::kPack,
          from >= 0 && left >= Image<T>::kPack};
}

// Shares the slots of `count` samples among the block's threads, always in the same way. `whole(place)` gets those that
// are a pack in memory, if `packs`; `single(place)` each element of the others.
template <class M, class T, class Like, class Whole, class Single>
DIA_DEVICE void for_slots(M& m, const Image<T>& image, const Samples<Like>& like, int64_t sample, int count, bool packs,
                          Whole whole, Single single) {
  const int total = count * image.slots();
  for (int number = m.thread(); number < total; number += m.threads()) {
    const Slot slot = slot_of(image, like, sample, number);
    if (packs && slot.whole)
      whole(slot.place);
    else
      for (int k = slot.begin; k < slot.end; ++k) single(slot.place.next(k));
  }
}

// The owned channel of an element, and then of its successors: a division once, not for each.
struct ChannelWalk {
  int channel, left, period;

  template <class T>
  DIA_DEVICE ChannelWalk(const Image<T>& image, int element)
      : channel(image.channel_at(element)),
        left(image.interleaved ? 1 : (channel + 1) * image.positions - element),
        period(image.interleaved ? 1 : image.positions) {}
  // Whether that was the channel's last element.
  DIA_DEVICE bool next() {
    if (--left > 0) return false;
    ++channel;
    left = period;
    return true;
  }
};

// Copies the owned part of `count` samples of `map`, from `sample` on, into `memory`, an image after the other. Loads
// come in batches before the first of them is used.
template <class M, class T, class Array>
DIA_DEVICE void copy_in(M& m, const Image<T>& image, const Samples<const T>& map, int64_t sample, int count,
                        const Array& memory) {
  constexpr int kBatch = 2;
  const int total = count * image.slots();
  for (int first = m.thread(); first < total; first += kBatch * m.threads()) {
    Pack<T> packs[kBatch]{};  // undefined ones would be carried from pass to pass, in memory
    int places[kBatch];
    DIA_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      places[b] = -1;
      const int number = first + b * m.threads();
      if (number >= total) continue;
      const Slot slot = slot_of(image, map, sample, number);
      if (!slot.whole) continue;
      packs[b] = m.load_pack(slot.place.in(map, sample));
      places[b] = slot.place.place;
    }
    DIA_UNROLL
    for (int b = 0; b < kBatch; ++b)
      if (places[b] >= 0) memory.set_pack(places[b], packs[b]);
    // Incomplete slots when no pack waits in registers any more.
    for (int b = 0; b < kBatch; ++b) {
      const int number = first + b * m.threads();
      if (number >= total) break;
      const Slot slot = slot_of(image, map, sample, number);
      if (slot.whole) continue;
      for (int k = slot.begin; k < slot.end; ++k)
        memory[slot.place.place + k] = m.load(slot.place.next(k).in(map, sample));
    }
  }
}

}  // namespace dia::kernels
