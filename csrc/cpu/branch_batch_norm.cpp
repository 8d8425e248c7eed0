// Training batch norm with the residual sum and the activation: one pass for the statistics, one to apply.
#include <cmath>

#include "op.h"

namespace hne {
namespace {

constexpr int64_t kRows = 128;  // rows summed in the tensor's own precision before they join the double sums

// Sums over all rows of a branch, [branch][2][channels] in double: equal shares of the rows, added in order.
template <typename T, typename F>
std::vector<double> branch_sums(int64_t branches, int64_t rows, int64_t channels, const F& chunk_sums) {
  const int64_t chunks = ceil_div(rows, kRows);
  const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(chunks, 16));
  std::vector<double> partial(branches * shares * 2 * channels, 0.0), sums(branches * 2 * channels, 0.0);
  parallel_tasks(branches * shares, [&](int64_t task) {
    const int64_t branch = task / shares, share = task % shares;
    for (int64_t chunk = chunks * share / shares; chunk < chunks * (share + 1) / shares; ++chunk) {
      const int64_t first = chunk * kRows;
      chunk_sums(branch, branch * rows + first, std::min(kRows, rows - first), partial.data() + task * 2 * channels);
    }
  });
  for (int64_t branch = 0; branch < branches; ++branch)
    for (int64_t share = 0; share < shares; ++share)
      for (int64_t i = 0; i < 2 * channels; ++i)
        sums[branch * 2 * channels + i] += partial[(branch * shares + share) * 2 * channels + i];
  return sums;
}

template <typename F>
void for_row_chunks(int64_t branches, int64_t rows, const F& f) {
  constexpr int64_t kApplyRows = 512;
  const int64_t chunks = ceil_div(rows, kApplyRows);
  parallel_tasks(branches * chunks, [&](int64_t task) {
    const int64_t branch = task / chunks, first = task % chunks * kApplyRows;
    f(branch, branch * rows + first, std::min(kApplyRows, rows - first));
  });
}

std::tuple<Tensor, Tensor, Tensor> branch_batch_norm(const Tensor& x_in, const Tensor& weight_in, const Tensor& bias_in,
                                                     const std::optional<Tensor>& residual_in,
                                                     const std::string& activation, double eps) {
  STD_TORCH_CHECK(x_in.dim() == 5, "x: expected 5 dimensions");
  const int64_t branches = x_in.size(0), channels = x_in.size(4);
  const int64_t rows = x_in.size(1) * x_in.size(2) * x_in.size(3);
  check_shape("weight", weight_in, {branches, channels});
  check_shape("bias", bias_in, {branches, channels});
  check_kind("x", x_in, x_in);
  check_kind("bias", bias_in, weight_in);
  if (residual_in.has_value()) {
    const auto sizes = x_in.sizes();
    check_shape("residual", *residual_in, {sizes.begin(), sizes.end()});
    check_kind("residual", *residual_in, x_in);
  }
  const Tensor x = torch::stable::contiguous(widen(x_in));
  const Tensor weight = torch::stable::contiguous(widen(weight_in)), bias = torch::stable::contiguous(widen(bias_in));
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight: expected the dtype of the statistics of x");
  const std::optional<Tensor> residual = contiguous(widen(residual_in));
  Tensor y = torch::stable::new_empty(x, x_in.sizes());
  Tensor mean = torch::stable::new_empty(weight, {branches, channels});
  Tensor var = torch::stable::new_empty(weight, {branches, channels});
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    // Sums of x - shift with the branch's first row as shift: the variance does not cancel for a large mean.
    const std::vector<double> sums =
        branch_sums<T>(branches, rows, channels, [&](int64_t branch, int64_t row, int64_t count, double* into) {
          NormRows<T> r{};
          r.x = data<T>(x) + row * channels, r.shift = data<T>(x) + branch * rows * channels;
          r.sums = into, r.partial = scratch<T>(0, 2 * channels), r.count = count, r.channels = channels;
          kernels<T>().norm_statistics(r);
        });
    std::vector<T> scale(branches * channels);
    for (int64_t i = 0; i < branches * channels; ++i) {
      const int64_t branch = i / channels, c = i % channels;
      const double values = double(std::max<int64_t>(rows, 1));  // an empty batch has mean and variance 0
      const double first = sums[branch * 2 * channels + c] / values;
      const double second = sums[(branch * 2 + 1) * channels + c] / values;
      const double origin = rows > 0 ? double(data<T>(x)[branch * rows * channels + c]) : 0.0;
      mutable_data<T>(mean)[i] = T(origin + first);
      mutable_data<T>(var)[i] = T(std::max(second - first * first, 0.0));
      scale[i] = T(data<T>(weight)[i] / std::sqrt(double(mutable_data<T>(var)[i]) + eps));
    }
    for_row_chunks(branches, rows, [&](int64_t branch, int64_t row, int64_t count) {
      NormRows<T> r{};
      r.x = data<T>(x) + row * channels;
      r.residual = residual.has_value() ? data<T>(residual) + row * channels : nullptr;
      r.mean = data<T>(mean) + branch * channels, r.scale = scale.data() + branch * channels;
      r.shift = data<T>(bias) + branch * channels, r.out = mutable_data<T>(y) + row * channels;
      r.count = count, r.channels = channels, r.clamp = Clamp<T>::named(activation);
      kernels<T>().norm_apply(r);
    });
  });
  return {round_to(y, x_in.scalar_type()), round_to(mean, weight_in.scalar_type()),
          round_to(var, weight_in.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> branch_batch_norm_backward(const Tensor& grad_in, const Tensor& x_in,
                                                                      const Tensor& y_in, const Tensor& weight_in,
                                                                      const Tensor& mean_in, const Tensor& var_in,
                                                                      bool with_residual, const std::string& activation,
                                                                      double eps) {
  STD_TORCH_CHECK(x_in.dim() == 5, "x: expected 5 dimensions");
  const int64_t branches = x_in.size(0), channels = x_in.size(4);
  const int64_t rows = x_in.size(1) * x_in.size(2) * x_in.size(3);
  const auto sizes = x_in.sizes();
  for (const auto& [name, t] : {std::pair{"grad", &grad_in}, {"y", &y_in}}) {
    check_shape(name, *t, {sizes.begin(), sizes.end()});
    check_kind(name, *t, x_in);
  }
  for (const auto& [name, t] : {std::pair{"weight", &weight_in}, {"mean", &mean_in}, {"var", &var_in}}) {
    check_shape(name, *t, {branches, channels});
    check_kind(name, *t, weight_in);
  }
  check_kind("x", x_in, x_in);
  const Tensor grad = torch::stable::contiguous(widen(grad_in)), x = torch::stable::contiguous(widen(x_in));
  const Tensor y = torch::stable::contiguous(widen(y_in)), weight = torch::stable::contiguous(widen(weight_in));
  const Tensor mean = torch::stable::contiguous(widen(mean_in)), var = torch::stable::contiguous(widen(var_in));
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight: expected the dtype of the statistics of x");
  Tensor grad_x = torch::stable::new_empty(x, x_in.sizes());
  Tensor grad_weight = torch::stable::new_empty(weight, {branches, channels});
  Tensor grad_bias = torch::stable::new_empty(weight, {branches, channels});
  Tensor grad_residual = with_residual ? torch::stable::new_empty(x, x_in.sizes()) : torch::stable::new_empty(x, {0});
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const Clamp<T> clamp = Clamp<T>::named(activation);
    const auto rows_at = [&](int64_t branch, int64_t row, int64_t count) {
      NormRows<T> r{};
      r.x = data<T>(x) + row * channels, r.y = data<T>(y) + row * channels, r.grad = data<T>(grad) + row * channels;
      r.mean = data<T>(mean) + branch * channels, r.count = count, r.channels = channels, r.clamp = clamp;
      return r;
    };
    const std::vector<double> sums =
        branch_sums<T>(branches, rows, channels, [&](int64_t branch, int64_t row, int64_t count, double* into) {
          NormRows<T> r = rows_at(branch, row, count);
          r.sums = into, r.partial = scratch<T>(0, 2 * channels);
          r.out_residual = with_residual ? mutable_data<T>(grad_residual) + row * channels : nullptr;
          kernels<T>().norm_backward_sums(r);
        });
    std::vector<T> scale(branches * channels), shift(branches * channels), slope(branches * channels);
    for (int64_t i = 0; i < branches * channels; ++i) {
      const double sum = sums[i / channels * 2 * channels + i % channels];
      const double product = sums[(i / channels * 2 + 1) * channels + i % channels];
      const double precision = 1 / (double(data<T>(var)[i]) + eps);
      mutable_data<T>(grad_bias)[i] = T(sum);
      mutable_data<T>(grad_weight)[i] = T(product * std::sqrt(precision));
      scale[i] = T(data<T>(weight)[i] * std::sqrt(precision));
      shift[i] = T(sum / double(rows)), slope[i] = T(product * precision / double(rows));  // unused for rows = 0
    }
    for_row_chunks(branches, rows, [&](int64_t branch, int64_t row, int64_t count) {
      NormRows<T> r = rows_at(branch, row, count);
      r.scale = scale.data() + branch * channels, r.shift = shift.data() + branch * channels;
      r.slope = slope.data() + branch * channels, r.out = mutable_data<T>(grad_x) + row * channels;
      if (with_residual)
        r.grad = data<T>(grad_residual) + row * channels, r.clamp = Clamp<T>{};  // as the first pass left it
      kernels<T>().norm_backward_apply(r);
    });
  });
  return {round_to(grad_x, x_in.scalar_type()), round_to(grad_weight, weight_in.scalar_type()),
          round_to(grad_bias, weight_in.scalar_type()), round_to(grad_residual, x_in.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) {
  m.impl("branch_batch_norm", TORCH_BOX(&branch_batch_norm));
  m.impl("branch_batch_norm_backward", TORCH_BOX(&branch_batch_norm_backward));
}

}  // namespace hne
