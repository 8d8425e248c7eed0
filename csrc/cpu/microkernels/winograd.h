// The transforms of Winograd's convolution F(2x2, 3x3) (Lavin & Gray, "Fast Algorithms for Convolutional Neural
// Networks", 2016): a 4x4 patch d of the input gives 2x2 outputs, A' [(G g G') * (B' d B)] A, with 16 products for each
// pair of channels instead of 36.
#pragma once

#include "simd.h"

namespace hne::HNE_ISA {

// out = B' d B for every patch.
template <typename T>
void winograd_input(const WinogradInput<T>& w) {
  for (int64_t tile = 0; tile < w.count; ++tile) {
    const T* const* pixels = w.pixels + 16 * tile;
    T* const out = w.out + tile * w.channels;
    for_lanes<T>(w.channels, [&](auto width, int64_t c) {
      constexpr int W = decltype(width)::value;
      Vec<T, W> columns[4][4];  // B' d
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) {
        const Vec<T, W> d0 = load<W>(pixels[x] + c), d1 = load<W>(pixels[4 + x] + c);
        const Vec<T, W> d2 = load<W>(pixels[8 + x] + c), d3 = load<W>(pixels[12 + x] + c);
        columns[0][x] = d0 - d2, columns[1][x] = d1 + d2, columns[2][x] = d2 - d1, columns[3][x] = d1 - d3;
      }
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) {
        const auto& row = columns[y];
        T* const at = out + 4 * y * w.stride + c;
        store<W>(at, row[0] - row[2]);
        store<W>(at + w.stride, row[1] + row[2]);
        store<W>(at + 2 * w.stride, row[2] - row[1]);
        store<W>(at + 3 * w.stride, row[1] - row[3]);
      }
    });
  }
}

// out = clamp(A' m A + bias + add) for the sums m of every tile.
template <typename T>
void winograd_output(const WinogradOutput<T>& w) {
  for (int64_t tile = 0; tile < w.count; ++tile) {
    const T* const sums = w.sums + tile * w.channels;
    T* const* out = w.out + 4 * tile;
    const T* const* add = w.add != nullptr ? w.add + 4 * tile : nullptr;
    for_lanes<T>(w.channels, [&](auto width, int64_t c) {
      constexpr int W = decltype(width)::value;
      Vec<T, W> rows[2][4];  // A' m
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) {
        const T* const at = sums + x * w.stride + c;
        const Vec<T, W> m0 = load<W>(at), m1 = load<W>(at + 4 * w.stride);
        const Vec<T, W> m2 = load<W>(at + 8 * w.stride), m3 = load<W>(at + 12 * w.stride);
        rows[0][x] = m0 + m1 + m2, rows[1][x] = m1 - m2 - m3;
      }
      const Vec<T, W> bias = load<W>(w.bias + c);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (out[i] == nullptr) continue;
        const auto& row = rows[i / 2];
        Vec<T, W> v = bias + (i % 2 == 0 ? row[0] + row[1] + row[2] : row[1] - row[2] - row[3]);
        if (add != nullptr) v += load<W>(add[i] + c);
        store<W>(out[i] + c, clamp(v, w.clamp));
      }
    });
  }
}

// out = A d A' for the gradient d of every tile.
template <typename T>
void winograd_output_gradient(const WinogradInput<T>& w) {
  for (int64_t tile = 0; tile < w.count; ++tile) {
    const T* const* pixels = w.pixels + 4 * tile;
    T* const out = w.out + tile * w.channels;
    for_lanes<T>(w.channels, [&](auto width, int64_t c) {
      constexpr int W = decltype(width)::value;
      Vec<T, W> columns[4][2];  // A d
#pragma GCC unroll 2
      for (int x = 0; x < 2; ++x) {
        const Vec<T, W> d0 = load<W>(pixels[x] + c), d1 = load<W>(pixels[2 + x] + c);
        columns[0][x] = d0, columns[1][x] = d0 + d1, columns[2][x] = d0 - d1, columns[3][x] = -d1;
      }
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) {
        const auto& row = columns[y];
        T* const at = out + 4 * y * w.stride + c;
        store<W>(at, row[0]);
        store<W>(at + w.stride, row[0] + row[1]);
        store<W>(at + 2 * w.stride, row[0] - row[1]);
        store<W>(at + 3 * w.stride, -row[1]);
      }
    });
  }
}

// out = G' u G for the sums u of every channel.
template <typename T>
void winograd_filter_gradient(const WinogradFilterGradient<T>& w) {
  for_lanes<T>(w.channels, [&](auto width, int64_t c) {
    constexpr int W = decltype(width)::value;
    Vec<T, W> rows[3][4];  // G' u
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const T* const at = w.sums + x * w.stride + c;
      const Vec<T, W> u0 = load<W>(at), u1 = load<W>(at + 4 * w.stride);
      const Vec<T, W> u2 = load<W>(at + 8 * w.stride), u3 = load<W>(at + 12 * w.stride);
      const Vec<T, W> sum = (u1 + u2) * T(0.5);
      rows[0][x] = u0 + sum, rows[1][x] = (u1 - u2) * T(0.5), rows[2][x] = sum + u3;
    }
    T taps[9][W];
#pragma GCC unroll 3
    for (int y = 0; y < 3; ++y) {
      const auto& row = rows[y];
      const Vec<T, W> sum = (row[1] + row[2]) * T(0.5);
      store<W>(taps[3 * y], row[0] + sum);
      store<W>(taps[3 * y + 1], (row[1] - row[2]) * T(0.5));
      store<W>(taps[3 * y + 2], sum + row[3]);
    }
    T* out = w.out + 9 * c;
    for (int i = 0; i < W; ++i, out += 9)
#pragma GCC unroll 9
      for (int tap = 0; tap < 9; ++tap) out[tap] = taps[tap][i];
  });
}

}  // namespace hne::HNE_ISA
