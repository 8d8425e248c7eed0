// Convolutions with packed weights, bias and activation (inference).
#pragma once

#include <mutex>

#include "winograd.h"

namespace hne {

class PackedConvolution {
 public:
  // `reused`: for many calls, so that filters may be transformed in the first. `in_pairs`: for features in bfloat16,
  // with a channel more than the weight has if that has an odd number.
  PackedConvolution(const Tensor& weight, const Tensor& bias, int64_t stride, int64_t padding, int64_t replicate,
                    std::string activation, bool reused = true, bool in_pairs = false)
      : weight_(packed_filters(weight, in_pairs)),
        bias_(bias),
        stride_(stride),
        padding_(padding),
        replicate_(replicate),
        activation_(std::move(activation)),
        winograd_(reused && !in_pairs ? std::make_shared<Winograd>() : nullptr) {
    STD_TORCH_CHECK(weight.dim() == 6 && bias.dim() == 2, "weight: expected 6 dimensions, bias: 2");
    branches_ = bias.size(0), in_channels_ = weight.size(4), out_channels_ = bias.size(1);
    kernel_size_ = weight.size(2);
    check_shape("weight", weight,
                {branches_, ceil_div(out_channels_, kPanel), kernel_size_, kernel_size_, in_channels_, kPanel});
    check_kind("weight", weight, weight);
    check_kind("bias", bias, weight);
    if (in_pairs) in_channels_ = ceil_div(in_channels_, kTerms<bfloat16>) * kTerms<bfloat16>;
  }

  int64_t branches() const { return branches_; }

  // The geometry for an input of shape `shape`.
  Geometry geometry(const std::vector<int64_t>& shape) const {
    STD_TORCH_CHECK(shape.size() == 5 && shape[4] == in_channels_, "x: does not have the channels of weight");
    return forward_geometry(shape, branches_, out_channels_, kernel_size_, stride_, padding_, replicate_);
  }

  template <typename T>
  void forward(const Geometry& g, const T* x, T* out, Summand<T> add = {}) const {
    const Sum<T>* const bias = bias_.data<Sum<T>>();
    if constexpr (kTerms<T> == 1) {
      if (winograd_ != nullptr && prefers_winograd(g, true))
        return convolve_winograd<T>(g, x, winograd_weights<T>(), bias, add, clamp<T>(), out);
    }
    convolve_packed<T>(g, {x, g.batch * g.pixels(), g.in_channels}, weight_.data<T>(), bias, add, clamp<T>(), out);
  }

  // The same for one feature map, of a branch of the output; `add` is a feature map or null.
  template <typename T>
  void forward_map(Geometry g, int64_t branch, const T* x, T* out, const T* add) const {
    g.parents = g.branches = g.batch = g.replicate = 1;
    const Sum<T>* const bias = bias_.data<Sum<T>>() + branch * out_channels_;
    if constexpr (kTerms<T> == 1) {
      if (winograd_ != nullptr && prefers_winograd(g, true))
        return convolve_winograd<T>(g, x, {winograd_weights<T>()[branch]}, bias, {add}, clamp<T>(), out);
    }
    const T* const weight =
        weight_.data<T>() + branch * ceil_div(out_channels_, kPanel) * kPanel * g.taps() * in_channels_;
    convolve_packed<T>(g, {x, g.pixels(), g.in_channels}, weight, bias, {add}, clamp<T>(), out);
  }

 private:
  ConstTensor weight_, bias_;
  int64_t branches_, in_channels_, out_channels_, kernel_size_, stride_, padding_, replicate_;
  std::string activation_;
  // The transformed filters, made when they are first needed.
  struct Winograd {
    std::once_flag once;
    WinogradWeights weights;
  };
  std::shared_ptr<Winograd> winograd_;  // null if the convolution is used once

  template <typename T>
  Clamp<Sum<T>> clamp() const {
    return Clamp<Sum<T>>::named(activation_);
  }

  template <typename T>
  const WinogradWeights& winograd_weights() const {
    std::call_once(winograd_->once, [&] {
      winograd_->weights = transform_packed(weight_.data<T>(), branches_, in_channels_, out_channels_);
    });
    return winograd_->weights;
  }
};

}  // namespace hne
