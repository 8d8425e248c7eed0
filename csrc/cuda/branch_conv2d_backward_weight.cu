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
struct DenseWeightGradient : GemmProblem<T, float, true, true> {
  struct Work : Tile {
    int branch, split;
  };

  WeightGradient<T> d;
  float* partial = nullptr;
  int splits = 1, split_rows = 0;

  explicit DenseWeightGradient(const WeightGradient<T>& d_) : d(d_) {}

  HNE_BOTH int columns() const { return d.s.taps() * d.s.in_channels; }
  HNE_BOTH int row_tiles() const { return (d.s.out_channels + kTileRows - 1) / kTileRows; }
  HNE_BOTH int column_tiles() const { return (columns() + kTileColumns - 1) / kTileColumns; }
  bool vectors() const {
    return whole_vectors<T>({d.s.in_channels, d.s.out_channels}, {d.output.grad, d.output.y, d.x}) &&
           d.output.vectors() && d.normalization.vectors();
  }
  int64_t blocks() const { return int64_t(row_tiles()) * column_tiles() * d.s.branches * splits; }

  HNE_DEVICE Work tile(int block) const {
    Work w;
    w.row = block % row_tiles() * kTileRows;
    block /= row_tiles();
    w.column = block % column_tiles() * kTileColumns;
    block /= column_tiles();
    w.split = int(block % splits), w.branch = int(block / splits);
    w.rows = d.s.out_channels, w.columns = columns();
    w.begin = int64_t(w.split) * split_rows;
    w.end = w.begin + split_rows < d.s.rows() ? w.begin + split_rows : d.s.rows();
    return w;
  }

  HNE_BOTH const T* left_base() const { return d.output.grad; }
  HNE_DEVICE const T* left(const Work& w, int64_t row, int64_t k) const {
    return row < w.rows ? d.output.grad + (int64_t(w.branch) * d.s.rows() + k) * d.s.out_channels + row : nullptr;
  }
  HNE_BOTH const T* left_companion() const { return d.output.y; }
  HNE_DEVICE bool transforms_left() const { return d.output.present(); }
  template <int width>
  HNE_DEVICE void transform_left(const Work& w, int64_t row, int64_t, float (&values)[width],
                                 const float (&y)[width]) const {
    d.output.apply(d.output.template at<width>(w.branch, int(row)), values, y);
  }

  HNE_BOTH const T* right_base() const { return d.x; }
  HNE_DEVICE const T* right(const Work& w, int64_t column, int64_t k) const {
    if (column >= w.columns) return nullptr;
    const int tap = int(column) / d.s.in_channels, channel = int(column) - tap * d.s.in_channels;
    const int64_t pixel = d.s.pointwise() ? k : d.s.source(int(k), tap);
    if (pixel < 0) return nullptr;
    return d.x + (int64_t(w.branch / d.s.replicate) * d.s.in_rows() + pixel) * d.s.in_channels + channel;
  }
  HNE_DEVICE bool transforms_right() const { return d.normalization.present(); }
  template <int width>
  HNE_DEVICE void transform_right(const Work& w, int64_t column, int64_t, float (&values)[width]) const {
    const int parent = w.branch / d.s.replicate, channel = int(column) % d.s.in_channels;
    d.normalization.apply(d.normalization.template at<width>(parent, channel), values);
  }

  template <int width, typename S>
  HNE_DEVICE void finish(const Work& w, int64_t row, int64_t column, float (&values)[width], S&) const {
    store<width>(partial + ((int64_t(w.split) * d.s.branches + w.branch) * w.rows + row) * w.columns + column, values);
  }
};

}  // namespace

template <typename T>
Tensor dense_backward_weight(const Device& device, const WeightGradient<T>& d, const Tensor& x) {
  DenseWeightGradient<T> problem(d);
  // Enough blocks for the largest GPU, each with enough pixels to be worth its partial sums. The number depends on the
  // shapes alone: the same order of additions on every GPU.
  const Shape& s = d.s;
  const int64_t rows = s.rows(), least = 512;
  const int64_t splits =
      std::clamp<int64_t>(512 / std::max<int64_t>(problem.blocks(), 1), 1, std::max<int64_t>(ceil_div(rows, least), 1));
  problem.split_rows = int(ceil_div(ceil_div(rows, splits), 64) * 64);  // a split begins where a strip begins
  problem.splits = int(splits);
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
