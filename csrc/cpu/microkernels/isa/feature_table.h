// The micro-kernels of one instruction set that read or write feature maps of any type.
#pragma once

#include "../depthwise.h"
#include "../distillation.h"
#include "../gemm.h"
#include "../normalize.h"
#include "../pooling.h"

namespace hne::HNE_ISA {

template <typename T>
constexpr FeatureKernels<T> kFeatureKernels{
    gemm<T>, outer<T>,   pair_rows<T>, depthwise_rows<T>, depthwise_input_row<T>, normalize<T>, normalize_backward<T>,
    mask<T>, moments<T>, mean_rows<T>, add_scaled<T>,
};

}  // namespace hne::HNE_ISA
