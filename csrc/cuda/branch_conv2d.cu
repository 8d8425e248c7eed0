// Branch convolution: plain, and as a training unit that normalises what it reads and gives its result's statistics.
//
//   G branches, M output pixels each   bytes moved at least                               multiply-adds
//   plain                              x + weight + out                                   G M C_out C_in k^2
//   training unit                      x + weight + y (+ statistics of 128 pixels each)   the same
#include "convolution.h"
#include "transpose.h"

namespace hne {

template <typename T, bool packed>
void run_forward(const Device& device, const Forward<T, packed>& problem) {
  run_gemm<T>(device, problem, problem.vectors());
}
template void run_forward(const Device&, const Forward<float, false>&);
template void run_forward(const Device&, const Forward<half, false>&);
template void run_forward(const Device&, const Forward<bfloat16, false>&);

namespace {

Geometry check(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding, int64_t replicate) {
  STD_TORCH_CHECK(weight.dim() == 5, "weight: expected 5 dimensions");
  const Geometry g = forward_geometry(x, weight.size(0), weight.size(1), weight.size(3), stride, padding, replicate);
  check_shape("weight", weight, {g.branches, g.out_channels, g.in_channels, g.kernel_size, g.kernel_size});
  check_kind("x", x, x);
  check_kind("weight", weight, x);
  return g;
}

Tensor branch_conv2d(const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in, int64_t stride,
                     int64_t padding, int64_t replicate) {
  const Geometry g = check(x_in, weight_in, stride, padding, replicate);
  if (bias_in.has_value()) {
    check_shape("bias", *bias_in, {g.branches, g.out_channels});
    check_kind("bias", *bias_in, x_in);
  }
  const Shape shape(g);
  const Device device(x_in);
  const Tensor x = torch::stable::contiguous(x_in), weight = torch::stable::contiguous(weight_in);
  const std::optional<Tensor> bias = contiguous(bias_in);
  Tensor out = torch::stable::new_empty(x, {g.branches, g.batch, g.out_height, g.out_width, g.out_channels});
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const Tensor filters = taps_first<T>(device, weight, g);
    run_forward(device, Forward<T, false>{.s = shape,
                                          .left_base = data<T>(x),
                                          .right_base = data<T>(filters),
                                          .bias = data<T>(bias),
                                          .out = mutable_data<T>(out)});
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> branch_conv2d_stats(const Tensor& x_in, const Tensor& weight_in,
                                                       const std::optional<Tensor>& mean,
                                                       const std::optional<Tensor>& scale,
                                                       const std::optional<Tensor>& shift,
                                                       const std::string& activation, int64_t stride, int64_t padding,
                                                       int64_t replicate) {
  const Geometry g = check(x_in, weight_in, stride, padding, replicate);
  const Shape shape(g);
  const Device device(x_in);
  const NormalizationArguments arguments(mean, scale, shift, activation, g.parents, g.in_channels, x_in);
  const Tensor x = torch::stable::contiguous(x_in), weight = torch::stable::contiguous(weight_in);
  Tensor y = torch::stable::new_empty(x, {g.branches, g.batch, g.out_height, g.out_width, g.out_channels});
  OverPixels statistics(x, g.branches, g.out_channels);
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const Tensor filters = taps_first<T>(device, weight, g);
    Forward<T, false> problem{.s = shape,
                              .left_base = data<T>(x),
                              .right_base = data<T>(filters),
                              .normalization = arguments.normalization,
                              .out = mutable_data<T>(y)};
    problem.partials = statistics.partials(Moments<1>::kPlanes, problem.row_tiles());
    run_forward(device, problem);
  });
  combine_moments(device, statistics, g.batch * g.out_pixels());
  return {y, statistics.first, statistics.second};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) {
  m.impl("branch_conv2d", TORCH_BOX(&branch_conv2d));
  m.impl("branch_conv2d_stats", TORCH_BOX(&branch_conv2d_stats));
}

}  // namespace hne
