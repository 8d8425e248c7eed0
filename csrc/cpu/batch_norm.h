// Batch norm, residual sum and activation over rows of channels: one read of each operand per pass.
#pragma once

#include "simd.h"

namespace hne::HNE_ISA {

// sums[0] += x - shift, sums[1] += (x - shift)^2. Few rows a call: what a call adds is summed in T.
template <typename T>
void norm_statistics(const NormRows<T>& r) {
  for_lanes<T>(r.channels, [&](auto width, int64_t c) {
    constexpr int W = decltype(width)::value;
    const Vec<T, W> shift = load<W>(r.shift + c);
    Vec<T, W> sum = {}, square = {};
    for (int64_t m = 0; m < r.count; ++m) {
      const Vec<T, W> x = load<W>(r.x + m * r.channels + c) - shift;
      sum += x;
      square += x * x;
    }
    T sums[W], squares[W];
    store<W>(sums, sum);
    store<W>(squares, square);
    for (int i = 0; i < W; ++i) {
      r.sums[c + i] += sums[i];
      r.sums[r.channels + c + i] += squares[i];
    }
  });
}

// out = clamp((x - mean) * scale + shift + residual)
template <typename T>
void norm_apply(const NormRows<T>& r) {
  for_lanes<T>(r.channels, [&](auto width, int64_t c) {
    constexpr int W = decltype(width)::value;
    const Vec<T, W> mean = load<W>(r.mean + c), scale = load<W>(r.scale + c), shift = load<W>(r.shift + c);
    for (int64_t m = 0; m < r.count; ++m) {
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

// sums[0] += gradient, sums[1] += gradient * (x - mean); few rows a call, as norm_statistics
template <typename T>
void norm_backward_sums(const NormRows<T>& r) {
  for_lanes<T>(r.channels, [&](auto width, int64_t c) {
    constexpr int W = decltype(width)::value;
    const Vec<T, W> mean = load<W>(r.mean + c);
    Vec<T, W> sum = {}, product = {};
    for (int64_t m = 0; m < r.count; ++m) {
      const int64_t at = m * r.channels + c;
      const Vec<T, W> grad = through_activation<W>(r, at);
      sum += grad;
      product += grad * (load<W>(r.x + at) - mean);
    }
    T sums[W], products[W];
    store<W>(sums, sum);
    store<W>(products, product);
    for (int i = 0; i < W; ++i) {
      r.sums[c + i] += sums[i];
      r.sums[r.channels + c + i] += products[i];
    }
  });
}

// out = scale * (gradient - shift - (x - mean) * slope); out_residual = gradient
template <typename T>
void norm_backward_apply(const NormRows<T>& r) {
  for_lanes<T>(r.channels, [&](auto width, int64_t c) {
    constexpr int W = decltype(width)::value;
    const Vec<T, W> mean = load<W>(r.mean + c), scale = load<W>(r.scale + c);
    const Vec<T, W> shift = load<W>(r.shift + c), slope = load<W>(r.slope + c);
    for (int64_t m = 0; m < r.count; ++m) {
      const int64_t at = m * r.channels + c;
      const Vec<T, W> grad = through_activation<W>(r, at);
      store<W>(r.out + at, (grad - shift - (load<W>(r.x + at) - mean) * slope) * scale);
      if (r.out_residual != nullptr) store<W>(r.out_residual + at, grad);
    }
  });
}

}  // namespace hne::HNE_ISA
