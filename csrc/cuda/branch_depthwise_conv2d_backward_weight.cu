// Gradient of a depthwise branch convolution's weight: plain, and of a training unit.
//
//   G branches, M output pixels each   bytes moved at least                            multiply-adds
//   plain                              grad + x + weight (+ partial sums, twice)       G M C k^2
//   training unit                      grad + y + x + weight (+ partial sums, twice)   the same
#include "depthwise.h"
#include "unit.h"

namespace hne {
namespace {

// The sums of a share of the output pixels: partial[share][branch][tap][channel]. A block has 32 channels and kLanes
// pixels at a time; with `taps` 9 a thread keeps all taps of a 3x3 filter, else the block does one tap.
constexpr int kLanes = kThreads / 32;

template <typename T>
struct WeightGradient {
  Shape s;
  const T *grad, *x;
  const T* y = nullptr;          // the convolution's result, for its statistics' gradient
  OutputGradient gradient = {};  // to be made of grad and y
  Normalization normalization = {};
};

template <typename T, int taps>
__global__ void __launch_bounds__(kThreads, taps > 1 ? 2 : 4)
    depthwise_backward_weight(const WeightGradient<T> d, float* partial, const int shares) {
  const Shape& s = d.s;
  const int lane = int(threadIdx.x) % 32, row_lane = int(threadIdx.x) / 32;
  const int groups = (s.in_channels + 31) / 32, tap_groups = s.taps() / taps;
  int at = int(blockIdx.x);
  const int channel = at % groups * 32 + lane;
  at /= groups;
  const int first_tap = at % tap_groups * taps;
  at /= tap_groups;
  const int branch = at % s.branches, share = at / s.branches;
  const int rows = s.rows(), begin = int(int64_t(rows) * share / shares),
            end = int(int64_t(rows) * (share + 1) / shares);
  float sums[taps] = {};
  if (channel < s.in_channels) {
    const int64_t map = int64_t(branch) * rows * s.in_channels + channel;
    const int parent = branch / s.replicate;
    const T* from = d.x + int64_t(parent) * s.in_rows() * s.in_channels + channel;
    Correction<1> correction = {};
    if (d.gradient.present()) correction = d.gradient.template at<1>(branch, channel);
    Affine<1> affine = {};
    if (d.normalization.present()) affine = d.normalization.template at<1>(parent, channel);
    for (int row = begin + row_lane; row < end; row += kLanes) {
      float g[1], y[1];
      load<1>(g, d.grad + map + int64_t(row) * s.in_channels);
      if (d.gradient.present()) {
        load<1>(y, d.y + map + int64_t(row) * s.in_channels);
        correction(g, y);
      }
#pragma unroll
      for (int tap = 0; tap < taps; ++tap) {
        const int64_t pixel = taps == 9 ? s.source(row, tap / 3, tap % 3) : s.source(row, first_tap + tap);
        if (pixel < 0) continue;
        float a[1];
        load<1>(a, from + pixel * s.in_channels);
        if (d.normalization.present()) d.normalization.apply(affine, a);
        sums[tap] += g[0] * a[0];
      }
    }
  }
  float* const all = static_cast<float*>(shared_memory());  // [kLanes][taps][32]
#pragma unroll
  for (int tap = 0; tap < taps; ++tap) all[(row_lane * taps + tap) * 32 + lane] = sums[tap];
  block_sync();
  for (int tap = row_lane; tap < taps; tap += kLanes) {
    float sum = 0;
    for (int other = 0; other < kLanes; ++other) sum += all[(other * taps + tap) * 32 + lane];
    if (channel < s.in_channels)
      partial[((int64_t(share) * s.branches + branch) * s.taps() + first_tap + tap) * s.in_channels + channel] = sum;
  }
}

// out[branch][channel][tap] = sum over shares, in order, of partial[share][branch][tap][channel]
template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_shares(const float* partial, T* out, const int shares, const int64_t branches, const int64_t channels,
               const int64_t taps) {
  const int64_t size = branches * channels * taps, at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= size) return;
  float sum = 0;
  for (int share = 0; share < shares; ++share) sum += partial[share * size + at];
  out[(at / channels / taps * channels + at % channels) * taps + at / channels % taps] = T(sum);
}

template <typename T>
Tensor run(const Device& device, const Geometry& g, const WeightGradient<T>& d, const Tensor& x) {
  Tensor out = torch::stable::new_empty(x, {g.branches, g.in_channels, g.kernel_size, g.kernel_size});
  const int64_t taps = g.taps() == 9 ? 9 : 1, blocks = g.branches * ceil_div(g.in_channels, 32) * (g.taps() / taps);
  // As many shares as fill a large GPU, each of some length; from the shapes alone, so that the sums are too.
  const int64_t shares = std::clamp<int64_t>(1024 / std::max<int64_t>(blocks, 1), 1,
                                             std::max<int64_t>(ceil_div(g.batch * g.out_pixels(), 256), 1));
  const Tensor partial = torch::stable::new_empty(x, {shares, g.branches, g.taps(), g.in_channels}, ScalarType::Float);
  device.launch(taps == 9 ? depthwise_backward_weight<T, 9> : depthwise_backward_weight<T, 1>, blocks * shares,
                kThreads, taps * kThreads * int64_t(sizeof(float)), d, mutable_data<float>(partial), int(shares));
  device.launch(add_shares<T>, ceil_div(g.branches * g.in_channels * g.taps(), kThreads), kThreads, 0,
                data<float>(partial), mutable_data<T>(out), int(shares), g.branches, g.in_channels, g.taps());
  return out;
}

Geometry check(const Tensor& grad, const Tensor& x, int64_t kernel_size, int64_t stride, int64_t padding,
               int64_t replicate) {
  STD_TORCH_CHECK(x.dim() == 5, "x: expected 5 dimensions");
  const Geometry g = backward_geometry(grad, x.size(4), x.size(2), x.size(3), kernel_size, stride, padding, replicate);
  check_shape("x", x, {g.parents, g.batch, g.height, g.width, g.in_channels});
  STD_TORCH_CHECK(g.out_channels == g.in_channels, "grad: channels do not match x");
  check_kind("x", x, x);
  check_kind("grad", grad, x);
  return g;
}

Tensor branch_depthwise_conv2d_backward_weight(const Tensor& grad_in, const Tensor& x_in, int64_t kernel_size,
                                               int64_t stride, int64_t padding, int64_t replicate) {
  const Geometry g = check(grad_in, x_in, kernel_size, stride, padding, replicate);
  const Shape shape(g);
  const Device device(x_in);
  const Tensor grad = torch::stable::contiguous(grad_in), x = torch::stable::contiguous(x_in);
  Tensor out;
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    out = run<T>(device, g, {.s = shape, .grad = data<T>(grad), .x = data<T>(x)}, x);
  });
  return out;
}

Tensor branch_depthwise_conv2d_stats_backward_weight(const Tensor& grad_in, const Tensor& grad_mean,
                                                     const Tensor& grad_var, const Tensor& y, const Tensor& y_mean,
                                                     const Tensor& x_in, const std::optional<Tensor>& mean,
                                                     const std::optional<Tensor>& scale,
                                                     const std::optional<Tensor>& shift, const std::string& activation,
                                                     int64_t kernel_size, int64_t stride, int64_t padding,
                                                     int64_t replicate) {
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
                  .grad = data<T>(from.grad),
                  .x = data<T>(x),
                  .y = data<T>(from.y),
                  .gradient = from.gradient,
                  .normalization = to.normalization},
                 x);
  });
  return out;
}

constexpr auto branch_depthwise_conv2d_stats_backward =
    unit_backward<branch_depthwise_conv2d_stats_backward_input, branch_depthwise_conv2d_stats_backward_weight>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) {
  m.impl("branch_depthwise_conv2d_backward_weight", TORCH_BOX(&branch_depthwise_conv2d_backward_weight));
  m.impl("branch_depthwise_conv2d_stats_backward", TORCH_BOX(branch_depthwise_conv2d_stats_backward));
}

}  // namespace hne
