// Forward convolution as a matrix product: rows are output pixels, the depth is (tap, input channel).
#pragma once

#include "gemm.h"
#include "shape.h"

namespace hne {

// `packed`: weight [branch][panel][tap][in_channel][16] (hne_kernels/packing.py), else [branch][tap][out][in].
template <typename T, bool packed>
struct Forward {
  using Type = T;
  using Out = T;
  static constexpr bool kLeftAcross = false, kRightAcross = packed;

  struct Work : Tile {
    int branch;
    const T *x, *weight;
  };

  Shape s;
  const T *left_base, *right_base;  // x, weight
  const T* bias = nullptr;          // [branch][out_channels] or null
  const T* add = nullptr;           // features added before the activation, or null,
  int add_replicate = 1;            // branch g / add_replicate of them
  Clamp<float> range = {};
  T* out;

  HNE_BOTH int row_tiles() const { return (s.rows() + kTileRows - 1) / kTileRows; }
  HNE_BOTH int column_tiles() const { return (s.out_channels + kTileColumns - 1) / kTileColumns; }
  int64_t blocks() const { return int64_t(s.branches) * row_tiles() * column_tiles(); }

  // Neighbouring blocks read the same rows: the second finds them in the cache.
  HNE_DEVICE Work tile(int block) const {
    Work w;
    w.column = block % column_tiles() * kTileColumns;
    w.row = block / column_tiles() % row_tiles() * kTileRows;
    w.branch = block / column_tiles() / row_tiles();
    w.rows = s.rows(), w.columns = s.out_channels;
    w.begin = 0, w.end = s.taps() * s.in_channels;
    w.x = left_base + int64_t(w.branch / s.replicate) * s.in_rows() * s.in_channels;
    const int columns = packed ? (s.out_channels + int(kPanel) - 1) / int(kPanel) * int(kPanel) : s.out_channels;
    w.weight = right_base + w.branch * w.end * columns;
    return w;
  }

  HNE_DEVICE const T* left(const Work& w, int64_t row, int64_t k) const {
    if (row >= w.rows) return nullptr;
    if (s.pointwise()) return w.x + row * s.in_channels + k;
    const int tap = int(k) / s.in_channels, channel = int(k) - tap * s.in_channels;
    const int64_t pixel = s.source(int(row), tap);
    return pixel >= 0 ? w.x + pixel * s.in_channels + channel : nullptr;
  }

  HNE_DEVICE const T* right(const Work& w, int64_t column, int64_t k) const {
    if (column >= w.columns) return nullptr;
    if constexpr (packed) return w.weight + (column / kPanel * w.end + k) * kPanel + column % kPanel;
    const int tap = int(k) / s.in_channels, channel = int(k) - tap * s.in_channels;
    return w.weight + (int64_t(tap) * s.out_channels + column) * s.in_channels + channel;
  }

  template <int width>
  HNE_DEVICE void finish(const Work& w, int64_t row, int64_t column, float (&values)[width]) const {
    if (bias != nullptr) {
      float b[width];
      load<width>(b, bias + int64_t(w.branch) * s.out_channels + column);
#pragma unroll
      for (int i = 0; i < width; ++i) values[i] += b[i];
    }
    if (add != nullptr) {
      float a[width];
      load<width>(a, add + (int64_t(w.branch / add_replicate) * w.rows + row) * s.out_channels + column);
#pragma unroll
      for (int i = 0; i < width; ++i) values[i] += a[i];
    }
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = clamp(values[i], range);
    store<width>(out + (w.branch * w.rows + row) * s.out_channels + column, values);
  }

  bool vectors() const {
    return whole_vectors<T>({s.in_channels, s.out_channels}, {left_base, right_base, bias, add, out});
  }
};

}  // namespace hne
