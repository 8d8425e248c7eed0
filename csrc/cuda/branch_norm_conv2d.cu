// Convolution between two batch norms in training, dense or depthwise: it normalises its input as it reads it and gives
// the batch statistics of its output. The kernels are those of the plain convolutions, whose files list bytes and
// operations; each gradient has a kernel of its own.
#include "branch_conv.h"

namespace hne {
namespace {

// f(Dense{}) or f(Depthwise{}), by the dimensions of the weight.
template <typename F>
auto by_kind(const Tensor& weight, const F& f) {
  STD_TORCH_CHECK(weight.dim() == 5 || weight.dim() == 4, "weight: expected 5 (dense) or 4 (depthwise) dimensions");
  return weight.dim() == 5 ? f(Dense{}) : f(Depthwise{});
}

// The schemas also allow a fused kernel that stores its normalised input z; only the CPU library has one.
void check_not_materialized(bool materialize) {
  STD_TORCH_CHECK(!materialize, "materialize, residual, z: not supported on CUDA; ",
                  "hne_kernels.branch_norm_conv2d calls branch_normalize first instead");
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// y, its mean and variance, and an empty z.
Results branch_norm_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& norm,
                           const std::optional<Tensor>& residual, const std::string& activation, int64_t stride,
                           int64_t padding, int64_t replicate, bool materialize) {
  check_not_materialized(materialize || residual.has_value());
  return by_kind(weight, [&](auto kind) -> Results {
    using Kind = decltype(kind);
    const Geometry g = check_forward<Kind>(x, weight, stride, padding, replicate);
    const NormalizationArguments arguments(norm, activation, x);
    const Device device(x);
    ChannelReduction moments(x, g.branches, g.out_channels);
    const Tensor y = convolve<Kind>(device, g, x, weight, std::nullopt, arguments.normalization, &moments);
    const auto [mean, var] = combine_moments(device, moments, g.batch * g.out_pixels());
    return {y, mean, var, torch::stable::new_empty(x, {0})};
  });
}

// Gradients of x, weight and norm, and an empty one of the residual. `need_input` is for all but the weight; a gradient
// that is not needed is an empty tensor.
Results branch_norm_conv2d_backward(const Tensor& grad_y, const Tensor& grad_mean, const Tensor& grad_var,
                                    const std::optional<Tensor>& grad_z, const Tensor& y, const Tensor& y_mean,
                                    const std::optional<Tensor>& z, const Tensor& x, const Tensor& weight,
                                    const std::optional<Tensor>& norm, const std::string& activation, int64_t stride,
                                    int64_t padding, int64_t replicate, bool has_residual, bool need_input,
                                    bool need_weight) {
  check_not_materialized(grad_z.has_value() || z.has_value() || has_residual);
  STD_TORCH_CHECK(x.dim() == 5, "x: expected 5 dimensions");
  return by_kind(weight, [&](auto kind) -> Results {
    using Kind = decltype(kind);
    const Geometry g = check_backward<Kind>(grad_y, x.size(4), x.size(2), x.size(3), kernel_size_of<Kind>(weight),
                                            stride, padding, replicate);
    check_input(x, g, grad_y);
    check_weight<Kind>(weight, g, grad_y);
    const OutputGradientArguments output(grad_y, grad_mean, grad_var, y, y_mean);
    const NormalizationArguments arguments(norm, activation, x);
    const Normalization& normalization = arguments.normalization;
    const Device device(x);
    Tensor grad_x = torch::stable::new_empty(x, {0}), grad_weight = torch::stable::new_empty(weight, {0});
    Tensor grad_norm = torch::stable::new_empty(x, {0}, ScalarType::Float);
    if (need_input && norm.has_value()) {
      ChannelReduction sums(x, g.parents, g.in_channels);
      grad_x = input_gradient<Kind>(device, g, output, weight, x, normalization, &sums);
      grad_norm = combine_norm_gradient(device, sums, normalization.scale);
    } else if (need_input) {
      grad_x = input_gradient<Kind>(device, g, output, weight);
    }
    if (need_weight) grad_weight = weight_gradient<Kind>(device, g, output, x, normalization);
    return {grad_x, grad_weight, grad_norm, torch::stable::new_empty(x, {0})};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) {
  m.impl("branch_norm_conv2d", TORCH_BOX(&branch_norm_conv2d));
  m.impl("branch_norm_conv2d_backward", TORCH_BOX(&branch_norm_conv2d_backward));
}

}  // namespace hne
