// The checked weights of one bottleneck, in the layout that the kernels read (inference).
#pragma once

#include "geometry.h"
#include "op.h"

namespace hne {

class BottleneckWeights {
 public:
  const ConstTensor expand, expand_bias, depthwise, depthwise_bias, project;
  const std::optional<ConstTensor> shortcut;
  const ConstTensor sum_bias;  // bias of the projection plus bias of the shortcut
  const int64_t stride, replicate;
  const bool identity;
  const std::string activation, final_activation;

  // `weights` are the eight tensors of fused_bottleneck, in its order; only the last two may be missing. `in_pairs`:
  // for Bottleneck<bfloat16>.
  BottleneckWeights(const std::optional<Tensor>* weights, int64_t stride, int64_t replicate, std::string activation,
                    bool identity, std::string final_activation, bool in_pairs = false)
      : BottleneckWeights(check(weights, stride, replicate, identity), weights, stride, replicate,
                          std::move(activation), identity, std::move(final_activation), in_pairs) {}

  int64_t branches() const { return pixel_geometry_.branches; }
  int64_t middle() const { return middle_; }  // channels of the depthwise convolution

  // The geometry for an input of shape `shape`: kernel, stride and padding of the depthwise convolution, and the
  // channels of the bottleneck's input and output.
  Geometry geometry(const std::vector<int64_t>& shape) const {
    const Geometry& g = pixel_geometry_;
    STD_TORCH_CHECK(shape.size() == 5 && shape[4] == g.in_channels, "x: does not have the channels of expand");
    return forward_geometry(shape, g.branches, g.out_channels, g.kernel_size, stride, g.padding, replicate);
  }

 private:
  BottleneckWeights(Geometry pixel_geometry, const std::optional<Tensor>* weights, int64_t stride, int64_t replicate,
                    std::string activation, bool identity, std::string final_activation, bool in_pairs)
      : expand(packed_filters(*weights[0], in_pairs)),
        expand_bias(*weights[1]),
        depthwise(*weights[2]),
        depthwise_bias(*weights[3]),
        project(packed_filters(*weights[4], in_pairs)),
        shortcut(weights[6].has_value() ? std::optional<ConstTensor>(packed_filters(*weights[6], in_pairs))
                                        : std::nullopt),
        sum_bias(sum(*weights[5], weights[7])),
        stride(stride),
        replicate(replicate),
        identity(identity),
        activation(std::move(activation)),
        final_activation(std::move(final_activation)),
        pixel_geometry_(pixel_geometry),
        middle_(weights[2]->size(3)) {}

  // Checks the weights; returns the geometry for feature maps of one pixel.
  static Geometry check(const std::optional<Tensor>* weights, int64_t stride, int64_t replicate, bool identity) {
    for (int i = 0; i < 8; ++i) {
      if (i < 6) STD_TORCH_CHECK(weights[i].has_value(), "weights: only the shortcut may be missing");
      if (weights[i].has_value()) check_kind("weights", *weights[i], *weights[0]);
    }
    STD_TORCH_CHECK(weights[0]->dim() == 6 && replicate >= 1, "expand: expected 6 dimensions");
    const int64_t parents = ceil_div(weights[0]->size(0), replicate);
    return bottleneck_geometry({parents, 1, 1, 1, weights[0]->size(4)}, *weights[0], *weights[1], *weights[2],
                               *weights[3], *weights[4], *weights[5], weights[6], weights[7], stride, replicate,
                               identity);
  }

  static Tensor sum(const Tensor& bias, const std::optional<Tensor>& other) {
    const Tensor first = torch::stable::contiguous(widen(bias));
    if (!other.has_value()) return first;
    const Tensor second = torch::stable::contiguous(widen(*other)), result = empty(first, first.sizes());
    dispatch(first, [&](auto type) {
      using T = decltype(type);
      const T *a = data<T>(first), *b = data<T>(second);
      std::transform(a, a + first.numel(), b, mutable_data<T>(result), std::plus<T>());
    });
    return result;
  }

  Geometry pixel_geometry_;
  int64_t middle_;
};

}  // namespace hne
