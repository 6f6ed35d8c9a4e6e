// The element types of a map, and their conversion to and from the compute type. Plain C++, no torch, no CUDA headers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "gates.h"

namespace dia {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type of pooling, cell and state for a map of T.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Sixteen bytes of elements of 2 or 4 bytes: what one wide access moves. Words, not elements: a compiler for a GPU
// gives each of eight small elements a register of its own.
template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / static_cast<int>(sizeof(T));
  uint32_t words[4];

  DIA_HOST_DEVICE T operator[](int k) const {
    T value;
    if constexpr (sizeof(T) == 4)
      __builtin_memcpy(&value, &words[k], 4);
    else
      value.bits = static_cast<uint16_t>(words[k / 2] >> (k % 2 * 16));
    return value;
  }
  DIA_HOST_DEVICE void set(int k, T value) {
    if constexpr (sizeof(T) == 4)
      __builtin_memcpy(&words[k], &value, 4);
    else
      words[k / 2] = (words[k / 2] & (0xffff0000u >> (k % 2 * 16))) | static_cast<uint32_t>(value.bits) << (k % 2 * 16);
  }
};

// --- conversions on the host; a GPU has instructions for them ----------------------------------------

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

inline float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

// float16 to float: move exponent and mantissa into place, then multiply by 2^112 to correct the
// exponent (which also makes subnormals right); infinities and NaN get the largest exponent.
inline float widen(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  float magnitude;
  __builtin_memcpy(&magnitude, &rest, 4);
  magnitude *= 0x1p112f;
  uint32_t bits;
  __builtin_memcpy(&bits, &magnitude, 4);
  if ((value.bits & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  bits |= sign;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

inline void narrow(float value, float* to) { *to = value; }
inline void narrow(double value, double* to) { *to = value; }

// Round to nearest, ties to even; NaN becomes the quiet NaN that torch writes.
inline void narrow(float value, BFloat16* to) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  to->bits = value != value ? 0x7fc0u : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Round to nearest, ties to even, by adding a power of two that leaves just the kept bits.
inline void narrow(float value, Float16* to) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;
  } else if (bits >= 0x477ff000u) {
    half = 0x7c00u;
  } else if (bits < 0x38800000u) {
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    __builtin_memcpy(&half, &magnitude, 4);
    half -= 0x3f000000u;
  } else {
    half = (bits - 0x38000000u + 0x0fffu + ((bits >> 13) & 1u)) >> 13;
  }
  to->bits = static_cast<uint16_t>(half | sign);
}

}  // namespace dia
