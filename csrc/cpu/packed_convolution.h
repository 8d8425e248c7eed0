// Convolutions with packed weights, bias and activation (inference).
#pragma once

#include "branch_conv2d.h"

namespace hne {

class PackedConvolution {
 public:
  PackedConvolution(const Tensor& weight, const Tensor& bias, int64_t stride, int64_t padding, int64_t replicate,
                    std::string activation)
      : weight_(weight),
        bias_(bias),
        stride_(stride),
        padding_(padding),
        replicate_(replicate),
        activation_(std::move(activation)) {
    STD_TORCH_CHECK(weight.dim() == 6 && bias.dim() == 2, "weight: expected 6 dimensions, bias: 2");
    branches_ = bias.size(0), in_channels_ = weight.size(4), out_channels_ = bias.size(1);
    kernel_size_ = weight.size(2);
    check_shape("weight", weight,
                {branches_, ceil_div(out_channels_, kPanel), kernel_size_, kernel_size_, in_channels_, kPanel});
    check_kind("weight", weight, weight);
    check_kind("bias", bias, weight);
  }

  int64_t branches() const { return branches_; }

  // The geometry for an input of shape `shape`.
  Geometry geometry(const std::vector<int64_t>& shape) const {
    STD_TORCH_CHECK(shape.size() == 5 && shape[4] == in_channels_, "x: does not have the channels of weight");
    return forward_geometry(shape, branches_, out_channels_, kernel_size_, stride_, padding_, replicate_);
  }

  template <typename T>
  void forward(const Geometry& g, const T* x, T* out, Summand<T> add = {}) const {
    convolve_packed<T>(g, {x, g.batch * g.pixels(), g.in_channels}, weight_.data<T>(), bias_.data<T>(), add,
                       Clamp<T>::named(activation_), out);
  }

 private:
  ConstTensor weight_, bias_;
  int64_t branches_, in_channels_, out_channels_, kernel_size_, stride_, padding_, replicate_;
  std::string activation_;
};

// Convolutions of one branch, applied one after another: the stem before bottlenecks.
template <typename T>
class ConvolutionChain {
 public:
  // `shape` is the shape of the input; it becomes the shape of the output.
  ConvolutionChain(const std::vector<PackedConvolution>& layers, std::vector<int64_t>& shape) : layers_(layers) {
    for (const PackedConvolution& layer : layers) {
      geometry_.push_back(layer.geometry(shape));
      shape = geometry_.back().out_shape();
    }
  }

  size_t size() const { return layers_.size(); }
  // Values of one feature map: of the input, and of the output of a layer.
  int64_t in_size() const { return geometry_.front().pixels() * geometry_.front().in_channels; }
  int64_t out_size(size_t layer) const { return geometry_[layer].out_pixels() * geometry_[layer].out_channels; }

  // Applies all layers to `num_maps` contiguous feature maps; buffer(i) is the memory for the output of layer i.
  // Returns the output of the last layer, or x if there are no layers.
  template <typename F>
  const T* forward(const T* x, int64_t num_maps, const F& buffer) const {
    for (size_t i = 0; i < layers_.size(); ++i) {
      Geometry g = geometry_[i];
      g.batch = num_maps;
      T* const out = buffer(i);
      layers_[i].template forward<T>(g, x, out);
      x = out;
    }
    return x;
  }

 private:
  const std::vector<PackedConvolution>& layers_;
  std::vector<Geometry> geometry_;
};

}  // namespace hne
