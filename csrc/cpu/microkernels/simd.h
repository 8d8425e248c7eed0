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
template <typename T, int W>
using Vec = typename Lanes<T, W>::type;

template <typename T>
constexpr int kLanes = HNE_VECTOR_BYTES / sizeof(T);

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

// Non-temporal store where a vector is a whole cache line (AVX-512), else an ordinary store: for memory that is not
// read soon, so that writing it neither reads it first nor evicts other data.
template <int W, typename T>
HNE_INLINE void stream(T* p, Vec<T, W> v) {
#if HNE_VECTOR_BYTES == 64
  if constexpr (sizeof v == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#endif
  store<W>(p, v);
}

// Orders streamed values before later stores, so that other threads see them.
HNE_INLINE void finish_stream() {
#if HNE_VECTOR_BYTES == 64
  _mm_sfence();
#endif
}

template <int W, typename T>
HNE_INLINE Vec<T, W> splat(T value) {
  return value - Vec<T, W>{};
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
