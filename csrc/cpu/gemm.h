// Register-blocked matrix micro-kernels. Left rows are read in place through pointers (a row is the channels
// of one pixel), so a convolution needs no im2col: a tap's row pointers are the im2col.
#pragma once

#include "simd.h"

namespace hne::HNE_ISA {

// Panels of 16 columns that one tile covers, at most, and rows of the tile: accumulators fill the registers.
template <typename T>
constexpr int kMaxPanels = HNE_REGISTERS == 32 ? 64 / (int)kPanel * 4 / (int)sizeof(T) : 1;

template <typename T>
constexpr int tile_rows(int panels) {
  const int vectors = panels * (int)kPanel / kLanes<T>;
  if (HNE_REGISTERS == 32) return vectors >= 4 ? 6 : vectors == 3 ? 8 : vectors == 2 ? 10 : 12;
  return vectors <= 2 ? 6 : vectors <= 4 ? 2 : 1;
}

template <typename T, int ROWS, int PANELS>
void gemm_tile(const Gemm<T>& g, int64_t row, int64_t panel) {
  constexpr int W = kLanes<T> < (int)kPanel ? kLanes<T> : (int)kPanel;
  constexpr int PER_PANEL = (int)kPanel / W;
  constexpr int VECTORS = PANELS * PER_PANEL;
  Vec<T, W> sum[ROWS][VECTORS] = {};
  for (int64_t t = 0; t < g.num_taps; ++t) {
    const Tap<T>& tap = g.taps[t];
    const T* left[ROWS];
    for (int i = 0; i < ROWS; ++i) left[i] = tap.rows[row + i];
    const T* right[PANELS];
    for (int p = 0; p < PANELS; ++p) right[p] = tap.weight + (panel + p) * tap.panel_stride;
    for (int64_t k = 0; k < tap.depth; ++k) {
      Vec<T, W> w[VECTORS];
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; ++j) w[j] = load<W>(right[j / PER_PANEL] + k * kPanel + j % PER_PANEL * W);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const Vec<T, W> x = splat<W>(left[i][k]);
#pragma GCC unroll 16
        for (int j = 0; j < VECTORS; ++j) sum[i][j] += x * w[j];
      }
    }
  }
  const int64_t first = panel * kPanel;
  const int64_t columns = g.channels - first < PANELS * kPanel ? g.channels - first : PANELS * kPanel;
  for (int i = 0; i < ROWS; ++i) {
    T* out = g.out[row + i] + first;
    const T* add = g.add != nullptr ? g.add[row + i] + first : nullptr;
    if (columns == PANELS * kPanel) {
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; ++j) {
        Vec<T, W> v = sum[i][j];
        if (g.bias != nullptr) v += load<W>(g.bias + first + j * W);
        if (add != nullptr) v += load<W>(add + j * W);
        store<W>(out + j * W, clamp(v, g.clamp));
      }
    } else {
      alignas(64) T values[VECTORS * W];
      for (int j = 0; j < VECTORS; ++j) store<W>(values + j * W, sum[i][j]);
      for (int64_t c = 0; c < columns; ++c) {
        T v = values[c];
        if (g.bias != nullptr) v += g.bias[first + c];
        if (add != nullptr) v += add[c];
        out[c] = clamp(v, g.clamp);
      }
    }
  }
}

// Rows in tiles of ROWS, the rest in tiles of 4, 2 and 1.
template <typename T, int ROWS, int PANELS>
void gemm_columns(const Gemm<T>& g, int64_t panel, int64_t row = 0) {
  for (; row + ROWS <= g.count; row += ROWS) gemm_tile<T, ROWS, PANELS>(g, row, panel);
  if constexpr (ROWS > 1) {
    if (row < g.count) gemm_columns<T, (ROWS > 4 ? 4 : ROWS / 2), PANELS>(g, panel, row);
  }
}

template <typename T, int PANELS>
void gemm_panels(const Gemm<T>& g, int64_t panel, int64_t panels) {
  for (; panel + PANELS <= panels; panel += PANELS) gemm_columns<T, tile_rows<T>(PANELS), PANELS>(g, panel);
  if constexpr (PANELS > 1) {
    if (panel < panels) gemm_panels<T, PANELS - 1>(g, panel, panels);
  }
}

template <typename T>
void gemm(const Gemm<T>& g) {
  gemm_panels<T, kMaxPanels<T>>(g, 0, (g.channels + kPanel - 1) / kPanel);
}

template <typename T, int ROWS, int W, int VECTORS>
void outer_tile(const Outer<T>& o, int64_t i0, int64_t j0) {
  Vec<T, W> sum[ROWS][VECTORS] = {};
  for (int64_t m = 0; m < o.count; ++m) {
    const T* left = o.left[m] + i0;
    const T* right = o.right[m] + j0;
    Vec<T, W> r[VECTORS];
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) r[j] = load<W>(right + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Vec<T, W> l = splat<W>(left[i]);
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; ++j) sum[i][j] += l * r[j];
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    T* out = o.sum + (i0 + i) * o.right_channels + j0;
    for (int j = 0; j < VECTORS; ++j) store<W>(out + j * W, load<W>(out + j * W) + sum[i][j]);
  }
}

template <typename T, int ROWS, int W, int VECTORS>
void outer_columns(const Outer<T>& o, int64_t j0, int64_t i0 = 0) {
  for (; i0 + ROWS <= o.left_channels; i0 += ROWS) outer_tile<T, ROWS, W, VECTORS>(o, i0, j0);
  if constexpr (ROWS > 1) {
    if (i0 < o.left_channels) outer_columns<T, ROWS / 2, W, VECTORS>(o, j0, i0);
  }
}

template <typename T>
void outer(const Outer<T>& o) {
  constexpr int W = kLanes<T>, VECTORS = HNE_REGISTERS == 32 ? 4 : 2;
  int64_t j = 0;
  for (; j + VECTORS * W <= o.right_channels; j += VECTORS * W)
    outer_columns<T, HNE_REGISTERS == 32 ? 6 : 4, W, VECTORS>(o, j);
  if (j < o.right_channels)
    for_lanes<T>(o.right_channels, [&](auto width, int64_t c) { outer_columns<T, 8, width.value, 1>(o, c); }, j);
}

}  // namespace hne::HNE_ISA
