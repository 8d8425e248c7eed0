// Vectors by the compilers' vector extensions: one source gives AVX-512, AVX2 and portable code. Only for isa/*.cpp,
// which define HNE_ISA (namespace), HNE_VECTOR_BYTES and HNE_REGISTERS (number of vector registers).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace hne::HNE_ISA {

template <typename T, int W>
struct Lanes {
  typedef T type __attribute__((vector_size(W * sizeof(T))));
};
template <typename T>
struct Lanes<T, 1> {
  typedef T type;
};
// Of bfloat16, its bits; load() and store() convert from and to vectors of float.
template <typename T, int W>
using Vec = typename Lanes<std::conditional_t<std::is_same_v<T, bfloat16>, uint16_t, T>, W>::type;

// Sums of a vector.
template <typename T>
constexpr int kLanes = HNE_VECTOR_BYTES / sizeof(Sum<T>);

#define HNE_INLINE inline __attribute__((always_inline))

template <int W, typename T>
HNE_INLINE Vec<T, W> load(const T* p) {
  Vec<T, W> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <int W, typename T>
HNE_INLINE void store(T* p, Vec<T, W> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <int W, typename T>
HNE_INLINE Vec<T, W> splat(T value) {
  return value - Vec<T, W>{};
}

// The bits of W bfloat16, each in 32 bits.
template <int W>
HNE_INLINE Vec<uint32_t, W> load_bits(const bfloat16* p) {
#if HNE_BF16  // GCC 12 would convert it in two halves
  if constexpr (W == 16) {
    __m256i bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return (Vec<uint32_t, W>)_mm512_maskz_cvtepu16_epi32(0xffff, bits);  // without a mask it warns
  }
#endif
  const Vec<uint16_t, W> bits = load<W>(reinterpret_cast<const uint16_t*>(p));
  if constexpr (W == 1)
    return bits;
  else
    return __builtin_convertvector(bits, Vec<uint32_t, W>);
}

// bfloat16 in memory, float in vectors.
template <int W>
HNE_INLINE Vec<float, W> load(const bfloat16* p) {
  if constexpr (W == 1) {
    return to_sum(*p);
  } else {
    const Vec<uint32_t, W> bits = load_bits<W>(p) << 16;
    Vec<float, W> v;
    __builtin_memcpy(&v, &bits, sizeof v);
    return v;
  }
}

// To the nearest bfloat16, and of two to the even one; NaN stays NaN.
template <int W>
HNE_INLINE void store(bfloat16* p, Vec<float, W> v) {
#if HNE_BF16
  if constexpr (W == 16) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy(p, &rounded, sizeof rounded);
    return;
  }
#endif
  if constexpr (W == 1) {
    *p = to_bfloat16(v);
  } else {
    Vec<uint32_t, W> bits;
    __builtin_memcpy(&bits, &v, sizeof v);
    const Vec<uint32_t, W> rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = (bits >> 16) | 0x40;
    const Vec<uint32_t, W> result = v == v ? rounded : quiet;
    store<W>(reinterpret_cast<uint16_t*>(p), __builtin_convertvector(result, Vec<uint16_t, W>));
  }
}

// kTerms consecutive terms for each of W sums: a value, or a pair of bfloat16.
template <typename T, int W>
using Terms = Vec<std::conditional_t<std::is_same_v<T, bfloat16>, uint32_t, T>, W>;

template <int W, typename T>
HNE_INLINE Terms<T, W> load_terms(const T* p) {
  Terms<T, W> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// The same terms for all sums.
template <int W, typename T>
HNE_INLINE Terms<T, W> splat_terms(const T* p) {
  if constexpr (kTerms<T> == 1) {
    return splat<W>(*p);
  } else {
    uint32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return splat<W>(pair);
  }
}

// The upper bfloat16 of each pair.
template <int W>
HNE_INLINE Vec<float, W> upper_bfloat16(Vec<uint32_t, W> pairs) {
  pairs = pairs & 0xffff0000;
  Vec<float, W> values;
  __builtin_memcpy(&values, &pairs, sizeof values);
  return values;
}

template <typename T, int W>
HNE_INLINE Vec<Sum<T>, W> multiply_add(Terms<T, W> x, Terms<T, W> w, Vec<Sum<T>, W> sum) {
  if constexpr (kTerms<T> == 1) return sum + x * w;
#if HNE_BF16
  if constexpr (kTerms<T> == 2 && W == 16) return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
#endif
  if constexpr (kTerms<T> == 2) {
    sum += upper_bfloat16<W>(x << 16) * upper_bfloat16<W>(w << 16);
    return sum + upper_bfloat16<W>(x) * upper_bfloat16<W>(w);
  }
}

// Non-temporal store where a vector is a whole cache line (AVX-512), else an ordinary store: for memory that is not
// read soon, so that writing it neither reads it first nor evicts other data.
template <int W, typename T>
HNE_INLINE void stream(T* p, Vec<Sum<T>, W> v) {
#if HNE_VECTOR_BYTES == 64
  if constexpr (sizeof v == 64 && sizeof(T) >= 4) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#endif
  store<W>(p, v);
}

// Orders streamed values before later stores, so that other threads see them.
HNE_INLINE void finish_stream() {
#if HNE_VECTOR_BYTES == 64
  _mm_sfence();
#endif
}

// Hides the origin of p from the compiler, which else keeps a register for every address near p instead of an offset.
template <typename T>
HNE_INLINE T* opaque(T* p) {
  asm("" : "+r"(p));
  return p;
}

// NaN stays NaN: both comparisons are false.
template <typename V, typename T>
HNE_INLINE V clamp(V v, const Clamp<T>& range) {
  const V low = range.low - V{}, high = range.high - V{};
  v = v < low ? low : v;
  return v > high ? high : v;
}

template <int W>
struct Width {
  static constexpr int value = W;
};

// Calls f(width, c) for channels [c, count): the widest vectors first, then narrower ones, then single values.
template <typename T, int W = kLanes<T>, typename F>
HNE_INLINE void for_lanes(int64_t count, const F& f, int64_t c = 0) {
  for (; c + W <= count; c += W) f(Width<W>{}, c);
  if constexpr (W > 1) {
    if (c < count) for_lanes<T, (W > 4 ? W / 2 : 1)>(count, f, c);
  }
}

}  // namespace hne::HNE_ISA
