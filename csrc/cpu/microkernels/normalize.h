// Normalisation, sum and activation over rows of channels, and the gradients and their sums, with one read of each
// operand.
#pragma once

#include "simd.h"

namespace hne::HNE_ISA {

// The functions here copy their argument: what is stored cannot change a local variable, so that its members stay in
// registers.

constexpr int64_t kAhead = 1024;  // values between those that are read and those that are prefetched

// f(width, c, first, last) over blocks of rows and vectors of channels. A block is a few contiguous KiB, so that memory
// is read front to back, although the values of a channel are far apart.
template <typename T, typename F>
HNE_INLINE void for_blocks(const NormRows<T>& r, const F& f) {
  const int64_t rows = r.channels > 0 && r.channels < kAhead ? kAhead / r.channels : 1;
  for (int64_t first = 0; first < r.count; first += rows) {
    const int64_t last = first + rows < r.count ? first + rows : r.count;
    for_lanes<T>(r.channels, [&](auto width, int64_t c) { f(width, c, first, last); });
  }
}

// Adds two sums over the rows to r.sums; f(width, c, m, sum, product) adds row m to vectors of both. The rows of one
// call are few, and summed in Sum<T>.
template <typename T, typename F>
HNE_INLINE void sum_rows(const NormRows<T>& r, const F& f) {
  Sum<T>* const sums = r.partial;
  Sum<T>* const products = r.partial + r.channels;
  for (int64_t c = 0; c < 2 * r.channels; ++c) r.partial[c] = Sum<T>(0);
  for_blocks<T>(r, [&](auto width, int64_t c, int64_t first, int64_t last) {
    constexpr int W = decltype(width)::value;
    Vec<Sum<T>, W> sum = load<W>(sums + c), product = load<W>(products + c);
    for (int64_t m = first; m < last; ++m) f(width, c, m, sum, product);
    store<W>(sums + c, sum);
    store<W>(products + c, product);
  });
  for (int64_t c = 0; c < 2 * r.channels; ++c) r.sums[c] += r.partial[c];
}

// sums[0] += x - shift, sums[1] += (x - shift)^2, and out = x - shift unless out is null
template <typename T>
void moments(const NormRows<T>& rows) {
  const NormRows<T> r = rows;
  sum_rows<T>(r, [&](auto width, int64_t c, int64_t m, auto& sum, auto& square) {
    constexpr int W = decltype(width)::value;
    Vec<Sum<T>, W> x = load<W>(r.x + m * r.channels + c) - load<W>(r.shift + c);
    if (r.out != nullptr) {
      store<W>(r.out + m * r.channels + c, x);
      if constexpr (kTerms<T> > 1) x = load<W>(r.out + m * r.channels + c);  // the sums of what `out` says
    }
    sum += x;
    square += x * x;
  });
}

// out = clamp((x - mean) * scale + shift + add). Memory is read front to back for the hardware prefetcher, as this is
// where a convolution waits for memory.
template <typename T>
void normalize(const NormRows<T>& rows) {
  const NormRows<T> r = rows;
  for (int64_t m = 0, row = 0; m < r.count; ++m, row += r.channels)
    for_lanes<T>(r.channels, [&](auto width, int64_t c) {
      constexpr int W = decltype(width)::value;
      const Vec<Sum<T>, W> mean = load<W>(r.mean + c), scale = load<W>(r.scale + c), shift = load<W>(r.shift + c);
      __builtin_prefetch(r.x + row + c + kAhead);
      Vec<Sum<T>, W> v = (load<W>(r.x + row + c) - mean) * scale + shift;
      if (r.add != nullptr) {
        __builtin_prefetch(r.add + row + c + kAhead);
        v += load<W>(r.add + row + c);
      }
      v = clamp(v, r.clamp);
      if constexpr (kTerms<T> > 1) {
        if (r.out_sums != nullptr) {
          store<W>(r.out_sums + row + c, v);
          return;
        }
      }
      store<W>(r.out + row + c, v);
    });
}

// The gradient before the activation: grad, but zero where the output y is at an end of the clamp.
template <typename V, typename T>
HNE_INLINE V masked_by(V grad, V y, const Clamp<T>& range) {
  const V zero = {}, low = range.low - V{}, high = range.high - V{};
  grad = y <= low ? zero : grad;
  return y >= high ? zero : grad;
}

// out = gradient before the activation, sums[0] += out; `streamed`, unless null, gets a copy of out
template <typename T>
void mask(const NormRows<T>& rows) {
  const NormRows<T> r = rows;
  sum_rows<T>(r, [&](auto width, int64_t c, int64_t m, auto& sum, auto&) {
    constexpr int W = decltype(width)::value;
    const int64_t at = m * r.channels + c;
    __builtin_prefetch(r.grad + at + kAhead);
    Vec<Sum<T>, W> masked = load<W>(r.grad + at);
    if (r.clamp.active()) {
      __builtin_prefetch(r.y + at + kAhead);
      masked = masked_by(masked, load<W>(r.y + at), r.clamp);
    }
    store<W>(r.out + at, masked);
    if (r.streamed != nullptr) stream<W>(r.streamed + at, masked);
    sum += masked;
  });
  finish_stream();
}

// masked = gradient before the activation
// out = masked * scale, sums[0] += masked, sums[1] += masked * (x - mean)
template <typename T>
void normalize_backward(const NormRows<T>& rows) {
  const NormRows<T> r = rows;
  sum_rows<T>(r, [&](auto width, int64_t c, int64_t m, auto& sum, auto& product) {
    constexpr int W = decltype(width)::value;
    const int64_t at = m * r.channels + c;
    __builtin_prefetch(r.x + at + kAhead);
    __builtin_prefetch(r.grad + at + kAhead);
    const Vec<Sum<T>, W> apart = load<W>(r.x + at) - load<W>(r.mean + c), scale = load<W>(r.scale + c);
    Vec<Sum<T>, W> masked = load<W>(r.grad + at);
    if (r.clamp.active()) {
      const Vec<Sum<T>, W> y = r.y != nullptr ? load<W>(r.y + at) : apart * scale + load<W>(r.shift + c);
      masked = masked_by(masked, y, r.clamp);
    }
    if (r.out_masked != nullptr) store<W>(r.out_masked + at, masked);
    store<W>(r.out + at, masked * scale);
    sum += masked;
    product += masked * apart;
  });
}

}  // namespace hne::HNE_ISA
