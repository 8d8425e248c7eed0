// Register-blocked matrix micro-kernels. Left rows are read in place through pointers (a row is the channels
// of one pixel), so a convolution needs no im2col: a tap's row pointers are the im2col.
#pragma once

#include <algorithm>
#include <utility>

#include "simd.h"

namespace hne::HNE_ISA {

// Shape of a tile, in rows and panels of 16 columns: its accumulators fill the registers. With 32 of them two panels by
// 14 rows or three by 9: a panel's weights are then read from the first cache, and rarely.
template <typename T>
constexpr int kVectorsPerPanel = kLanes<T> < (int)kPanel ? (int)kPanel / kLanes<T> : 1;
template <typename T>
constexpr int kMaxPanels = HNE_REGISTERS == 32 && kVectorsPerPanel<T> == 1 ? 3 : 1;

constexpr int64_t kShortSum = 32;  // terms, of all taps

template <typename T>
constexpr int tile_rows(int panels, bool steps) {
  const int vectors = panels * kVectorsPerPanel<T>, most = steps ? 14 : 8;  // as many pointers as there are registers
  if (HNE_REGISTERS == 32) return std::min(most, vectors >= 8 ? 2 : vectors >= 4 ? 6 : vectors == 3 ? 9 : 14);
  return vectors <= 2 ? 6 : vectors <= 4 ? 3 : 1;
}

// The left rows of a tile at the current column. Where they lie at a constant distance, an address is one of a third as
// many pointers and a multiple of the distance.
template <typename T, int ROWS, bool STEPS>
struct LeftRows {
  static constexpr int EACH = STEPS ? 3 : 1, COUNT = (ROWS + EACH - 1) / EACH;
  const T* at[COUNT];
  int64_t step;
  LeftRows(const Tap<T>& tap, int64_t row) : step(tap.step) {
    for (int i = 0; i < COUNT; ++i) at[i] = STEPS ? tap.rows[0] + (row + i * EACH) * step : tap.rows[row + i];
  }
  HNE_INLINE T value(int row, int64_t k) const { return at[row / EACH][row % EACH * step + k]; }
  HNE_INLINE void advance(int64_t columns) {
    for (int i = 0; i < COUNT; ++i) at[i] += columns;
  }
};

// `fetched`, if it is not null, is fetched into the second cache meanwhile, and else `ahead`, a panel that is read
// later.
template <typename T, int ROWS, int PANELS, bool STEPS>
void gemm_tile(const Gemm<T>& g, int64_t row, int64_t panel, int64_t ahead, const T* fetched) {
  constexpr int W = kLanes<T> < (int)kPanel ? kLanes<T> : (int)kPanel;
  constexpr int PER_PANEL = kVectorsPerPanel<T>, VECTORS = PANELS * PER_PANEL;
  if (!g.cached) {  // what the end of the tile reads and writes is fetched during the sums
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < PANELS; ++j) {
        __builtin_prefetch(g.out[row + i] + (panel + j) * kPanel, 1);
        if (g.add != nullptr) __builtin_prefetch(g.add[row + i] + (panel + j) * kPanel);
      }
  }
  const int64_t first = panel * kPanel, columns = g.channels - first;
  const bool whole = columns >= PANELS * kPanel;
  Vec<T, W> bias[VECTORS] = {};
  if (g.bias != nullptr) {
    T present[VECTORS * W] = {};
    const T* from = g.bias + first;
    if (!whole) from = std::copy_n(from, columns, present) - columns;
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) bias[j] = load<W>(from + j * W);
  }
  Vec<T, W> sum[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = bias[j];
  for (int64_t t = 0; t < g.num_taps; ++t) {
    const Tap<T>& tap = g.taps[t];
    LeftRows<T, ROWS, STEPS> left(tap, row);
    const T* right = tap.weight + panel * tap.panel_stride;
    const T* later = fetched != nullptr ? fetched : tap.weight + ahead * tap.panel_stride;
    const auto column = [&](int64_t k) __attribute__((always_inline)) {
      Vec<T, W> w[VECTORS];
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; ++j)
        w[j] = load<W>(right + j / PER_PANEL * tap.panel_stride + k * kPanel + j % PER_PANEL * W);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const Vec<T, W> x = splat<W>(left.value(i, k));
#pragma GCC unroll 16
        for (int j = 0; j < VECTORS; ++j) sum[i][j] += x * w[j];
      }
    };
    for (int64_t k = 0; k < tap.depth; ++k, left.advance(1), right += kPanel, later += kPanel) {
      __builtin_prefetch(later, 0, 2);
      column(0);
    }
  }
  T* const* out = g.out + row;
  const T* const* add = g.add != nullptr ? g.add + row : nullptr;
  const Clamp<T> range = g.clamp;
  if (whole) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      T* to = out[i] + first;
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; ++j) {
        Vec<T, W> v = sum[i][j];
        if (add != nullptr) v += load<W>(add[i] + first + j * W);
        store<W>(to + j * W, clamp(v, range));
      }
    }
    return;
  }
  T values[ROWS][VECTORS * W];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) store<W>(values[i] + j * W, sum[i][j]);
  for (int i = 0; i < ROWS; ++i)
    for (int64_t c = 0; c < columns; ++c) {
      T v = values[i][c];
      if (add != nullptr) v += add[i][first + c];
      out[i][first + c] = clamp(v, range);
    }
}

// All rows, in the fewest tiles, of sizes as equal as can be.
template <typename T, int PANELS, bool STEPS, int ROWS = tile_rows<T>(PANELS, STEPS)>
void gemm_rows(const Gemm<T>& g, int64_t panel, int64_t ahead, const T* fetched, int64_t row, int64_t rows) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return gemm_rows<T, PANELS, STEPS, ROWS - 1>(g, panel, ahead, fetched, row, rows);
  }
  gemm_tile<T, ROWS, PANELS, STEPS>(g, row, panel, ahead, fetched);
}

template <typename T, int PANELS, bool STEPS>
void gemm_columns(const Gemm<T>& g, int64_t panel) {
  constexpr int ROWS = tile_rows<T>(PANELS, STEPS);
  const int64_t panels = (g.channels + kPanel - 1) / kPanel;
  const int64_t tiles = (g.count + ROWS - 1) / ROWS;
  const int64_t depth = g.num_taps > 0 ? g.taps[0].depth : 0;  // a phase of a strided convolution may meet no tap
  int64_t ahead = panel + PANELS;                              // each tile fetches one of the panels that come next
  for (int64_t row = 0, tile = 0; tile < tiles; ++tile, ++ahead) {
    const int64_t rows = (g.count - row + tiles - tile - 1) / (tiles - tile);
    const int64_t fetched = (panel / PANELS * tiles + tile) * depth * kPanel;
    gemm_rows<T, PANELS, STEPS>(g, panel, ahead < std::min(panel + 2 * PANELS, panels) ? ahead : panel,
                                fetched < g.ahead.count ? g.ahead.at + fetched : nullptr, row, rows);
    row += rows;
  }
}

template <typename T, bool STEPS>
void gemm_panels(const Gemm<T>& g) {
  const int64_t panels = (g.channels + kPanel - 1) / kPanel;
  int64_t panel = 0;
  if constexpr (kMaxPanels<T> == 3) {
    // A few rows wait for their weights: many streams of them at once.
    if (g.count <= tile_rows<T>(8, STEPS))
      for (; panel + 8 <= panels; panel += 8) gemm_columns<T, 8, STEPS>(g, panel);
    // Short sums end soon: four panels by 6 rows then, which write whole runs of lines.
    int64_t terms = 0;
    for (int64_t t = 0; t < g.num_taps; ++t) terms += g.taps[t].depth;
    if (terms <= kShortSum)
      for (; panel + 4 <= panels; panel += 4) gemm_columns<T, 4, STEPS>(g, panel);
    if ((panels - panel) % 2 == 1 && panels - panel > 1) gemm_columns<T, 3, STEPS>(g, panel), panel += 3;
    for (; panel + 2 <= panels; panel += 2) gemm_columns<T, 2, STEPS>(g, panel);
  }
  for (; panel < panels; ++panel) gemm_columns<T, 1, STEPS>(g, panel);
}

template <typename T>
void gemm(const Gemm<T>& g) {
  bool steps = true;
  for (int64_t t = 0; t < g.num_taps; ++t) steps &= g.taps[t].step != 0;
  steps ? gemm_panels<T, true>(g) : gemm_panels<T, false>(g);
}

// What a product fetches for those after it, a line of the cache at a time.
template <typename T>
class Fetch {
 public:
  explicit Fetch(const Outer<T>& o) : ranges_(o.ahead), nothing_(o.sum) {}

  // Of so many lines the first one, and the distance to the next.
  std::pair<const T*, int64_t> take(int64_t lines) {
    while (range_ < 2 && from_ >= ranges_[range_].count) ++range_, from_ = 0;
    if (range_ == 2) return {nothing_, 0};
    const T* at = ranges_[range_].at + from_;
    from_ += lines * kLine;
    return {at, kLine};
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  const Prefetch<T>* ranges_;
  const T* nothing_;
  int64_t range_ = 0, from_ = 0;
};

template <typename T, int ROWS, int W, int VECTORS>
void outer_tile(const Outer<T>& o, int64_t i0, int64_t j0, const T* ahead, int64_t line) {
  Vec<T, W> sum[ROWS][VECTORS] = {};
  for (int64_t m = 0; m < o.count; ++m, ahead += line) {
    __builtin_prefetch(ahead, 0, 2);
    const T* left = opaque(o.left[m] + i0);
    const T* right = opaque(o.right[m] + j0);
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
  T* out = o.sum + i0 * o.right_channels + j0;
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i, out += o.right_channels)
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) store<W>(out + j * W, load<W>(out + j * W) + sum[i][j]);
}

template <typename T, int ROWS, int W, int VECTORS>
void outer_rows(const Outer<T>& o, int64_t i0, int64_t rows, int64_t j0, const T* ahead, int64_t line) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return outer_rows<T, ROWS - 1, W, VECTORS>(o, i0, rows, j0, ahead, line);
  }
  outer_tile<T, ROWS, W, VECTORS>(o, i0, j0, ahead, line);
}

// All channels on the left, in the fewest tiles, of sizes as equal as can be.
template <typename T, int ROWS, int W, int VECTORS>
void outer_columns(const Outer<T>& o, int64_t j0, Fetch<T>& fetch) {
  const int64_t tiles = (o.left_channels + ROWS - 1) / ROWS;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t i0 = o.left_channels * tile / tiles, rows = o.left_channels * (tile + 1) / tiles - i0;
    const auto [ahead, line] = fetch.take(o.count);
    outer_rows<T, ROWS, W, VECTORS>(o, i0, rows, j0, ahead, line);
  }
}

template <typename T>
void outer(const Outer<T>& o) {
  constexpr int W = kLanes<T>, VECTORS = HNE_REGISTERS == 32 ? 4 : 2, ROWS = HNE_REGISTERS == 32 ? 6 : 4;
  Fetch<T> fetch(o);
  int64_t j = 0;
  for (; j + VECTORS * W <= o.right_channels; j += VECTORS * W) outer_columns<T, ROWS, W, VECTORS>(o, j, fetch);
  if (j < o.right_channels)
    for_lanes<T>(o.right_channels, [&](auto width, int64_t c) { outer_columns<T, 8, width.value, 1>(o, c, fetch); }, j);
}

}  // namespace hne::HNE_ISA
