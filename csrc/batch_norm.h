// Parameters and running statistics of a batch norm over several branches, for every device.
#pragma once

#include "tensor.h"

namespace hne {

// Where the values per channel lie in memory: value (g, c) at g * branch + c * channel.
struct ChannelStrides {
  int64_t branch = 0, channel = 0;
};

// Strides of a tensor [branches, channels], or [branches * channels] as nn.BatchNorm2d has it. In a tensor that is
// `written`, no two values may share memory.
inline ChannelStrides channel_strides(const char* name, const Tensor& t, int64_t branches, int64_t channels,
                                      bool written) {
  const auto sizes = t.sizes(), strides = t.strides();
  const bool flat = t.dim() == 1 && sizes[0] == branches * channels;
  STD_TORCH_CHECK(flat || (t.dim() == 2 && sizes[0] == branches && sizes[1] == channels), name, ": unexpected shape");
  const ChannelStrides result =
      flat ? ChannelStrides{channels * strides[0], strides[0]} : ChannelStrides{strides[0], strides[1]};
  const bool shared = (branches > 1 && result.branch == 0) || (channels > 1 && result.channel == 0);
  STD_TORCH_CHECK(!written || !shared || branches * channels == 0, name, ": expected a place in memory for each value");
  return result;
}

// Checks the dtype of a parameter or running statistic: floating, and no wider than the batch statistics `mean`.
inline void check_parameter_dtype(const char* name, const Tensor& t, const Tensor& mean) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16 ||
                      (type == ScalarType::Double && mean.scalar_type() == ScalarType::Double),
                  name, ": expected a floating-point dtype, not wider than that of mean");
}

inline void check_counter(const std::optional<Tensor>& t) {
  STD_TORCH_CHECK(!t.has_value() || (t->scalar_type() == ScalarType::Long && t->numel() == 1),
                  "num_batches_tracked: expected one int64");
}

// Checks of the numbers, and of what one tensor has in common with another.
inline void check_batch_norm(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
                             const std::optional<Tensor>& total, int64_t count, double momentum, double eps) {
  if (weight.has_value() && bias.has_value()) {
    const auto sizes = weight->sizes();
    check_shape("bias", *bias, {sizes.begin(), sizes.end()});
    STD_TORCH_CHECK(bias->scalar_type() == weight->scalar_type(), "bias: expected the dtype of weight");
  }
  STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(),
                  "running_mean: expected with running_var, or neither");
  STD_TORCH_CHECK(!total.has_value() || total->numel() == 1, "total: expected one number");
  STD_TORCH_CHECK(count >= 0, "count: expected at least 0");
  STD_TORCH_CHECK(eps >= 0, "eps: expected a number that is not negative");
  STD_TORCH_CHECK(momentum == momentum, "momentum: expected a number");
}

// `t` in contiguous memory. Asking first takes less time than a call of PyTorch.
inline Tensor in_order(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Factor of the unbiased variance, count / (count - 1).
inline double unbiased_factor(int64_t count) { return count > 1 ? double(count) / double(count - 1) : 1.0; }

}  // namespace hne
