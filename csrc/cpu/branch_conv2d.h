// The dense convolution, its two gradients, and packed weights, for the ops that use them.
#pragma once

#include "convolution.h"
#include "prologue.h"

namespace hne {

// Packs the weight (n, k, tap) of one branch, given by strides, into panels [panel][tap][k][16].
template <typename T>
void pack(const T* weight, int64_t channels, int64_t depth, int64_t taps, int64_t stride_n, int64_t stride_k,
          int64_t panel_stride, T* packed) {
  for (int64_t n0 = 0, panel = 0; n0 < channels; n0 += kPanel, ++panel)
    for (int64_t tap = 0; tap < taps; ++tap) {
      T* out = packed + panel * panel_stride + tap * depth * kPanel;
      const T* in = weight + n0 * stride_n + tap;
      const int64_t present = std::min(kPanel, channels - n0);
      if (stride_k == 1 && present == kPanel) {
        kernels<T>().transpose_panel(in, stride_n, depth, out);
        continue;
      }
      for (int64_t k = 0; k < depth; ++k, out += kPanel) {
        if (stride_n == 1 && present == kPanel) {
          std::copy_n(in + k * stride_k, kPanel, out);
          continue;
        }
        for (int64_t n = 0; n < present; ++n) out[n] = in[n * stride_n + k * stride_k];
        for (int64_t n = present; n < kPanel; ++n) out[n] = T(0);
      }
    }
}

// Rows that a task writes at once: whole tiles, and few enough for their features to stay in the second cache.
constexpr int64_t kBlockRows = 112;

// A feature map like the output of a convolution that joins it before the activation; null for none. Output branch g
// adds its branch g / replicate.
template <typename T>
struct Summand {
  const T* features = nullptr;
  int64_t replicate = 1;
};

// out = clamp(conv(x, packed) + bias + add); packed is [branch][panel][tap][in_channels][kPanel], bias may be null. A
// computed x needs a pointwise kernel with stride 1. bfloat16 needs a pointwise kernel, or fewer than kFewChannels.
template <typename T>
void convolve_packed(const Geometry& g, const PrologueInput<T>& x, const T* packed, const Sum<T>* bias, Summand<T> add,
                     Clamp<Sum<T>> clamp, T* out, const RowsWritten& written = {});

// out = conv(x, weight) + bias
template <typename T>
void convolve(const Geometry& g, const PrologueInput<T>& x, const Tensor& weight, const T* bias, T* out,
              const RowsWritten& written = {});

// The gradient of x from that of the output.
template <typename T>
void convolve_input(const Geometry& g, const PrologueInput<T>& grad, const Tensor& weight, T* out,
                    const RowsWritten& written = {});

// The gradient of the weight; `out` is [branch][out_channels][in_channels][k][k].
template <typename T>
void convolve_weight(const Geometry& g, const PrologueInput<T>& grad, const PrologueInput<T>& x, const Tensor& out);

// Both gradients, with one read of x and of the output's gradient; a null gradient is not computed.
template <typename T>
void convolve_backward(const Geometry& g, const PrologueInput<T>& grad, const PrologueInput<T>& x, const Tensor& weight,
                       T* grad_x, const Tensor* grad_weight, const RowsWritten& written);

// The same for a pointwise convolution; `add` is added to the gradient of x, and may be null.
template <typename T>
void pointwise_backward(const Geometry& g, const PrologueInput<T>& grad, const PrologueInput<T>& x,
                        const Tensor& weight, const T* add, T* grad_x, const Tensor* grad_weight,
                        const RowsWritten& written);

}  // namespace hne
