// Dense branch convolution and its two gradients.
//
//   G branches, M output pixels each   bytes moved at least                        multiply-adds
//   forward                            x + weight + out                            G M C_out C_in k^2
//   gradient of the input              grad + weight + x                           the same
//   gradient of the weight             grad + x + weight (+ partial sums, twice)   the same
#include "convolution.h"
#include "transpose.h"

namespace hne {
namespace {

// Rows are the input pixels of one phase (iy % stride, ix % stride): these meet the same taps of the kernel. The depth
// is (child, tap, output channel), the filters of all children of a parent. weight: [branch][tap][out][in].
template <typename T>
struct InputGradient {
  using Type = T;
  using Out = T;
  static constexpr bool kLeftAcross = false, kRightAcross = true;

  struct Work : Tile {
    int parent, y, x, height, width;     // the phase and its size in pixels
    int first_y, first_x, taps, taps_x;  // its first tap, how many, how many in a row
  };

  Shape s;
  const T *left_base, *right_base;  // grad, weight
  T* out;

  HNE_BOTH int phase_size(int size, int phase) const { return size > phase ? (size - phase - 1) / s.stride + 1 : 0; }
  HNE_BOTH int row_tiles() const {  // of the largest phase
    return (s.batch * phase_size(s.height, 0) * phase_size(s.width, 0) + kTileRows - 1) / kTileRows;
  }
  HNE_BOTH int column_tiles() const { return (s.in_channels + kTileColumns - 1) / kTileColumns; }
  HNE_BOTH int phases_y() const { return s.stride < s.height ? s.stride : s.height; }
  HNE_BOTH int phases_x() const { return s.stride < s.width ? s.stride : s.width; }
  int64_t blocks() const { return int64_t(row_tiles()) * column_tiles() * phases_y() * phases_x() * s.parents; }

  HNE_DEVICE Work tile(int block) const {
    Work w;
    w.column = block % column_tiles() * kTileColumns;
    block /= column_tiles();
    w.row = block % row_tiles() * kTileRows;
    block /= row_tiles();
    w.x = int(block % phases_x());
    block /= phases_x();
    w.y = int(block % phases_y());
    w.parent = int(block / phases_y());
    w.height = phase_size(s.height, w.y), w.width = phase_size(s.width, w.x);
    w.rows = int64_t(s.batch) * w.height * w.width, w.columns = s.in_channels;
    w.first_y = (w.y + s.padding) % s.stride, w.first_x = (w.x + s.padding) % s.stride;
    w.taps_x = phase_size(s.kernel_size, w.first_x);
    w.taps = phase_size(s.kernel_size, w.first_y) * w.taps_x;
    const int children = min(s.replicate, s.branches - w.parent * s.replicate);
    w.begin = 0, w.end = int64_t(children) * w.taps * s.out_channels;
    return w;
  }

  // Pixel `row` of the phase: sample, and coordinates in the map.
  HNE_DEVICE void locate(const Work& w, int row, int& sample, int& iy, int& ix) const {
    const int within_row = row % w.width, rest = row / w.width;
    sample = rest / w.height;
    iy = rest % w.height * s.stride + w.y, ix = within_row * s.stride + w.x;
  }
  HNE_DEVICE void term(const Work& w, int k, int& branch, int& ky, int& kx, int& channel) const {
    const int at = k / s.out_channels, child = at / w.taps, tap = at - child * w.taps;
    channel = k - at * s.out_channels;
    branch = w.parent * s.replicate + child;
    ky = w.first_y + tap / w.taps_x * s.stride, kx = w.first_x + tap % w.taps_x * s.stride;
  }

  HNE_DEVICE const T* left(const Work& w, int64_t row, int64_t k) const {
    if (row >= w.rows) return nullptr;
    int branch, ky, kx, channel;
    term(w, int(k), branch, ky, kx, channel);
    if (s.pointwise()) return left_base + (int64_t(branch) * s.rows() + row) * s.out_channels + channel;
    int sample, iy, ix;
    locate(w, int(row), sample, iy, ix);
    const int dy = iy + s.padding - ky, dx = ix + s.padding - kx;  // multiples of the stride
    if (dy < 0 || dx < 0 || dy / s.stride >= s.out_height || dx / s.stride >= s.out_width) return nullptr;
    const int pixel = sample * s.out_pixels() + dy / s.stride * s.out_width + dx / s.stride;
    return left_base + (int64_t(branch) * s.rows() + pixel) * s.out_channels + channel;
  }

  HNE_DEVICE const T* right(const Work& w, int64_t column, int64_t k) const {
    if (column >= w.columns) return nullptr;
    int branch, ky, kx, channel;
    term(w, int(k), branch, ky, kx, channel);
    const int64_t filter = int64_t(branch) * s.taps() + ky * s.kernel_size + kx;
    return right_base + (filter * s.out_channels + channel) * s.in_channels + column;
  }

  template <int width>
  HNE_DEVICE void finish(const Work& w, int64_t row, int64_t column, float (&values)[width]) const {
    int sample, iy, ix;
    locate(w, int(row), sample, iy, ix);
    const int64_t pixel = (int64_t(w.parent) * s.batch + sample) * s.pixels() + iy * s.width + ix;
    store<width>(out + pixel * s.in_channels + column, values);
  }
};

// Rows are output channels, columns (tap, input channel), the depth is pixels: split between blocks, whose partial sums
// [split][branch][out][tap][in] another kernel adds in order.
template <typename T>
struct WeightGradient {
  using Type = T;
  using Out = float;
  static constexpr bool kLeftAcross = true, kRightAcross = true;

  struct Work : Tile {
    int branch, split;
  };

  Shape s;
  const T *left_base, *right_base;  // grad, x
  float* partial;
  int splits, split_rows;

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
  HNE_DEVICE const T* right(const Work& w, int64_t column, int64_t k) const {
    if (column >= w.columns) return nullptr;
    const int tap = int(column) / s.in_channels, channel = int(column) - tap * s.in_channels;
    const int64_t pixel = s.pointwise() ? k : s.source(int(k), tap);
    if (pixel < 0) return nullptr;
    return right_base + (int64_t(w.branch / s.replicate) * s.in_rows() + pixel) * s.in_channels + channel;
  }
  template <int width>
  HNE_DEVICE void finish(const Work& w, int64_t row, int64_t column, float (&values)[width]) const {
    store<width>(partial + ((int64_t(w.split) * s.branches + w.branch) * w.rows + row) * w.columns + column, values);
  }
};

template <typename T>
Tensor taps_first(const Device& device, const Tensor& weight, const Geometry& g) {
  return transposed<T>(device, weight, g.branches, g.out_channels * g.in_channels, g.taps());
}

Tensor branch_conv2d(const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in, int64_t stride,
                     int64_t padding, int64_t replicate) {
  STD_TORCH_CHECK(weight_in.dim() == 5, "weight: expected 5 dimensions");
  const Geometry g =
      forward_geometry(x_in, weight_in.size(0), weight_in.size(1), weight_in.size(3), stride, padding, replicate);
  check_shape("weight", weight_in, {g.branches, g.out_channels, g.in_channels, g.kernel_size, g.kernel_size});
  check_kind("x", x_in, x_in);
  check_kind("weight", weight_in, x_in);
  if (bias_in.has_value()) {
    check_shape("bias", *bias_in, {g.branches, g.out_channels});
    check_kind("bias", *bias_in, x_in);
  }
  const Shape shape(g);
  const Device device(x_in);
  const Tensor x = torch::stable::contiguous(x_in), weight = torch::stable::contiguous(weight_in);
  const std::optional<Tensor> bias = contiguous(bias_in);
  Tensor out = torch::stable::new_empty(x, {g.branches, g.batch, g.out_height, g.out_width, g.out_channels});
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const Tensor filters = taps_first<T>(device, weight, g);
    Forward<T, false> problem{.s = shape,
                              .left_base = data<T>(x),
                              .right_base = data<T>(filters),
                              .bias = data<T>(bias),
                              .out = mutable_data<T>(out)};
    run_gemm<T>(device, problem, problem.vectors());
  });
  return out;
}

Tensor branch_conv2d_backward_input(const Tensor& grad_in, const Tensor& weight_in, int64_t height, int64_t width,
                                    int64_t stride, int64_t padding, int64_t replicate) {
  STD_TORCH_CHECK(weight_in.dim() == 5, "weight: expected 5 dimensions");
  const Geometry g =
      backward_geometry(grad_in, weight_in.size(2), height, width, weight_in.size(3), stride, padding, replicate);
  check_shape("weight", weight_in, {g.branches, g.out_channels, g.in_channels, g.kernel_size, g.kernel_size});
  check_kind("grad", grad_in, grad_in);
  check_kind("weight", weight_in, grad_in);
  const Shape shape(g);
  const Device device(grad_in);
  const Tensor grad = torch::stable::contiguous(grad_in), weight = torch::stable::contiguous(weight_in);
  Tensor out = torch::stable::new_empty(grad, {g.parents, g.batch, height, width, g.in_channels});
  dispatch(grad, [&](auto type) {
    using T = decltype(type);
    const Tensor filters = taps_first<T>(device, weight, g);
    const InputGradient<T> problem{shape, data<T>(grad), data<T>(filters), mutable_data<T>(out)};
    run_gemm<T>(device, problem,
                whole_vectors<T>({g.in_channels, g.out_channels}, {data<T>(grad), data<T>(filters), data<T>(out)}));
  });
  return out;
}

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

Tensor branch_conv2d_backward_weight(const Tensor& grad_in, const Tensor& x_in, int64_t kernel_size, int64_t stride,
                                     int64_t padding, int64_t replicate) {
  STD_TORCH_CHECK(x_in.dim() == 5, "x: expected 5 dimensions");
  const Geometry g =
      backward_geometry(grad_in, x_in.size(4), x_in.size(2), x_in.size(3), kernel_size, stride, padding, replicate);
  check_shape("x", x_in, {g.parents, g.batch, g.height, g.width, g.in_channels});
  check_kind("grad", grad_in, grad_in);
  check_kind("x", x_in, grad_in);
  const Shape shape(g);
  const Device device(grad_in);
  const Tensor grad = torch::stable::contiguous(grad_in), x = torch::stable::contiguous(x_in);
  Tensor out = torch::stable::new_empty(grad, {g.branches, g.out_channels, g.in_channels, kernel_size, kernel_size});
  dispatch(grad, [&](auto type) {
    using T = decltype(type);
    WeightGradient<T> problem{shape, data<T>(grad), data<T>(x), nullptr, 1, 0};
    // Enough blocks for the largest GPU, each with enough pixels to be worth its partial sums. The number depends on
    // the shapes alone: the same sums on every GPU.
    const int64_t rows = problem.s.rows(), least = 512;
    const int64_t splits = std::clamp<int64_t>(512 / std::max<int64_t>(problem.blocks(), 1), 1,
                                               std::max<int64_t>(ceil_div(rows, least), 1));
    problem.split_rows = int(ceil_div(ceil_div(rows, splits), 64) * 64);  // begins where a strip begins
    problem.splits = int(splits);
    const Tensor partial = torch::stable::new_empty(
        grad, {splits, g.branches, g.out_channels, g.taps() * g.in_channels}, ScalarType::Float);
    problem.partial = mutable_data<float>(partial);
    run_gemm<T>(device, problem, whole_vectors<T>({g.in_channels, g.out_channels}, {data<T>(grad), data<T>(x)}));
    device.launch(add_splits<T>, ceil_div(g.branches * g.out_channels * g.in_channels * g.taps(), kThreads), kThreads,
                  0, problem.partial, mutable_data<T>(out), splits, g.branches, g.out_channels, g.in_channels,
                  g.taps());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) {
  m.impl("branch_conv2d", TORCH_BOX(&branch_conv2d));
  m.impl("branch_conv2d_backward_input", TORCH_BOX(&branch_conv2d_backward_input));
  m.impl("branch_conv2d_backward_weight", TORCH_BOX(&branch_conv2d_backward_weight));
}

}  // namespace hne
