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

// The same for products of bfloat16, in pairs of terms; `depth` is even, and panels lie panel_stride values apart.
inline void pack(const float* weight, int64_t channels, int64_t depth, int64_t taps, int64_t stride_n, int64_t stride_k,
                 int64_t panel_stride, bfloat16* packed) {
  float* const panel = scratch<float>(11, depth * kPanel);
  for (int64_t n0 = 0; n0 < channels; n0 += kPanel, packed += panel_stride)
    for (int64_t tap = 0; tap < taps; ++tap) {
      pack(weight + n0 * stride_n + tap, std::min(kPanel, channels - n0), depth, 1, stride_n, stride_k, 0, panel);
      const float* from = panel;
      bfloat16* out = packed + tap * depth * kPanel;
      for (int64_t k = 0; k < depth; k += 2, from += 2 * kPanel)
        for (int64_t n = 0; n < kPanel; ++n, out += 2)
          out[0] = to_bfloat16(from[n]), out[1] = to_bfloat16(from[kPanel + n]);
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

// sum[i][j] += over at most kBlockRows rows of left[i] * right[j]
template <typename T>
void add_outer(const T* const* left, int64_t left_channels, const T* const* right, int64_t right_channels,
               int64_t count, Sum<T>* sum, PrefetchQueue<T>* ahead = nullptr) {
  const T* pairs[2][kBlockRows];
  if constexpr (kTerms<T> > 1) {
    const auto pair = [&](const T* const*& rows, int64_t channels, int slot) {
      T* const memory = scratch<T>(slot, kBlockRows * channels);
      kernels<T>().pair_rows({rows, count, channels, memory});
      rows = pairs[slot - 10];
      for (int64_t m = 0; 2 * m < count; ++m) pairs[slot - 10][m] = memory + 2 * m * channels;
    };
    pair(left, left_channels, 10), pair(right, right_channels, 11);
  }
  const int64_t steps = ceil_div(count, kTerms<T>);
  kernels<T>().outer({left, right, steps, left_channels, right_channels, sum, ahead});
}

// out = clamp(conv(x, packed) + bias + add); packed is [branch][panel][tap][in_channels][kPanel], bias may be null. A
// computed x needs a pointwise kernel with stride 1. bfloat16 needs an even number of input channels, whose weights lie
// in pairs.
template <typename T>
void convolve_packed(const Geometry& g, const PrologueInput<T>& x, const T* packed, const Sum<T>* bias, Summand<T> add,
                     Clamp<Sum<T>> clamp, T* out, const RowsWritten& written = {});

// Below, weights, their gradients and biases are of type Sum<T>. bfloat16 needs kernels of one tap, and even numbers of
// channels where they are summed over.

// out = conv(x, weight) + bias
template <typename T>
void convolve(const Geometry& g, const PrologueInput<T>& x, const Tensor& weight, const Sum<T>* bias, T* out,
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
