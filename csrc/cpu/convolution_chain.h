// Convolutions of one branch, applied one after another (inference).
#pragma once

#include "packed_convolution.h"

namespace hne {

// The convolutions of features T.
template <typename T>
struct ChainedConvolution {
  using type = PackedConvolution;
};

// The stem before bottlenecks.
template <typename T>
class ConvolutionChain {
  using Layer = typename ChainedConvolution<T>::type;

 public:
  // `shape` is the shape of the input; it becomes the shape of the output.
  ConvolutionChain(const std::vector<Layer>& layers, std::vector<int64_t>& shape) : layers_(layers) {
    for (const Layer& layer : layers) {
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
      layers_[i].forward(g, x, out);
      x = out;
    }
    return x;
  }

 private:
  const std::vector<Layer>& layers_;
  std::vector<Geometry> geometry_;
};

}  // namespace hne
