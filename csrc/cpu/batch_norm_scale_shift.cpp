// Batch norm from the statistics of a batch: mean, scale and shift of a feature map, and the running statistics.
#include <cmath>

#include "batch_norm.h"
#include "op.h"

namespace hne {
namespace {

// A parameter or running statistic in the dtype of the batch statistics, with adjacent channels; null where absent.
class ChannelValues {
 public:
  ChannelValues(const char* name, const std::optional<Tensor>& given, const Tensor& mean, bool written = false) {
    if (!given.has_value()) return;
    STD_TORCH_CHECK(given->is_cpu(), name, ": expected a CPU tensor");
    check_parameter_dtype(name, *given, mean);
    const int64_t channels = mean.size(1);
    branch_stride_ = channel_strides(name, *given, mean.size(0), channels, written).branch;
    given_ = values_ = *given;
    const bool adjacent = channels <= 1 || given->strides()[given->dim() - 1] == 1;
    if (adjacent && given->scalar_type() == mean.scalar_type()) return;
    values_ = torch::stable::contiguous(torch::stable::to(*given, mean.scalar_type()));
    branch_stride_ = channels;
    is_copy_ = true;
  }

  template <typename T>
  const T* row(int64_t branch) const {
    return values_.has_value() ? data<T>(*values_) + branch * branch_stride_ : nullptr;
  }
  template <typename T>
  T* mutable_row(int64_t branch) const {
    return mutable_data<T>(*values_) + branch * branch_stride_;
  }
  void write_back() {
    if (is_copy_) torch::stable::copy_(*given_, *values_);
  }

 private:
  std::optional<Tensor> given_, values_;
  int64_t branch_stride_ = 0;
  bool is_copy_ = false;
};

// running += momentum * (factor * batch - running), rounded as torch.lerp rounds.
template <typename T>
void update(T* __restrict running, const T* __restrict batch, T factor, T momentum, int64_t channels) {
  if (std::abs(momentum) < T(0.5))
    for (int64_t c = 0; c < channels; ++c) running[c] += momentum * (batch[c] * factor - running[c]);
  else
    for (int64_t c = 0; c < channels; ++c) {
      const T target = batch[c] * factor;
      running[c] = target - (target - running[c]) * (1 - momentum);
    }
}

void check_statistics(const Tensor& mean, const Tensor& var, const std::optional<Tensor>& total) {
  STD_TORCH_CHECK(mean.dim() == 2, "mean: expected 2 dimensions");
  check_kind("mean", mean, mean);
  check_kind("var", var, mean);
  check_shape("var", var, {mean.size(0), mean.size(1)});
  if (total.has_value()) check_kind("total", *total, mean);
}

Tensor batch_norm_scale_shift(const Tensor& mean_in, const Tensor& var_in, const std::optional<Tensor>& weight_in,
                              const std::optional<Tensor>& bias_in, const std::optional<Tensor>& running_mean_in,
                              const std::optional<Tensor>& running_var_in,
                              const std::optional<Tensor>& num_batches_tracked, const std::optional<Tensor>& total,
                              int64_t count, double momentum, double eps) {
  check_statistics(mean_in, var_in, total);
  check_batch_norm(weight_in, bias_in, running_mean_in, running_var_in, total, count, momentum, eps);
  check_counter(num_batches_tracked);
  STD_TORCH_CHECK(!num_batches_tracked.has_value() || num_batches_tracked->is_cpu(),
                  "num_batches_tracked: expected a CPU tensor");
  const Tensor mean = in_order(mean_in), var = in_order(var_in);
  const ChannelValues weight("weight", weight_in, mean), bias("bias", bias_in, mean);
  ChannelValues running_mean("running_mean", running_mean_in, mean, true);
  ChannelValues running_var("running_var", running_var_in, mean, true);
  const int64_t branches = mean.size(0), channels = mean.size(1), values = branches * channels;
  const Tensor norm = empty(mean, {3, branches, channels});
  dispatch(mean, [&](auto type) {
    using T = decltype(type);
    const T epsilon = T(eps), number = total.has_value() ? *data<T>(*total) : T(0);
    const T factor = total.has_value() ? number / (number - 1) : T(unbiased_factor(count));
    const bool updates = running_mean_in.has_value() && (total.has_value() || count > 1);
    T* const rows = mutable_data<T>(norm);
    for (int64_t g = 0; g < branches; ++g) {
      const T *from_mean = data<T>(mean) + g * channels, *__restrict from_var = data<T>(var) + g * channels;
      const T* __restrict from_weight = weight.row<T>(g), *from_bias = bias.row<T>(g);
      T* const to_mean = rows + g * channels;
      T* const __restrict to_scale = to_mean + values, * const to_shift = to_scale + values;
      std::copy(from_mean, from_mean + channels, to_mean);
      for (int64_t c = 0; c < channels; ++c) to_scale[c] = 1 / std::sqrt(from_var[c] + epsilon);
      if (from_weight != nullptr)
        for (int64_t c = 0; c < channels; ++c) to_scale[c] *= from_weight[c];
      if (from_bias != nullptr)
        std::copy(from_bias, from_bias + channels, to_shift);
      else
        std::fill(to_shift, to_shift + channels, T(0));
      if (!updates) continue;
      update(running_mean.mutable_row<T>(g), from_mean, T(1), T(momentum), channels);
      update(running_var.mutable_row<T>(g), data<T>(var) + g * channels, factor, T(momentum), channels);
    }
    if (!updates) return;
    running_mean.write_back();
    running_var.write_back();
  });
  if (num_batches_tracked.has_value()) ++*mutable_data<int64_t>(*num_batches_tracked);
  return norm;
}

// Gradients of mean, var, weight and bias; empty for an absent parameter. That of the bias has the layout of the
// weight.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_scale_shift_backward(const Tensor& grad_in, const Tensor& var_in,
                                                                           const std::optional<Tensor>& weight_in,
                                                                           bool has_bias, double eps) {
  check_statistics(var_in, var_in, std::nullopt);
  check_kind("grad", grad_in, var_in);
  const int64_t branches = var_in.size(0), channels = var_in.size(1), values = branches * channels;
  check_shape("grad", grad_in, {3, branches, channels});
  const Tensor grad = in_order(grad_in), var = in_order(var_in);
  const ChannelValues weight("weight", weight_in, var);
  const Tensor& like = weight_in.has_value() ? *weight_in : var_in;
  const Tensor grad_mean = empty(var, {branches, channels}), grad_var = empty(var, {branches, channels});
  const Tensor grad_weight = weight_in.has_value() ? empty(var, like.sizes()) : empty(var, {0});
  const Tensor grad_bias = has_bias ? empty(var, like.sizes()) : empty(var, {0});
  dispatch(var, [&](auto type) {
    using T = decltype(type);
    const T epsilon = T(eps), *const of_mean = data<T>(grad), *const of_shift = of_mean + 2 * values;
    std::copy(of_mean, of_mean + values, mutable_data<T>(grad_mean));
    if (has_bias) std::copy(of_shift, of_shift + values, mutable_data<T>(grad_bias));
    for (int64_t g = 0; g < branches; ++g) {
      const T* __restrict from_var = data<T>(var) + g * channels, * __restrict from_weight = weight.row<T>(g);
      const T* __restrict of_scale = of_mean + values + g * channels;
      T* __restrict to_var = mutable_data<T>(grad_var) + g * channels;
      for (int64_t c = 0; c < channels; ++c) {
        const T inverse = 1 / std::sqrt(from_var[c] + epsilon);
        to_var[c] = T(-0.5) * of_scale[c] * (inverse * inverse * inverse);
      }
      if (from_weight == nullptr) continue;
      T* __restrict to_weight = mutable_data<T>(grad_weight) + g * channels;
      for (int64_t c = 0; c < channels; ++c) {
        to_var[c] *= from_weight[c];
        to_weight[c] = of_scale[c] * (1 / std::sqrt(from_var[c] + epsilon));
      }
    }
  });
  const ScalarType dtype = like.scalar_type();
  return {grad_mean, grad_var, round_to(grad_weight, dtype), round_to(grad_bias, dtype)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) {
  m.impl("batch_norm_scale_shift", TORCH_BOX(&batch_norm_scale_shift));
  m.impl("batch_norm_scale_shift_backward", TORCH_BOX(&batch_norm_scale_shift_backward));
}

}  // namespace hne
