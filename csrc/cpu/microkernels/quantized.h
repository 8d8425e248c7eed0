// Kernels of int8 inference. HNE_VNNI says whether the instruction set has the product of groups, vpdpbusd.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "quantized_kernels.h"
#include "simd.h"

namespace hne::HNE_ISA {

template <int W>
using Ints = Vec<int32_t, W>;
template <int W>
using Floats = Vec<float, W>;

#if HNE_VECTOR_BYTES == 64
constexpr __mmask16 kAll = 0xffff;  // GCC 12 warns of uninitialised values in the functions without a mask
#endif

// sum[i] += products of the kGroup bytes of x[i] (unsigned) and of w[i] (signed), added
template <int W>
HNE_INLINE Ints<W> dot(Ints<W> sum, Ints<W> x, Ints<W> w) {
#if HNE_VECTOR_BYTES == 64
  if constexpr (W == 16) {
#if HNE_VNNI
    return (Ints<W>)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#else
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)x, (__m512i)w);
    return sum + (Ints<W>)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#endif
  }
#endif
#if HNE_VECTOR_BYTES >= 32
  if constexpr (W == 8) {
#if HNE_VNNI && HNE_VECTOR_BYTES == 64
    return (Ints<W>)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
#elif HNE_VNNI
    return (Ints<W>)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
#else
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)x, (__m256i)w);
    return sum + (Ints<W>)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
  }
  if constexpr (W == 4) {
    const __m128i pairs = _mm_maddubs_epi16((__m128i)x, (__m128i)w);
    return sum + (Ints<W>)_mm_madd_epi16(pairs, _mm_set1_epi16(1));
  }
#endif
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) sum += (x >> 8 * j & 255) * ((Ints<W>)((Vec<uint32_t, W>)w << (24 - 8 * j)) >> 24);
  return sum;
}

// The nearest integers, of two the even one.
template <int W>
HNE_INLINE Ints<W> round(Floats<W> x) {
#if HNE_VECTOR_BYTES == 64
  if constexpr (W == 16) return (Ints<W>)_mm512_maskz_cvtps_epi32(kAll, (__m512)x);
#endif
#if HNE_VECTOR_BYTES >= 32
  if constexpr (W == 8) return (Ints<W>)_mm256_cvtps_epi32((__m256)x);
#endif
#if defined(__x86_64__)
  if constexpr (W == 4) return (Ints<W>)_mm_cvtps_epi32((__m128)x);
#endif
  Ints<W> rounded;
  for (int i = 0; i < W; ++i) rounded[i] = int32_t(std::lrintf(x[i]));
  return rounded;
}

template <int W>
HNE_INLINE Floats<W> to_float(Ints<W> x) {
  return __builtin_convertvector(x, Floats<W>);
}

template <int W>
HNE_INLINE Ints<W> scaled(Ints<W> x, Floats<W> scale) {
  return round<W>(to_float<W>(x) * scale);
}

template <int W>
HNE_INLINE Ints<W> load_bytes(const uint8_t* p) {
  // The compilers convert vectors of this many elements piece by piece.
#if HNE_VECTOR_BYTES == 64
  if constexpr (W == 16) return (Ints<W>)_mm512_maskz_cvtepu8_epi32(kAll, (__m128i)load<W>(p));
#endif
#if HNE_VECTOR_BYTES >= 32
  if constexpr (W == 8) return (Ints<W>)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  if constexpr (W == 4)
    return (Ints<W>)_mm_cvtepu8_epi32(_mm_cvtsi32_si128(load<1>(reinterpret_cast<const int32_t*>(p))));
#endif
  return __builtin_convertvector(load<W>(p), Ints<W>);
}

// Stores values limited to 0 to 255.
template <int W>
HNE_INLINE void store_bytes(uint8_t* out, Ints<W> x) {
#if HNE_VECTOR_BYTES == 64
  if constexpr (W == 16) {
    const __m512i positive = _mm512_maskz_max_epi32(kAll, (__m512i)x, _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_maskz_cvtusepi32_epi8(kAll, positive));
    return;
  }
#endif
#if HNE_VECTOR_BYTES >= 32
  if constexpr (W == 8) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(words, words));
    return;
  }
#endif
#if defined(__x86_64__)
  if constexpr (W == 4) {
    const __m128i words = _mm_packs_epi32((__m128i)x, (__m128i)x);
    const int32_t bytes = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
    std::memcpy(out, &bytes, 4);
    return;
  }
#endif
  for (int i = 0; i < W; ++i) out[i] = uint8_t(std::clamp(x[i], 0, 255));
}

// Stores the vectors of consecutive panels, limited to 0 to 255.
template <int W, int VECTORS>
HNE_INLINE void store_panels(uint8_t* out, const Ints<W>* x) {
#if HNE_VECTOR_BYTES == 64
  if constexpr (VECTORS == 4) {
    const __m512i low = _mm512_packs_epi32((__m512i)x[0], (__m512i)x[1]);
    const __m512i high = _mm512_packs_epi32((__m512i)x[2], (__m512i)x[3]);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(out, _mm512_maskz_permutexvar_epi32(kAll, order, _mm512_packus_epi16(low, high)));
    return;
  }
#endif
#pragma GCC unroll 4
  for (int j = 0; j < VECTORS; ++j) store_bytes<W>(out + j * W, x[j]);
}

// The left rows of a tile: one pointer serves three rows, since an address is a pointer plus 0, 1 or 2 strides.
template <int ROWS>
struct ByteRows {
  static constexpr int POINTERS = (ROWS + 2) / 3;
  const uint8_t* pointers[POINTERS];
  int64_t stride;
  ByteRows(const QuantizedTap& tap, int64_t row) : stride(tap.row_stride) {
    for (int i = 0; i < POINTERS; ++i) pointers[i] = tap.rows + (row + 3 * i) * stride;
  }
  HNE_INLINE int32_t group(int row) const {
    int32_t bytes;
    __builtin_memcpy(&bytes, pointers[row / 3] + row % 3 * stride, sizeof bytes);
    return bytes;
  }
  HNE_INLINE void advance() {
    for (int i = 0; i < POINTERS; ++i) pointers[i] += kGroup;
  }
};

template <int ROWS, int PANELS>
void quantized_tile(const QuantizedGemm& g, int64_t row, int64_t panel) {
  constexpr int W = kLanes<int32_t>, PER_PANEL = int(kPanel) / W, VECTORS = PANELS * PER_PANEL;
  const int64_t first = panel * kPanel, columns = g.channels - first;
  const bool full = columns >= PANELS * kPanel;
  Ints<W> sum[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = load<W>(g.bias + first + j * W);
  if (g.add != nullptr) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const uint8_t* add = g.add + (row + i) * g.add_stride + first;
      uint8_t padded[PANELS * kPanel];
      if (!full) {
        std::memset(padded, 0, sizeof padded);
        std::memcpy(padded, add, columns);
        add = padded;
      }
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; ++j)
        sum[i][j] += scaled<W>(load_bytes<W>(add + j * W), load<W>(g.add_scale + first + j * W));
    }
  }
  for (int64_t t = 0; t < g.num_taps; ++t) {
    const QuantizedTap& tap = g.taps[t];
    if (t > 0) {
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; ++j) {
        const Floats<W> rescale = load<W>(g.rescale + first + j * W);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) sum[i][j] = scaled<W>(sum[i][j], rescale);
      }
    }
    ByteRows<ROWS> left(tap, row);
    const int64_t panel_stride = tap.groups * kPanel * kGroup;
    const int8_t* right = tap.weight + panel * panel_stride;
    for (int64_t k = 0; k < tap.groups; ++k, left.advance(), right += kPanel * kGroup) {
      Ints<W> w[VECTORS];
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; ++j)
        __builtin_memcpy(&w[j], right + j / PER_PANEL * panel_stride + j % PER_PANEL * W * kGroup, sizeof w[j]);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const Ints<W> x = splat<W>(left.group(i));
#pragma GCC unroll 16
        for (int j = 0; j < VECTORS; ++j) sum[i][j] = dot<W>(sum[i][j], x, w[j]);
      }
    }
  }
  Floats<W> scale[VECTORS];
#pragma GCC unroll 16
  for (int j = 0; j < VECTORS; ++j) scale[j] = load<W>(g.scale + first + j * W);
  if (g.out == nullptr) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      float padded[PANELS * kPanel];
      float* const out = full ? g.out_float[row + i] + first : padded;
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; ++j) store<W>(out + j * W, to_float<W>(sum[i][j]) * scale[j]);
      if (!full) std::memcpy(g.out_float[row + i] + first, padded, columns * sizeof(float));
    }
    return;
  }
  const Ints<W> zero = splat<W>(g.zero_point);
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = scaled<W>(sum[i][j], scale[j]) + zero;
    if (full) {
      store_panels<W, VECTORS>(g.out[row + i] + first, sum[i]);
    } else {
      uint8_t padded[PANELS * kPanel];
      store_panels<W, VECTORS>(padded, sum[i]);
      std::memcpy(g.out[row + i] + first, padded, columns);
    }
  }
}

// Rows of a tile, so that its sums fill the registers beside the weights and what `dot` needs.
constexpr int quantized_rows(int panels) {
  if (HNE_REGISTERS == 32) return panels == 4 ? 6 : panels == 2 ? 10 : 14;
  return HNE_VECTOR_BYTES == 16 ? 2 : HNE_VNNI ? 6 : 4;
}

template <int ROWS, int PANELS>
void quantized_tile_of(const QuantizedGemm& g, int64_t row, int64_t rows, int64_t panel) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return quantized_tile_of<ROWS - 1, PANELS>(g, row, rows, panel);
  }
  quantized_tile<ROWS, PANELS>(g, row, panel);
}

// All panels from `panel` on, PANELS at a time; then the others, fewer at a time.
template <int PANELS>
void quantized_panels(const QuantizedGemm& g, int64_t panel, int64_t panels) {
  constexpr int ROWS = quantized_rows(PANELS);
  const int64_t tiles = (g.count + ROWS - 1) / ROWS;  // of nearly equal size
  for (; panel + PANELS <= panels; panel += PANELS)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = g.count * tile / tiles;
      quantized_tile_of<ROWS, PANELS>(g, row, g.count * (tile + 1) / tiles - row, panel);
    }
  if constexpr (PANELS > 1) {
    if (panel < panels) quantized_panels<PANELS / 2>(g, panel, panels);
  }
}

inline void quantized_gemm(const QuantizedGemm& g) {
  quantized_panels<HNE_REGISTERS == 32 ? 4 : 1>(g, 0, (g.channels + kPanel - 1) / kPanel);
}

// Calls f(width, c) for channels [0, count), a whole number of groups.
template <int W = kLanes<int32_t>, typename F>
HNE_INLINE void for_groups(int64_t count, const F& f, int64_t c = 0) {
  for (; c + W <= count; c += W) f(Width<W>{}, c);
  if constexpr (W > kGroup) {
    if (c < count) for_groups<W / 2>(count, f, c);
  }
}

// The bytes of ROWS rows at one place, as groups.
template <int W, int ROWS>
HNE_INLINE Ints<W> column(const uint8_t* in, int64_t row_size) {
  Ints<W> groups = load_bytes<W>(in);
#pragma GCC unroll 4
  for (int r = 1; r < ROWS; ++r) groups |= load_bytes<W>(in + r * row_size) << 8 * r;
  return groups;
}

template <int W>
HNE_INLINE Ints<W> load_groups(const int8_t* p) {
  Ints<W> groups;
  __builtin_memcpy(&groups, p, sizeof groups);
  return groups;
}

template <int W>
HNE_INLINE void depthwise_out(const QuantizedDepthwise& d, int64_t c, Ints<W> sum, uint8_t* out) {
  store_bytes<W>(out, scaled<W>(sum, load<W>(d.scale + c)) + splat<W>(d.zero_point));
}

// Channels from c on of a row of outputs of a 3x3 filter: PIXELS at a time share the columns that they read.
template <int W, int STRIDE, int PIXELS>
HNE_INLINE void depthwise_3x3(const QuantizedDepthwise& d, int64_t c, const uint8_t* in, uint8_t* out, int64_t ox) {
  Ints<W> w[3];
#pragma GCC unroll 3
  for (int kx = 0; kx < 3; ++kx) w[kx] = load_groups<W>(d.weight + (kx * d.channels + c) * kGroup);
  const Ints<W> bias = load<W>(d.bias + c);
  for (; ox + PIXELS <= d.out_width; ox += PIXELS) {
    Ints<W> sum[PIXELS];
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; ++i) sum[i] = bias;
#pragma GCC unroll 16
    for (int x = 0; x < (PIXELS - 1) * STRIDE + 3; ++x) {
      const Ints<W> groups = column<W, 3>(in + (ox * STRIDE + x) * d.channels + c, d.row_size);
#pragma GCC unroll 8
      for (int i = 0; i < PIXELS; ++i)
        if (x - i * STRIDE >= 0 && x - i * STRIDE < 3) sum[i] = dot<W>(sum[i], groups, w[x - i * STRIDE]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; ++i) depthwise_out<W>(d, c, sum[i], out + (ox + i) * d.channels + c);
  }
  if constexpr (PIXELS > 1) depthwise_3x3<W, STRIDE, PIXELS / 2>(d, c, in, out, ox);
}

// The same for any filter.
template <int W>
HNE_INLINE void depthwise_any(const QuantizedDepthwise& d, int64_t c, const uint8_t* in, uint8_t* out) {
  for (int64_t ox = 0; ox < d.out_width; ++ox) {
    Ints<W> sum = load<W>(d.bias + c);
    const int8_t* weight = d.weight + c * kGroup;
    for (int64_t kx = 0; kx < d.kernel_size; ++kx) {
      const uint8_t* at = in + (ox * d.stride + kx) * d.channels + c;
      for (int64_t ky = 0; ky < d.kernel_size; ky += kGroup, weight += d.channels * kGroup) {
        Ints<W> groups = load_bytes<W>(at + ky * d.row_size);
        for (int64_t i = 1; i < std::min(kGroup, d.kernel_size - ky); ++i)
          groups |= load_bytes<W>(at + (ky + i) * d.row_size) << int(8 * i);
        sum = dot<W>(sum, groups, load_groups<W>(weight));
      }
    }
    depthwise_out<W>(d, c, sum, out + ox * d.channels + c);
  }
}

#if HNE_VECTOR_BYTES >= 32

// A block: as many channels as a vector has bytes. Unpacking instructions make four vectors of groups of it, in the
// order of the instructions: in vector j, the 128 bits l are the channels 16 l + 4 j to 16 l + 4 j + 3.
constexpr int kBlock = HNE_VECTOR_BYTES, kBlockWidth = kBlock / 4;

// The values of a block in this order.
HNE_INLINE void order_block(const void* values, Ints<kBlockWidth>* out) {
  for (int j = 0; j < 4; ++j)
    for (int l = 0; l < kBlock / 16; ++l)
      std::memcpy(reinterpret_cast<char*>(&out[j]) + l * 16, static_cast<const char*>(values) + (l * 16 + j * 4) * 4,
                  16);
}

#if HNE_VECTOR_BYTES == 64
HNE_INLINE __m512i load_block(const uint8_t* p, bool half) {
  return _mm512_maskz_loadu_epi8(half ? 0xffffffff : ~__mmask64(0), p);
}
#else
HNE_INLINE __m256i load_block(const uint8_t* p, bool) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
#endif

// The bytes of three rows at one place; `half`: only the first 32 bytes may be read.
HNE_INLINE void block_column(const uint8_t* in, int64_t row_size, Ints<kBlockWidth>* groups, bool half = false) {
#if HNE_VECTOR_BYTES == 64
  const auto low_bytes = [](auto a, auto b) { return _mm512_unpacklo_epi8(a, b); };
  const auto high_bytes = [](auto a, auto b) { return _mm512_unpackhi_epi8(a, b); };
  const auto low_pairs = [](auto a, auto b) { return (Ints<kBlockWidth>)_mm512_unpacklo_epi16(a, b); };
  const auto high_pairs = [](auto a, auto b) { return (Ints<kBlockWidth>)_mm512_unpackhi_epi16(a, b); };
  const __m512i none = _mm512_setzero_si512();
#else
  const auto low_bytes = [](auto a, auto b) { return _mm256_unpacklo_epi8(a, b); };
  const auto high_bytes = [](auto a, auto b) { return _mm256_unpackhi_epi8(a, b); };
  const auto low_pairs = [](auto a, auto b) { return (Ints<kBlockWidth>)_mm256_unpacklo_epi16(a, b); };
  const auto high_pairs = [](auto a, auto b) { return (Ints<kBlockWidth>)_mm256_unpackhi_epi16(a, b); };
  const __m256i none = _mm256_setzero_si256();
#endif
  const auto a = load_block(in, half), b = load_block(in + row_size, half), c = load_block(in + 2 * row_size, half);
  const auto low = low_bytes(a, b), high = high_bytes(a, b);
  const auto low_c = low_bytes(c, none), high_c = high_bytes(c, none);
  groups[0] = low_pairs(low, low_c), groups[1] = high_pairs(low, low_c);
  groups[2] = low_pairs(high, high_c), groups[3] = high_pairs(high, high_c);
}

// Stores a block, limited to 0 to 255, in the order of the channels.
HNE_INLINE void store_block(uint8_t* out, const Ints<kBlockWidth>* x) {
#if HNE_VECTOR_BYTES == 64
  const __m512i low = _mm512_packs_epi32((__m512i)x[0], (__m512i)x[1]);
  const __m512i high = _mm512_packs_epi32((__m512i)x[2], (__m512i)x[3]);
  _mm512_storeu_si512(out, _mm512_packus_epi16(low, high));
#else
  const __m256i low = _mm256_packs_epi32((__m256i)x[0], (__m256i)x[1]);
  const __m256i high = _mm256_packs_epi32((__m256i)x[2], (__m256i)x[3]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_packus_epi16(low, high));
#endif
}

// The filters of a block, in its order: of channels from c on, or of few channels again and again.
struct BlockFilter {
  Ints<kBlockWidth> w[3][4], bias[4], scale[4];
  BlockFilter(const QuantizedDepthwise& d, int64_t c) {
    const int64_t channels = std::min<int64_t>(d.channels, kBlock);
    const auto order = [&](const void* values, Ints<kBlockWidth>* out) {
      char block[kBlock * 4];
      for (int64_t i = 0; i < kBlock; i += channels) std::memcpy(block + i * 4, values, channels * 4);
      order_block(block, out);
    };
    for (int kx = 0; kx < 3; ++kx) order(d.weight + (kx * d.channels + c) * kGroup, w[kx]);
    order(d.bias + c, bias);
    order(d.scale + c, scale);
  }
};

HNE_INLINE void finish_block(const QuantizedDepthwise& d, const BlockFilter& f, Ints<kBlockWidth>* sum, uint8_t* out) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)
    sum[j] = scaled<kBlockWidth>(sum[j], (Floats<kBlockWidth>)f.scale[j]) + splat<kBlockWidth>(d.zero_point);
  store_block(out, sum);
}

// A block of channels of a row of outputs of a 3x3 filter.
template <int STRIDE, int PIXELS>
HNE_INLINE void depthwise_block(const QuantizedDepthwise& d, const BlockFilter& f, const uint8_t* in, uint8_t* out,
                                int64_t ox) {
  constexpr int W = kBlockWidth;
  for (; ox + PIXELS <= d.out_width; ox += PIXELS) {
    Ints<W> sum[PIXELS][4];
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[i][j] = f.bias[j];
#pragma GCC unroll 16
    for (int x = 0; x < (PIXELS - 1) * STRIDE + 3; ++x) {
      Ints<W> groups[4];
      block_column(in + (ox * STRIDE + x) * d.channels, d.row_size, groups);
#pragma GCC unroll 8
      for (int i = 0; i < PIXELS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
          if (x - i * STRIDE >= 0 && x - i * STRIDE < 3)
            sum[i][j] = dot<W>(sum[i][j], groups[j], f.w[x - i * STRIDE][j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[i][j] = scaled<W>(sum[i][j], (Floats<W>)f.scale[j]) + splat<W>(d.zero_point);
      store_block(out + (ox + i) * d.channels, sum[i]);
    }
  }
  if constexpr (PIXELS > 1) depthwise_block<STRIDE, PIXELS / 2>(d, f, in, out, ox);
}

template <int STRIDE>
void depthwise_blocks(const QuantizedDepthwise& d, int64_t c) {
  const BlockFilter filter(d, c);
  for (int64_t y = 0; y < d.count; ++y)
    depthwise_block<STRIDE, HNE_REGISTERS == 32 ? 4 : 2>(d, filter, d.in + y * STRIDE * d.row_size + c,
                                                         d.out + y * d.out_width * d.channels + c, 0);
}

// 128 bits from place `lane` on of two vectors one after the other.
template <int LANE>
HNE_INLINE Ints<kBlockWidth> joined(Ints<kBlockWidth> first, Ints<kBlockWidth> second) {
  if constexpr (LANE == 0) return first;
  if constexpr (LANE == kBlock / 16) return second;
#if HNE_VECTOR_BYTES == 64
  return (Ints<kBlockWidth>)_mm512_maskz_alignr_epi32(kAll, (__m512i)second, (__m512i)first, LANE * 4 % 16);
#else
  return (Ints<kBlockWidth>)_mm256_permute2x128_si256((__m256i)first, (__m256i)second, 0x21);
#endif
}

// A row of few channels, 16 * LANES, as a block of several pixels after another: a tap further to the right is the same
// row, LANES * 128 bits on.
template <int LANES>
void depthwise_pixels(const QuantizedDepthwise& d) {
  constexpr int W = kBlockWidth;
  const BlockFilter f(d, 0);
  const int64_t blocks = d.out_width * d.channels / kBlock;
  for (int64_t y = 0; y < d.count; ++y) {
    const uint8_t* in = d.in + y * d.row_size;
    uint8_t* out = d.out + y * d.out_width * d.channels;
    Ints<W> groups[4];
    block_column(in, d.row_size, groups);
    for (int64_t b = 1; b <= blocks; ++b, out += kBlock) {
      Ints<W> next[4], sum[4];
      block_column(in + b * kBlock, d.row_size, next, LANES * 32 < kBlock && b == blocks);  // two pixels are left
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        sum[j] = dot<W>(f.bias[j], groups[j], f.w[0][j]);
        sum[j] = dot<W>(sum[j], joined<LANES>(groups[j], next[j]), f.w[1][j]);
        sum[j] = dot<W>(sum[j], joined<2 * LANES>(groups[j], next[j]), f.w[2][j]);
        groups[j] = next[j];
      }
      finish_block(d, f, sum, out);
    }
  }
}

#endif

inline void quantized_depthwise(const QuantizedDepthwise& d) {
  int64_t c = 0;
#if HNE_VECTOR_BYTES >= 32
  if (d.kernel_size == 3 && d.stride == 1 && d.out_width * d.channels % kBlock == 0) {
    if (d.channels == 16) return depthwise_pixels<1>(d);
    if (d.channels == 32 && kBlock == 64) return depthwise_pixels<kBlock / 32>(d);
  }
  if (d.kernel_size == 3 && d.stride <= 2)
    for (; c + kBlock <= d.channels; c += kBlock) d.stride == 1 ? depthwise_blocks<1>(d, c) : depthwise_blocks<2>(d, c);
#endif
  if (c == d.channels) return;
  for (int64_t y = 0; y < d.count; ++y) {
    const uint8_t* in = d.in + y * d.stride * d.row_size;
    uint8_t* out = d.out + y * d.out_width * d.channels;
    for_groups(
        d.channels,
        [&](auto width, int64_t first) {
          constexpr int W = decltype(width)::value, PIXELS = HNE_REGISTERS == 32 ? 8 : 4;
          if (d.kernel_size == 3 && d.stride == 1)
            depthwise_3x3<W, 1, PIXELS>(d, first, in, out, 0);
          else if (d.kernel_size == 3 && d.stride == 2)
            depthwise_3x3<W, 2, 4>(d, first, in, out, 0);
          else
            depthwise_any<W>(d, first, in, out);
        },
        c);
  }
}

inline void quantize_row(const QuantizeRow& r) {
  constexpr int W = kLanes<int32_t>;
  constexpr float kMost = 1 << 20;  // far beyond what is saturated, and within int32
  const auto quantized = [&](float x) __attribute__((always_inline)) {
    x = x * r.inverse_scale;
    x = x > -kMost ? x : -kMost;  // NaN as well
    x = x < kMost ? x : kMost;
    return std::clamp(int32_t(std::nearbyintf(x)) + r.zero_point, 0, 255);
  };
  int64_t i = 0;
  if (r.column_stride == 1 && r.out_channels == kGroup) {
    const Ints<W> low = splat<W>(0), high = splat<W>(255);
    for (; i + W <= r.width; i += W) {
      Ints<W> groups = low;
      for (int64_t c = 0; c < r.channels; ++c) {
        Floats<W> x = load<W>(r.in + c * r.channel_stride + i) * splat<W>(r.inverse_scale);
        x = x > -kMost ? x : splat<W>(-kMost);
        x = x < kMost ? x : splat<W>(kMost);
        Ints<W> q = round<W>(x) + splat<W>(r.zero_point);
        q = q < low ? low : q;
        q = q > high ? high : q;
        groups |= q << int(8 * c);
      }
      __builtin_memcpy(r.out + i * kGroup, &groups, sizeof groups);
    }
  }
  for (; i < r.width; ++i)
    for (int64_t c = 0; c < r.out_channels; ++c)
      r.out[i * r.out_channels + c] =
          c < r.channels ? uint8_t(quantized(r.in[c * r.channel_stride + i * r.column_stride])) : uint8_t(0);
}

inline void quantized_mean(const QuantizedMean& m) {
  for_groups(m.channels, [&](auto width, int64_t c) {
    constexpr int W = decltype(width)::value;
    Ints<W> sum = splat<W>(m.offset);
    for (int64_t i = 0; i < m.count; ++i) sum += load_bytes<W>(m.in + i * m.channels + c);
    store_bytes<W>(m.out + c, scaled<W>(sum, splat<W>(m.scale)) + splat<W>(m.zero_point));
  });
}

const QuantizedKernels& quantized_table() {
  static constexpr QuantizedKernels kernels{quantized_gemm, quantized_depthwise, quantize_row, quantized_mean};
  return kernels;
}

}  // namespace hne::HNE_ISA
