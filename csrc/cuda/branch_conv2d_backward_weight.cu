// Gradient of a dense branch convolution's weight.
//
//   G branches, M output pixels each   bytes moved at least                            multiply-adds
//   plain                              grad + x + weight (+ partial sums, twice)       G M C_out C_in k^2
//   training                           grad + y + x + weight (+ partial sums, twice)   the same
#include "convolution.h"
#include "gemm.h"

namespace hne {
namespace {

// Rows are output channels, columns are (tap, input channel). The depth is the output pixels, split between blocks:
// partial [split][branch][out][tap][in].
template <typename T>
struct DenseWeightGradient : GemmProblem<T, float> {
  struct Work : Tile {
    int branch, parent, split;
  };

  WeightGradient<T> d;
  float* partial = nullptr;
  int splits = 1, split_rows = 0;
  int row_tiles;
  Divider by_row_tiles, by_splits, by_replicate, by_channels, by_kernel_size, by_out_pixels, by_out_width;

  explicit DenseWeightGradient(const WeightGradient<T>& d_)
      : GemmProblem<T, float>(d_.s.taps() * d_.s.in_channels),
        d(d_),
        row_tiles(int(ceil_div(d_.s.out_channels, kTileRows))),
        by_row_tiles(row_tiles),
        by_replicate(d_.s.replicate),
        by_channels(d_.s.in_channels),
        by_kernel_size(d_.s.kernel_size),
        by_out_pixels(d_.s.out_pixels()),
        by_out_width(d_.s.out_width) {}

  bool vectors() const {
    return whole_vectors<T>({d.s.in_channels, d.s.out_channels}, {d.output.grad, d.output.y, d.x}) &&
           d.output.vectors() && d.normalization.vectors();
  }
  int64_t blocks() const { return int64_t(row_tiles) * this->column_tiles * d.s.branches * splits; }

  HNE_DEVICE Work tile(int block) const {
    Work w;
    const int column_block = by_row_tiles(block), split_block = this->by_column_tiles(column_block);
    w.row = (block - column_block * row_tiles) * kTileRows;
    w.column = (column_block - split_block * this->column_tiles) * this->tile_columns;
    w.branch = by_splits(split_block), w.split = split_block - w.branch * splits;
    w.parent = by_replicate(w.branch);
    w.rows = d.s.out_channels, w.columns = this->columns;
    w.begin = w.split * split_rows, w.end = w.begin < d.s.rows() - split_rows ? w.begin + split_rows : d.s.rows();
    return w;
  }

  static constexpr bool kCompanion = true;
  HNE_BOTH bool has_companion() const { return d.output.present(); }

  struct Left : GemmOperand<T, true> {
    struct Row {
      const T* grad;  // of the branch's first pixel
      int channel;
    };
    using Depth = int;  // output pixel

    const DenseWeightGradient& p;
    const Work& w;

    HNE_DEVICE Left(const DenseWeightGradient& p_, const Work& w_) : p(p_), w(w_) {}
    HNE_DEVICE const T* base() const { return p.d.output.grad; }
    HNE_DEVICE const T* companion() const { return p.d.output.y; }
    HNE_DEVICE Row row(int64_t channel) const {
      return {p.d.output.grad + int64_t(w.branch) * p.d.s.rows() * p.d.s.out_channels + channel, int(channel)};
    }
    HNE_DEVICE Depth depth(int k) const { return k; }
    HNE_DEVICE const T* at(const Row& row, Depth pixel) const { return row.grad + int64_t(pixel) * p.d.s.out_channels; }
    HNE_DEVICE bool transforms() const { return p.d.output.present(); }
    template <int width>
    HNE_DEVICE Affine<width> parameters(const Row& row, Depth, int i) const {
      return p.d.output.template at<width>(w.branch, row.channel + i);
    }
    template <int width>
    HNE_DEVICE void transform(const Affine<width>& affine, float (&values)[width], const float (&y)[width]) const {
      p.d.output.apply(affine, values, y);
    }
  };

  struct Right : GemmOperand<T, true> {
    struct Row {
      const T* x;  // the channel of the pixel under the tap, for output pixel 0 of sample 0
      int channel, iy, ix;
    };
    struct Depth {
      int pixel, iy, ix;  // input pixel under the first tap without padding, counted over the batch, and in the sample
    };

    const DenseWeightGradient& p;
    const Work& w;

    HNE_DEVICE Right(const DenseWeightGradient& p_, const Work& w_) : p(p_), w(w_) {}
    HNE_DEVICE const T* base() const { return p.d.x; }
    HNE_DEVICE Row row(int64_t column) const {
      const Shape& s = p.d.s;
      const int tap = p.by_channels(int(column)), channel = int(column) - tap * s.in_channels;
      const int ky = p.by_kernel_size(tap), iy = ky - s.padding, ix = tap - ky * s.kernel_size - s.padding;
      const T* const x = p.d.x + int64_t(w.parent) * s.in_rows() * s.in_channels;
      return {x + (int64_t(iy) * s.width + ix) * s.in_channels + channel, channel, iy, ix};
    }
    HNE_DEVICE Depth depth(int k) const {
      const Shape& s = p.d.s;
      if (s.pointwise()) return {k, 0, 0};
      const int sample = p.by_out_pixels(k), within = k - sample * s.out_pixels();
      const int oy = p.by_out_width(within), iy = oy * s.stride, ix = (within - oy * s.out_width) * s.stride;
      return {sample * s.pixels() + iy * s.width + ix, iy, ix};
    }
    HNE_DEVICE const T* at(const Row& row, const Depth& depth) const {
      const Shape& s = p.d.s;
      const bool inside = s.pointwise() || (unsigned(row.iy + depth.iy) < unsigned(s.height) &&
                                            unsigned(row.ix + depth.ix) < unsigned(s.width));
      return inside ? row.x + int64_t(depth.pixel) * s.in_channels : nullptr;
    }
    HNE_DEVICE bool transforms() const { return p.d.normalization.present(); }
    template <int width>
    HNE_DEVICE Affine<width> parameters(const Row& row, const Depth&, int i) const {
      return p.d.normalization.template at<width>(w.parent, row.channel + i);
    }
    template <int width>
    HNE_DEVICE void transform(const Affine<width>& affine, float (&values)[width], const float (&)[width]) const {
      p.d.normalization.apply(affine, values);
    }
  };

  template <int width, typename S>
  HNE_DEVICE void finish(const Work& w, int64_t row, int64_t column, float (&values)[width], S&) const {
    store<width>(partial + ((int64_t(w.split) * d.s.branches + w.branch) * w.rows + row) * w.columns + column, values);
  }
};

}  // namespace

template <typename T>
Tensor dense_backward_weight(const Device& device, const WeightGradient<T>& d, const Tensor& x) {
  DenseWeightGradient<T> problem(d);
  // Enough tiles of 64 columns for the largest GPU, each with enough pixels to be worth its partial sums. The number
  // depends on the shapes alone: the same order of additions on every GPU.
  const Shape& s = d.s;
  const int64_t rows = s.rows(), least = 512;
  const int64_t splits =
      std::clamp<int64_t>(512 / std::max<int64_t>(problem.blocks(), 1), 1, std::max<int64_t>(ceil_div(rows, least), 1));
  problem.split_rows = int(ceil_div(ceil_div(rows, splits), 64) * 64);  // a split begins where a strip begins
  problem.splits = int(splits), problem.by_splits = Divider(problem.splits);
  Tensor partial = torch::stable::new_empty(x, {splits, int64_t(s.branches) * s.out_channels, s.taps(), s.in_channels},
                                            ScalarType::Float);
  problem.partial = mutable_data<float>(partial);
  run_gemm<T>(device, problem);
  return partial;
}
template Tensor dense_backward_weight(const Device&, const WeightGradient<float>&, const Tensor&);
template Tensor dense_backward_weight(const Device&, const WeightGradient<half>&, const Tensor&);
template Tensor dense_backward_weight(const Device&, const WeightGradient<bfloat16>&, const Tensor&);

}  // namespace hne
