// The gradients of a training unit, which the op gives together.
#pragma once

#include "normalization.h"

namespace hne {

// Both gradients, each by a kernel of its own; empty where not needed.
template <auto backward_input, auto backward_weight>
std::tuple<Tensor, Tensor, Tensor, Tensor> unit_backward(
    const Tensor& grad, const Tensor& grad_mean, const Tensor& grad_var, const Tensor& y, const Tensor& y_mean,
    const Tensor& weight, const Tensor& x, const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, const std::string& activation, int64_t stride, int64_t padding,
    int64_t replicate, bool need_input, bool need_weight) {
  Tensor grad_x = torch::stable::new_empty(x, {0}), grad_weight = torch::stable::new_empty(weight, {0});
  Tensor grad_scale = no_statistics(x), grad_shift = no_statistics(x);
  if (need_input)
    std::tie(grad_x, grad_scale, grad_shift) = backward_input(grad, grad_mean, grad_var, y, y_mean, weight, x, mean,
                                                              scale, shift, activation, stride, padding, replicate);
  if (need_weight)
    grad_weight = backward_weight(grad, grad_mean, grad_var, y, y_mean, x, mean, scale, shift, activation,
                                  weight.size(weight.dim() - 1), stride, padding, replicate);
  return {grad_x, grad_scale, grad_shift, grad_weight};
}

}  // namespace hne
