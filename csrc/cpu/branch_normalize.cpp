// Normalisation by given statistics, residual sum and activation at the end of a block, in training.
#include "conv_norm.h"

namespace hne {
namespace {

Tensor branch_normalize(const Tensor& x_in, const Tensor& norm, const std::optional<Tensor>& residual_in,
                        const std::optional<Tensor>& residual_norm, const std::string& activation) {
  const Normalization normalization("norm", x_in, norm, activation);
  check_kind("x", x_in, x_in);
  const bool kept = keeps_bfloat16(x_in);
  const Residual residual(residual_in, residual_norm, x_in, kept);
  const Tensor x = read_features(x_in, kept);
  const Tensor y = empty(x, x_in.sizes());
  dispatch_features(x, [&](auto type) {
    using T = decltype(type);
    PrologueInput<T> input = normalization.input<T>(x);
    residual.add_to(input);
    input.write(x.size(0), mutable_data<T>(y));
  });
  return round_to(y, x_in.scalar_type());
}

// The gradient of a residual without a normalisation is `grad` itself where there is no activation; it is left empty
// then. The residual is only given together with its normalisation.
std::tuple<Tensor, Tensor, Tensor, Tensor> branch_normalize_backward(const Tensor& grad_in, const Tensor& x_in,
                                                                     const Tensor& y_in, const Tensor& norm,
                                                                     const std::optional<Tensor>& residual_in,
                                                                     const std::optional<Tensor>& residual_norm,
                                                                     const std::string& activation, bool has_residual) {
  const Normalization normalization("norm", x_in, norm, activation);
  check_kind("x", x_in, x_in);
  const auto sizes = x_in.sizes();
  for (const auto& [name, t] : {std::pair{"grad", &grad_in}, {"y", &y_in}}) {
    check_shape(name, *t, {sizes.begin(), sizes.end()});
    check_kind(name, *t, x_in);
  }
  const bool kept = keeps_bfloat16(x_in);
  const Residual residual(residual_in, residual_norm, x_in, kept);
  const bool activates = activation != "none", normalized = residual.norm.has_value();
  STD_TORCH_CHECK(has_residual || !normalized, "has_residual: expected true with residual_norm");
  const Tensor grad = read_features(grad_in, kept), x = read_features(x_in, kept);
  const Tensor y = activates ? read_features(y_in, kept) : x;
  const Tensor grad_x = empty(x, sizes), grad_norm = empty(norm, norm.sizes());
  const Tensor grad_residual = has_residual && (activates || normalized) ? empty(x, sizes) : empty(x, {0});
  const Tensor grad_residual_norm = normalized ? empty(norm, norm.sizes()) : empty(norm, {0});
  dispatch_features(x, [&](auto type) {
    using T = decltype(type);
    constexpr int64_t kRows = 512;
    PrologueInput<T> input = normalization.input<T>(x);
    residual.add_to(input);
    const int64_t branches = x.size(0), blocks = ceil_div(input.rows, kRows);
    ChannelSums<T> sums(branches, blocks, input.channels);
    ChannelSums<T> residual_sums(branches, normalized ? blocks : 0, input.channels);
    T* const to_residual = mutable_data<T>(grad_residual);
    parallel_tasks(branches * blocks, [&](int64_t task) {
      const int64_t branch = task / blocks, first = task % blocks * kRows;
      const int64_t at = (branch * input.rows + first) * input.channels;
      const int64_t count = std::min(kRows, input.rows - first);
      NormRows<T> r = input.norm(branch, first, count);
      r.y = data<T>(y) + at, r.grad = data<T>(grad) + at, r.out = mutable_data<T>(grad_x) + at;
      r.out_masked = grad_residual.numel() > 0 ? to_residual + at : nullptr;
      sums.add(branch, task % blocks, r, kernels<T>().normalize_backward);
      if (!normalized) return;
      r = input.added_norm(branch, first, count);
      r.grad = to_residual + at, r.out = to_residual + at;
      residual_sums.add(branch, task % blocks, r, kernels<T>().normalize_backward);
    });
    sums.finish_norm(*normalization.norm, grad_norm);
    if (normalized) residual_sums.finish_norm(*residual.norm, grad_residual_norm);
  });
  const ScalarType dtype = x_in.scalar_type();
  return {round_to(grad_x, dtype), grad_norm, round_to(grad_residual, dtype), grad_residual_norm};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) {
  m.impl("branch_normalize", TORCH_BOX(&branch_normalize));
  m.impl("branch_normalize_backward", TORCH_BOX(&branch_normalize_backward));
}

}  // namespace hne
