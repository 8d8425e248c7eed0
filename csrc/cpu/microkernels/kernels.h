// The micro-kernels: their arguments, and one table of functions per instruction set (isa/*.cpp).
// Everything is row-major. A row is the channels of one pixel of one branch, contiguous in memory.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "../runtime/capability.h"
#include "clamp.h"
#include "panel.h"

namespace hne {

// A feature or weight in 16 bits, the upper half of a float. Sums of its products are float.
enum class bfloat16 : uint16_t {};

// The type of the sums of values T, and of what is added to them.
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, bfloat16>, float, T>;

// Consecutive terms of a sum that are multiplied at once: a product of bfloat16 multiplies pairs of channels.
template <typename T>
constexpr int64_t kTerms = sizeof(Sum<T>) / sizeof(T);

template <typename T>
Sum<T> to_sum(T value) {
  if constexpr (std::is_same_v<T, bfloat16>)
    return std::bit_cast<float>(uint32_t(value) << 16);
  else
    return value;
}

// The nearest bfloat16, and of two the even one; NaN stays NaN.
inline bfloat16 to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return bfloat16(value == value ? rounded : bits >> 16 | 0x40);
}

// One term of a convolution: rows[m] times weight, which is [panel][depth / kTerms][kPanel][kTerms] with panels
// panel_stride apart. The depth is a multiple of kTerms.
// A 1x1 convolution has one tap, a kxk convolution k*k, and the end of a bottleneck two: the projection and the
// shortcut.
template <typename T>
struct Tap {
  const T* const* rows;
  const T* weight;
  int64_t panel_stride;
  int64_t depth;
  int64_t row_stride = 0;  // distance of consecutive rows, if constant: then only rows[0] is read; else 0
};

// Ranges of memory that are read or written next. While products compute, they prefetch them into the second cache.
template <typename T>
class PrefetchQueue {
 public:
  void clear() { next_ = end_ = 0; }

  void add(const T* data, int64_t count) {
    if (data != nullptr && count > 0 && end_ < kMaxRanges) ranges_[end_++] = {data, count};
  }

  // The first of `count` values to prefetch, or null. The last values of a range may exceed it, which does no harm.
  const T* take(int64_t count) {
    if (next_ == end_) return nullptr;
    Range& range = ranges_[next_];
    const T* const data = range.data;
    range.data += count, range.count -= count;
    if (range.count <= 0) ++next_;
    return data;
  }

 private:
  static constexpr int kMaxRanges = 16;
  struct Range {
    const T* data;
    int64_t count;
  };
  Range ranges_[kMaxRanges];
  int next_ = 0, end_ = 0;
};

// out[m][n] = clamp(sum over taps + bias[n] + add[m][n])
template <typename T>
struct Gemm {
  const Tap<T>* taps;
  int64_t num_taps;
  int64_t count;        // rows m
  int64_t channels;     // columns n
  T* const* out;        // [count]
  const Sum<T>* bias;   // [channels] or null
  const T* const* add;  // [count] rows or null
  Clamp<Sum<T>> clamp;
  PrefetchQueue<T>* prefetch = nullptr;
  bool outputs_cached = false;      // out and add lie in the cache: they need no prefetch
  const T* next_weights = nullptr;  // of the product that follows, or null: prefetched during the last columns
  int64_t next_count = 0;           // values of them
  // [count], of bfloat16 only: results as float, instead of `out`, with outputs_cached and nothing to add.
  Sum<T>* const* sums = nullptr;
};

// Pixels of Winograd's convolution at the 16 frequencies f, at out[f * stride + tile * channels + c]: 4x4 pixels of the
// input, or 2x2 pixels of the output's gradient.
template <typename T>
struct WinogradInput {
  const T* const* pixels;  // [count][16] or [count][4]; zeros outside the feature map
  int64_t count, channels;
  T* out;
  int64_t stride;  // between frequencies
};

// Tiles of 2x2 output pixels, from their sums [16][count][channels].
template <typename T>
struct WinogradOutput {
  const T* sums;
  int64_t stride;  // between frequencies
  int64_t count, channels;
  T* const* out;        // [count][4], null outside the feature map
  const T* const* add;  // [count][4] or null
  const T* bias;        // [channels]
  Clamp<T> clamp;
};

// A row of the gradient of filters [channels][3][3], from its sums at the 16 frequencies f, sums[f * stride + channel].
template <typename T>
struct WinogradFilterGradient {
  const T* sums;
  int64_t stride, channels;
  T* out;
};

// sum[i][j] += sum over rows m of left[m][i] * right[m][j]: the gradient of a convolution's weights. A row of bfloat16
// is a pair of rows, [channel][2].
template <typename T>
struct Outer {
  const T* const* left;
  const T* const* right;
  int64_t count;
  int64_t left_channels;
  int64_t right_channels;
  Sum<T>* sum;  // [left_channels][right_channels]
  PrefetchQueue<T>* prefetch = nullptr;
};

// out[m / kTerms][channel][m % kTerms] = rows[m][channel], with zeros for rows that are missing: what Outer reads.
template <typename T>
struct RowPairs {
  const T* const* rows;
  int64_t count, channels;
  T* out;
};

// Rows of output pixels of a depthwise convolution. Output row y reads the input rows rows[y * stride + ky], zeros
// outside the feature map.
template <typename T>
struct DepthwiseRows {
  const Sum<T>* const* rows;  // [(count - 1) * stride + kernel_size]
  const Sum<T>* weight;       // [kernel_size][kernel_size][channels]
  const Sum<T>* bias;         // [channels] or null
  T* out;                     // [count][out_width][channels]
  int64_t width, out_width, channels, kernel_size, stride, padding;
  bool accumulate;  // start from out instead of bias
  Clamp<Sum<T>> clamp;
  int64_t count = 1;
};

// One row of pixels of the input gradient of a depthwise convolution with a stride above 1:
// out[ix] += sum over kx, ky of rows[ky][ox] * weight[ky][kx], ox * stride + kx = ix + padding.
template <typename T>
struct DepthwiseInputRow {
  const Sum<T>* const* rows;  // [kernel_size], null if no output row reads this input row
  const Sum<T>* weight;       // [kernel_size][kernel_size][channels]
  T* out;                     // [width][channels]
  int64_t width, out_width, channels, kernel_size, stride, padding;
};

// The gradient of a depthwise convolution's weights, for one row of output pixels:
// sum[ky][kx][c] += sum over ox of grad[ox][c] * rows[ky][ox * stride + kx - padding][c].
template <typename T>
struct DepthwiseWeightRow {
  const T* grad;         // [out_width][channels]
  const T* const* rows;  // [kernel_size], null outside the feature map
  T* sum;                // [kernel_size][kernel_size][channels]
  int64_t width, out_width, channels, kernel_size, stride, padding;
};

// Normalisation of `count` rows of `channels`: clamp((x - mean) * scale + shift + add). Each kernel uses some members.
template <typename T>
struct NormRows {
  const T* x;
  const Sum<T>* mean;  // [channels], like the next two
  const Sum<T>* scale;
  const Sum<T>* shift;
  const T* add;         // or null
  Clamp<Sum<T>> clamp;  // the activation
  T* out;
  Sum<T>* out_sums;  // of bfloat16 only, or null: the normalised rows as float, instead of `out`
  // Backward:
  const T* grad;    // gradient of the output
  const T* y;       // the output: the activation's gradient is 0 where y is an end of the clamp; null: y is recomputed
  T* out_masked;    // gradient of the activation's input, or null
  T* streamed;      // non-temporal copy of the masked gradient, in rows of whole cache lines, or null
  double* sums;     // [2][channels], accumulated into
  Sum<T>* partial;  // [2][channels] of scratch memory
  int64_t count, channels;
};

// The hierarchical distillation loss of one sample, and its gradient.
template <typename T>
struct DistillSample {
  const T* logits;          // [models] rows of `classes`, `stride` apart
  T* grad;                  // the same layout
  T* scratch;               // [num_students + 2][classes]
  const int64_t* students;  // ensemble sizes, rising and below `models`
  int64_t num_students, models, classes, stride, target;
  double alpha, temperature, batch;
};

// Kernels that read or write feature maps of any type.
template <typename T>
struct FeatureKernels {
  void (*gemm)(const Gemm<T>&);
  void (*outer)(const Outer<T>&);
  void (*pair_rows)(const RowPairs<T>&);
  void (*depthwise_rows)(const DepthwiseRows<T>&);
  void (*depthwise_input_row)(const DepthwiseInputRow<T>&);
  void (*normalize)(const NormRows<T>&);
  void (*normalize_backward)(const NormRows<T>&);
  void (*mask)(const NormRows<T>&);                                           // the gradient of the activation
  void (*moments)(const NormRows<T>&);                                        // sums of x - shift and of its squares
  void (*mean_rows)(const T* rows, int64_t count, int64_t channels, T* out);  // out[c] = mean over m of rows[m][c]
  void (*add_scaled)(T* out, const T* x, Sum<T> scale, int64_t count);        // out += scale * x
};

// Depthwise convolutions of bfloat16 read float: their features are converted, or normalised, when they are read.
template <typename T>
struct Kernels : FeatureKernels<T> {
  void (*depthwise_weight_row)(const DepthwiseWeightRow<T>&);
  void (*max_of_rows)(const T* const* rows, int64_t count, int64_t channels, T* out);
  void (*sum_of_rows)(const T* const* rows, int64_t count, int64_t channels, T scale, T* out);
  void (*transpose_panel)(const T* in, int64_t stride, int64_t depth, T* out);  // out[k][n] = in[n * stride + k]
  void (*store_scaled)(T* out, const T* x, T scale, int64_t count);             // out = scale * x
  void (*winograd_input)(const WinogradInput<T>&);
  void (*winograd_output)(const WinogradOutput<T>&);
  void (*winograd_output_gradient)(const WinogradInput<T>&);
  void (*winograd_filter_gradient)(const WinogradFilterGradient<T>&);
  double (*distill_sample)(const DistillSample<T>&);  // returns the sample's loss
};

template <>
struct Kernels<bfloat16> : FeatureKernels<bfloat16> {};

namespace portable {
template <typename T>
const Kernels<T>& table();
const Kernels<bfloat16>& bfloat16_table();
}  // namespace portable
namespace avx2 {
template <typename T>
const Kernels<T>& table();
}
namespace avx512 {
template <typename T>
const Kernels<T>& table();
}
namespace avx512_bf16 {
const Kernels<bfloat16>& bfloat16_table();
}
namespace amx {
const Kernels<bfloat16>& bfloat16_table();
}

template <typename T>
const Kernels<T>& kernels() {
#if defined(__x86_64__)
  if (capability() == Capability::avx512) return avx512::table<T>();
  if (capability() == Capability::avx2) return avx2::table<T>();
#endif
  return portable::table<T>();
}

template <>
inline const Kernels<bfloat16>& kernels() {
#if defined(__x86_64__) || defined(HNE_EMULATED_TILES)
  if (bfloat16_products() == Bfloat16Products::amx) return amx::bfloat16_table();
#endif
#if defined(__x86_64__)
  if (bfloat16_products() == Bfloat16Products::avx512) return avx512_bf16::bfloat16_table();
#endif
  return portable::bfloat16_table();
}

}  // namespace hne
