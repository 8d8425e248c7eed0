// Shapes of branch convolutions, heads and bottlenecks, for every device.
#pragma once

#include "tensor.h"

namespace hne {

// Sizes of a convolution, named as in hne_kernels, from x [parents, batch, height, width, in_channels] to
// [branches, batch, out_height, out_width, out_channels]. Branch g reads parent g / replicate; the last parent has
// fewer children where `branches` is a leading slice of the tree.
struct Geometry {
  int64_t parents, branches, batch, height, width, in_channels;
  int64_t out_height, out_width, out_channels;
  int64_t kernel_size, stride, padding, replicate;

  int64_t taps() const { return kernel_size * kernel_size; }
  int64_t pixels() const { return height * width; }
  int64_t out_pixels() const { return out_height * out_width; }
  bool pointwise() const { return kernel_size == 1 && stride == 1 && padding == 0; }

  void check() const {
    STD_TORCH_CHECK(stride >= 1 && padding >= 0 && replicate >= 1 && kernel_size >= 1,
                    "stride, padding, replicate or kernel size out of range");
    STD_TORCH_CHECK(parents == ceil_div(branches, replicate), "weight: branches do not match x and replicate");
    STD_TORCH_CHECK(height + 2 * padding >= kernel_size && width + 2 * padding >= kernel_size,
                    "x: smaller than the kernel");
  }
  std::vector<int64_t> out_shape() const { return {branches, batch, out_height, out_width, out_channels}; }

  static int64_t out_size(int64_t size, int64_t kernel_size, int64_t stride, int64_t padding) {
    return (size + 2 * padding - kernel_size) / stride + 1;
  }
};

// `x` is the shape of the input.
inline Geometry forward_geometry(const std::vector<int64_t>& x, int64_t branches, int64_t out_channels,
                                 int64_t kernel_size, int64_t stride, int64_t padding, int64_t replicate) {
  STD_TORCH_CHECK(x.size() == 5, "x: expected 5 dimensions");
  Geometry g{};
  g.parents = x[0], g.batch = x[1], g.height = x[2], g.width = x[3], g.in_channels = x[4];
  g.branches = branches, g.out_channels = out_channels;
  g.kernel_size = kernel_size, g.stride = stride, g.padding = padding, g.replicate = replicate;
  g.check();
  g.out_height = Geometry::out_size(g.height, kernel_size, stride, padding);
  g.out_width = Geometry::out_size(g.width, kernel_size, stride, padding);
  return g;
}

inline Geometry forward_geometry(const Tensor& x, int64_t branches, int64_t out_channels, int64_t kernel_size,
                                 int64_t stride, int64_t padding, int64_t replicate) {
  const auto sizes = x.sizes();
  return forward_geometry(std::vector<int64_t>(sizes.begin(), sizes.end()), branches, out_channels, kernel_size, stride,
                          padding, replicate);
}

// Checks a feature map that is added to the output: output branch g adds its branch g / replicate.
inline void check_residual(const std::vector<int64_t>& shape, int64_t replicate, const Geometry& g) {
  const std::vector<int64_t> expected = {ceil_div(g.branches, replicate), g.batch, g.out_height, g.out_width,
                                         g.out_channels};
  STD_TORCH_CHECK(shape == expected, "residual: unexpected shape");
}

inline void check_residual(const std::optional<Tensor>& residual, int64_t replicate, const Geometry& g) {
  STD_TORCH_CHECK(replicate >= 1, "residual_replicate: expected at least 1");
  if (!residual.has_value()) return;
  const auto sizes = residual->sizes();
  check_residual(std::vector<int64_t>(sizes.begin(), sizes.end()), replicate, g);
}

inline Geometry backward_geometry(const Tensor& grad, int64_t in_channels, int64_t height, int64_t width,
                                  int64_t kernel_size, int64_t stride, int64_t padding, int64_t replicate) {
  STD_TORCH_CHECK(grad.dim() == 5, "grad: expected 5 dimensions");
  STD_TORCH_CHECK(replicate >= 1, "replicate: expected at least 1");
  Geometry g{};
  g.branches = grad.size(0), g.batch = grad.size(1), g.out_height = grad.size(2), g.out_width = grad.size(3);
  g.out_channels = grad.size(4), g.in_channels = in_channels, g.height = height, g.width = width;
  g.kernel_size = kernel_size, g.stride = stride, g.padding = padding, g.replicate = replicate;
  g.parents = ceil_div(g.branches, replicate);
  g.check();
  STD_TORCH_CHECK(g.out_height == Geometry::out_size(height, kernel_size, stride, padding) &&
                      g.out_width == Geometry::out_size(width, kernel_size, stride, padding),
                  "grad: does not have the size of the convolution's output");
  return g;
}

// Sizes of the linear heads of all models: a head is a 1x1 convolution of a feature map of one pixel. features
// [models, batch, channels], weight [models, classes, channels], bias [models, classes] or absent.
inline Geometry heads_geometry(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(features.dim() == 3 && weight.dim() == 3, "features, weight: expected 3 dimensions");
  Geometry g{};
  g.parents = g.branches = features.size(0), g.batch = features.size(1), g.in_channels = features.size(2);
  g.out_channels = weight.size(1);
  g.height = g.width = g.out_height = g.out_width = g.kernel_size = g.stride = g.replicate = 1;
  check_shape("weight", weight, {g.branches, g.out_channels, g.in_channels});
  if (bias.has_value()) check_shape("bias", *bias, {g.branches, g.out_channels});
  return g;
}

// Checks the shapes of a bottleneck (hne_kernels/ops/fused_bottleneck.py) whose input has the shape x. Returns the
// sizes of its depthwise convolution, but with the channels of x and of the output.
inline Geometry bottleneck_geometry(const std::vector<int64_t>& x, const Tensor& expand, const Tensor& expand_bias,
                                    const Tensor& depthwise, const Tensor& depthwise_bias, const Tensor& project,
                                    const Tensor& project_bias, const std::optional<Tensor>& shortcut,
                                    const std::optional<Tensor>& shortcut_bias, int64_t stride, int64_t replicate,
                                    bool identity) {
  STD_TORCH_CHECK(depthwise.dim() == 4 && project_bias.dim() == 2, "depthwise: expected 4 dimensions");
  const int64_t k = depthwise.size(1), middle = depthwise.size(3);
  const Geometry g = forward_geometry(x, project_bias.size(0), project_bias.size(1), k, stride, k / 2, replicate);
  STD_TORCH_CHECK(k % 2 == 1, "depthwise: expected an odd kernel");
  check_shape("expand", expand, {g.branches, ceil_div(middle, kPanel), 1, 1, g.in_channels, kPanel});
  check_shape("expand_bias", expand_bias, {g.branches, middle});
  check_shape("depthwise", depthwise, {g.branches, k, k, middle});
  check_shape("depthwise_bias", depthwise_bias, {g.branches, middle});
  check_shape("project", project, {g.branches, ceil_div(g.out_channels, kPanel), 1, 1, middle, kPanel});
  STD_TORCH_CHECK(shortcut.has_value() == shortcut_bias.has_value(), "shortcut: expected with its bias");
  STD_TORCH_CHECK(!identity || (stride == 1 && g.in_channels == g.out_channels && !shortcut.has_value()),
                  "identity: expected equal shapes and no shortcut");
  if (shortcut.has_value()) {
    check_shape("shortcut", *shortcut, {g.branches, ceil_div(g.out_channels, kPanel), 1, 1, g.in_channels, kPanel});
    check_shape("shortcut_bias", *shortcut_bias, {g.branches, g.out_channels});
  }
  return g;
}

}  // namespace hne
