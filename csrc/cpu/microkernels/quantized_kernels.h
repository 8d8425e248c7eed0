// The micro-kernels of int8 inference: their arguments, and one table of functions per instruction set.
// Features are uint8 with a zero point, weights int8 of at most kMostWeight, sums int32. All results are the same on
// every instruction set: sums are exact, and each step to the next integer is one rounded product.
#pragma once

#include <cstdint>

#include "../runtime/capability.h"
#include "panel.h"

namespace hne {

// Channels of a group, which one instruction multiplies and adds. Features have a whole number of groups.
constexpr int64_t kGroup = 4;

// So that two products of a weight and a feature fit into int16, as AVX2 adds them: 2 * 64 * 255 < 2^15.
constexpr int64_t kMostWeight = 64;

// One term of a convolution: rows, `row_stride` apart, times weight [panel][groups][kPanel][kGroup].
struct QuantizedTap {
  const uint8_t* rows;
  int64_t row_stride;
  const int8_t* weight;
  int64_t groups;
};

// sum[m][n] = bias[n] + round(add[m][n] * add_scale[n]) + first tap, then round(sum * rescale[n]) + second tap;
// out[m][n] = saturate(round(sum * scale[n]) + zero_point), or sum * scale[n] as float.
// Arrays over channels have whole panels.
struct QuantizedGemm {
  const QuantizedTap* taps;
  int64_t num_taps;  // 1 or 2
  int64_t count;     // rows m
  int64_t channels;  // columns n
  const int32_t* bias;
  const float* rescale;  // for two taps
  const float* scale;
  int32_t zero_point;            // of the output
  uint8_t* const* out;           // [count] rows, or null
  float* const* out_float;       // [count] rows, if out is null
  const uint8_t* add = nullptr;  // rows, add_stride apart, or null
  int64_t add_stride = 0;
  const float* add_scale = nullptr;
};

// Rows of output pixels of a depthwise convolution of padded input rows, row_size bytes apart; weight
// [kernel_size][ceil(kernel_size / kGroup)][channels][kGroup]: columns of the filter, in groups of rows.
struct QuantizedDepthwise {
  const uint8_t* in;
  int64_t row_size, count;  // count: rows of the output
  const int8_t* weight;
  const int32_t* bias;  // [channels], like the next
  const float* scale;
  int32_t zero_point;  // of the output
  uint8_t* out;        // [count][out_width][channels]
  int64_t out_width, channels, kernel_size, stride;
};

// A row of pixels of an image: out[i][c] = saturate(round(in[c][i] * inverse_scale) + zero_point); channels of `out`
// beyond those of the image are 0.
struct QuantizeRow {
  const float* in;
  int64_t channel_stride, column_stride, width, channels;
  float inverse_scale;
  int32_t zero_point;
  uint8_t* out;
  int64_t out_channels;
};

// The mean over the pixels of a feature map: out[c] = saturate(round((sum over pixels + offset) * scale) + zero_point).
struct QuantizedMean {
  const uint8_t* in;  // [count][channels]
  int64_t count, channels;
  int32_t offset;
  float scale;
  int32_t zero_point;
  uint8_t* out;
};

struct QuantizedKernels {
  void (*gemm)(const QuantizedGemm&);
  void (*depthwise)(const QuantizedDepthwise&);
  void (*quantize_row)(const QuantizeRow&);
  void (*mean)(const QuantizedMean&);
};

namespace portable {
const QuantizedKernels& quantized_table();
}
namespace avx2 {
const QuantizedKernels& quantized_table();
}
namespace avx2_vnni {
const QuantizedKernels& quantized_table();
}
namespace avx512 {
const QuantizedKernels& quantized_table();
}
namespace avx512_vnni {
const QuantizedKernels& quantized_table();
}

inline const QuantizedKernels& quantized_kernels() {
#if defined(__x86_64__)
  if (capability() == Capability::avx512) return vnni() ? avx512_vnni::quantized_table() : avx512::quantized_table();
  if (capability() == Capability::avx2) return vnni() ? avx2_vnni::quantized_table() : avx2::quantized_table();
#endif
  return portable::quantized_table();
}

}  // namespace hne
