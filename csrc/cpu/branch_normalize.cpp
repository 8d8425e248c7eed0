// Normalisation by given statistics, the residual sum and the activation: the end of a block in training.
#include "prologue.h"

namespace hne {
namespace {

Tensor branch_normalize(const Tensor& x_in, const Tensor& mean_in, const Tensor& scale_in, const Tensor& shift_in,
                        const std::optional<Tensor>& residual_in, const std::string& activation) {
  STD_TORCH_CHECK(x_in.dim() == 5, "x: expected 5 dimensions");
  const int64_t branches = x_in.size(0), channels = x_in.size(4);
  check_kind("x", x_in, x_in);
  check_vector("mean", mean_in, x_in, branches, channels);
  check_vector("scale", scale_in, x_in, branches, channels);
  check_vector("shift", shift_in, x_in, branches, channels);
  if (residual_in.has_value()) {
    const auto sizes = x_in.sizes();
    check_shape("residual", *residual_in, {sizes.begin(), sizes.end()});
    check_kind("residual", *residual_in, x_in);
  }
  const Tensor x = torch::stable::contiguous(widen(x_in)), mean = torch::stable::contiguous(mean_in);
  const Tensor scale = torch::stable::contiguous(scale_in), shift = torch::stable::contiguous(shift_in);
  const std::optional<Tensor> residual = contiguous(widen(residual_in));
  Tensor y = empty(x, x_in.sizes());
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const PrologueInput<T> map{
        data<T>(x),        x.size(1) * x.size(2) * x.size(3), channels, data<T>(mean), data<T>(scale), data<T>(shift),
        data<T>(residual), Clamp<T>::named(activation)};
    map.write(branches, mutable_data<T>(y));
  });
  return round_to(y, x_in.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> branch_normalize_backward(const Tensor& grad_in, const Tensor& x_in,
                                                                     const Tensor& y_in, const Tensor& mean_in,
                                                                     const Tensor& scale_in,
                                                                     const std::string& activation) {
  STD_TORCH_CHECK(x_in.dim() == 5, "x: expected 5 dimensions");
  const int64_t branches = x_in.size(0), channels = x_in.size(4);
  const int64_t rows = x_in.size(1) * x_in.size(2) * x_in.size(3);
  const auto sizes = x_in.sizes();
  check_kind("x", x_in, x_in);
  for (const auto& [name, t] : {std::pair{"grad", &grad_in}, {"y", &y_in}}) {
    check_shape(name, *t, {sizes.begin(), sizes.end()});
    check_kind(name, *t, x_in);
  }
  check_vector("mean", mean_in, x_in, branches, channels);
  check_vector("scale", scale_in, x_in, branches, channels);
  const bool masks = activation != "none";
  const Tensor grad = torch::stable::contiguous(widen(grad_in)), x = torch::stable::contiguous(widen(x_in));
  const Tensor y = masks ? torch::stable::contiguous(widen(y_in)) : x;
  const Tensor mean = torch::stable::contiguous(mean_in), scale = torch::stable::contiguous(scale_in);
  Tensor grad_x = empty(x, x_in.sizes());
  Tensor grad_scale = empty(scale, {branches, channels});
  Tensor grad_shift = empty(scale, {branches, channels});
  Tensor grad_residual = masks ? empty(x, x_in.sizes()) : empty(x, {0});
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    constexpr int64_t kRows = 512;
    const int64_t shares = ceil_div(rows, kRows);
    ChannelSums<T> sums(branches, shares, channels);
    parallel_tasks(branches * shares, [&](int64_t task) {
      const int64_t branch = task / shares, first = task % shares * kRows, at = (branch * rows + first) * channels;
      NormRows<T> r{};
      r.x = data<T>(x) + at, r.y = data<T>(y) + at, r.grad = data<T>(grad) + at;
      r.out = mutable_data<T>(grad_x) + at, r.out_masked = masks ? mutable_data<T>(grad_residual) + at : nullptr;
      r.mean = data<T>(mean) + branch * channels, r.scale = data<T>(scale) + branch * channels;
      r.count = std::min(kRows, rows - first), r.channels = channels, r.clamp = Clamp<T>::named(activation);
      sums.add(branch, task % shares, r, kernels<T>().normalize_backward);
    });
    sums.finish(branches, mutable_data<T>(grad_shift), mutable_data<T>(grad_scale));
  });
  const ScalarType dtype = x_in.scalar_type();
  return {round_to(grad_x, dtype), grad_scale, grad_shift, round_to(grad_residual, dtype)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) {
  m.impl("branch_normalize", TORCH_BOX(&branch_normalize));
  m.impl("branch_normalize_backward", TORCH_BOX(&branch_normalize_backward));
}

}  // namespace hne
