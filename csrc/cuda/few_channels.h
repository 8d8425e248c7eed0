// Convolution of few input channels, such as a network's first one on images. Both functions are compiled in
// few_channels.cu. They return false, and have done nothing, if the filters are too large for the kernel, or the
// feature maps too small.
#pragma once

#include <array>

#include "convolution.h"

namespace hne {

// With packed weights (inference). x has the strides x_strides (branch, sample, row, column, channel), in values.
template <typename T>
bool run_few_channels(const Device& device, const Convolution<T>& d, const std::array<int64_t, 5>& x_strides);

// With weights [branch][tap][out][in]. `moments` gets partial Moments of the result; null where no statistics are
// wanted. False also with a normalisation, and where the channels fill vectors of 16 bytes.
template <typename T>
bool run_few_channels(const Device& device, const Convolution<T>& d, ChannelReduction* moments);

}  // namespace hne
