// The inner kernels, one table per instruction set (isa/*.cpp), and what they are asked to compute.
// Everything is row-major; "row" means the channels of one pixel of one branch, contiguous in memory.
#pragma once

#include <cstdint>

#include "../runtime/capability.h"
#include "clamp.h"
#include "panel.h"

namespace hne {

// One term of a convolution: rows[m] . weight, where weight is [panel][depth][kPanel] and panels lie
// panel_stride apart. A 1x1 convolution has one tap, a kxk convolution k*k, and a bottleneck's last
// product has two: the projection and the shortcut.
template <typename T>
struct Tap {
  const T* const* rows;
  const T* weight;
  int64_t panel_stride;
  int64_t depth;
  int64_t step = 0;  // from one row to the next where it is always the same: rows[0] is then enough
};

// Values that are read next: fetched into the second cache while others are computed with.
template <typename T>
struct Prefetch {
  const T* at;
  int64_t count;
};

// out[m][n] = clamp(sum over taps + bias[n] + add[m][n])
template <typename T>
struct Gemm {
  const Tap<T>* taps;
  int64_t num_taps;
  int64_t count;        // rows m
  int64_t channels;     // columns n
  T* const* out;        // [count]
  const T* bias;        // [channels] or null
  const T* const* add;  // [count] rows or null
  Clamp<T> clamp;
  Prefetch<T> ahead = {};
  bool cached = false;  // out and add are near enough: they are not fetched during the sums
};

// sum[i][j] += over rows m of left[m][i] * right[m][j]: the gradient of a convolution's weights
template <typename T>
struct Outer {
  const T* const* left;
  const T* const* right;
  int64_t count;
  int64_t left_channels;
  int64_t right_channels;
  T* sum;  // [left_channels][right_channels]
  Prefetch<T> ahead[2] = {};
};

// One row of pixels of a depthwise convolution. rows[ky] are the input rows (zeros where outside the map).
template <typename T>
struct DepthwiseRow {
  const T* const* rows;  // [kernel_size]
  const T* weight;       // [kernel_size][kernel_size][channels]
  const T* bias;         // [channels] or null
  T* out;                // [out_width][channels]
  int64_t width, out_width, channels, kernel_size, stride, padding;
  bool accumulate;  // start from out instead of bias
  Clamp<T> clamp;
};

// One row of pixels of the gradient of a depthwise convolution's input, stride above 1:
// out[ix] += sum over kx, ky of rows[ky][ox] * weight[ky][kx], ox * stride + kx = ix + padding.
template <typename T>
struct DepthwiseInputRow {
  const T* const* rows;  // [kernel_size], null where no output row meets this input row
  const T* weight;       // [kernel_size][kernel_size][channels]
  T* out;                // [width][channels]
  int64_t width, out_width, channels, kernel_size, stride, padding;
};

// sum[ky][kx][c] += over ox of grad[ox][c] * rows[ky][ox * stride + kx - padding][c]
template <typename T>
struct DepthwiseWeightRow {
  const T* grad;         // [out_width][channels]
  const T* const* rows;  // [kernel_size], null where outside the map
  T* sum;                // [kernel_size][kernel_size][channels]
  int64_t width, out_width, channels, kernel_size, stride, padding;
};

// Normalisation of `count` rows of `channels`: value = (x - mean) * scale + shift (+ add).
template <typename T>
struct NormRows {
  const T* x;
  const T* mean;  // [channels], like the next two
  const T* scale;
  const T* shift;
  const T* add;    // or null
  Clamp<T> clamp;  // the activation
  T* out;
  // The way back:
  const T* grad;  // of the output
  const T* y;     // the output, to know where the activation was flat; null: it is computed again
  T* out_masked;  // gradient behind the activation, or null
  T* streamed;    // copy of it that is not read soon: rows of whole cache lines, or null
  double* sums;   // [2][channels], added to
  T* partial;     // [2][channels] of scratch memory
  int64_t count, channels;
};

// Ensembles of one sample: prefix means over the members and the distillation loss.
template <typename T>
struct DistillSample {
  const T* logits;          // [models] rows of `classes`, `stride` apart
  T* grad;                  // the same layout
  T* scratch;               // [num_students + 2][classes]
  const int64_t* students;  // ensemble sizes below models
  int64_t num_students, models, classes, stride, target;
  double alpha, temperature, batch;
};

template <typename T>
struct Kernels {
  void (*gemm)(const Gemm<T>&);
  void (*outer)(const Outer<T>&);
  void (*depthwise_row)(const DepthwiseRow<T>&);
  void (*depthwise_input_row)(const DepthwiseInputRow<T>&);
  void (*depthwise_weight_row)(const DepthwiseWeightRow<T>&);
  void (*normalize)(const NormRows<T>&);
  void (*normalize_backward)(const NormRows<T>&);
  void (*mask)(const NormRows<T>&);
  void (*moments)(const NormRows<T>&);
  void (*mean_rows)(const T* rows, int64_t count, int64_t channels, T* out);    // out[c] = mean over m of rows[m][c]
  void (*transpose_panel)(const T* in, int64_t stride, int64_t depth, T* out);  // out[k][n] = in[n * stride + k]
  void (*add_scaled)(T* out, const T* x, T scale, int64_t count);               // out += scale * x
  void (*store_scaled)(T* out, const T* x, T scale, int64_t count);             // out = scale * x
  double (*distill_sample)(const DistillSample<T>&);                            // the sample's loss
};

namespace portable {
template <typename T>
const Kernels<T>& table();
}
namespace avx2 {
template <typename T>
const Kernels<T>& table();
}
namespace avx512 {
template <typename T>
const Kernels<T>& table();
}

template <typename T>
const Kernels<T>& kernels() {
#if defined(__x86_64__)
  if (capability() == Capability::avx512) return avx512::table<T>();
  if (capability() == Capability::avx2) return avx2::table<T>();
#endif
  return portable::table<T>();
}

}  // namespace hne
