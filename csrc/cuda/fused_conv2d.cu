// Convolution with packed weights, bias and activation (inference).
//
//   G branches, M output pixels each   bytes moved at least    multiply-adds
//   forward                            x + weight + out        G M C_out C_in k^2
#include "convolution.h"

namespace hne {

template <typename T, bool packed>
void run_forward(const Device& device, const Forward<T, packed>& problem) {
  run_gemm<T>(device, problem, problem.vectors());
}
template void run_forward(const Device&, const Forward<float, true>&);
template void run_forward(const Device&, const Forward<half, true>&);
template void run_forward(const Device&, const Forward<bfloat16, true>&);

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
  const Shape shape(g);
  const Device device(x_in);
  const Tensor x = torch::stable::contiguous(x_in), weight = torch::stable::contiguous(weight_in);
  const Tensor bias = torch::stable::contiguous(bias_in);
  Tensor out = torch::stable::new_empty(x, {g.branches, g.batch, g.out_height, g.out_width, g.out_channels});
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const Forward<T, true> problem{.s = shape,
                                   .left_base = data<T>(x),
                                   .right_base = data<T>(weight),
                                   .bias = data<T>(bias),
                                   .range = Clamp<float>::named(activation),
                                   .out = mutable_data<T>(out)};
    run_forward(device, problem);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) { m.impl("fused_conv2d", TORCH_BOX(&fused_conv2d)); }

}  // namespace hne
