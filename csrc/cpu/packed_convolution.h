// A convolution with packed weights, bias and activation (inference).
#pragma once

#include "branch_conv2d.h"

namespace hne {

struct PackedConvolution {
  Tensor weight, bias;
  int64_t stride, padding, replicate;
  std::string activation;

  PackedConvolution(const Tensor& weight_in, const Tensor& bias_in, int64_t stride, int64_t padding, int64_t replicate,
                    std::string activation)
      : stride(stride), padding(padding), replicate(replicate), activation(std::move(activation)) {
    STD_TORCH_CHECK(weight_in.dim() == 6 && bias_in.dim() == 2, "weight: expected 6 dimensions, bias: 2");
    const int64_t panels = ceil_div(bias_in.size(1), kPanel), kernel_size = weight_in.size(2);
    check_shape("weight", weight_in, {bias_in.size(0), panels, kernel_size, kernel_size, weight_in.size(4), kPanel});
    check_kind("weight", weight_in, weight_in);
    check_kind("bias", bias_in, weight_in);
    weight = torch::stable::contiguous(widen(weight_in)), bias = torch::stable::contiguous(widen(bias_in));
  }

  // `shape` is that of x.
  Geometry geometry(const std::vector<int64_t>& shape) const {
    STD_TORCH_CHECK(shape.size() == 5 && shape[4] == weight.size(4), "x: does not have the channels of weight");
    return forward_geometry(shape, bias.size(0), bias.size(1), weight.size(2), stride, padding, replicate);
  }

  template <typename T>
  void run(const Geometry& g, const T* x, T* out) const {
    convolve_packed<T>(g, {x, g.batch * g.pixels(), g.in_channels}, data<T>(weight), data<T>(bias),
                       Clamp<T>::named(activation), out);
  }
};

// Convolutions of one branch, one after the other: what comes before a run of bottlenecks.
template <typename T>
class Convolutions {
 public:
  // `shape` is that of x, and then of the result.
  Convolutions(const std::vector<PackedConvolution>& layers, std::vector<int64_t>& shape) : layers_(layers) {
    for (const PackedConvolution& layer : layers) {
      geometry_.push_back(layer.geometry(shape));
      shape = geometry_.back().out_shape();
      largest_ = std::max(largest_, size(shape));
    }
  }

  bool empty() const { return layers_.empty(); }
  int64_t in_size() const { return geometry_.front().pixels() * geometry_.front().in_channels; }  // values of a map
  int64_t largest() const { return largest_; }  // values of the largest map that is not x

  // The features of some maps that follow each other, in one of two pieces of memory.
  const T* run(const T* x, int64_t maps, T* one, T* other) const {
    for (size_t i = 0; i < layers_.size(); ++i, std::swap(one, other)) {
      Geometry g = geometry_[i];
      g.batch = maps;
      layers_[i].template run<T>(g, x, one);
      x = one;
    }
    return x;
  }

 private:
  static int64_t size(const std::vector<int64_t>& shape) { return shape[2] * shape[3] * shape[4]; }

  const std::vector<PackedConvolution>& layers_;
  std::vector<Geometry> geometry_;
  int64_t largest_ = 0;
};

}  // namespace hne
