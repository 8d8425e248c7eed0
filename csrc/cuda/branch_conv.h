// Host side of the branch convolutions, dense and depthwise, for the plain ops and branch_norm_conv2d. The kernels are
// in branch_conv2d*.cu and branch_depthwise_conv2d*.cu, which list bytes and operations.
#pragma once

#include "convolution.h"
#include "weight_layout.h"

namespace hne {

// weight [branch][out][in][k][k]
struct Dense {
  static constexpr int kWeightDims = 5;
  static std::vector<int64_t> weight_shape(const Geometry& g) {
    return {g.branches, g.out_channels, g.in_channels, g.kernel_size, g.kernel_size};
  }
  static void forward(const auto&... arguments) { dense_forward(arguments...); }
  static void backward_input(const auto&... arguments) { dense_backward_input(arguments...); }
  static Tensor backward_weight(const auto&... arguments) { return dense_backward_weight(arguments...); }
};

// weight [branch][channel][k][k]
struct Depthwise {
  static constexpr int kWeightDims = 4;
  static std::vector<int64_t> weight_shape(const Geometry& g) {
    return {g.branches, g.in_channels, g.kernel_size, g.kernel_size};
  }
  static void forward(const auto&... arguments) { depthwise_forward(arguments...); }
  static void backward_input(const auto&... arguments) { depthwise_backward_input(arguments...); }
  static Tensor backward_weight(const auto&... arguments) { return depthwise_backward_weight(arguments...); }
};

// --- checks ------------------------------------------------------------------------------------------------

inline void check_input(const Tensor& x, const Geometry& g, const Tensor& like) {
  check_shape("x", x, {g.parents, g.batch, g.height, g.width, g.in_channels});
  check_kind("x", x, like);
}

template <typename Kind>
int64_t kernel_size_of(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == Kind::kWeightDims, "weight: expected ", Kind::kWeightDims, " dimensions");
  return weight.size(Kind::kWeightDims - 1);
}

template <typename Kind>
void check_weight(const Tensor& weight, const Geometry& g, const Tensor& like) {
  check_shape("weight", weight, Kind::weight_shape(g));
  check_kind("weight", weight, like);
}

template <typename Kind>
Geometry check_forward(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding, int64_t replicate) {
  const int64_t kernel_size = kernel_size_of<Kind>(weight);
  const Geometry g = forward_geometry(x, weight.size(0), weight.size(1), kernel_size, stride, padding, replicate);
  check_kind("x", x, x);
  check_weight<Kind>(weight, g, x);
  Shape{g};  // raises where 32 bits are too few
  return g;
}

template <typename Kind>
Geometry check_backward(const Tensor& grad, int64_t in_channels, int64_t height, int64_t width, int64_t kernel_size,
                        int64_t stride, int64_t padding, int64_t replicate) {
  const Geometry g = backward_geometry(grad, in_channels, height, width, kernel_size, stride, padding, replicate);
  STD_TORCH_CHECK(Kind::kWeightDims == 5 || g.out_channels == g.in_channels,
                  "grad: expected the channels of the input of the depthwise convolution");
  check_kind("grad", grad, grad);
  Shape{g};  // raises where 32 bits are too few
  return g;
}

// --- launches ----------------------------------------------------------------------------------------------

// y = conv(normalization(x), weight) + bias; `moments`, unless null, gets the partial Moments of y.
template <typename Kind>
Tensor convolve(const Device& device, const Geometry& g, const Tensor& x_in, const Tensor& weight,
                const std::optional<Tensor>& bias_in, const Normalization& normalization = {},
                ChannelReduction* moments = nullptr) {
  const Tensor x = torch::stable::contiguous(x_in);
  const std::optional<Tensor> bias = contiguous(bias_in);
  Tensor out = torch::stable::new_empty(x, g.out_shape());
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const TapsFirst filters = taps_first(device, weight, g);
    const Convolution<T> d{.s = Shape(g),
                           .x = data<T>(x),
                           .normalization = normalization,
                           .filters = data<T>(filters.values),
                           .strides = filters.strides,
                           .bias = data<T>(bias),
                           .out = mutable_data<T>(out)};
    Kind::forward(device, d, moments);
  });
  return out;
}

// Gradient of x; `sums`, unless null, gets the partial gradients of the normalisation's scale and shift (Pair).
template <typename Kind>
Tensor input_gradient(const Device& device, const Geometry& g, const OutputGradientArguments& output,
                      const Tensor& weight, const std::optional<Tensor>& x_in = {},
                      const Normalization& normalization = {}, ChannelReduction* sums = nullptr) {
  const std::optional<Tensor> x = contiguous(x_in);
  Tensor out = torch::stable::new_empty(output.grad, {g.parents, g.batch, g.height, g.width, g.in_channels});
  dispatch(out, [&](auto type) {
    using T = decltype(type);
    const TapsFirst filters = taps_first(device, weight, g);
    const InputGradient<T> d{.s = Shape(g),
                             .output = output.operands<T>(),
                             .filters = data<T>(filters.values),
                             .strides = filters.strides,
                             .x = data<T>(x),
                             .normalization = normalization,
                             .out = mutable_data<T>(out)};
    Kind::backward_input(device, d, sums);
  });
  return out;
}

template <typename Kind>
Tensor weight_gradient(const Device& device, const Geometry& g, const OutputGradientArguments& output,
                       const Tensor& x_in, const Normalization& normalization = {}) {
  const Tensor x = torch::stable::contiguous(x_in);
  Tensor out = torch::stable::new_empty(x, Kind::weight_shape(g));
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const WeightGradient<T> d{
        .s = Shape(g), .output = output.operands<T>(), .x = data<T>(x), .normalization = normalization};
    taps_last(device, Kind::backward_weight(device, d, x), out);
  });
  return out;
}

}  // namespace hne
