// Convolution with packed weights, bias and activation (inference).
#include "branch_conv2d.h"

namespace hne {
namespace {

Tensor fused_conv2d(const Tensor& x_in, const Tensor& weight_in, const Tensor& bias_in, int64_t stride, int64_t padding,
                    int64_t replicate, const std::string& activation) {
  STD_TORCH_CHECK(weight_in.dim() == 6 && bias_in.dim() == 2, "weight: expected 6 dimensions, bias: 2");
  const Geometry g =
      forward_geometry(x_in, bias_in.size(0), bias_in.size(1), weight_in.size(2), stride, padding, replicate);
  check_shape("weight", weight_in,
              {g.branches, ceil_div(g.out_channels, kPanel), g.kernel_size, g.kernel_size, g.in_channels, kPanel});
  check_kind("x", x_in, x_in);
  check_kind("weight", weight_in, x_in);
  check_kind("bias", bias_in, x_in);
  const Tensor x = torch::stable::contiguous(widen(x_in)), weight = torch::stable::contiguous(widen(weight_in));
  const Tensor bias = torch::stable::contiguous(widen(bias_in));
  Tensor out = empty(x, {g.branches, g.batch, g.out_height, g.out_width, g.out_channels});
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    convolve_packed<T>(g, {data<T>(x), g.batch * g.pixels(), g.in_channels}, data<T>(weight), data<T>(bias),
                       Clamp<T>::named(activation), mutable_data<T>(out));
  });
  return round_to(out, x_in.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) { m.impl("fused_conv2d", TORCH_BOX(&fused_conv2d)); }

}  // namespace hne
