// Dense forward convolution as a matrix product: rows are output pixels, the depth is (tap, input channel).
//
//   G branches, M output pixels each   bytes moved at least              multiply-adds
//                                      x + weight + out (+ statistics)   G M C_out C_in k^2
#pragma once

#include "convolution.h"
#include "gemm.h"

namespace hne {

// `packed` weights (hne_kernels/packing.py) are for inference: neither normalisation nor statistics.
template <typename T, bool packed>
struct DenseForward : GemmProblem<T, T, false, packed> {
  template <int width>
  struct NoSums {};
  template <int width>
  using Sums = std::conditional_t<packed, NoSums<width>, Moments<width>>;

  struct Work : Tile {
    int branch;
    const T *x, *weight;
  };

  Convolution<T> d;
  const T* add = nullptr;  // feature map added before the activation, or null
  int add_replicate = 1;   // output branch g reads its branch g / add_replicate
  Partials partials = {};  // for the statistics of the result

  DenseForward(const Convolution<T>& d_, ChannelReduction* moments) : d(d_) {
    if (moments != nullptr) partials = moments->allocate(Moments<1>::kPlanes, row_tiles());
  }

  HNE_BOTH int row_tiles() const { return (d.s.rows() + kTileRows - 1) / kTileRows; }
  HNE_BOTH int column_tiles() const { return (d.s.out_channels + kTileColumns - 1) / kTileColumns; }
  int64_t blocks() const { return int64_t(d.s.branches) * row_tiles() * column_tiles(); }
  bool vectors() const { return d.vectors() && aligned(add); }

  // Neighbouring blocks read the same rows: the second finds them in the cache.
  HNE_DEVICE Work tile(int block) const {
    const Shape& s = d.s;
    Work w;
    w.column = block % column_tiles() * kTileColumns;
    w.row = block / column_tiles() % row_tiles() * kTileRows;
    w.branch = block / column_tiles() / row_tiles();
    w.rows = s.rows(), w.columns = s.out_channels;
    w.begin = 0, w.end = s.taps() * s.in_channels;
    w.x = d.x + int64_t(w.branch / s.replicate) * s.in_rows() * s.in_channels;
    const int columns = packed ? (s.out_channels + int(kPanel) - 1) / int(kPanel) * int(kPanel) : s.out_channels;
    w.weight = d.filters + w.branch * w.end * columns;
    return w;
  }

  HNE_BOTH const T* left_base() const { return d.x; }
  HNE_DEVICE const T* left(const Work& w, int64_t row, int64_t k) const {
    const Shape& s = d.s;
    if (row >= w.rows) return nullptr;
    if (s.pointwise()) return w.x + row * s.in_channels + k;
    const int tap = int(k) / s.in_channels, channel = int(k) - tap * s.in_channels;
    const int64_t pixel = s.source(int(row), tap);
    return pixel >= 0 ? w.x + pixel * s.in_channels + channel : nullptr;
  }
  HNE_DEVICE bool transforms_left() const { return !packed && d.normalization.present(); }
  template <int width>
  HNE_DEVICE void transform_left(const Work& w, int64_t, int64_t k, float (&values)[width],
                                 const float (&)[width]) const {
    const int channel = d.s.pointwise() ? int(k) : int(k) % d.s.in_channels;
    d.normalization.apply(d.normalization.template at<width>(w.branch / d.s.replicate, channel), values);
  }

  HNE_BOTH const T* right_base() const { return d.filters; }
  HNE_DEVICE const T* right(const Work& w, int64_t column, int64_t k) const {
    const Shape& s = d.s;
    if (column >= w.columns) return nullptr;
    if constexpr (packed) return w.weight + (column / kPanel * w.end + k) * kPanel + column % kPanel;
    const int tap = int(k) / s.in_channels, channel = int(k) - tap * s.in_channels;
    return w.weight + (int64_t(tap) * s.out_channels + column) * s.in_channels + channel;
  }

  template <int width, typename S>
  HNE_DEVICE void finish(const Work& w, int64_t row, int64_t column, float (&values)[width], S& sums) const {
    const int channels = d.s.out_channels;
    if (d.bias != nullptr) {
      float b[width];
      load<width>(b, d.bias + int64_t(w.branch) * channels + column);
#pragma unroll
      for (int i = 0; i < width; ++i) values[i] += b[i];
    }
    if (add != nullptr) {
      float a[width];
      load<width>(a, add + (int64_t(w.branch / add_replicate) * w.rows + row) * channels + column);
#pragma unroll
      for (int i = 0; i < width; ++i) values[i] += a[i];
    }
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = clamp(values[i], d.range);
    store<width>(d.out + (w.branch * w.rows + row) * channels + column, values);
    if constexpr (!packed) {
      if (partials.values != nullptr) sums.add(values);
    }
  }

  template <typename S>
  HNE_DEVICE void reduce(const Work& w, const S& sums, float* scratch, int across) const {
    if constexpr (!packed) {
      if (partials.values == nullptr) return;
      const int64_t rows = w.rows - w.row < kTileRows ? w.rows - w.row : kTileRows;
      sums.put(partials, {w.branch, int(w.row / kTileRows), int(w.column)}, scratch, across, int(rows));
    }
  }
};

}  // namespace hne
