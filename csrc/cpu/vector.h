// Vectors of float or double lanes, and the few functions of them that the kernels need.
//
// Built on the compiler's vector extension, so the same source serves every instruction set; the file
// is compiled once for each, inside the namespace DIA_ISA, so that no two builds of one template
// share a symbol. Only the conversions of float16 and access to a part of a vector need intrinsics.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace dia::cpu::DIA_ISA {

#if defined(DIA_VECTOR_BYTES)  // the tests ask the plain build for the widths of others
inline constexpr int kVectorBytes = DIA_VECTOR_BYTES;
#elif defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class A>
struct Lanes {
  static constexpr int count = kVectorBytes / sizeof(A);
  typedef A Vector __attribute__((vector_size(kVectorBytes)));
  using Int = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef Int IntVector __attribute__((vector_size(kVectorBytes)));
};

template <class A>
using Vector = typename Lanes<A>::Vector;

template <class A>
inline Vector<A> splat(A value) {
  return value - Vector<A>{};
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// A mask of the first `count` lanes, as the instructions below want it.
template <class A>
inline __m256i first_lanes(int64_t count) {
  typename Lanes<A>::IntVector lane;
  for (int k = 0; k < Lanes<A>::count; ++k) lane[k] = k;
  return (__m256i)(lane < static_cast<typename Lanes<A>::Int>(count));
}
#endif

// --- loads and stores, converting between the map's type and the compute type ---------------------

template <class A>
inline Vector<A> load(const A* from) {
  Vector<A> result;
  __builtin_memcpy(&result, from, sizeof(result));
  return result;
}

template <class A>
inline void store(Vector<A> value, A* to) {
  __builtin_memcpy(to, &value, sizeof(value));
}

// Loads `count` lanes, fewer than there are, and zeros for the rest; nothing beyond them is touched. The same for
// stores.
template <class A>
inline Vector<A> load_part(const A* from, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return (Vector<A>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
  else
    return (Vector<A>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), from);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4)
    return (Vector<A>)_mm256_maskload_ps(from, first_lanes<A>(count));
  else
    return (Vector<A>)_mm256_maskload_pd(from, first_lanes<A>(count));
#else
  A lanes[Lanes<A>::count] = {};
  for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = from[lane];
  return load(lanes);
#endif
}

template <class A>
inline void store_part(Vector<A> value, A* to, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)value);
  else
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << count) - 1), (__m512d)value);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4)
    _mm256_maskstore_ps(to, first_lanes<A>(count), (__m256)value);
  else
    _mm256_maskstore_pd(to, first_lanes<A>(count), (__m256d)value);
#else
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = value[lane];
#endif
}

typedef uint16_t Short __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));

inline Vector<float> load(const BFloat16* from) {
  Short bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return (Vector<float>)(__builtin_convertvector(bits, Word) << 16);
}

inline void store(Vector<float> value, BFloat16* to) {
  const Word bits = (Word)value;
  const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Word is_nan = (Word)(value != value);
  const Short result = __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), Short);
  __builtin_memcpy(to, &result, sizeof(result));
}

inline Vector<float> load(const Float16* from) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Vector<float> result;
  for (int lane = 0; lane < Lanes<float>::count; ++lane) result[lane] = widen(from[lane]);
  return result;
#endif
}

inline void store(Vector<float> value, Float16* to) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < Lanes<float>::count; ++lane) narrow(value[lane], to + lane);
#endif
}

// --- reductions --------------------------------------------------------------------------------------

// Of every group of 2 * width lanes, the first `width` from `offset` on of a, then those of b.
template <class A, int width, int offset, int... lane>
inline Vector<A> take(Vector<A> a, Vector<A> b, std::integer_sequence<int, lane...>) {
  constexpr auto from = [](int to) {
    const int place = to % (2 * width), group = to - place + offset;
    return place < width ? group + place : Lanes<A>::count + group + place - width;
  };
#if defined(__clang__)
  return __builtin_shufflevector(a, b, from(lane)...);
#else
  return __builtin_shuffle(a, b, typename Lanes<A>::IntVector{from(lane)...});
#endif
}

// Sum of the lanes, pairwise: the upper half of them is added to the lower until one is left.
template <class A, int width = Lanes<A>::count / 2>
inline A sum_lanes(Vector<A> v) {
  if constexpr (width == 0) {
    return v[0];
  } else {
    constexpr auto lanes = std::make_integer_sequence<int, Lanes<A>::count>();
    return sum_lanes<A, width / 2>(v + take<A, width, width>(v, v, lanes));
  }
}

// Lane k of the result is the sum of the lanes of v[k], in the order of sum_lanes; v holds as many vectors as a vector
// has lanes. A third of the instructions that a sum for each takes.
template <class A, int width = Lanes<A>::count / 2>
inline Vector<A> sum_each(const Vector<A>* v) {
  if constexpr (width == 0) {
    return v[0];
  } else {
    constexpr auto lanes = std::make_integer_sequence<int, Lanes<A>::count>();
    Vector<A> sums[width];
    for (int k = 0; k < width; ++k)
      sums[k] = take<A, width, 0>(v[k], v[k + width], lanes) + take<A, width, width>(v[k], v[k + width], lanes);
    return sum_each<A, width / 2>(sums);
  }
}

// --- sigmoid and tanh ----------------------------------------------------------------------------------
// Coefficients: Cephes mathematical library (S. L. Moshier), expf, exp, tanhf and tanh.

template <class A>
inline Vector<A> select(typename Lanes<A>::IntVector mask, Vector<A> yes, Vector<A> no) {
  using IntVector = typename Lanes<A>::IntVector;
  return (Vector<A>)((mask & (IntVector)yes) | (~mask & (IntVector)no));
}

// 2^n for integral n within the exponents of normal numbers.
template <class A>
inline Vector<A> power_of_two(typename Lanes<A>::IntVector n) {
  constexpr int mantissa = sizeof(A) == 4 ? 23 : 52;
  constexpr int bias = sizeof(A) == 4 ? 127 : 1023;
  return (Vector<A>)((n + bias) << mantissa);
}

// exp, within 2 ulp; 0 and infinity beyond the range, NaN for NaN.
template <class A>
inline Vector<A> exp(Vector<A> x) {
  using V = Vector<A>;
  constexpr bool single = sizeof(A) == 4;
  constexpr A low = single ? A(-104.0) : A(-746.0), high = single ? A(89.0) : A(710.0);
  // Adding and subtracting it rounds to an integer, which its low bits then hold.
  constexpr A magic = single ? A(0x1.8p23) : A(0x1.8p52);
  V t = select<A>(x < low, splat(low), x);
  t = select<A>(t > high, splat(high), t);
  const V shifted = t * A(1.44269504088896340736) + magic;
  const V n = shifted - magic;
  const auto whole = (typename Lanes<A>::IntVector)shifted - (typename Lanes<A>::IntVector)splat(magic);
  V r, result;
  if constexpr (single) {
    r = t - n * A(0.693359375) - n * A(-2.12194440e-4);
    V q = r * A(1.9875691500e-4) + A(1.3981999507e-3);
    q = q * r + A(8.3334519073e-3);
    q = q * r + A(4.1665795894e-2);
    q = q * r + A(1.6666665459e-1);
    q = q * r + A(5.0000001201e-1);
    result = q * (r * r) + r + A(1);
  } else {
    r = t - n * A(6.93145751953125e-1) - n * A(1.42860682030941723212e-6);
    const V rr = r * r;
    V p = rr * A(1.26177193074810590878e-4) + A(3.02994407707441961300e-2);
    p = (p * rr + A(9.99999999999999999910e-1)) * r;
    V q = rr * A(3.00198505138664455042e-6) + A(2.52448340349684104192e-3);
    q = q * rr + A(2.27265548208155028766e-1);
    q = q * rr + A(2.0);
    result = A(1) + A(2) * (p / (q - p));
  }
  // In two factors, so that subnormal results and the last step to infinity come out right.
  const auto half = whole >> 1;
  return result * power_of_two<A>(half) * power_of_two<A>(whole - half);
}

// The Maths of core/gates.h over vectors.
template <class A>
struct VectorMaths {
  using Value = Vector<A>;

  static Value sigmoid(Value x) { return A(1) / (A(1) + exp<A>(-x)); }

  // Near zero a polynomial (or quotient), which keeps relative accuracy; else 1 - 2 / (1 + e^2|x|).
  static Value tanh(Value x) {
    using Int = typename Lanes<A>::IntVector;
    const Int sign = (Int)x & (Int)splat(A(-0.0));
    const Value magnitude = (Value)((Int)x & ~sign);
    const Value z = x * x;
    Value near;
    if constexpr (sizeof(A) == 4) {
      Value q = z * A(-5.70498872745e-3) + A(2.06390887954e-2);
      q = q * z + A(-5.37397155531e-2);
      q = q * z + A(1.33314422036e-1);
      q = q * z + A(-3.33332819422e-1);
      near = q * z * x + x;
    } else {
      Value p = z * A(-9.64399179425052238628e-1) + A(-9.92877231001918586564e1);
      p = p * z + A(-1.61468768441708447952e3);
      Value q = z + A(1.12811678491632931402e2);
      q = q * z + A(2.23548839060100448583e3);
      q = q * z + A(4.84406305325125486048e3);
      near = z * (p / q) * x + x;
    }
    const Value far = A(1) - A(2) / (A(1) + exp<A>(A(2) * magnitude));
    const Value signed_far = (Value)((Int)far | sign);
    return select<A>(magnitude < A(0.625), near, signed_far);
  }
};

}  // namespace dia::cpu::DIA_ISA
