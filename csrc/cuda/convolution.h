// Forward convolution as a matrix product: rows are output pixels, the depth is (tap, input channel).
//
//   G branches, M output pixels each   bytes moved at least              multiply-adds
//                                      x + weight + out (+ statistics)   G M C_out C_in k^2
#pragma once

#include "gemm.h"
#include "normalization.h"
#include "shape.h"

namespace hne {

// `packed`: weight [branch][panel][tap][in_channel][16] (hne_kernels/packing.py), else [branch][tap][out][in].
// Packed weights are for inference: neither normalisation nor statistics.
template <typename T, bool packed>
struct Forward {
  using Type = T;
  using Out = T;
  static constexpr bool kLeftAcross = false, kRightAcross = packed;

  template <int width>
  struct NoSums {};
  template <int width>
  using Sums = std::conditional_t<packed, NoSums<width>, Moments<width>>;

  struct Work : Tile {
    int branch;
    const T *x, *weight;
  };

  Shape s;
  const T *left_base, *right_base;   // x, weight
  const T* bias = nullptr;           // [branch][out_channels] or null
  const T* add = nullptr;            // features added before the activation, or null,
  int add_replicate = 1;             // branch g / add_replicate of them
  Clamp<float> range = {};           // of the result
  Normalization normalization = {};  // of x
  Partials partials = {};            // of the statistics of the result
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
  HNE_BOTH const T* left_beside() const { return nullptr; }
  HNE_DEVICE bool left_made() const { return !packed && normalization.present(); }
  template <int width>
  HNE_DEVICE void make_left(const Work& w, int64_t, int64_t k, float (&values)[width], const float (&)[width]) const {
    const int channel = s.pointwise() ? int(k) : int(k) % s.in_channels;
    normalization.apply(normalization.at<width>(w.branch / s.replicate, channel), values);
  }

  HNE_DEVICE const T* right(const Work& w, int64_t column, int64_t k) const {
    if (column >= w.columns) return nullptr;
    if constexpr (packed) return w.weight + (column / kPanel * w.end + k) * kPanel + column % kPanel;
    const int tap = int(k) / s.in_channels, channel = int(k) - tap * s.in_channels;
    return w.weight + (int64_t(tap) * s.out_channels + column) * s.in_channels + channel;
  }
  HNE_DEVICE bool right_made() const { return false; }
  template <int width>
  HNE_DEVICE void make_right(const Work&, int64_t, int64_t, float (&)[width]) const {}

  template <int width, typename S>
  HNE_DEVICE void finish(const Work& w, int64_t row, int64_t column, float (&values)[width], S& sums) const {
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
    if constexpr (!packed) {
      if (partials.values != nullptr) sums.add(values);
    }
  }

  template <typename S>
  HNE_DEVICE void leave(const Work& w, const S& sums, float* scratch, int across) const {
    if constexpr (!packed) {
      if (partials.values == nullptr) return;
      const int64_t rows = w.rows - w.row < kTileRows ? w.rows - w.row : kTileRows;
      sums.put(partials, {w.branch, int(w.row / kTileRows), int(w.column)}, scratch, across, int(rows));
    }
  }

  bool vectors() const {
    return whole_vectors<T>({s.in_channels, s.out_channels}, {left_base, right_base, bias, add, out, normalization.mean,
                                                              normalization.scale, normalization.shift});
  }
};

// Compiled once: with filters as they are in branch_conv2d.cu, packed in fused_conv2d.cu.
template <typename T, bool packed>
void run_forward(const Device& device, const Forward<T, packed>& problem);

// The gradients of a training unit, which branch_conv2d_stats_backward gives together.
std::tuple<Tensor, Tensor, Tensor> branch_conv2d_stats_backward_input(
    const Tensor& grad_in, const Tensor& grad_mean, const Tensor& grad_var, const Tensor& y, const Tensor& y_mean,
    const Tensor& weight_in, const Tensor& x_in, const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, const std::string& activation, int64_t stride, int64_t padding,
    int64_t replicate);

}  // namespace hne
