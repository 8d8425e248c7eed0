// Weights as kernels read them and as torch stores them: the last two dimensions exchanged.
#pragma once

#include "convolution.h"

namespace hne {

// Filters with the taps first, and their strides if they are dense.
struct TapsFirst {
  Tensor values;
  FilterStrides strides = {};
};

// Dense weights [branch][out][in][tap] to [branch][tap][out][in], depthwise ones [branch][channel][tap] to
// [branch][tap][channel]. The weight may be a slice of more channels, which is read where it is. Dense filters of one
// tap are returned as they are.
TapsFirst taps_first(const Device& device, const Tensor& weight, const Geometry& g);

// Filters [branch][out][in] as they are, if their input channels lie side by side, and their rows at whole vectors
// where whole vectors can be read; else a copy.
TapsFirst filters_in_place(const Tensor& filters);

// Adds up partial weight gradients [split][matrix][tap][channel] into `out`, [matrix][channel][tap].
void taps_last(const Device& device, const Tensor& partial, const Tensor& out);

}  // namespace hne
