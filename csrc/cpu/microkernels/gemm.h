// Register-blocked matrix micro-kernels. The left rows are read in place through pointers (a row is the channels of one
// pixel), so that a convolution needs no im2col copy: a tap's row pointers take its place.
#pragma once

#include <algorithm>
#include <utility>

#include "simd.h"

namespace hne::HNE_ISA {

template <typename T>
constexpr int64_t kLine = 64 / sizeof(T);  // values of a cache line

// A tile is a number of rows by a number of vectors of columns whose accumulators fill the registers: with 32 registers
// two panels of 16 columns by 14 rows or three by 9, so that weights are read rarely, and then from the first cache.
template <typename T>
constexpr int kVectorsPerPanel = kLanes<T> < (int)kPanel ? (int)kPanel / kLanes<T> : 1;
template <typename T>
constexpr int kMaxPanels = HNE_REGISTERS == 32 && kVectorsPerPanel<T> == 1 ? 3 : 1;
// Panels of a tile of few rows, which wait for their weights: their loads overlap.
template <typename T>
constexpr int kFewRowsPanels = kVectorsPerPanel<T> < 8 ? 8 / kVectorsPerPanel<T> : 1;

constexpr int64_t kShortSum = 32;  // terms over all taps

template <typename T>
constexpr int tile_rows(int vectors, bool constant_stride) {
  // Without a constant row stride, every row needs a general-purpose register for its pointer.
  const int max_rows = constant_stride ? 14 : 8;
  if (HNE_REGISTERS == 32) return std::min(max_rows, vectors >= 8 ? 2 : vectors >= 4 ? 6 : vectors == 3 ? 9 : 14);
  return vectors == 1 ? std::min(max_rows, 12) : vectors == 2 ? 6 : vectors <= 4 ? 3 : 1;
}

// The left rows of a tile at the current column. With a constant row stride (CONSTANT_STRIDE), one pointer serves three
// rows: an address is a pointer plus 0, 1 or 2 strides.
template <typename T, int ROWS, bool CONSTANT_STRIDE>
struct LeftRows {
  static constexpr int ROWS_PER_POINTER = CONSTANT_STRIDE ? 3 : 1;
  static constexpr int POINTERS = (ROWS + ROWS_PER_POINTER - 1) / ROWS_PER_POINTER;
  const T* pointers[POINTERS];
  int64_t row_stride;
  LeftRows(const Tap<T>& tap, int64_t row) : row_stride(tap.row_stride) {
    for (int i = 0; i < POINTERS; ++i)
      pointers[i] = CONSTANT_STRIDE ? tap.rows[0] + (row + i * ROWS_PER_POINTER) * row_stride : tap.rows[row + i];
  }
  HNE_INLINE const T* address(int row) const {
    return pointers[row / ROWS_PER_POINTER] + row % ROWS_PER_POINTER * row_stride;
  }
  HNE_INLINE void advance(int64_t columns) {
    for (int i = 0; i < POINTERS; ++i) pointers[i] += columns;
  }
};

// What the tiles of some columns prefetch into the second cache, a cache line or less for each step, which multiplies
// kTerms terms: data of the queue, or if there are none the weights that are read after those of these columns. All
// tiles share them, since a core reads memory much more slowly than it computes.
template <typename T>
class TilePrefetch {
 public:
  TilePrefetch(const Gemm<T>& g, int64_t panel, int64_t panels, int64_t tiles)
      : g_(g),
        panel_(panel),
        next_(panel + panels),
        panels_(std::min((g.channels + kPanel - 1) / kPanel - next_, panels)) {
    for (int64_t t = 0; t < g.num_taps; ++t) steps_ += g.taps[t].depth / kTerms<T>;
    if (panels_ > 0)
      stride_ = (panels_ * kRow + tiles - 1) / tiles;
    else if (g.next_weights != nullptr && steps_ > 0)
      stride_ = (g.next_count + tiles * steps_ - 1) / (tiles * steps_);
  }

  void next_tile() {
    ++tile_;
    data_ = g_.prefetch != nullptr ? g_.prefetch->take(steps_ * kLine<T>) : nullptr;
  }

  // The address for the first step of a tap, and the distance of those for the next ones.
  std::pair<const T*, int64_t> start(const Tap<T>& tap) {
    const int64_t steps = tap.depth / kTerms<T>;
    if (data_ != nullptr) return {std::exchange(data_, data_ + steps * kLine<T>), kLine<T>};
    if (panels_ <= 0 && g_.next_weights != nullptr) return {g_.next_weights + tile_ * steps * stride_, stride_};
    // Panels of one tap are contiguous, those of several are not.
    if (panels_ <= 0 || tap.panel_stride != tap.depth * kPanel)
      return {tap.weight + (tile_ < panels_ ? next_ + tile_ : panel_) * tap.panel_stride, kRow};
    return {tap.weight + next_ * tap.panel_stride + tile_ * steps * stride_, stride_};
  }

 private:
  static constexpr int64_t kRow = kPanel * kTerms<T>;  // values of a panel for one step
  const Gemm<T>& g_;
  const int64_t panel_, next_;
  const int64_t panels_;  // number of the next ones
  int64_t steps_ = 0, stride_ = 0, tile_ = -1;
  const T* data_ = nullptr;
};

// Writes the results of a tile as float; there is nothing to add.
template <int ROWS, int VECTORS, int W, typename T>
HNE_INLINE void store_sums(const Gemm<T>& g, const Vec<Sum<T>, W> (&sum)[ROWS][VECTORS], int64_t row, int64_t first,
                           int64_t columns) {
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    Sum<T>* const out = g.sums[row + i] + first;
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) {
      const Vec<Sum<T>, W> v = clamp(sum[i][j], g.clamp);
      const int64_t count = columns - j * W;
      if (count >= W)
        store<W>(out + j * W, v);
      else if (count > 0)
        __builtin_memcpy(out + j * W, &v, count * sizeof(Sum<T>));
    }
  }
}

// Computes `tiles` tiles from `row` on.
template <typename T, int ROWS, int VECTORS, bool CONSTANT_STRIDE>
void gemm_tiles(const Gemm<T>& g, int64_t panel, int64_t row, int64_t tiles, TilePrefetch<T>& tile_prefetch) {
  constexpr int W = kLanes<T> < (int)kPanel ? kLanes<T> : (int)kPanel, PER_PANEL = kVectorsPerPanel<T>;
  const int64_t first = panel * kPanel, columns = g.channels - first;
  const bool full = columns >= VECTORS * W;
  Sum<T> padded[VECTORS * W] = {};
  if (g.bias != nullptr && !full) std::copy_n(g.bias + first, columns, padded);
  const Sum<T>* const bias = g.bias != nullptr && full ? g.bias + first : padded;
  for (; tiles > 0; --tiles, row += ROWS) {
    tile_prefetch.next_tile();
    if (!g.outputs_cached) {  // out and add are needed after the sums
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < VECTORS; j += PER_PANEL) {
          __builtin_prefetch(g.out[row + i] + first + j * W, 1);
          if (g.add != nullptr) __builtin_prefetch(g.add[row + i] + first + j * W);
        }
    }
    Vec<Sum<T>, W> sum[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = load<W>(bias + j * W);
    for (int64_t t = 0; t < g.num_taps; ++t) {
      const Tap<T>& tap = g.taps[t];
      LeftRows<T, ROWS, CONSTANT_STRIDE> left(tap, row);
      const T* right = tap.weight + panel * tap.panel_stride;
      auto [prefetch, prefetch_step] = tile_prefetch.start(tap);
      for (int64_t k = 0; k < tap.depth; k += kTerms<T>) {
        __builtin_prefetch(prefetch, 0, 2);
        Terms<T, W> w[VECTORS];
#pragma GCC unroll 16
        for (int j = 0; j < VECTORS; ++j)
          w[j] = load_terms<W>(right + j / PER_PANEL * tap.panel_stride + j % PER_PANEL * W * kTerms<T>);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
          const Terms<T, W> x = splat_terms<W>(left.address(i));
#pragma GCC unroll 16
          for (int j = 0; j < VECTORS; ++j) sum[i][j] = multiply_add<T, W>(x, w[j], sum[i][j]);
        }
        left.advance(kTerms<T>), right += kPanel * kTerms<T>, prefetch += prefetch_step;
      }
    }
    if constexpr (kTerms<T> > 1) {
      if (g.sums != nullptr) {
        store_sums<ROWS, VECTORS, W>(g, sum, row, first, std::min<int64_t>(columns, VECTORS * W));
        continue;
      }
    }
    T* const* out = g.out + row;
    const T* const* add = g.add != nullptr ? g.add + row : nullptr;
    const Clamp<Sum<T>> range = g.clamp;
    if (full) {
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        T* out_row = out[i] + first;
#pragma GCC unroll 16
        for (int j = 0; j < VECTORS; ++j) {
          Vec<Sum<T>, W> v = sum[i][j];
          if (add != nullptr) v += load<W>(add[i] + first + j * W);
          store<W>(out_row + j * W, clamp(v, range));
        }
      }
      continue;
    }
    Sum<T> values[ROWS][VECTORS * W];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; ++j) store<W>(values[i] + j * W, sum[i][j]);
    for (int i = 0; i < ROWS; ++i)
      for_lanes<T, W>(columns, [&](auto width, int64_t c) {
        constexpr int N = decltype(width)::value;
        Vec<Sum<T>, N> v = load<N>(values[i] + c);
        if (add != nullptr) v += load<N>(add[i] + first + c);
        store<N>(out[i] + first + c, clamp(v, range));
      });
  }
}

// Calls the gemm_tiles with ROWS = `rows`.
template <typename T, int VECTORS, bool CONSTANT_STRIDE, int ROWS = tile_rows<T>(VECTORS, CONSTANT_STRIDE)>
void gemm_rows(const Gemm<T>& g, int64_t panel, int64_t row, int64_t rows, int64_t tiles, TilePrefetch<T>& prefetch) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return gemm_rows<T, VECTORS, CONSTANT_STRIDE, ROWS - 1>(g, panel, row, rows, tiles, prefetch);
  }
  gemm_tiles<T, ROWS, VECTORS, CONSTANT_STRIDE>(g, panel, row, tiles, prefetch);
}

// All rows of the VECTORS vectors of columns from `panel` on, in as few tiles as possible, of nearly equal size.
template <typename T, int VECTORS, bool CONSTANT_STRIDE>
void gemm_columns(const Gemm<T>& g, int64_t panel) {
  if (g.count == 0) return;
  constexpr int ROWS = tile_rows<T>(VECTORS, CONSTANT_STRIDE), PER_PANEL = kVectorsPerPanel<T>;
  const int64_t tiles = (g.count + ROWS - 1) / ROWS, rows = (g.count + tiles - 1) / tiles;
  const int64_t large = g.count - (rows - 1) * tiles;  // tiles of `rows` rows; the others have one less
  TilePrefetch<T> prefetch(g, panel, (VECTORS + PER_PANEL - 1) / PER_PANEL, tiles);
  gemm_rows<T, VECTORS, CONSTANT_STRIDE>(g, panel, 0, rows, large, prefetch);
  if (large < tiles) gemm_rows<T, VECTORS, CONSTANT_STRIDE>(g, panel, large * rows, rows - 1, tiles - large, prefetch);
}

template <typename T, bool CONSTANT_STRIDE>
void gemm_panels(const Gemm<T>& g) {
  constexpr int PER_PANEL = kVectorsPerPanel<T>, FEW_ROWS_VECTORS = kFewRowsPanels<T> * PER_PANEL;
  const int64_t panels = (g.channels + kPanel - 1) / kPanel;
  int64_t panel = 0;
  if constexpr (kFewRowsPanels<T> > 1) {
    if (g.count <= tile_rows<T>(FEW_ROWS_VECTORS, CONSTANT_STRIDE))
      for (; panel + kFewRowsPanels<T> <= panels; panel += kFewRowsPanels<T>)
        gemm_columns<T, FEW_ROWS_VECTORS, CONSTANT_STRIDE>(g, panel);
  }
  if constexpr (kMaxPanels<T> == 3) {
    // Short sums mostly wait for their stores: tiles of four panels by 6 rows write four adjacent cache lines per row.
    int64_t terms = 0;
    for (int64_t t = 0; t < g.num_taps; ++t) terms += g.taps[t].depth;
    if (terms <= kShortSum)
      for (; panel + 4 <= panels; panel += 4) gemm_columns<T, 4, CONSTANT_STRIDE>(g, panel);
    if ((panels - panel) % 2 == 1 && panels - panel > 1) gemm_columns<T, 3, CONSTANT_STRIDE>(g, panel), panel += 3;
    for (; panel + 2 <= panels; panel += 2) gemm_columns<T, 2, CONSTANT_STRIDE>(g, panel);
  }
  for (; panel < panels; ++panel) {
    if constexpr (PER_PANEL == 2) {
      if (g.channels - panel * kPanel <= kPanel / 2)  // the rest of the last panel is padding
        return gemm_columns<T, 1, CONSTANT_STRIDE>(g, panel);
    }
    gemm_columns<T, PER_PANEL, CONSTANT_STRIDE>(g, panel);
  }
}

template <typename T>
void gemm(const Gemm<T>& g) {
  bool constant_stride = true;
  for (int64_t t = 0; t < g.num_taps; ++t) constant_stride &= g.taps[t].row_stride != 0;
  constant_stride ? gemm_panels<T, true>(g) : gemm_panels<T, false>(g);
}

// Computes sum[i][j] for ROWS left channels from i0 and VECTORS * W right channels from j0.
template <typename T, int ROWS, int W, int VECTORS>
void outer_tile(const Outer<T>& o, int64_t i0, int64_t j0, const T* prefetch, int64_t prefetch_stride) {
  Vec<Sum<T>, W> sum[ROWS][VECTORS] = {};
  for (int64_t m = 0; m < o.count; ++m, prefetch += prefetch_stride) {
    __builtin_prefetch(prefetch, 0, 2);
    const T* left = opaque(o.left[m] + i0 * kTerms<T>);
    const T* right = opaque(o.right[m] + j0 * kTerms<T>);
    Terms<T, W> r[VECTORS];
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) r[j] = load_terms<W>(right + j * W * kTerms<T>);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Terms<T, W> l = splat_terms<W>(left + i * kTerms<T>);
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = multiply_add<T, W>(l, r[j], sum[i][j]);
    }
  }
  Sum<T>* out = o.sum + i0 * o.right_channels + j0;
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i, out += o.right_channels)
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) store<W>(out + j * W, load<W>(out + j * W) + sum[i][j]);
}

// Calls the outer_tile with ROWS = `rows`.
template <typename T, int ROWS, int W, int VECTORS>
void outer_rows(const Outer<T>& o, int64_t i0, int64_t rows, int64_t j0, const T* prefetch, int64_t prefetch_stride) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return outer_rows<T, ROWS - 1, W, VECTORS>(o, i0, rows, j0, prefetch, prefetch_stride);
  }
  outer_tile<T, ROWS, W, VECTORS>(o, i0, j0, prefetch, prefetch_stride);
}

// All left channels, in as few tiles as possible, of nearly equal size.
template <typename T, int ROWS, int W, int VECTORS>
void outer_columns(const Outer<T>& o, int64_t j0) {
  const int64_t tiles = (o.left_channels + ROWS - 1) / ROWS;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t i0 = o.left_channels * tile / tiles, rows = o.left_channels * (tile + 1) / tiles - i0;
    const T* const prefetch = o.prefetch != nullptr ? o.prefetch->take(o.count * kLine<T>) : nullptr;
    outer_rows<T, ROWS, W, VECTORS>(o, i0, rows, j0, prefetch != nullptr ? prefetch : reinterpret_cast<const T*>(o.sum),
                                    prefetch != nullptr ? kLine<T> : 0);
  }
}

template <typename T>
void outer(const Outer<T>& o) {
  constexpr int W = kLanes<T>, VECTORS = HNE_REGISTERS == 32 ? 4 : 2;
  int64_t j = 0;
  for (; j + VECTORS * W <= o.right_channels; j += VECTORS * W) outer_columns<T, 6, W, VECTORS>(o, j);
  if constexpr (VECTORS == 4) {  // fewer columns by more rows
    if (j + 3 * W <= o.right_channels) outer_columns<T, 8, W, 3>(o, j), j += 3 * W;
    if (j + 2 * W <= o.right_channels) outer_columns<T, 12, W, 2>(o, j), j += 2 * W;
  }
  if (j < o.right_channels)
    for_lanes<T>(
        o.right_channels,
        [&](auto width, int64_t c) { outer_columns<T, HNE_REGISTERS == 32 ? 16 : 8, width.value, 1>(o, c); }, j);
}

template <typename T>
void pair_rows(const RowPairs<T>& p) {
  static_assert(kTerms<T> <= 2);
  if constexpr (kTerms<T> == 2) {
    T* out = p.out;
    for (int64_t m = 0; m < p.count; m += 2, out += 2 * p.channels) {
      const T* const first = p.rows[m];
      const T* const second = m + 1 < p.count ? p.rows[m + 1] : nullptr;
      for_lanes<T>(p.channels, [&](auto width, int64_t c) {
        constexpr int W = decltype(width)::value;
        Vec<uint32_t, W> pairs = load_bits<W>(first + c);
        if (second != nullptr) pairs |= load_bits<W>(second + c) << 16;
        __builtin_memcpy(out + 2 * c, &pairs, sizeof pairs);
      });
    }
  }
}

}  // namespace hne::HNE_ISA
