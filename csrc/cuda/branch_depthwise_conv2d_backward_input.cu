// Gradient of a depthwise branch convolution's input: plain, and of a training unit.
//
//   G branches, M output pixels each   bytes moved at least       multiply-adds
//   plain                              grad + weight + x          G M C k^2
//   training unit                      grad + y + weight + 2 x    the same
#include "depthwise.h"
#include "transpose.h"

namespace hne {
namespace {

template <typename T>
struct InputGradient {
  Shape s;
  const T *grad, *weight;  // weight [branch][tap][channel]
  T* out;
  const T* y = nullptr;          // the convolution's result, for its statistics' gradient
  OutputGradient gradient = {};  // to be made of grad and y
  const T* x = nullptr;          // what was normalised
  Normalization normalization = {};
};

// A thread gathers what reaches 16 bytes of channels of one input pixel at a time.
template <typename T, int width>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_backward_input(const InputGradient<T> d, const RowPartition<width> shares, const Partials partials) {
  const Shape& s = d.s;
  const auto here = shares.here();
  const int parent = here.place.branch, channel = here.channel;
  const int last = min(s.branches, (parent + 1) * s.replicate);
  Pair<width> vectors;
  for (int row = here.begin; row < here.end; row += here.step) {
    const int line = row / s.width, ix = row - line * s.width, sample = line / s.height, iy = line - sample * s.height;
    // Of the taps of a row of the kernel, every stride-th reaches the pixel: from ever earlier outputs.
    const int first_oy = (iy + s.padding) / s.stride, first_ky = iy + s.padding - first_oy * s.stride;
    const int first_ox = (ix + s.padding) / s.stride, first_kx = ix + s.padding - first_ox * s.stride;
    float sums[width] = {};
    for (int branch = parent * s.replicate; branch < last; ++branch) {
      Correction<width> correction = {};
      if (d.gradient.present()) correction = d.gradient.template at<width>(branch, channel);
      const int64_t map = (int64_t(branch) * s.batch + sample) * s.out_pixels() * s.in_channels + channel;
      const T* filters = d.weight + int64_t(branch) * s.taps() * s.in_channels + channel;
      for (int ky = first_ky, oy = first_oy; ky < s.kernel_size && oy >= 0; ky += s.stride, --oy) {
        if (oy >= s.out_height) continue;
        for (int kx = first_kx, ox = first_ox; kx < s.kernel_size && ox >= 0; kx += s.stride, --ox) {
          if (ox >= s.out_width) continue;
          const int64_t at = map + (int64_t(oy) * s.out_width + ox) * s.in_channels;
          float g[width], w[width];
          load<width>(g, d.grad + at);
          if (d.gradient.present()) {
            float y[width];
            load<width>(y, d.y + at);
            correction(g, y);
          }
          load<width>(w, filters + (ky * s.kernel_size + kx) * s.in_channels);
#pragma unroll
          for (int i = 0; i < width; ++i) sums[i] += g[i] * w[i];
        }
      }
    }
    const int64_t to = (int64_t(parent) * s.in_rows() + row) * s.in_channels + channel;
    if (d.normalization.present()) {
      float x[width];
      load<width>(x, d.x + to);
      d.normalization.back(d.normalization.template at<width>(parent, channel), x, sums, vectors);
    }
    store<width>(d.out + to, sums);
  }
  if (partials.values != nullptr)
    vectors.put(partials, here.place, static_cast<float*>(shared_memory()), shares.across);
}

template <typename T>
void run(const Device& device, const InputGradient<T>& d, OverPixels* vectors) {
  const Shape& s = d.s;
  const bool vector = whole_vectors<T>(
      {s.in_channels}, {d.grad, d.weight, d.out, d.y, d.gradient.mean, d.gradient.grad_mean, d.gradient.grad_var, d.x,
                        d.normalization.mean, d.normalization.scale, d.normalization.shift});
  dispatch_width<T>(vector, [&](auto width) {
    constexpr int w = decltype(width)::value;
    const RowPartition<w> shares(s.parents, s.in_rows(), s.in_channels);
    const Partials partials = vectors != nullptr ? vectors->partials(Pair<w>::kPlanes, shares.shares()) : Partials{};
    device.launch(depthwise_backward_input<T, w>, shares.blocks(), kThreads, RowPartition<w>::kScratch, d, shares,
                  partials);
  });
}

void check_weight(const Tensor& weight, const Geometry& g, const Tensor& grad) {
  check_shape("weight", weight, {g.branches, g.in_channels, g.kernel_size, g.kernel_size});
  STD_TORCH_CHECK(g.out_channels == g.in_channels, "grad: channels do not match weight");
  check_kind("weight", weight, grad);
}

Tensor branch_depthwise_conv2d_backward_input(const Tensor& grad_in, const Tensor& weight_in, int64_t height,
                                              int64_t width, int64_t stride, int64_t padding, int64_t replicate) {
  STD_TORCH_CHECK(weight_in.dim() == 4, "weight: expected 4 dimensions");
  const Geometry g =
      backward_geometry(grad_in, weight_in.size(1), height, width, weight_in.size(2), stride, padding, replicate);
  check_kind("grad", grad_in, grad_in);
  check_weight(weight_in, g, grad_in);
  const Shape shape(g);
  const Device device(grad_in);
  const Tensor grad = torch::stable::contiguous(grad_in), weight = torch::stable::contiguous(weight_in);
  Tensor out = torch::stable::new_empty(grad, {g.parents, g.batch, height, width, g.in_channels});
  dispatch(grad, [&](auto type) {
    using T = decltype(type);
    const Tensor filters = transposed<T>(device, weight, g.branches, g.in_channels, g.taps());
    run<T>(device, {.s = shape, .grad = data<T>(grad), .weight = data<T>(filters), .out = mutable_data<T>(out)},
           nullptr);
  });
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> branch_depthwise_conv2d_stats_backward_input(
    const Tensor& grad_in, const Tensor& grad_mean, const Tensor& grad_var, const Tensor& y, const Tensor& y_mean,
    const Tensor& weight_in, const Tensor& x_in, const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, const std::string& activation, int64_t stride, int64_t padding,
    int64_t replicate) {
  STD_TORCH_CHECK(weight_in.dim() == 4 && x_in.dim() == 5, "weight: expected 4 dimensions, x: 5");
  const Geometry g = backward_geometry(grad_in, x_in.size(4), x_in.size(2), x_in.size(3), weight_in.size(2), stride,
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
  OverPixels vectors(x, g.parents, g.in_channels);  // gradients of scale and shift
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const Tensor filters = transposed<T>(device, weight, g.branches, g.in_channels, g.taps());
    run<T>(device,
           {.s = shape,
            .grad = data<T>(from.grad),
            .weight = data<T>(filters),
            .out = mutable_data<T>(grad_x),
            .y = data<T>(from.y),
            .gradient = from.gradient,
            .x = data<T>(x),
            .normalization = to.normalization},
           to.normalization.present() ? &vectors : nullptr);
  });
  if (!to.normalization.present()) return {grad_x, no_statistics(x), no_statistics(x)};
  combine_sums(device, vectors);
  return {grad_x, vectors.first, vectors.second};
}

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) {
  m.impl("branch_depthwise_conv2d_backward_input", TORCH_BOX(&branch_depthwise_conv2d_backward_input));
}

}  // namespace hne
