// Depthwise branch convolution and its two gradients.
//
//   G branches, M output pixels each   bytes moved at least                        multiply-adds
//   forward                            x + weight + out                            G M C k^2
//   gradient of the input              grad + weight + x                           G M C k^2
//   gradient of the weight             grad + x + weight (+ partial sums, twice)   G M C k^2
#include "depthwise.h"
#include "transpose.h"

namespace hne {
namespace {

Geometry check_forward(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding, int64_t replicate) {
  STD_TORCH_CHECK(weight.dim() == 4, "weight: expected 4 dimensions");
  const Geometry g = forward_geometry(x, weight.size(0), weight.size(1), weight.size(2), stride, padding, replicate);
  check_shape("weight", weight, {g.branches, g.in_channels, g.kernel_size, g.kernel_size});
  check_kind("x", x, x);
  check_kind("weight", weight, x);
  return g;
}

Tensor branch_depthwise_conv2d(const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in,
                               int64_t stride, int64_t padding, int64_t replicate) {
  const Geometry g = check_forward(x_in, weight_in, stride, padding, replicate);
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
    const Tensor filters = transposed<T>(device, weight, g.branches, g.in_channels, g.taps());
    run_depthwise<T>(device, {shape, data<T>(x), data<T>(filters), data<T>(bias), {}, mutable_data<T>(out)});
  });
  return out;
}

// A thread gathers what reaches 16 bytes of channels of one input pixel. weight: [branch][tap][channel].
template <typename T, int width>
__global__ void __launch_bounds__(kThreads, 4)
    depthwise_backward_input(const Shape s, const T* grad, const T* weight, T* out) {
  const int groups = s.in_channels / width;
  const uint32_t at = thread_number(), pixel = at / groups, row = pixel / s.width, map = row / s.height;
  const int channel = int(at - pixel * groups) * width, ix = int(pixel - row * s.width), iy = int(row - map * s.height);
  const int parent = int(map / s.batch), sample = int(map % s.batch);
  if (parent >= s.parents) return;
  float sums[width] = {};
  const int last = min(s.branches, (parent + 1) * s.replicate);
  for (int branch = parent * s.replicate; branch < last; ++branch) {
    const T* from = grad + (int64_t(branch) * s.batch + sample) * s.out_pixels() * s.in_channels + channel;
    const T* filters = weight + int64_t(branch) * s.taps() * s.in_channels + channel;
    for (int ky = 0; ky < s.kernel_size; ++ky) {
      const int dy = iy + s.padding - ky;
      if (dy < 0 || dy % s.stride != 0 || dy / s.stride >= s.out_height) continue;
      for (int kx = 0; kx < s.kernel_size; ++kx) {
        const int dx = ix + s.padding - kx;
        if (dx < 0 || dx % s.stride != 0 || dx / s.stride >= s.out_width) continue;
        float g[width], w[width];
        load<width>(g, from + (int64_t(dy / s.stride) * s.out_width + dx / s.stride) * s.in_channels);
        load<width>(w, filters + (ky * s.kernel_size + kx) * s.in_channels);
#pragma unroll
        for (int i = 0; i < width; ++i) sums[i] += g[i] * w[i];
      }
    }
  }
  store<width>(out + int64_t(pixel) * s.in_channels + channel, sums);
}

Tensor branch_depthwise_conv2d_backward_input(const Tensor& grad_in, const Tensor& weight_in, int64_t height,
                                              int64_t width, int64_t stride, int64_t padding, int64_t replicate) {
  STD_TORCH_CHECK(weight_in.dim() == 4, "weight: expected 4 dimensions");
  const Geometry g =
      backward_geometry(grad_in, weight_in.size(1), height, width, weight_in.size(2), stride, padding, replicate);
  check_shape("weight", weight_in, {g.branches, g.in_channels, g.kernel_size, g.kernel_size});
  STD_TORCH_CHECK(g.out_channels == g.in_channels, "grad: channels do not match weight");
  check_kind("grad", grad_in, grad_in);
  check_kind("weight", weight_in, grad_in);
  const Shape shape(g);
  const Device device(grad_in);
  const Tensor grad = torch::stable::contiguous(grad_in), weight = torch::stable::contiguous(weight_in);
  Tensor out = torch::stable::new_empty(grad, {g.parents, g.batch, height, width, g.in_channels});
  dispatch(grad, [&](auto type) {
    using T = decltype(type);
    const Tensor filters = transposed<T>(device, weight, g.branches, g.in_channels, g.taps());
    dispatch_width<T>(whole_vectors<T>({g.in_channels}, {data<T>(grad), data<T>(filters), data<T>(out)}),
                      [&](auto vector) {
                        constexpr int w = decltype(vector)::value;
                        const int64_t threads = g.parents * g.batch * g.pixels() * (g.in_channels / w);
                        device.launch(depthwise_backward_input<T, w>, blocks_of_threads(threads), kThreads, 0, shape,
                                      data<T>(grad), data<T>(filters), mutable_data<T>(out));
                      });
  });
  return out;
}

// The sums of a share of the output pixels: partial[share][branch][tap][channel]. A block has 32 channels and kLanes
// pixels at a time; with `taps` 9 a thread keeps all taps of a 3x3 filter, else the block does one tap.
constexpr int kLanes = kThreads / 32;

template <typename T, int taps>
__global__ void __launch_bounds__(kThreads)
    depthwise_backward_weight(const Shape s, const T* grad, const T* x, float* partial, const int shares) {
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
    const T* from = grad + int64_t(branch) * rows * s.in_channels + channel;
    const T* parent = x + int64_t(branch / s.replicate) * s.in_rows() * s.in_channels + channel;
    for (int row = begin + row_lane; row < end; row += kLanes) {
      const float g = float(from[int64_t(row) * s.in_channels]);
#pragma unroll
      for (int tap = 0; tap < taps; ++tap) {
        const int64_t pixel = taps == 9 ? s.source(row, tap / 3, tap % 3) : s.source(row, first_tap + tap);
        if (pixel >= 0) sums[tap] += g * float(parent[pixel * s.in_channels]);
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

Tensor branch_depthwise_conv2d_backward_weight(const Tensor& grad_in, const Tensor& x_in, int64_t kernel_size,
                                               int64_t stride, int64_t padding, int64_t replicate) {
  STD_TORCH_CHECK(x_in.dim() == 5, "x: expected 5 dimensions");
  const Geometry g =
      backward_geometry(grad_in, x_in.size(4), x_in.size(2), x_in.size(3), kernel_size, stride, padding, replicate);
  check_shape("x", x_in, {g.parents, g.batch, g.height, g.width, g.in_channels});
  STD_TORCH_CHECK(g.out_channels == g.in_channels, "grad: channels do not match x");
  check_kind("grad", grad_in, grad_in);
  check_kind("x", x_in, grad_in);
  const Shape shape(g);
  const Device device(grad_in);
  const Tensor grad = torch::stable::contiguous(grad_in), x = torch::stable::contiguous(x_in);
  Tensor out = torch::stable::new_empty(grad, {g.branches, g.in_channels, kernel_size, kernel_size});
  dispatch(grad, [&](auto type) {
    using T = decltype(type);
    const int64_t taps = g.taps() == 9 ? 9 : 1, blocks = g.branches * ceil_div(g.in_channels, 32) * (g.taps() / taps);
    // As many shares as fill a large GPU, each of some length; from the shapes alone, so that the sums are too.
    const int64_t shares = std::clamp<int64_t>(1024 / std::max<int64_t>(blocks, 1), 1,
                                               std::max<int64_t>(ceil_div(g.batch * g.out_pixels(), 256), 1));
    const Tensor partial =
        torch::stable::new_empty(grad, {shares, g.branches, g.taps(), g.in_channels}, ScalarType::Float);
    device.launch(taps == 9 ? depthwise_backward_weight<T, 9> : depthwise_backward_weight<T, 1>, blocks * shares,
                  kThreads, taps * kThreads * int64_t(sizeof(float)), shape, data<T>(grad), data<T>(x),
                  mutable_data<float>(partial), int(shares));
    device.launch(add_shares<T>, ceil_div(g.branches * g.in_channels * g.taps(), kThreads), kThreads, 0,
                  data<float>(partial), mutable_data<T>(out), int(shares), g.branches, g.in_channels, g.taps());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) {
  m.impl("branch_depthwise_conv2d", TORCH_BOX(&branch_depthwise_conv2d));
  m.impl("branch_depthwise_conv2d_backward_input", TORCH_BOX(&branch_depthwise_conv2d_backward_input));
  m.impl("branch_depthwise_conv2d_backward_weight", TORCH_BOX(&branch_depthwise_conv2d_backward_weight));
}

}  // namespace hne
