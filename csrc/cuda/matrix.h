// Products of small matrices in shared memory by one warp: tensor cores for 16-bit types and tf32, multiply-adds for
// exact float32. In both cases the sums lie in registers in the layout of the tensor cores.
//
//   m x n sums over a depth of k   bytes moved, in shared memory   multiply-adds
//                                  (m + n) k values                m n k
#pragma once

#include "device.h"

namespace hne {

constexpr int kWarp = 32;

// Precision of the products: the type in memory, and for float32 whether to round to tf32 (10 bits of mantissa).
template <typename T, bool tf32 = false>
struct Precision {
  using Type = T;
  static constexpr bool kExact = sizeof(T) == 4 && !tf32;
  static constexpr int kVector = 16 / int(sizeof(T));  // values in 16 bytes
};

// Padding behind each row of a tile in shared memory: rows that a warp reads together lie in different banks.
template <typename T>
constexpr int kRowPadding = 16 / int(sizeof(T));  // depth within a row: 8 rows at a time
constexpr int kColumnPadding = 8;                 // depth across rows: 4 rows of 8 values at a time

// Element i of a lane's sums belongs to row sum_row(lane, i) and column sum_column(lane, i) of the 16x8 tile.
HNE_DEVICE int sum_row(int lane, int i) { return lane / 4 + 8 * (i / 2); }
HNE_DEVICE int sum_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

// Operands of a product. RowsOf: row m of the operand begins at row(m), the depth is contiguous. Across: the operand is
// stored [depth][pitch], its rows are contiguous.
template <typename T, typename Row>
struct RowsOf {
  static constexpr bool kAcross = false;
  Row row;
  HNE_DEVICE const T* at(int m, int k) const { return row(m) + k; }
};
template <typename T>
struct Across {
  static constexpr bool kAcross = true;
  const T* tile;
  int pitch;
  HNE_DEVICE const T* at(int m, int k) const { return tile + k * pitch + m; }
};
template <typename T>
struct Pitched {
  const T* tile;
  int pitch;
  HNE_DEVICE const T* operator()(int m) const { return tile + m * pitch; }
};
template <typename T>
using Rows = RowsOf<T, Pitched<T>>;

// sums[i][j] += a[16 i .. 16 i + 15][0 .. depth) * b[0 .. depth)[8 j .. 8 j + 7], rows and columns relative to the
// warp's tile. `depth` is a multiple of 16. A row of operand b is a column of the product. `thread` is threadIdx.x.
template <typename P, int MT, int NT, typename A, typename B>
HNE_DEVICE void multiply(float (&sums)[MT][NT][4], const A& a, const B& b, int depth, unsigned thread = threadIdx.x) {
  using T = typename P::Type;
  const int lane = int(thread % kWarp), g = lane / 4, t = lane % 4;
  if constexpr (P::kExact) {
    for (int k = 0; k < depth; ++k) {
      float left[MT][2], right[NT][2];
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) left[i][h] = *a.at(16 * i + g + 8 * h, k);
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) right[j][h] = *b.at(8 * j + 2 * t + h, k);
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[i][j][e] += left[i][e / 2] * right[j][e % 2];
    }
  } else if constexpr (sizeof(T) == 4) {
    for (int k = 0; k < depth; k += 8) {
      uint32_t left[MT][4], right[NT][2];
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) left[i][e] = round_to_tf32(*a.at(16 * i + g + 8 * (e % 2), k + t + 4 * (e / 2)));
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) right[j][e] = round_to_tf32(*b.at(8 * j + g, k + t + 4 * e));
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int j = 0; j < NT; ++j) multiply_fragments(sums[i][j], left[i], right[j][0], right[j][1], T{});
    }
  } else {
    static_assert(NT % 2 == 0, "one load of b serves two tiles");
    const int eight = lane / 8, within = lane % 8;
    for (int k = 0; k < depth; k += 16) {
      uint32_t left[MT][4], right[NT / 2][4];
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        if constexpr (A::kAcross)
          load_matrices_transposed(left[i], a.at(16 * i + eight % 2 * 8, k + within + eight / 2 * 8));
        else
          load_matrices(left[i], a.at(16 * i + lane % 16, k + lane / 16 * 8));
      }
#pragma unroll
      for (int j = 0; j < NT / 2; ++j) {
        if constexpr (B::kAcross)
          load_matrices_transposed(right[j], b.at(16 * j + eight / 2 * 8, k + within + eight % 2 * 8));
        else
          load_matrices(right[j], b.at(16 * j + within + eight / 2 * 8, k + eight % 2 * 8));
      }
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int j = 0; j < NT; ++j)
          multiply_fragments(sums[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1], T{});
    }
  }
}

}  // namespace hne
