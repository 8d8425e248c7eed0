// The depthwise convolution and its two gradients: what the ops made of them share.
#pragma once

#include "convolution.h"
#include "map.h"

namespace hne {

// out = the depthwise convolution of x with `weight` [branch][channel][k][k], plus bias (may be null); told of a whole
// sample at a time.
template <typename T>
void filter(const Geometry& g, const Map<T>& x, const Tensor& weight, const T* bias, T* out,
            const Written& written = {});

// The gradient of x, from that of the output.
template <typename T>
void filter_input(const Geometry& g, const Map<T>& grad, const Tensor& weight, T* out, const Written& written = {});

// The gradient of the weight.
template <typename T>
void filter_weight(const Geometry& g, const Map<T>& grad, const Map<T>& x, const Tensor& out);

}  // namespace hne
