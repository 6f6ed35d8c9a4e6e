// About which value the moments of a channel are taken. A sum of squares in float32 loses the digits of the square of
// how many deviations the mean is away, so one that is an outlier (the corner of a padded convolution's result, a
// defective pixel) would spoil the variance: it is the median of three values, which one outlier does not move, and
// which of a constant channel is exact.
//
// Plain C++: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "gates.h"

namespace dia {

// The k-th of three places among `positions`: not in a corner, nor, of the sizes that maps have, all at one edge.
DIA_HOST_DEVICE inline int64_t shift_place(int64_t positions, int k) {
  return positions * (k == 0 ? 27 : k == 1 ? 66 : 107) / 128;
}

// The median of three values; 0 where one is not finite.
template <class A>
DIA_HOST_DEVICE A shift_of(A a, A b, A c) {
  const A low = a < b ? a : b, high = a < b ? b : a;
  const A median = c < low ? low : c > high ? high : c;
  return (a - a) + (b - b) + (c - c) == 0 ? median : A(0);
}

}  // namespace dia
