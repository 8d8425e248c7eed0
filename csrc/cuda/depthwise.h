// Depthwise convolution with bias and activation, or of a normalised map with the statistics of the result. Every value
// of x is read from device memory once and a few times from the caches: a thread computes runs of neighbouring pixels
// of 16 bytes of channels.
//
//   G branches, M output pixels each   bytes moved at least              multiply-adds
//                                      x + weight + out (+ statistics)   G M C k^2
#pragma once

#include "normalization.h"
#include "shape.h"

namespace hne {

template <typename T>
struct Depthwise {
  Shape s;
  const T *x, *weight;      // weight [branch][tap][channel]
  const T* bias = nullptr;  // [branch][channel] or null
  Clamp<float> range = {};  // of the result
  T* out;
  Normalization normalization = {};  // of x
};

// `statistics` of the result: null where nobody asks. Compiled once, in branch_depthwise_conv2d.cu.
template <typename T>
void run_depthwise(const Device& device, const Depthwise<T>& d, OverPixels* statistics = nullptr);

// The gradients of a training unit, which branch_depthwise_conv2d_stats_backward gives together.
std::tuple<Tensor, Tensor, Tensor> branch_depthwise_conv2d_stats_backward_input(
    const Tensor& grad_in, const Tensor& grad_mean, const Tensor& grad_var, const Tensor& y, const Tensor& y_mean,
    const Tensor& weight_in, const Tensor& x_in, const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, const std::string& activation, int64_t stride, int64_t padding,
    int64_t replicate);

}  // namespace hne
