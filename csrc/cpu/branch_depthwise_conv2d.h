// The depthwise convolution and its two gradients, for the ops that use them.
#pragma once

#include "convolution.h"
#include "prologue.h"

namespace hne {

// Weights, their gradients and biases are of type Sum<T>.

// Whether bfloat16 features stay as they are. The gradients of several children are added up in memory, in float32.
inline bool keeps_depthwise(const Geometry& g, const Tensor& x) { return g.replicate == 1 && keeps_bfloat16(x); }

// out = depthwise convolution of x with `weight` [branch][channel][k][k], plus bias (may be null). `written` is called
// for whole samples.
template <typename T>
void filter(const Geometry& g, const PrologueInput<T>& x, const Tensor& weight, const Sum<T>* bias, T* out,
            const RowsWritten& written = {});

// Both gradients, with one read of x and of the output's gradient. A null gradient is not computed: the weight is only
// read for `grad_x`, and x only for `grad_weight`.
template <typename T>
void filter_backward(const Geometry& g, const PrologueInput<T>& grad, const PrologueInput<T>& x, const Tensor& weight,
                     T* grad_x, const Tensor* grad_weight, const RowsWritten& written = {});

}  // namespace hne
