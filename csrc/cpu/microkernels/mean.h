// The mean over the pixels of a feature map (global average pooling).
#pragma once

#include "simd.h"

namespace hne::HNE_ISA {

// out[c] = mean over m of rows[m][c]
template <typename T>
void mean_rows(const T* rows, int64_t count, int64_t channels, T* out) {
  const auto columns = [&](auto width, auto vectors, int64_t c) {
    constexpr int W = decltype(width)::value, VECTORS = decltype(vectors)::value;
    Vec<T, W> sum[VECTORS] = {};
    for (int64_t m = 0; m < count; ++m)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sum[j] += load<W>(rows + m * channels + c + j * W);
    for (int j = 0; j < VECTORS; ++j) store<W>(out + c + j * W, sum[j] / T(count));
  };
  constexpr int W = kLanes<T>;
  int64_t c = 0;
  for (; c + 4 * W <= channels; c += 4 * W)
    columns(Width<W>{}, Width<4>{}, c);  // four independent sums hide the latency of the additions
  for_lanes<T>(channels, [&](auto width, int64_t channel) { columns(width, Width<1>{}, channel); }, c);
}

}  // namespace hne::HNE_ISA
