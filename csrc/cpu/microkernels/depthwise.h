// Depthwise convolutions, vectorised over channels: all rows of one block of channels, then those of the next, so that
// each input pixel comes into the first cache once.
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

// Output pixels [begin, end) of all rows for any kernel size and stride, with bounds checks.
template <typename T, int W>
HNE_INLINE void depthwise_pixels(const DepthwiseRows<T>& r, int64_t c, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < r.count; ++row) {
    const Sum<T>* const* rows = r.rows + row * r.stride;
    for (int64_t ox = begin; ox < end; ++ox) {
      T* out = r.out + (row * r.out_width + ox) * r.channels + c;
      Vec<Sum<T>, W> sum = {};
      if (r.accumulate)
        sum = load<W>(out);
      else if (r.bias != nullptr)
        sum = load<W>(r.bias + c);
      for (int64_t kx = 0; kx < r.kernel_size; ++kx) {
        const int64_t ix = ox * r.stride + kx - r.padding;
        if (ix < 0 || ix >= r.width) continue;
        for (int64_t ky = 0; ky < r.kernel_size; ++ky)
          sum +=
              load<W>(rows[ky] + ix * r.channels + c) * load<W>(r.weight + (ky * r.kernel_size + kx) * r.channels + c);
      }
      store<W>(out, clamp(sum, r.clamp));
    }
  }
}

// Output pixels at a time: their independent sums hide the latency of multiply-adds.
template <int STRIDE>
constexpr int kDepthwisePixels = HNE_REGISTERS == 32 || STRIDE == 1 ? 8 : 4;

// Output pixels [begin, end) of all rows of a 3x3 kernel, PIXELS at a time, without bounds checks. 32 registers hold
// the input pixels of a filter row, so that consecutive multiply-adds are of different sums. 16 registers hold a filter
// row, or the whole filter where there are four sums, and each input pixel is used as soon as it is read.
template <typename T, int W, int STRIDE, int PIXELS>
void depthwise_3x3(const DepthwiseRows<T>& r, int64_t c, int64_t begin, int64_t end) {
  constexpr bool KEEP_PIXELS = HNE_REGISTERS == 32, KEEP_FILTER = !KEEP_PIXELS && kDepthwisePixels<STRIDE> == 4;
  const int64_t channels = r.channels;
  const Sum<T>* const weight = r.weight + c;
  const Vec<Sum<T>, W> bias = r.bias != nullptr ? load<W>(r.bias + c) : Vec<Sum<T>, W>{};
  Vec<Sum<T>, W> w[9];
#pragma GCC unroll 9
  for (int i = 0; KEEP_FILTER && i < 9; ++i) w[i] = load<W>(weight + i * channels);
  for (int64_t row = 0; row < r.count; ++row) {
    const Sum<T>* const* rows = r.rows + row * STRIDE;
    T* out = r.out + (row * r.out_width + begin) * channels + c;
    for (int64_t ox = begin; ox < end; ox += PIXELS, out += PIXELS * channels) {
      Vec<Sum<T>, W> sum[PIXELS];
#pragma GCC unroll 8
      for (int i = 0; i < PIXELS; ++i) sum[i] = r.accumulate ? load<W>(out + i * channels) : bias;
#pragma GCC unroll 3
      for (int ky = 0; ky < 3; ++ky) {
        const Sum<T>* const x = rows[ky] + (ox * STRIDE - r.padding) * channels + c;
#pragma GCC unroll 3
        for (int i = ky * 3; !KEEP_FILTER && i < ky * 3 + 3; ++i) w[i] = load<W>(weight + i * channels);
        if constexpr (KEEP_PIXELS) {
#pragma GCC unroll 3
          for (int kx = 0; kx < 3; ++kx)
#pragma GCC unroll 8
            for (int i = 0; i < PIXELS; ++i) sum[i] += load<W>(x + (i * STRIDE + kx) * channels) * w[ky * 3 + kx];
        } else {
#pragma GCC unroll 10
          for (int k = 0; k < (PIXELS - 1) * STRIDE + 3; ++k) {
            const Vec<Sum<T>, W> v = load<W>(x + k * channels);
#pragma GCC unroll 8
            for (int i = 0; i < PIXELS; ++i)
              if (k - i * STRIDE >= 0 && k - i * STRIDE < 3) sum[i] += v * w[ky * 3 + k - i * STRIDE];
          }
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < PIXELS; ++i) store<W>(out + i * channels, clamp(sum[i], r.clamp));
    }
  }
}

// Calls the depthwise_3x3 with PIXELS = `pixels`.
template <typename T, int W, int STRIDE, int PIXELS = kDepthwisePixels<STRIDE>>
void depthwise_groups(const DepthwiseRows<T>& r, int64_t c, int64_t begin, int64_t end, int64_t pixels) {
  if constexpr (PIXELS > 1) {
    if (pixels < PIXELS) return depthwise_groups<T, W, STRIDE, PIXELS - 1>(r, c, begin, end, pixels);
  }
  depthwise_3x3<T, W, STRIDE, PIXELS>(r, c, begin, end);
}

// Output pixels [begin, end) of all rows of a 3x3 kernel, in as few groups as possible, of nearly equal size.
template <typename T, int W, int STRIDE>
void depthwise_interior(const DepthwiseRows<T>& r, int64_t c, int64_t begin, int64_t end) {
  constexpr int64_t PIXELS = kDepthwisePixels<STRIDE>;
  const int64_t count = end - begin, groups = (count + PIXELS - 1) / PIXELS;
  if (groups == 0) return;
  const int64_t pixels = count / groups, middle = begin + count % groups * (pixels + 1);
  if (begin < middle) depthwise_groups<T, W, STRIDE>(r, c, begin, middle, pixels + 1);
  depthwise_groups<T, W, STRIDE>(r, c, middle, end, pixels);
}

template <typename T>
void depthwise_rows(const DepthwiseRows<T>& r) {
  const Interior inner(r);
  for_lanes<T>(r.channels, [&](auto width, int64_t c) {
    constexpr int W = decltype(width)::value;
    const bool interior = r.kernel_size == 3 && r.stride <= 2;
    const int64_t first = interior ? inner.first : r.out_width, last = interior ? inner.last : r.out_width;
    depthwise_pixels<T, W>(r, c, 0, first);
    if (first < last)
      r.stride == 1 ? depthwise_interior<T, W, 1>(r, c, first, last) : depthwise_interior<T, W, 2>(r, c, first, last);
    depthwise_pixels<T, W>(r, c, last, r.out_width);
  });
}

template <typename T>
void depthwise_input_row(const DepthwiseInputRow<T>& r) {
  for_lanes<T>(r.channels, [&](auto width, int64_t c) {
    constexpr int W = decltype(width)::value;
    for (int64_t ix = 0; ix < r.width; ++ix) {
      T* out = r.out + ix * r.channels + c;
      Vec<Sum<T>, W> sum = load<W>(out);
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
