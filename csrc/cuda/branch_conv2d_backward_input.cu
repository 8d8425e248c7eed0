// Gradient of a branch convolution's input: plain, and of a training unit.
//
//   G branches, M output pixels each   bytes moved at least       multiply-adds
//   plain                              grad + weight + x          G M C_out C_in k^2
//   training unit                      grad + y + weight + 2 x    the same
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
  template <int width>
  using Sums = Pair<width>;

  struct Work : Tile {
    int parent, y, x, height, width;     // the phase and its size in pixels
    int share;                           // of the pixels of the parent
    int first_y, first_x, taps, taps_x;  // its first tap, how many, how many in a row
  };

  Shape s;
  const T *left_base, *right_base;  // grad, weight
  T* out;
  const T* y = nullptr;          // the convolution's result, for its statistics' gradient
  OutputGradient gradient = {};  // to be made of grad and y
  const T* x = nullptr;          // what was normalised
  Normalization normalization = {};
  Partials partials = {};  // of the gradients of scale and shift

  HNE_BOTH int phase_size(int size, int phase) const { return size > phase ? (size - phase - 1) / s.stride + 1 : 0; }
  HNE_BOTH int row_tiles() const {  // of the largest phase
    return (s.batch * phase_size(s.height, 0) * phase_size(s.width, 0) + kTileRows - 1) / kTileRows;
  }
  HNE_BOTH int column_tiles() const { return (s.in_channels + kTileColumns - 1) / kTileColumns; }
  HNE_BOTH int phases_y() const { return s.stride < s.height ? s.stride : s.height; }
  HNE_BOTH int phases_x() const { return s.stride < s.width ? s.stride : s.width; }
  int64_t shares() const { return int64_t(row_tiles()) * phases_y() * phases_x(); }
  int64_t blocks() const { return shares() * column_tiles() * s.parents; }

  HNE_DEVICE Work tile(int block) const {
    Work w;
    w.column = block % column_tiles() * kTileColumns;
    block /= column_tiles();
    w.share = block % (row_tiles() * phases_x() * phases_y());
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

  HNE_BOTH const T* left_beside() const { return y; }
  HNE_DEVICE bool left_made() const { return gradient.present(); }
  template <int width>
  HNE_DEVICE void make_left(const Work& w, int64_t, int64_t k, float (&values)[width],
                            const float (&others)[width]) const {
    int branch, ky, kx, channel;
    term(w, int(k), branch, ky, kx, channel);
    gradient.at<width>(branch, channel)(values, others);
  }

  HNE_DEVICE const T* right(const Work& w, int64_t column, int64_t k) const {
    if (column >= w.columns) return nullptr;
    int branch, ky, kx, channel;
    term(w, int(k), branch, ky, kx, channel);
    const int64_t filter = int64_t(branch) * s.taps() + ky * s.kernel_size + kx;
    return right_base + (filter * s.out_channels + channel) * s.in_channels + column;
  }

  HNE_DEVICE bool right_made() const { return false; }
  template <int width>
  HNE_DEVICE void make_right(const Work&, int64_t, int64_t, float (&)[width]) const {}

  template <int width>
  HNE_DEVICE void finish(const Work& w, int64_t row, int64_t column, float (&values)[width], Pair<width>& sums) const {
    int sample, iy, ix;
    locate(w, int(row), sample, iy, ix);
    const int64_t pixel = (int64_t(w.parent) * s.batch + sample) * s.pixels() + iy * s.width + ix;
    if (normalization.present()) {
      float read[width];
      load<width>(read, x + pixel * s.in_channels + column);
      normalization.back(normalization.at<width>(w.parent, int(column)), read, values, sums);
    }
    store<width>(out + pixel * s.in_channels + column, values);
  }

  template <int width>
  HNE_DEVICE void leave(const Work& w, const Pair<width>& sums, float* scratch, int across) const {
    if (normalization.present()) sums.put(partials, {w.parent, w.share, int(w.column)}, scratch, across);
  }

  bool vectors() const {
    return whole_vectors<T>({s.in_channels, s.out_channels},
                            {left_base, right_base, out, y, gradient.mean, gradient.grad_mean, gradient.grad_var, x,
                             normalization.mean, normalization.scale, normalization.shift});
  }
};

void check_weight(const Tensor& weight, const Geometry& g, const Tensor& grad) {
  check_shape("weight", weight, {g.branches, g.out_channels, g.in_channels, g.kernel_size, g.kernel_size});
  check_kind("weight", weight, grad);
}

Tensor branch_conv2d_backward_input(const Tensor& grad_in, const Tensor& weight_in, int64_t height, int64_t width,
                                    int64_t stride, int64_t padding, int64_t replicate) {
  STD_TORCH_CHECK(weight_in.dim() == 5, "weight: expected 5 dimensions");
  const Geometry g =
      backward_geometry(grad_in, weight_in.size(2), height, width, weight_in.size(3), stride, padding, replicate);
  check_kind("grad", grad_in, grad_in);
  check_weight(weight_in, g, grad_in);
  const Shape shape(g);
  const Device device(grad_in);
  const Tensor grad = torch::stable::contiguous(grad_in), weight = torch::stable::contiguous(weight_in);
  Tensor out = torch::stable::new_empty(grad, {g.parents, g.batch, height, width, g.in_channels});
  dispatch(grad, [&](auto type) {
    using T = decltype(type);
    const Tensor filters = taps_first<T>(device, weight, g);
    const InputGradient<T> problem{
        .s = shape, .left_base = data<T>(grad), .right_base = data<T>(filters), .out = mutable_data<T>(out)};
    run_gemm<T>(device, problem, problem.vectors());
  });
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> branch_conv2d_stats_backward_input(
    const Tensor& grad_in, const Tensor& grad_mean, const Tensor& grad_var, const Tensor& y, const Tensor& y_mean,
    const Tensor& weight_in, const Tensor& x_in, const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, const std::string& activation, int64_t stride, int64_t padding,
    int64_t replicate) {
  STD_TORCH_CHECK(weight_in.dim() == 5 && x_in.dim() == 5, "weight, x: expected 5 dimensions");
  const Geometry g = backward_geometry(grad_in, x_in.size(4), x_in.size(2), x_in.size(3), weight_in.size(3), stride,
                                       padding, replicate);
  check_shape("x", x_in, {g.parents, g.batch, g.height, g.width, g.in_channels});
  check_kind("x", x_in, x_in);
  check_weight(weight_in, g, x_in);
  const Shape shape(g);
  const Device device(x_in);
  const OutputGradientArguments from(grad_in, grad_mean, grad_var, y, y_mean, x_in);
  const NormalizationArguments to(mean, scale, shift, activation, g.parents, g.in_channels, x_in);
  const Tensor x = torch::stable::contiguous(x_in), weight = torch::stable::contiguous(weight_in);
  Tensor grad_x = torch::stable::new_empty(x, x_in.sizes());
  OverPixels vectors(x, g.parents, g.in_channels);  // of scale and shift
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const Tensor filters = taps_first<T>(device, weight, g);
    InputGradient<T> problem{.s = shape,
                             .left_base = data<T>(from.grad),
                             .right_base = data<T>(filters),
                             .out = mutable_data<T>(grad_x),
                             .y = data<T>(from.y),
                             .gradient = from.gradient,
                             .x = data<T>(x),
                             .normalization = to.normalization};
    if (to.normalization.present()) problem.partials = vectors.partials(Pair<1>::kPlanes, problem.shares());
    run_gemm<T>(device, problem, problem.vectors());
  });
  if (!to.normalization.present()) return {grad_x, no_statistics(x), no_statistics(x)};
  combine_sums(device, vectors);
  return {grad_x, vectors.first, vectors.second};
}

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) {
  m.impl("branch_conv2d_backward_input", TORCH_BOX(&branch_conv2d_backward_input));
}

}  // namespace hne
