// Gradient of a branch convolution's weight: plain, and of a training unit.
//
//   G branches, M output pixels each   bytes moved at least                            multiply-adds
//   plain                              grad + x + weight (+ partial sums, twice)       G M C_out C_in k^2
//   training unit                      grad + y + x + weight (+ partial sums, twice)   the same
#include "convolution.h"
#include "unit.h"

namespace hne {
namespace {

// Rows are output channels, columns (tap, input channel), the depth is pixels: split between blocks, whose partial sums
// [split][branch][out][tap][in] another kernel adds in order.
template <typename T>
struct WeightGradient {
  using Type = T;
  using Out = float;
  static constexpr bool kLeftAcross = true, kRightAcross = true;
  template <int width>
  struct Sums {};

  struct Work : Tile {
    int branch, split;
  };

  Shape s;
  const T *left_base, *right_base;  // grad, x
  const T* y = nullptr;             // the convolution's result, for its statistics' gradient
  OutputGradient gradient = {};     // to be made of grad and y
  Normalization normalization = {};
  float* partial = nullptr;
  int splits = 1, split_rows = 0;

  HNE_BOTH int columns() const { return s.taps() * s.in_channels; }
  HNE_BOTH int row_tiles() const { return (s.out_channels + kTileRows - 1) / kTileRows; }
  HNE_BOTH int column_tiles() const { return (columns() + kTileColumns - 1) / kTileColumns; }
  int64_t blocks() const { return int64_t(row_tiles()) * column_tiles() * s.branches * splits; }

  HNE_DEVICE Work tile(int block) const {
    Work w;
    w.row = block % row_tiles() * kTileRows;
    block /= row_tiles();
    w.column = block % column_tiles() * kTileColumns;
    block /= column_tiles();
    w.split = int(block % splits), w.branch = int(block / splits);
    w.rows = s.out_channels, w.columns = columns();
    w.begin = int64_t(w.split) * split_rows, w.end = w.begin + split_rows < s.rows() ? w.begin + split_rows : s.rows();
    return w;
  }

  HNE_DEVICE const T* left(const Work& w, int64_t row, int64_t k) const {
    return row < w.rows ? left_base + (int64_t(w.branch) * s.rows() + k) * s.out_channels + row : nullptr;
  }
  HNE_BOTH const T* left_beside() const { return y; }
  HNE_DEVICE bool left_made() const { return gradient.present(); }
  template <int width>
  HNE_DEVICE void make_left(const Work& w, int64_t row, int64_t, float (&values)[width],
                            const float (&others)[width]) const {
    gradient.at<width>(w.branch, int(row))(values, others);
  }

  HNE_DEVICE const T* right(const Work& w, int64_t column, int64_t k) const {
    if (column >= w.columns) return nullptr;
    const int tap = int(column) / s.in_channels, channel = int(column) - tap * s.in_channels;
    const int64_t pixel = s.pointwise() ? k : s.source(int(k), tap);
    if (pixel < 0) return nullptr;
    return right_base + (int64_t(w.branch / s.replicate) * s.in_rows() + pixel) * s.in_channels + channel;
  }
  HNE_DEVICE bool right_made() const { return normalization.present(); }
  template <int width>
  HNE_DEVICE void make_right(const Work& w, int64_t column, int64_t, float (&values)[width]) const {
    normalization.apply(normalization.at<width>(w.branch / s.replicate, int(column) % s.in_channels), values);
  }

  template <int width>
  HNE_DEVICE void finish(const Work& w, int64_t row, int64_t column, float (&values)[width], Sums<width>&) const {
    store<width>(partial + ((int64_t(w.split) * s.branches + w.branch) * w.rows + row) * w.columns + column, values);
  }
  template <int width>
  HNE_DEVICE void leave(const Work&, const Sums<width>&, float*, int) const {}

  bool vectors() const {
    return whole_vectors<T>({s.in_channels, s.out_channels},
                            {left_base, right_base, y, gradient.mean, gradient.grad_mean, gradient.grad_var,
                             normalization.mean, normalization.scale, normalization.shift});
  }
};

// out[branch][filter][tap] = sum over splits, in order, of partial[split][branch][out][tap][in]; filter = (out, in).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_splits(const float* partial, T* out, const int64_t splits, const int64_t branches, const int64_t out_channels,
               const int64_t in_channels, const int64_t taps) {
  const int64_t size = branches * out_channels * in_channels * taps;
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;  // of a partial sum
  if (at >= size) return;
  float sum = 0;
  for (int64_t split = 0; split < splits; ++split) sum += partial[split * size + at];
  const int64_t channel = at % in_channels, tap = at / in_channels % taps, filter = at / in_channels / taps;
  out[(filter * in_channels + channel) * taps + tap] = T(sum);
}

template <typename T>
Tensor run(const Device& device, const Geometry& g, WeightGradient<T> problem, const Tensor& x) {
  Tensor out = torch::stable::new_empty(x, {g.branches, g.out_channels, g.in_channels, g.kernel_size, g.kernel_size});
  // Enough blocks for the largest GPU, each with enough pixels to be worth its partial sums. The number depends on
  // the shapes alone: the same sums on every GPU.
  const int64_t rows = problem.s.rows(), least = 512;
  const int64_t splits =
      std::clamp<int64_t>(512 / std::max<int64_t>(problem.blocks(), 1), 1, std::max<int64_t>(ceil_div(rows, least), 1));
  problem.split_rows = int(ceil_div(ceil_div(rows, splits), 64) * 64);  // begins where a strip begins
  problem.splits = int(splits);
  const Tensor partial =
      torch::stable::new_empty(x, {splits, g.branches, g.out_channels, g.taps() * g.in_channels}, ScalarType::Float);
  problem.partial = mutable_data<float>(partial);
  run_gemm<T>(device, problem, problem.vectors());
  device.launch(add_splits<T>, ceil_div(g.branches * g.out_channels * g.in_channels * g.taps(), kThreads), kThreads, 0,
                problem.partial, mutable_data<T>(out), splits, g.branches, g.out_channels, g.in_channels, g.taps());
  return out;
}

Geometry check(const Tensor& grad, const Tensor& x, int64_t kernel_size, int64_t stride, int64_t padding,
               int64_t replicate) {
  STD_TORCH_CHECK(x.dim() == 5, "x: expected 5 dimensions");
  const Geometry g = backward_geometry(grad, x.size(4), x.size(2), x.size(3), kernel_size, stride, padding, replicate);
  check_shape("x", x, {g.parents, g.batch, g.height, g.width, g.in_channels});
  check_kind("x", x, x);
  check_kind("grad", grad, x);
  return g;
}

Tensor branch_conv2d_backward_weight(const Tensor& grad_in, const Tensor& x_in, int64_t kernel_size, int64_t stride,
                                     int64_t padding, int64_t replicate) {
  const Geometry g = check(grad_in, x_in, kernel_size, stride, padding, replicate);
  const Shape shape(g);
  const Device device(x_in);
  const Tensor grad = torch::stable::contiguous(grad_in), x = torch::stable::contiguous(x_in);
  Tensor out;
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    out = run<T>(device, g, {.s = shape, .left_base = data<T>(grad), .right_base = data<T>(x)}, x);
  });
  return out;
}

Tensor branch_conv2d_stats_backward_weight(const Tensor& grad_in, const Tensor& grad_mean, const Tensor& grad_var,
                                           const Tensor& y, const Tensor& y_mean, const Tensor& x_in,
                                           const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
                                           const std::optional<Tensor>& shift, const std::string& activation,
                                           int64_t kernel_size, int64_t stride, int64_t padding, int64_t replicate) {
  const Geometry g = check(grad_in, x_in, kernel_size, stride, padding, replicate);
  const Shape shape(g);
  const Device device(x_in);
  const OutputGradientArguments from(grad_in, grad_mean, grad_var, y, y_mean, x_in);
  const NormalizationArguments to(mean, scale, shift, activation, g.parents, g.in_channels, x_in);
  const Tensor x = torch::stable::contiguous(x_in);
  Tensor out;
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    out = run<T>(device, g,
                 {.s = shape,
                  .left_base = data<T>(from.grad),
                  .right_base = data<T>(x),
                  .y = data<T>(from.y),
                  .gradient = from.gradient,
                  .normalization = to.normalization},
                 x);
  });
  return out;
}

constexpr auto branch_conv2d_stats_backward =
    unit_backward<branch_conv2d_stats_backward_input, branch_conv2d_stats_backward_weight>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) {
  m.impl("branch_conv2d_backward_weight", TORCH_BOX(&branch_conv2d_backward_weight));
  m.impl("branch_conv2d_stats_backward", TORCH_BOX(branch_conv2d_stats_backward));
}

}  // namespace hne
