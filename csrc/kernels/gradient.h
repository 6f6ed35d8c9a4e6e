// The gradient behind a ReLU.
#pragma once

#include "machine.h"

namespace dia::kernels {

// Zero where the ReLU that made y let nothing through: where y <= 0, so that NaN passes.
template <class M, class T>
DIA_DEVICE void mask_pack(Pack<T>& g, const Pack<T>& y) {
  DIA_UNROLL
  for (int k = 0; k < Pack<T>::size; ++k)
    if (M::widen(y[k]) <= 0.0f) g.set(k, M::template narrow<T>(0.0f));
}

// The same from the bits that tell what was let through.
template <class M, class T>
DIA_DEVICE void mask_pack(Pack<T>& g, unsigned bits) {
  DIA_UNROLL
  for (int k = 0; k < Pack<T>::size; ++k)
    if ((bits >> k & 1u) == 0) g.set(k, M::template narrow<T>(0.0f));
}

// Those bits, of what a ReLU made.
template <class M, class T>
DIA_DEVICE unsigned bits_of(const Pack<T>& y) {
  unsigned bits = 0;
  DIA_UNROLL
  for (int k = 0; k < Pack<T>::size; ++k) bits |= (M::widen(y[k]) <= 0.0f ? 0u : 1u) << k;
  return bits;
}

}  // namespace dia::kernels
