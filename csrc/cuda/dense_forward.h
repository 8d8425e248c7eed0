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
struct DenseForward : GemmProblem<T, T> {
  template <int width>
  struct NoSums {};
  template <int width>
  using Sums = std::conditional_t<packed, NoSums<width>, Moments<width>>;

  struct Work : Tile {
    int branch, parent;
    const T *x, *weight;  // of the branch
    const T* add;         // null for none
    T* out;
  };

  Convolution<T> d;
  const T* add = nullptr;  // feature map added before the activation, or null; with packed weights only
  int add_replicate = 1;   // output branch g reads its branch g / add_replicate
  Partials partials = {};  // for the statistics of the result
  int row_tiles;
  Divider by_row_tiles, by_replicate, by_channels, by_kernel_size, by_out_pixels, by_out_width;

  DenseForward(const Convolution<T>& d_, ChannelReduction* moments)
      : GemmProblem<T, T>(d_.s.out_channels),
        d(d_),
        row_tiles(int(ceil_div(d_.s.rows(), kTileRows))),
        by_row_tiles(row_tiles),
        by_replicate(d_.s.replicate),
        by_channels(d_.s.in_channels),
        by_kernel_size(d_.s.kernel_size),
        by_out_pixels(d_.s.out_pixels()),
        by_out_width(d_.s.out_width) {
    if (moments != nullptr) partials = moments->allocate(Moments<1>::kPlanes, row_tiles);
  }

  int64_t blocks() const { return int64_t(d.s.branches) * row_tiles * this->column_tiles; }
  bool vectors() const { return d.vectors() && aligned(add); }

  // Neighbouring blocks read the same rows: the second finds them in the cache.
  HNE_DEVICE Work tile(int block) const {
    const Shape& s = d.s;
    Work w;
    const int rest = this->by_column_tiles(block);
    w.branch = by_row_tiles(rest), w.parent = by_replicate(w.branch);
    w.column = (block - rest * this->column_tiles) * this->tile_columns;
    w.row = (rest - w.branch * row_tiles) * kTileRows;
    w.rows = s.rows(), w.columns = s.out_channels;
    w.begin = 0, w.end = s.taps() * s.in_channels;
    w.x = d.x + int64_t(w.parent) * s.in_rows() * s.in_channels;
    if constexpr (packed)
      w.weight =
          d.filters + int64_t(w.branch) * w.end * ((s.out_channels + int(kPanel) - 1) / int(kPanel) * int(kPanel));
    else
      w.weight = d.filters + w.branch * d.strides.branch;
    w.add = nullptr;
    if (packed && add != nullptr) w.add = add + int64_t(w.branch / add_replicate) * w.rows * s.out_channels;
    w.out = d.out + int64_t(w.branch) * w.rows * s.out_channels;
    return w;
  }

  struct Left : GemmOperand<T, false> {
    struct Row {
      const T* x;  // first channel of the pixel under the first tap
      int iy, ix;  // that pixel, which may lie in the padding
    };
    struct Depth {
      int ky, kx, channel;
    };

    const DenseForward& p;
    const Work& w;

    HNE_DEVICE Left(const DenseForward& p_, const Work& w_) : p(p_), w(w_) {}
    HNE_DEVICE const T* base() const { return p.d.x; }
    HNE_DEVICE Row row(int64_t r) const {
      const Shape& s = p.d.s;
      if (s.pointwise()) return {w.x + r * s.in_channels, 0, 0};
      const int sample = p.by_out_pixels(int(r)), within = int(r) - sample * s.out_pixels();
      const int oy = p.by_out_width(within), ox = within - oy * s.out_width;
      const int iy = oy * s.stride - s.padding, ix = ox * s.stride - s.padding;
      return {w.x + (int64_t(sample) * s.pixels() + int64_t(iy) * s.width + ix) * s.in_channels, iy, ix};
    }
    HNE_DEVICE Depth depth(int k) const {
      if (p.d.s.pointwise()) return {0, 0, k};
      const int tap = p.by_channels(k), ky = p.by_kernel_size(tap);
      return {ky, tap - ky * p.d.s.kernel_size, k - tap * p.d.s.in_channels};
    }
    HNE_DEVICE const T* at(const Row& row, const Depth& depth) const {
      const Shape& s = p.d.s;
      if (s.pointwise()) return row.x + depth.channel;
      const bool inside =
          unsigned(row.iy + depth.ky) < unsigned(s.height) && unsigned(row.ix + depth.kx) < unsigned(s.width);
      return inside ? row.x + int64_t(depth.ky * s.width + depth.kx) * s.in_channels + depth.channel : nullptr;
    }
    HNE_DEVICE bool transforms() const { return !packed && p.d.normalization.present(); }
    template <int width>
    HNE_DEVICE Affine<width> parameters(const Row&, const Depth& depth, int i) const {
      return p.d.normalization.template at<width>(w.parent, depth.channel + i);
    }
    template <int width>
    HNE_DEVICE void transform(const Affine<width>& affine, float (&values)[width], const float (&)[width]) const {
      p.d.normalization.apply(affine, values);
    }
  };

  struct Right : GemmOperand<T, packed> {
    struct Row {
      const T* weight;
    };
    using Depth = int64_t;  // from the column's first value

    const DenseForward& p;
    const Work& w;

    HNE_DEVICE Right(const DenseForward& p_, const Work& w_) : p(p_), w(w_) {}
    HNE_DEVICE const T* base() const { return p.d.filters; }
    HNE_DEVICE Row row(int64_t column) const {
      if constexpr (packed) return {w.weight + column / kPanel * w.end * kPanel + column % kPanel};
      return {w.weight + column * p.d.strides.out};
    }
    HNE_DEVICE Depth depth(int k) const {
      const Shape& s = p.d.s;
      if constexpr (packed) return int64_t(k) * kPanel;
      if (s.pointwise()) return k;
      const int tap = p.by_channels(k);  // filters are [tap][out][in]
      return int64_t(tap) * s.in_channels * (s.out_channels - 1) + k;
    }
    HNE_DEVICE const T* at(const Row& row, Depth depth) const { return row.weight + depth; }
  };

  template <int width, typename S>
  HNE_DEVICE void finish(const Work& w, int64_t row, int64_t column, float (&values)[width], S& sums) const {
    const int channels = d.s.out_channels;
    if (d.bias != nullptr) {
      float b[width];
      load<width>(b, d.bias + int64_t(w.branch) * channels + column);
#pragma unroll
      for (int i = 0; i < width; ++i) values[i] += b[i];
    }
    if (w.add != nullptr) {
      float a[width];
      load<width>(a, w.add + row * channels + column);
#pragma unroll
      for (int i = 0; i < width; ++i) values[i] += a[i];
    }
    if (d.range.low == 0) {  // an activation
#pragma unroll
      for (int i = 0; i < width; ++i) values[i] = clamp(values[i], d.range);
    }
    store<width>(w.out + row * channels + column, values);
    if constexpr (!packed) {
      if (partials.values != nullptr) sums.add(values);
    }
  }

  template <typename S>
  HNE_DEVICE void reduce(const Work& w, const S& sums, float* scratch, int across) const {
    if constexpr (!packed) {
      if (partials.values == nullptr) return;
      sums.put(partials, {w.branch, w.row / kTileRows, w.column}, scratch, across, min(w.rows - w.row, kTileRows));
    }
  }
};

}  // namespace hne
