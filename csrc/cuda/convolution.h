// Branch convolutions, dense and depthwise: operands and launches of their kernels.
#pragma once

#include "normalized_sum.h"
#include "shape.h"

namespace hne {

// Distances in dense filters [branch][tap][out][in]: from one branch to the next, and from one output channel to the
// next. Filters of one tap may be a slice of more channels.
struct FilterStrides {
  int64_t branch = 0, out = 0;
};

// out = activation(conv(normalization(x), weight) + bias). Filters are [branch][tap][out][in], or depthwise
// [branch][tap][channel].
template <typename T>
struct Convolution {
  Shape s;
  Clamp<float> range = {};  // activation of the result
  const T* x;
  Normalization normalization = {};
  const T* filters;
  FilterStrides strides = {};  // of dense filters that are not packed
  const T* bias = nullptr;     // [branch][out_channels] or null
  T* out;

  bool vectors() const {
    return whole_vectors<T>({s.in_channels, s.out_channels, strides.branch, strides.out}, {x, filters, bias, out}) &&
           normalization.vectors();
  }
};

// `moments` gets partial Moments of the result; null where no statistics are wanted.
template <typename T>
void dense_forward(const Device& device, const Convolution<T>& d, ChannelReduction* moments = nullptr);
template <typename T>
void depthwise_forward(const Device& device, const Convolution<T>& d, ChannelReduction* moments = nullptr);
// With packed weights [branch][panel][tap][in_channel][16] (inference). `add` is null or a feature map that joins the
// result before the activation; output branch g reads its branch g / add_replicate.
template <typename T>
void dense_forward_packed(const Device& device, const Convolution<T>& d, const T* add = nullptr, int add_replicate = 1);

// Gradient of x.
template <typename T>
struct InputGradient {
  Shape s;
  OutputGradient<T> output;
  const T* filters;
  FilterStrides strides = {};  // of dense filters
  const T* x = nullptr;        // before normalisation; null without one
  Normalization normalization = {};
  T* out;

  bool vectors() const {
    return whole_vectors<T>({s.in_channels, s.out_channels, strides.branch, strides.out},
                            {output.grad, output.y, filters, x, out}) &&
           output.vectors() && normalization.vectors();
  }
};

// `sums` gets the partial gradients of scale and shift (Pair); null without a normalisation.
template <typename T>
void dense_backward_input(const Device& device, const InputGradient<T>& d, ChannelReduction* sums);
template <typename T>
void depthwise_backward_input(const Device& device, const InputGradient<T>& d, ChannelReduction* sums);
// Gradient of the x of a stored input z; `grad_z` is the gradient of z's other readers. `d` has neither normalisation
// nor result. `residual_sums` is null unless the residual is normalised.
template <typename T>
void dense_backward_sum(const Device& device, const InputGradient<T>& d, const T* grad_z, const NormalizedSum<T>& sum,
                        ChannelReduction& sums, ChannelReduction* residual_sums);

// Gradient of the weight.
template <typename T>
struct WeightGradient {
  Shape s;
  OutputGradient<T> output;
  const T* x;
  Normalization normalization = {};
};

// Both return partial sums, [split][branch * out][tap][in] or depthwise [split][branch][tap][channel], allocated like
// `x`.
template <typename T>
Tensor dense_backward_weight(const Device& device, const WeightGradient<T>& d, const Tensor& x);
template <typename T>
Tensor depthwise_backward_weight(const Device& device, const WeightGradient<T>& d, const Tensor& x);

}  // namespace hne
