// Batch norm, residual sum and activation over rows of channels: one read of each operand per pass.
#pragma once

#include "simd.h"

namespace hne::HNE_ISA {

// f(width, c, first, last) over blocks of rows and lanes of channels: a block is a few contiguous KiB, so that memory
// is read front to back although a channel's rows are far apart.
template <typename T, typename F>
HNE_INLINE void for_blocks(const NormRows<T>& r, const F& f) {
  const int64_t rows = r.channels > 0 && r.channels < 1024 ? 1024 / r.channels : 1;
  for (int64_t first = 0; first < r.count; first += rows) {
    const int64_t last = first + rows < r.count ? first + rows : r.count;
    for_lanes<T>(r.channels, [&](auto width, int64_t c) { f(width, c, first, last); });
  }
}

// Adds to r.sums what f(width, c, m, sum, product) adds to a vector for every row m. Few rows a call: they are summed
// in T.
template <typename T, typename F>
HNE_INLINE void sum_rows(const NormRows<T>& r, const F& f) {
  T* const sums = r.partial;
  T* const products = r.partial + r.channels;
  for (int64_t c = 0; c < 2 * r.channels; ++c) r.partial[c] = T(0);
  for_blocks<T>(r, [&](auto width, int64_t c, int64_t first, int64_t last) {
    constexpr int W = decltype(width)::value;
    Vec<T, W> sum = load<W>(sums + c), product = load<W>(products + c);
    for (int64_t m = first; m < last; ++m) f(width, c, m, sum, product);
    store<W>(sums + c, sum);
    store<W>(products + c, product);
  });
  for (int64_t c = 0; c < 2 * r.channels; ++c) r.sums[c] += r.partial[c];
}

// sums[0] += x - shift, sums[1] += (x - shift)^2
template <typename T>
void norm_statistics(const NormRows<T>& r) {
  sum_rows<T>(r, [&](auto width, int64_t c, int64_t m, auto& sum, auto& square) {
    constexpr int W = decltype(width)::value;
    const Vec<T, W> x = load<W>(r.x + m * r.channels + c) - load<W>(r.shift + c);
    sum += x;
    square += x * x;
  });
}

// out = clamp((x - mean) * scale + shift + residual)
template <typename T>
void norm_apply(const NormRows<T>& r) {
  for_blocks<T>(r, [&](auto width, int64_t c, int64_t first, int64_t last) {
    constexpr int W = decltype(width)::value;
    const Vec<T, W> mean = load<W>(r.mean + c), scale = load<W>(r.scale + c), shift = load<W>(r.shift + c);
    for (int64_t m = first; m < last; ++m) {
      const int64_t at = m * r.channels + c;
      Vec<T, W> v = (load<W>(r.x + at) - mean) * scale + shift;
      if (r.residual != nullptr) v += load<W>(r.residual + at);
      store<W>(r.out + at, clamp(v, r.clamp));
    }
  });
}

// The gradient behind the activation: zero where y lies at an end of the clamp.
template <int W, typename T>
HNE_INLINE Vec<T, W> through_activation(const NormRows<T>& r, int64_t at) {
  const Vec<T, W> grad = load<W>(r.grad + at);
  if (!r.clamp.active()) return grad;
  const Vec<T, W> y = load<W>(r.y + at), zero = {};
  const Vec<T, W> low = splat<W>(r.clamp.low), high = splat<W>(r.clamp.high);
  const Vec<T, W> above = y <= low ? zero : grad;
  return y >= high ? zero : above;
}

// sums[0] += gradient, sums[1] += gradient * (x - mean); out_residual = gradient
template <typename T>
void norm_backward_sums(const NormRows<T>& r) {
  sum_rows<T>(r, [&](auto width, int64_t c, int64_t m, auto& sum, auto& product) {
    constexpr int W = decltype(width)::value;
    const int64_t at = m * r.channels + c;
    const Vec<T, W> grad = through_activation<W>(r, at);
    if (r.out_residual != nullptr) store<W>(r.out_residual + at, grad);
    sum += grad;
    product += grad * (load<W>(r.x + at) - load<W>(r.mean + c));
  });
}

// out = scale * (gradient - shift - (x - mean) * slope)
template <typename T>
void norm_backward_apply(const NormRows<T>& r) {
  for_blocks<T>(r, [&](auto width, int64_t c, int64_t first, int64_t last) {
    constexpr int W = decltype(width)::value;
    const Vec<T, W> mean = load<W>(r.mean + c), scale = load<W>(r.scale + c);
    const Vec<T, W> shift = load<W>(r.shift + c), slope = load<W>(r.slope + c);
    for (int64_t m = first; m < last; ++m) {
      const int64_t at = m * r.channels + c;
      const Vec<T, W> grad = through_activation<W>(r, at);
      store<W>(r.out + at, (grad - shift - (load<W>(r.x + at) - mean) * slope) * scale);
    }
  });
}

}  // namespace hne::HNE_ISA
