// Vectors of the instruction set that this file is compiled for, by the compilers' vector extensions:
// one source gives AVX-512, AVX2 and portable code. Included by isa/*.cpp alone, which define
// HNE_ISA (namespace), HNE_VECTOR_BYTES and HNE_REGISTERS.
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

// Past the caches, where a vector is a whole line of them: memory that is not read soon is not read first, either.
template <int W, typename T>
HNE_INLINE void stream(T* p, Vec<T, W> v) {
#if HNE_VECTOR_BYTES == 64
  if constexpr (sizeof v == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#endif
  store<W>(p, v);
}

// What was streamed is there for other threads.
HNE_INLINE void finish_stream() {
#if HNE_VECTOR_BYTES == 64
  _mm_sfence();
#endif
}

template <int W, typename T>
HNE_INLINE Vec<T, W> splat(T value) {
  return value - Vec<T, W>{};
}

// Keeps the compiler from making a register of every address beside p, where a distance would do.
template <typename T>
HNE_INLINE T* opaque(T* p) {
  asm("" : "+r"(p));
  return p;
}

// NaN stays NaN: both comparisons are then false.
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

// f(width, c) over channels 0..count-1: the widest vectors first, then narrower ones, then single values.
template <typename T, int W = kLanes<T>, typename F>
HNE_INLINE void for_lanes(int64_t count, const F& f, int64_t c = 0) {
  for (; c + W <= count; c += W) f(Width<W>{}, c);
  if constexpr (W > 1) {
    if (c < count) for_lanes<T, (W > 4 ? W / 2 : 1)>(count, f, c);
  }
}

}  // namespace hne::HNE_ISA
