// Products of bfloat16 in tiles of 16 x 16 sums (AMX): a tile of left rows is multiplied by up to four of right
// columns.
#pragma once

#include <algorithm>
#include <utility>

#include "gemm.h"
#include "tiles.h"
#include "transpose.h"

namespace hne::HNE_ISA {

// Numbers of tiles. Sums are 0 to 3; the last terms of a sum, fewer than the others, have tiles of their own.
constexpr int kSumTiles = 4, kLeft = 4, kRight = 5, kLastLeft = 6, kLastRight = 7;
constexpr int64_t kTileRows = 16;   // of sums and of left rows
constexpr int64_t kTilePairs = 16;  // pairs of terms, and rows of the right tile
constexpr int64_t kTileTerms = kTilePairs * kTerms<bfloat16>;
constexpr int64_t kPairBytes = 4;  // also of a sum

// Products of `rows` rows and `columns` columns over `pairs` pairs of terms, and over `last_pairs`.
inline TileShapes tile_shapes(int64_t rows, int64_t columns, int64_t pairs, int64_t last_pairs = 0) {
  TileShapes shapes;
  const auto set = [&](int left, int right, int64_t count) {
    if (count == 0) return;  // these tiles are not used
    shapes.set(left, rows, count * kPairBytes);
    shapes.set(right, count, columns * kPairBytes);
  };
  for (int sum = 0; sum < kSumTiles; ++sum) shapes.set(sum, rows, columns * kPairBytes);
  set(kLeft, kRight, pairs);
  set(kLastLeft, kLastRight, last_pairs);
  return shapes;
}

// Calls f(std::integral_constant<int, i>) for i = 0 .. COUNT - 1.
template <int COUNT, typename F>
HNE_INLINE void for_tiles(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, COUNT>{});
}

// Adds the products of `pairs` pairs of terms of a tap, from term k on, to the sums of TILES panels.
template <int TILES, int LEFT, int RIGHT>
HNE_INLINE void add_terms(Tiles& tiles, const Tap<bfloat16>& tap, int64_t panel, int64_t row, int64_t rows, int64_t k,
                          int64_t pairs) {
  if (tap.row_stride != 0) {
    tiles.load<LEFT>(tap.rows[0] + row * tap.row_stride + k, tap.row_stride * int64_t(sizeof(bfloat16)));
  } else {
    alignas(64) bfloat16 gathered[kTileRows][kTileTerms];
    for (int64_t m = 0; m < rows; ++m) std::copy_n(tap.rows[row + m] + k, pairs * kTerms<bfloat16>, gathered[m]);
    tiles.load<LEFT>(gathered, sizeof gathered[0]);
  }
  const bfloat16* const weight = tap.weight + panel * tap.panel_stride + k * kPanel;
  for_tiles<TILES>([&](auto i) {
    tiles.load<RIGHT>(weight + i * tap.panel_stride, kPanel * kPairBytes);
    tiles.multiply_add<i, LEFT, RIGHT>();
  });
}

// All rows of TILES panels from `panel` on, in tiles of `rows` rows.
template <int TILES>
void multiply_panels(const Gemm<bfloat16>& g, Tiles& tiles, int64_t panel, int64_t rows) {
  constexpr int64_t kColumns = TILES * kPanel;
  const int64_t first = panel * kPanel, columns = std::min(g.channels - first, kColumns);
  alignas(64) float sums[kTileRows][kColumns];
  for (int64_t row = 0; row < g.count; row += rows) {
    // The last tile begins earlier, so that it has as many rows as the others: the tile before has written the first.
    const int64_t begin = std::min(row, g.count - rows);
    for_tiles<TILES>([&](auto i) { tiles.zero<i>(); });
    for (int64_t t = 0; t < g.num_taps; ++t) {
      const Tap<bfloat16>& tap = g.taps[t];
      int64_t k = 0;
      for (; k + kTileTerms <= tap.depth; k += kTileTerms)
        add_terms<TILES, kLeft, kRight>(tiles, tap, panel, begin, rows, k, kTilePairs);
      if (k < tap.depth)
        add_terms<TILES, kLastLeft, kLastRight>(tiles, tap, panel, begin, rows, k, (tap.depth - k) / kTerms<bfloat16>);
    }
    for_tiles<TILES>([&](auto i) { tiles.store<i>(&sums[0][i * kPanel], sizeof sums[0]); });
    for (int64_t m = row; m < begin + rows; ++m) {
      const float* const row_sums = sums[m - begin];
      for_lanes<bfloat16>(columns, [&](auto width, int64_t c) {
        constexpr int N = decltype(width)::value;
        Vec<float, N> v = load<N>(row_sums + c);
        if (g.bias != nullptr) v += load<N>(g.bias + first + c);
        if (g.add != nullptr) v += load<N>(g.add[m] + first + c);
        v = clamp(v, g.clamp);
        g.sums != nullptr ? store<N>(g.sums[m] + first + c, v) : store<N>(g.out[m] + first + c, v);
      });
    }
  }
}

inline void tile_gemm(const Gemm<bfloat16>& g) {
  if (g.count == 0) return;
  int64_t last_pairs = 0;
  for (int64_t t = 0; t < g.num_taps; ++t) {
    const int64_t rest = g.taps[t].depth / kTerms<bfloat16> % kTilePairs;
    if (rest != 0 && last_pairs != 0 && rest != last_pairs) return gemm(g);  // tiles have one shape in a product
    last_pairs = std::max(last_pairs, rest);
  }
  const int64_t row_tiles = (g.count + kTileRows - 1) / kTileRows, rows = (g.count + row_tiles - 1) / row_tiles;
  const int64_t panels = (g.channels + kPanel - 1) / kPanel;
  Tiles tiles(tile_shapes(rows, kPanel, kTilePairs, last_pairs));
  int64_t panel = 0;
  for (; panel + 4 <= panels; panel += 4) multiply_panels<4>(g, tiles, panel, rows);
  if (panels - panel == 3) multiply_panels<3>(g, tiles, panel, rows);
  if (panels - panel == 2) multiply_panels<2>(g, tiles, panel, rows);
  if (panels - panel == 1) multiply_panels<1>(g, tiles, panel, rows);
}

// Calls f(begin, end, size) for the whole parts of `size` values among `count`, and for the rest.
template <typename F>
void for_parts(int64_t count, int64_t size, const F& f) {
  const int64_t whole = count / size * size;
  if (whole > 0) f(0, whole, size);
  if (whole < count) f(whole, count, count - whole);
}

// The distance of consecutive rows, or 0 if it is not constant.
inline int64_t constant_stride(const bfloat16* const* rows, int64_t count) {
  if (count < 2) return kTerms<bfloat16>;
  const int64_t stride = rows[1] - rows[0];
  for (int64_t m = 2; m < count; ++m)
    if (rows[m] - rows[m - 1] != stride) return 0;
  return stride;
}

// to[i][m] = pair of rows m of channel i, for `channels` channels from `from` on and `pairs` pairs of rows.
inline void transpose_pairs(const bfloat16* from, int64_t stride, int64_t channels, int64_t pairs,
                            float (&to)[kTileRows][kTilePairs]) {
#if defined(HNE_SHUFFLES)
  static_assert(kTilePairs == kPanel);
  if (channels == kTileRows && pairs == kTilePairs)
    return transpose_panel(reinterpret_cast<const float*>(from), stride / kTerms<bfloat16>, channels, &to[0][0]);
#endif
  for (int64_t i = 0; i < channels; ++i)
    for (int64_t m = 0; m < pairs; ++m)
      __builtin_memcpy(&to[i][m], from + m * stride + i * kTerms<bfloat16>, kPairBytes);
}

// The sums of TILES * `columns` right channels from `right` on, over `count` tiles of left channels and their rows.
template <int TILES>
void add_outer_tiles(Tiles& tiles, const float (*left)[kTileRows][kTilePairs], int64_t count, const bfloat16* right,
                     int64_t stride, int64_t pairs, int64_t columns, float* sum, int64_t sum_stride) {
  for_tiles<TILES>([&](auto i) { tiles.load<i>(sum + i * columns, sum_stride * kPairBytes); });
  for (int64_t chunk = 0; chunk < count; ++chunk, right += pairs * stride) {
    tiles.load<kLeft>(left[chunk], sizeof left[chunk][0]);
    for_tiles<TILES>([&](auto i) {
      tiles.load<kRight>(right + i * columns * kTerms<bfloat16>, stride * int64_t(sizeof(bfloat16)));
      tiles.multiply_add<i, kLeft, kRight>();
    });
  }
  for_tiles<TILES>([&](auto i) { tiles.store<i>(sum + i * columns, sum_stride * kPairBytes); });
}

inline void tile_outer(const Outer<bfloat16>& o) {
  constexpr int64_t kChunks = 4;  // tiles of left rows that are transposed at once: as many as a block of rows has
  const int64_t left_stride = constant_stride(o.left, o.count), right_stride = constant_stride(o.right, o.count);
  if (left_stride == 0 || right_stride == 0) return outer(o);
  alignas(64) float left[kChunks][kTileRows][kTilePairs];
  for_parts(o.count, kTilePairs, [&](int64_t first, int64_t last, int64_t pairs) {
    for_parts(o.left_channels, kTileRows, [&](int64_t i0, int64_t i1, int64_t rows) {
      for_parts(o.right_channels, kPanel, [&](int64_t j0, int64_t j1, int64_t columns) {
        Tiles tiles(tile_shapes(rows, columns, pairs));
        for (int64_t i = i0; i < i1; i += rows)
          for (int64_t m = first; m < last; m += kChunks * pairs) {
            const int64_t chunks = std::min((last - m) / pairs, kChunks);
            for (int64_t chunk = 0; chunk < chunks; ++chunk)
              transpose_pairs(o.left[m + chunk * pairs] + i * kTerms<bfloat16>, left_stride, rows, pairs, left[chunk]);
            const auto add = [&](auto count, int64_t j) {
              add_outer_tiles<count>(tiles, left, chunks, o.right[m] + j * kTerms<bfloat16>, right_stride, pairs,
                                     columns, o.sum + i * o.right_channels + j, o.right_channels);
            };
            int64_t j = j0;
            for (; j + kSumTiles * columns <= j1; j += kSumTiles * columns)
              add(std::integral_constant<int, kSumTiles>{}, j);
            for (; j < j1; j += columns) add(std::integral_constant<int, 1>{}, j);
          }
      });
    });
  });
}

}  // namespace hne::HNE_ISA
