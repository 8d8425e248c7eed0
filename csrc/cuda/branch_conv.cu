// Host side of the branch convolutions, dense and depthwise: plain ops and training ops (ConvNorm). Their kernels are
// in branch_conv2d*.cu and branch_depthwise_conv2d*.cu, which list bytes and operations.
#include "convolution.h"
#include "weight_layout.h"

namespace hne {
namespace {

// weight [branch][out][in][k][k]
struct Dense {
  static constexpr bool kDepthwise = false;
  static constexpr int kWeightDims = 5;
  static std::vector<int64_t> weight_shape(const Geometry& g) {
    return {g.branches, g.out_channels, g.in_channels, g.kernel_size, g.kernel_size};
  }
};

// weight [branch][channel][k][k]
struct Depthwise {
  static constexpr bool kDepthwise = true;
  static constexpr int kWeightDims = 4;
  static std::vector<int64_t> weight_shape(const Geometry& g) {
    return {g.branches, g.in_channels, g.kernel_size, g.kernel_size};
  }
};

// --- checks ------------------------------------------------------------------------------------------------

void check_bias(const std::optional<Tensor>& bias, const Geometry& g, const Tensor& x) {
  if (bias.has_value()) check_shape("bias", *bias, {g.branches, g.out_channels});
  check_kind("bias", bias, x);
}

void check_input(const Tensor& x, const Geometry& g, const Tensor& like) {
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
  STD_TORCH_CHECK(!Kind::kDepthwise || g.out_channels == g.in_channels,
                  "grad: expected the channels of the input of the depthwise convolution");
  check_kind("grad", grad, grad);
  Shape{g};  // raises where 32 bits are too few
  return g;
}

// --- launches ----------------------------------------------------------------------------------------------

// y = conv(normalization(x), weight) + bias; `statistics`, unless null, gets mean and variance of y.
template <typename Kind>
Tensor convolve(const Geometry& g, const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in,
                const Normalization& normalization = {}, ChannelReduction* statistics = nullptr) {
  const Device device(x_in);
  const Tensor x = torch::stable::contiguous(x_in), weight = torch::stable::contiguous(weight_in);
  const std::optional<Tensor> bias = contiguous(bias_in);
  Tensor out = torch::stable::new_empty(x, g.out_shape());
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const Tensor filters = taps_first<T>(device, weight, g);
    const Convolution<T> d{.s = Shape(g),
                           .x = data<T>(x),
                           .normalization = normalization,
                           .filters = data<T>(filters),
                           .bias = data<T>(bias),
                           .out = mutable_data<T>(out)};
    if constexpr (Kind::kDepthwise)
      depthwise_forward(device, d, statistics);
    else
      dense_forward(device, d, statistics);
  });
  if (statistics != nullptr) combine_moments(device, *statistics, g.batch * g.out_pixels());
  return out;
}

// Gradient of x; `sums`, unless null, gets the gradients of the normalisation's scale and shift.
template <typename Kind>
Tensor input_gradient(const Geometry& g, const OutputGradientArguments& output, const Tensor& weight_in,
                      const std::optional<Tensor>& x_in = {}, const Normalization& normalization = {},
                      ChannelReduction* sums = nullptr) {
  const Device device(output.grad);
  const Tensor weight = torch::stable::contiguous(weight_in);
  const std::optional<Tensor> x = contiguous(x_in);
  Tensor out = torch::stable::new_empty(output.grad, {g.parents, g.batch, g.height, g.width, g.in_channels});
  dispatch(out, [&](auto type) {
    using T = decltype(type);
    const Tensor filters = taps_first<T>(device, weight, g);
    const InputGradient<T> d{.s = Shape(g),
                             .output = output.operands<T>(),
                             .filters = data<T>(filters),
                             .x = data<T>(x),
                             .normalization = normalization,
                             .out = mutable_data<T>(out)};
    if constexpr (Kind::kDepthwise)
      depthwise_backward_input(device, d, sums);
    else
      dense_backward_input(device, d, sums);
  });
  if (sums != nullptr) combine_sums(device, *sums);
  return out;
}

template <typename Kind>
Tensor weight_gradient(const Geometry& g, const OutputGradientArguments& output, const Tensor& x_in,
                       const Normalization& normalization = {}) {
  const Device device(x_in);
  const Tensor x = torch::stable::contiguous(x_in);
  Tensor out = torch::stable::new_empty(x, Kind::weight_shape(g));
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const WeightGradient<T> d{
        .s = Shape(g), .output = output.operands<T>(), .x = data<T>(x), .normalization = normalization};
    if constexpr (Kind::kDepthwise)
      taps_last<T>(device, depthwise_backward_weight(device, d, x), out);
    else
      taps_last<T>(device, dense_backward_weight(device, d, x), out);
  });
  return out;
}

// --- ops ---------------------------------------------------------------------------------------------------

template <typename Kind>
struct BranchConv {
  static Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride,
                        int64_t padding, int64_t replicate) {
    const Geometry g = check_forward<Kind>(x, weight, stride, padding, replicate);
    check_bias(bias, g, x);
    return convolve<Kind>(g, x, weight, bias);
  }

  static Tensor backward_input(const Tensor& grad, const Tensor& weight, int64_t height, int64_t width, int64_t stride,
                               int64_t padding, int64_t replicate) {
    const int64_t kernel_size = kernel_size_of<Kind>(weight), in_channels = weight.size(Kind::kWeightDims - 3);
    const Geometry g = check_backward<Kind>(grad, in_channels, height, width, kernel_size, stride, padding, replicate);
    check_weight<Kind>(weight, g, grad);
    return input_gradient<Kind>(g, OutputGradientArguments(grad), weight);
  }

  static Tensor backward_weight(const Tensor& grad, const Tensor& x, int64_t kernel_size, int64_t stride,
                                int64_t padding, int64_t replicate) {
    STD_TORCH_CHECK(x.dim() == 5, "x: expected 5 dimensions");
    const Geometry g =
        check_backward<Kind>(grad, x.size(4), x.size(2), x.size(3), kernel_size, stride, padding, replicate);
    check_input(x, g, grad);
    return weight_gradient<Kind>(g, OutputGradientArguments(grad), x);
  }
};

// Training: normalises its input as it reads it and returns the statistics of its result.
template <typename Kind>
struct ConvNorm {
  static std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight,
                                                    const std::optional<Tensor>& mean,
                                                    const std::optional<Tensor>& scale,
                                                    const std::optional<Tensor>& shift, const std::string& activation,
                                                    int64_t stride, int64_t padding, int64_t replicate) {
    const Geometry g = check_forward<Kind>(x, weight, stride, padding, replicate);
    const NormalizationArguments norm(mean, scale, shift, activation, g.parents, g.in_channels, x);
    ChannelReduction statistics(x, g.branches, g.out_channels);
    const Tensor y = convolve<Kind>(g, x, weight, std::nullopt, norm.normalization, &statistics);
    return {y, statistics.first, statistics.second};
  }

  // Each gradient has a kernel of its own; one that is not needed is an empty tensor.
  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
      const Tensor& grad, const Tensor& grad_mean, const Tensor& grad_var, const Tensor& y, const Tensor& y_mean,
      const Tensor& weight, const Tensor& x, const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
      const std::optional<Tensor>& shift, const std::string& activation, int64_t stride, int64_t padding,
      int64_t replicate, bool need_input, bool need_weight) {
    STD_TORCH_CHECK(x.dim() == 5, "x: expected 5 dimensions");
    const Geometry g = check_backward<Kind>(grad, x.size(4), x.size(2), x.size(3), kernel_size_of<Kind>(weight), stride,
                                            padding, replicate);
    check_input(x, g, grad);
    check_weight<Kind>(weight, g, grad);
    const OutputGradientArguments output(grad, grad_mean, grad_var, y, y_mean);
    const NormalizationArguments norm(mean, scale, shift, activation, g.parents, g.in_channels, x);
    Tensor grad_x = torch::stable::new_empty(x, {0}), grad_weight = torch::stable::new_empty(weight, {0});
    Tensor grad_scale = no_statistics(x), grad_shift = no_statistics(x);
    if (need_input && norm.normalization.present()) {
      ChannelReduction sums(x, g.parents, g.in_channels);
      grad_x = input_gradient<Kind>(g, output, weight, x, norm.normalization, &sums);
      grad_scale = sums.first, grad_shift = sums.second;
    } else if (need_input) {
      grad_x = input_gradient<Kind>(g, output, weight);
    }
    if (need_weight) grad_weight = weight_gradient<Kind>(g, output, x, norm.normalization);
    return {grad_x, grad_scale, grad_shift, grad_weight};
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) {
  m.impl("branch_conv2d", TORCH_BOX(&BranchConv<Dense>::forward));
  m.impl("branch_conv2d_backward_input", TORCH_BOX(&BranchConv<Dense>::backward_input));
  m.impl("branch_conv2d_backward_weight", TORCH_BOX(&BranchConv<Dense>::backward_weight));
  m.impl("branch_depthwise_conv2d", TORCH_BOX(&BranchConv<Depthwise>::forward));
  m.impl("branch_depthwise_conv2d_backward_input", TORCH_BOX(&BranchConv<Depthwise>::backward_input));
  m.impl("branch_depthwise_conv2d_backward_weight", TORCH_BOX(&BranchConv<Depthwise>::backward_weight));
  m.impl("branch_conv2d_stats", TORCH_BOX(&ConvNorm<Dense>::forward));
  m.impl("branch_conv2d_stats_backward", TORCH_BOX(&ConvNorm<Dense>::backward));
  m.impl("branch_depthwise_conv2d_stats", TORCH_BOX(&ConvNorm<Depthwise>::forward));
  m.impl("branch_depthwise_conv2d_stats_backward", TORCH_BOX(&ConvNorm<Depthwise>::backward));
}

}  // namespace hne
