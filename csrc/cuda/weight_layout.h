// Weights as kernels read them and as torch stores them: the last two dimensions exchanged.
#pragma once

#include "geometry.h"
#include "op.h"

namespace hne {

// Dense weights [branch][out][in][tap] to [branch][tap][out][in], depthwise ones [branch][channel][tap] to
// [branch][tap][channel]. The weight may be a slice of more channels: it is read where it is, but for kernels of one
// tap, of which a slice is copied.
Tensor taps_first(const Device& device, const Tensor& weight, const Geometry& g);

// Adds up partial weight gradients [split][matrix][tap][channel] into `out`, [matrix][channel][tap].
void taps_last(const Device& device, const Tensor& partial, const Tensor& out);

}  // namespace hne
