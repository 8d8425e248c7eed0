// Transposition of a panel of weights, in registers.
#pragma once

#include <utility>

#include "simd.h"

namespace hne::HNE_ISA {

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HNE_SHUFFLES 1
#endif
#endif

#if defined(HNE_SHUFFLES)
// Swaps the two off-diagonal D x D blocks of every 2D x 2D block.
template <int D, typename T, int W, int... LANE>
HNE_INLINE void exchange(Vec<T, W> (&rows)[W], std::integer_sequence<int, LANE...>) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & D) continue;
    const Vec<T, W> upper = rows[i], lower = rows[i + D];
    rows[i] = __builtin_shufflevector(upper, lower, (LANE & D ? W + LANE - D : LANE)...);
    rows[i + D] = __builtin_shufflevector(upper, lower, (LANE & D ? W + LANE : LANE + D)...);
  }
}

template <int D, typename T, int W>
HNE_INLINE void transpose_square(Vec<T, W> (&rows)[W]) {
  exchange<D, T, W>(rows, std::make_integer_sequence<int, W>{});
  if constexpr (D > 1) transpose_square<D / 2, T, W>(rows);
}
#endif

// out[k][n] = in[n * stride + k] for the kPanel rows n and the `depth` columns k of a panel.
template <typename T>
void transpose_panel(const T* in, int64_t stride, int64_t depth, T* out) {
  int64_t k = 0;
#if defined(HNE_SHUFFLES)
  constexpr int W = kLanes<T> < (int)kPanel ? kLanes<T> : (int)kPanel;
  for (; k + W <= depth; k += W)
    for (int64_t n = 0; n < kPanel; n += W) {
      Vec<T, W> rows[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) rows[i] = load<W>(in + (n + i) * stride + k);
      transpose_square<W / 2, T, W>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store<W>(out + (k + i) * kPanel + n, rows[i]);
    }
#endif
  for (; k < depth; ++k)
    for (int64_t n = 0; n < kPanel; ++n) out[k * kPanel + n] = in[n * stride + k];
}

}  // namespace hne::HNE_ISA
