// Convolution of few input channels, such as a network's first one on images (inference).
#pragma once

#include "convolution.h"

namespace hne {

// Runs the convolution with packed weights of `d`, whose x has the strides x_strides (branch, sample, row, column,
// channel; in values). Returns false if its filters are too large for the kernel, or its feature maps too small.
// Compiled in few_channels.cu.
template <typename T>
bool run_few_channels(const Device& device, const Convolution<T>& d, const int64_t (&x_strides)[5]);

}  // namespace hne
