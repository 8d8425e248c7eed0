// Dense convolution with packed weights, bias, residual and activation (inference).
//
//   G branches, M output pixels each   bytes moved at least               multiply-adds
//   forward                            x + weight (+ residual) + out      G M C_out C_in k^2
#include "dense_forward.h"
#include "few_channels.h"
#include "small_product.h"

namespace hne {

template <typename T>
void dense_forward_packed(const Device& device, const Convolution<T>& d, const T* add, int add_replicate) {
  if (run_small_product<T, true>(device, d, add, add_replicate)) return;
  DenseForward<T, true> problem(d, nullptr);
  problem.add = add, problem.add_replicate = add_replicate;
  run_gemm<T>(device, problem);
}
template void dense_forward_packed(const Device&, const Convolution<float>&, const float*, int);
template void dense_forward_packed(const Device&, const Convolution<half>&, const half*, int);
template void dense_forward_packed(const Device&, const Convolution<bfloat16>&, const bfloat16*, int);

namespace {

Tensor fused_conv2d(const Tensor& x_in, const Tensor& weight_in, const Tensor& bias_in, int64_t stride, int64_t padding,
                    int64_t replicate, const std::string& activation, const std::optional<Tensor>& residual_in,
                    int64_t residual_replicate) {
  STD_TORCH_CHECK(weight_in.dim() == 6 && bias_in.dim() == 2, "weight: expected 6 dimensions, bias: 2");
  const Geometry g =
      forward_geometry(x_in, bias_in.size(0), bias_in.size(1), weight_in.size(2), stride, padding, replicate);
  check_shape("weight", weight_in,
              {g.branches, ceil_div(g.out_channels, kPanel), g.kernel_size, g.kernel_size, g.in_channels, kPanel});
  check_kind("x", x_in, x_in);
  check_kind("weight", weight_in, x_in);
  check_kind("bias", bias_in, x_in);
  check_residual(residual_in, residual_replicate, g);
  check_kind("residual", residual_in, x_in);
  const Shape shape(g);
  const Device device(x_in);
  const Tensor weight = torch::stable::contiguous(weight_in), bias = torch::stable::contiguous(bias_in);
  const std::optional<Tensor> residual = contiguous(residual_in);
  const int add_replicate = int(std::min(residual_replicate, std::max<int64_t>(g.branches, 1)));
  Tensor out = torch::stable::new_empty(x_in, g.out_shape());
  dispatch(x_in, [&](auto type) {
    using T = decltype(type);
    Convolution<T> d{.s = shape,
                     .range = Clamp<float>::named(activation),
                     .x = data<T>(x_in),
                     .filters = data<T>(weight),
                     .bias = data<T>(bias),
                     .out = mutable_data<T>(out)};
    // Images are read as they are, in either memory format. A sum goes through the general kernel: networks add to
    // features, and the results of the kernel for images have no second operand on their way out.
    if (!residual.has_value() && !whole_vectors<T>({g.in_channels}, {d.x})) {
      std::array<int64_t, 5> strides;
      std::copy_n(x_in.strides().begin(), 5, strides.begin());
      if (run_few_channels(device, d, strides)) return;
    }
    const Tensor x = torch::stable::contiguous(x_in);
    d.x = data<T>(x);
    dense_forward_packed(device, d, data<T>(residual), add_replicate);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) { m.impl("fused_conv2d", TORCH_BOX(&fused_conv2d)); }

}  // namespace hne
