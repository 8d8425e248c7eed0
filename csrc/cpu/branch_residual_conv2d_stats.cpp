// The end of a bottleneck and the pointwise convolution that begins the next: z = clamp((x - mean) * scale + shift +
// residual), which is kept, and y = conv(z) with its statistics.
#include "branch_conv2d.h"
#include "conv_norm.h"

namespace hne {
namespace {

Geometry check(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 5, "weight: expected 5 dimensions");
  const Geometry g = forward_geometry(x, weight.size(0), weight.size(1), 1, 1, 0, 1);
  check_shape("weight", weight, {g.branches, g.out_channels, g.in_channels, 1, 1});
  check_kind("x", x, x);
  check_kind("weight", weight, x);
  return g;
}

void check_map(const char* name, const Tensor& t, const Tensor& x) {
  const auto sizes = x.sizes();
  check_shape(name, t, {sizes.begin(), sizes.end()});
  check_kind(name, t, x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x_in, const Tensor& weight_in,
                                                   const std::optional<Tensor>& residual_in, const Tensor& mean,
                                                   const Tensor& scale, const Tensor& shift,
                                                   const std::string& activation) {
  const Normalization normalization(x_in, mean, scale, shift, activation);
  const Geometry g = check(x_in, weight_in);
  if (residual_in.has_value()) check_map("residual", *residual_in, x_in);
  const Tensor x = torch::stable::contiguous(widen(x_in)), weight = torch::stable::contiguous(widen(weight_in));
  const std::optional<Tensor> residual = contiguous(widen(residual_in));
  const Tensor z = empty(x, x_in.sizes());
  const Tensor y = empty(x, {g.branches, g.batch, g.out_height, g.out_width, g.out_channels});
  const auto [y_mean, y_var] = dispatch(x, [&](auto type) {
    using T = decltype(type);
    PrologueInput<T> map = normalization.of<T>(x);
    map.add = data<T>(residual), map.kept = mutable_data<T>(z);
    return statistics<T>(g, y, kBlockRows, [&](const RowsWritten& written) {
      convolve<T>(g, map, weight, nullptr, mutable_data<T>(y), written);
    });
  });
  const ScalarType dtype = x_in.scalar_type();
  return {round_to(z, dtype), round_to(y, dtype), y_mean, y_var};
}

// From the gradients of z, y and the statistics of y; the gradient of the residual is empty where there was none.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_z_in, const Tensor& grad_y, const Tensor& grad_mean, const Tensor& grad_var, const Tensor& z_in,
    const Tensor& y_in, const Tensor& y_mean, const Tensor& x_in, const Tensor& weight_in, const Tensor& mean,
    const Tensor& scale, const Tensor& shift, const std::string& activation, bool has_residual) {
  const Normalization normalization(x_in, mean, scale, shift, activation);
  const OutputGradient above(grad_y, grad_mean, grad_var, y_in, y_mean);
  const Geometry g = check(x_in, weight_in);
  check_kind("y", y_in, x_in);
  check_shape("y", y_in, {g.branches, g.batch, g.out_height, g.out_width, g.out_channels});
  check_map("z", z_in, x_in);
  check_map("grad_z", grad_z_in, x_in);
  const Tensor x = torch::stable::contiguous(widen(x_in)), weight = torch::stable::contiguous(widen(weight_in));
  const Tensor z = torch::stable::contiguous(widen(z_in)), grad_z = torch::stable::contiguous(widen(grad_z_in));
  const Tensor grad_x = empty(x, x_in.sizes()), grad_weight = empty(weight, weight_in.sizes());
  const Tensor grad_scale = empty(x, scale.sizes()), grad_shift = empty(x, shift.sizes());
  const Tensor grad_residual = has_residual ? empty(x, x_in.sizes()) : empty(x, {0});
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const PrologueInput<T> map = normalization.of<T>(x), from{data<T>(z), map.rows, g.in_channels};
    T* const masked = has_residual ? mutable_data<T>(grad_residual) : nullptr;
    T* const total = has_residual ? masked : mutable_data<T>(grad_x);  // the whole gradient of z, for a moment
    ChannelSums<T> sums(g.parents, ceil_div(map.rows, kBlockRows), g.in_channels);
    pointwise_backward(g, above.map<T>(), from, weight, data<T>(grad_z), total, &grad_weight,
                       [&](int64_t branch, int64_t first, int64_t count) {
                         const int64_t at = (branch * map.rows + first) * g.in_channels;
                         NormRows<T> r = map.norm(branch, first, count);
                         r.grad = total + at, r.y = data<T>(z) + at;
                         r.out = mutable_data<T>(grad_x) + at, r.out_masked = has_residual ? masked + at : nullptr;
                         sums.add(branch, first / kBlockRows, r, kernels<T>().normalize_backward);
                       });
    sums.finish(g.parents, mutable_data<T>(grad_shift), mutable_data<T>(grad_scale));
  });
  const ScalarType dtype = x_in.scalar_type();
  return {round_to(grad_x, dtype), grad_scale, grad_shift, round_to(grad_residual, dtype),
          round_to(grad_weight, dtype)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) {
  m.impl("branch_residual_conv2d_stats", TORCH_BOX(&forward));
  m.impl("branch_residual_conv2d_stats_backward", TORCH_BOX(&backward));
}

}  // namespace hne
