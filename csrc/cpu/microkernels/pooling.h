// Pooling: the mean over the pixels of a feature map, maximum and mean over windows.
#pragma once

#include "simd.h"

namespace hne::HNE_ISA {

// out[c] = mean over m of rows[m][c]
template <typename T>
void mean_rows(const T* rows, int64_t count, int64_t channels, T* out) {
  const auto columns = [&](auto width, auto vectors, int64_t c) {
    constexpr int W = decltype(width)::value, VECTORS = decltype(vectors)::value;
    Vec<Sum<T>, W> sum[VECTORS] = {};
    for (int64_t m = 0; m < count; ++m)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sum[j] += load<W>(rows + m * channels + c + j * W);
    for (int j = 0; j < VECTORS; ++j) store<W>(out + c + j * W, sum[j] / Sum<T>(count));
  };
  constexpr int W = kLanes<T>;
  int64_t c = 0;
  for (; c + 4 * W <= channels; c += 4 * W)
    columns(Width<W>{}, Width<4>{}, c);  // four independent sums hide the latency of the additions
  for_lanes<T>(channels, [&](auto width, int64_t channel) { columns(width, Width<1>{}, channel); }, c);
}

// out[c] = maximum over m of rows[m][c]; NaN if one of them is.
template <typename T>
void max_of_rows(const T* const* rows, int64_t count, int64_t channels, T* out) {
  for_lanes<T>(channels, [&](auto width, int64_t c) {
    constexpr int W = decltype(width)::value;
    Vec<T, W> most = load<W>(rows[0] + c);
    for (int64_t m = 1; m < count; ++m) {
      const Vec<T, W> v = load<W>(rows[m] + c);
      most = v > most ? v : most;
      most = v != v ? v : most;
    }
    store<W>(out + c, most);
  });
}

// out[c] = scale * sum over m of rows[m][c]
template <typename T>
void sum_of_rows(const T* const* rows, int64_t count, int64_t channels, T scale, T* out) {
  for_lanes<T>(channels, [&](auto width, int64_t c) {
    constexpr int W = decltype(width)::value;
    Vec<T, W> sum = {};
    for (int64_t m = 0; m < count; ++m) sum += load<W>(rows[m] + c);
    store<W>(out + c, sum * scale);
  });
}

}  // namespace hne::HNE_ISA
