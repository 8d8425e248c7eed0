// Convolution with packed weights, bias, residual and activation (inference).
#include "packed_convolution.h"

namespace hne {
namespace {

Tensor fused_conv2d(const Tensor& x_in, const Tensor& weight, const Tensor& bias, int64_t stride, int64_t padding,
                    int64_t replicate, const std::string& activation, const std::optional<Tensor>& residual_in,
                    int64_t residual_replicate) {
  const PackedConvolution convolution(weight, bias, stride, padding, replicate, activation, false);
  check_kind("x", x_in, weight);
  const Tensor x = torch::stable::contiguous(widen(x_in));
  const auto sizes = x.sizes();
  const Geometry g = convolution.geometry({sizes.begin(), sizes.end()});
  check_residual(residual_in, residual_replicate, g);
  if (residual_in.has_value()) check_kind("residual", *residual_in, weight);
  const std::optional<Tensor> residual = contiguous(widen(residual_in));
  const Tensor out = empty(x, g.out_shape());
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    convolution.forward<T>(g, data<T>(x), mutable_data<T>(out), {data<T>(residual), residual_replicate});
  });
  return round_to(out, x_in.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) { m.impl("fused_conv2d", TORCH_BOX(&fused_conv2d)); }

}  // namespace hne
