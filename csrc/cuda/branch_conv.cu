// The plain branch convolutions, dense and depthwise. The kernel of an op is in the file with the name of the op.
#include "branch_conv.h"

namespace hne {
namespace {

void check_bias(const std::optional<Tensor>& bias, const Geometry& g, const Tensor& x) {
  if (bias.has_value()) check_shape("bias", *bias, {g.branches, g.out_channels});
  check_kind("bias", bias, x);
}

template <typename Kind>
struct BranchConv {
  static Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride,
                        int64_t padding, int64_t replicate) {
    const Geometry g = check_forward<Kind>(x, weight, stride, padding, replicate);
    check_bias(bias, g, x);
    return convolve<Kind>(Device(x), g, x, weight, bias);
  }

  static Tensor backward_input(const Tensor& grad, const Tensor& weight, int64_t height, int64_t width, int64_t stride,
                               int64_t padding, int64_t replicate) {
    const int64_t kernel_size = kernel_size_of<Kind>(weight), in_channels = weight.size(Kind::kWeightDims - 3);
    const Geometry g = check_backward<Kind>(grad, in_channels, height, width, kernel_size, stride, padding, replicate);
    check_weight<Kind>(weight, g, grad);
    return input_gradient<Kind>(Device(grad), g, OutputGradientArguments(grad), weight);
  }

  static Tensor backward_weight(const Tensor& grad, const Tensor& x, int64_t kernel_size, int64_t stride,
                                int64_t padding, int64_t replicate) {
    STD_TORCH_CHECK(x.dim() == 5, "x: expected 5 dimensions");
    const Geometry g =
        check_backward<Kind>(grad, x.size(4), x.size(2), x.size(3), kernel_size, stride, padding, replicate);
    check_input(x, g, grad);
    return weight_gradient<Kind>(Device(x), g, OutputGradientArguments(grad), x);
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
}

}  // namespace hne
