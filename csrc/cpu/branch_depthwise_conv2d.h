// The depthwise convolution and its two gradients: what the ops made of them share.
#pragma once

#include "convolution.h"
#include "prologue.h"

namespace hne {

// out = the depthwise convolution of x with `weight` [branch][channel][k][k], plus bias (may be null); told of a whole
// sample at a time.
template <typename T>
void filter(const Geometry& g, const PrologueInput<T>& x, const Tensor& weight, const T* bias, T* out,
            const RowsWritten& written = {});

// Both gradients, from one reading of that of the output and of x. The one that is null is left out: without `grad_x`
// the weight is not read, without `grad_weight` x is not.
template <typename T>
void filter_backward(const Geometry& g, const PrologueInput<T>& grad, const PrologueInput<T>& x, const Tensor& weight,
                     T* grad_x, const Tensor* grad_weight, const RowsWritten& written = {});

}  // namespace hne
