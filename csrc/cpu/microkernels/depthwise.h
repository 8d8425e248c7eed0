// Depthwise convolutions, vectorised over channels; the filter of a block of channels stays in registers.
#pragma once

#include "simd.h"

namespace hne::HNE_ISA {

// Output pixels [first, last) whose taps all lie inside the row.
struct Interior {
  int64_t first, last;
  template <typename Row>
  explicit Interior(const Row& r) {
    first = (r.padding + r.stride - 1) / r.stride;
    last = (r.width + r.padding - r.kernel_size) / r.stride + 1;
    if (r.width + r.padding < r.kernel_size) last = 0;
    if (last > r.out_width) last = r.out_width;
    if (first > last) first = last;
  }
};

// Output pixels [begin, end) for any kernel size and stride, with bounds checks.
template <typename T, int W>
HNE_INLINE void depthwise_pixels(const DepthwiseRow<T>& r, int64_t c, int64_t begin, int64_t end) {
  for (int64_t ox = begin; ox < end; ++ox) {
    T* out = r.out + ox * r.channels + c;
    Vec<T, W> sum = {};
    if (r.accumulate)
      sum = load<W>(out);
    else if (r.bias != nullptr)
      sum = load<W>(r.bias + c);
    for (int64_t kx = 0; kx < r.kernel_size; ++kx) {
      const int64_t ix = ox * r.stride + kx - r.padding;
      if (ix < 0 || ix >= r.width) continue;
      for (int64_t ky = 0; ky < r.kernel_size; ++ky)
        sum +=
            load<W>(r.rows[ky] + ix * r.channels + c) * load<W>(r.weight + (ky * r.kernel_size + kx) * r.channels + c);
    }
    store<W>(out, clamp(sum, r.clamp));
  }
}

// 3x3 kernel without bounds checks: PIXELS outputs at a time share the columns that they read, the remainder is done
// with fewer at a time. Returns the first output pixel that is not computed.
template <typename T, int W, int STRIDE, int PIXELS>
HNE_INLINE int64_t depthwise_3x3(const DepthwiseRow<T>& r, int64_t c, int64_t ox, int64_t end) {
  Vec<T, W> w[9];
#pragma GCC unroll 9
  for (int i = 0; i < 9; ++i) w[i] = load<W>(r.weight + i * r.channels + c);
  const Vec<T, W> bias = r.bias != nullptr ? load<W>(r.bias + c) : Vec<T, W>{};
  for (; ox + PIXELS <= end; ox += PIXELS) {
    T* out = r.out + ox * r.channels + c;
    Vec<T, W> sum[PIXELS];
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; ++i) sum[i] = r.accumulate ? load<W>(out + i * r.channels) : bias;
#pragma GCC unroll 3
    for (int ky = 0; ky < 3; ++ky) {
      const T* row = r.rows[ky] + (ox * STRIDE - r.padding) * r.channels + c;
#pragma GCC unroll 16
      for (int kx = 0; kx < (PIXELS - 1) * STRIDE + 3; ++kx) {
        const Vec<T, W> x = load<W>(row + kx * r.channels);
#pragma GCC unroll 8
        for (int i = 0; i < PIXELS; ++i)
          if (kx - i * STRIDE >= 0 && kx - i * STRIDE < 3) sum[i] += x * w[ky * 3 + kx - i * STRIDE];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; ++i) store<W>(out + i * r.channels, clamp(sum[i], r.clamp));
  }
  if constexpr (PIXELS > 1) {
    if (ox < end) return depthwise_3x3<T, W, STRIDE, PIXELS / 2>(r, c, ox, end);
  }
  return ox;
}

template <typename T>
void depthwise_row(const DepthwiseRow<T>& r) {
  const Interior inner(r);
  for_lanes<T>(r.channels, [&](auto width, int64_t c) {
    constexpr int W = decltype(width)::value;
    int64_t ox = inner.first;
    depthwise_pixels<T, W>(r, c, 0, ox);
    if (r.kernel_size == 3 && r.stride == 1)
      ox = depthwise_3x3<T, W, 1, HNE_REGISTERS == 32 ? 8 : 4>(r, c, ox, inner.last);
    if (r.kernel_size == 3 && r.stride == 2) ox = depthwise_3x3<T, W, 2, 4>(r, c, ox, inner.last);
    depthwise_pixels<T, W>(r, c, ox, r.out_width);
  });
}

template <typename T>
void depthwise_input_row(const DepthwiseInputRow<T>& r) {
  for_lanes<T>(r.channels, [&](auto width, int64_t c) {
    constexpr int W = decltype(width)::value;
    for (int64_t ix = 0; ix < r.width; ++ix) {
      T* out = r.out + ix * r.channels + c;
      Vec<T, W> sum = load<W>(out);
      for (int64_t kx = (ix + r.padding) % r.stride; kx < r.kernel_size; kx += r.stride) {
        const int64_t ox = (ix + r.padding - kx) / r.stride;
        if (ix + r.padding < kx || ox >= r.out_width) continue;
        for (int64_t ky = 0; ky < r.kernel_size; ++ky)
          if (r.rows[ky] != nullptr)
            sum += load<W>(r.rows[ky] + ox * r.channels + c) *
                   load<W>(r.weight + (ky * r.kernel_size + kx) * r.channels + c);
      }
      store<W>(out, sum);
    }
  });
}

template <typename T>
void depthwise_weight_row(const DepthwiseWeightRow<T>& r) {
  const int64_t k = r.kernel_size;
  const Interior inner(r);
  for_lanes<T>(r.channels, [&](auto width, int64_t c) {
    constexpr int W = decltype(width)::value;
    const auto pixels = [&](const T* row, T* sums, int64_t begin, int64_t end) {
      for (int64_t kx = 0; kx < k; ++kx) {
        Vec<T, W> sum = load<W>(sums + kx * r.channels);
        for (int64_t ox = begin; ox < end; ++ox) {
          const int64_t ix = ox * r.stride + kx - r.padding;
          if (ix < 0 || ix >= r.width) continue;
          sum += load<W>(r.grad + ox * r.channels + c) * load<W>(row + ix * r.channels);
        }
        store<W>(sums + kx * r.channels, sum);
      }
    };
    for (int64_t ky = 0; ky < k; ++ky) {
      if (r.rows[ky] == nullptr) continue;
      const T* row = r.rows[ky] + c;
      T* sums = r.sum + ky * k * r.channels + c;
      if (k != 3) {
        pixels(row, sums, 0, r.out_width);
        continue;
      }
      pixels(row, sums, 0, inner.first);
      Vec<T, W> sum[3];
      for (int kx = 0; kx < 3; ++kx) sum[kx] = load<W>(sums + kx * r.channels);
      for (int64_t ox = inner.first; ox < inner.last; ++ox) {
        const Vec<T, W> g = load<W>(r.grad + ox * r.channels + c);
        const T* x = row + (ox * r.stride - r.padding) * r.channels;
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; ++kx) sum[kx] += g * load<W>(x + kx * r.channels);
      }
      for (int kx = 0; kx < 3; ++kx) store<W>(sums + kx * r.channels, sum[kx]);
      pixels(row, sums, inner.last, r.out_width);
    }
  });
}

}  // namespace hne::HNE_ISA
