// The phases of the fused bottleneck kernel, each for all threads of a block: the load of the input, the first product,
// the depthwise convolution and the residual.
//
//   pixels of a region, of a tile; chunk   bytes moved, in shared memory         multiply-adds
//   load_region                            region C_in values                    none
//   expand_chunk                           region (C_in + chunk) values          region C_in chunk
//   filter_...                             (k^2 + 1) tile chunk values           k^2 tile chunk
#pragma once

#include "bottleneck.h"

namespace hne {

constexpr int kWarps = kThreads / kWarp;

// The tile of a block: its first output pixel, its sample and its branch.
struct BlockTile {
  int x, y, sample, branch;
  template <typename T>
  HNE_DEVICE BlockTile(const BottleneckPlan<T>& p, int block) {
    x = p.tiles_x.split(block) << p.tile_shift;
    y = p.tiles_y.split(block) * p.tile_height;
    sample = p.samples.split(block);
    branch = block;
  }
};

// Loads the region of input pixels; those outside of the feature map become zeros. A warp loads whole rows.
template <typename T, bool vectors>
HNE_DEVICE void load_region(T* x, const Bottleneck<T>& b, const BottleneckPlan<T>& p, const T* from, int top,
                            int left) {
  constexpr int width = 16 / int(sizeof(T));
  const ThreadPlace place;
  const int per_row = p.region_width * p.x_vectors.divisor(), channels = b.s.in_channels;
  if constexpr (vectors) from = recompute(from);
#pragma unroll 1
  for (int y = place.warp; y < p.region_height; y += kWarps) {
    const bool row_inside = unsigned(top + y) < unsigned(b.s.height);
    const int row = row_inside ? ((top + y) * b.s.width + left) * channels : 0;
    T* const to = x + y * p.region_width * p.x_pitch;
#pragma unroll 1
    for (int i = place.lane; i < per_row; i += kWarp) {
      int pixel = i;
      const int channel = p.x_vectors.split(pixel) * width;
      const bool there = row_inside && unsigned(left + pixel) < unsigned(b.s.width) && channel < channels;
      const T* const source = from + (there ? row + pixel * channels + channel : 0);
      if constexpr (vectors)
        copy16(to + pixel * p.x_pitch + channel, source, there);
      else
        copy_vector<T, false>(to + pixel * p.x_pitch + channel, source, there ? channels - channel : 0, from);
    }
  }
}

// Copies the depthwise filters [tap][channel] of a chunk; channels from `present` on become zeros.
template <typename T, bool vectors>
HNE_DEVICE void copy_filters(T* to, const T* from, int middle, int taps, int present, int columns) {
  constexpr int width = 16 / int(sizeof(T));
  const int shift = (columns == 32 ? 5 : 4) - (width == 8 ? 3 : 2);
#pragma unroll 1
  for (int i = ThreadPlace{}.thread; i < taps << shift; i += kThreads) {
    const int tap = i >> shift, channel = (i - (tap << shift)) * width;
    copy_vector<T, vectors>(to + tap * kChunk + channel, from + int64_t(tap) * middle + channel, present - channel,
                            from);
  }
}

// sums += a b over `depth`. In 16 bits in steps of `kStep`: longer unrolled loops take more registers.
template <typename P, int kStep, int MT, int NT, typename A, typename T = typename P::Type>
HNE_DEVICE void multiply_in_steps(float (&sums)[MT][NT][4], const A& rows, const T* b, int pitch, int depth,
                                  int thread) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll 1
    for (int k = 0; k < depth; k += kStep) {
      const auto row = [&](int m) { return rows(m) + k; };
      multiply<P, MT, NT>(sums, RowsOf<T, decltype(row)>{row}, Across<T>{b + k * pitch, pitch}, kStep, thread);
    }
  } else {
    multiply<P, MT, NT>(sums, RowsOf<T, A>{rows}, Across<T>{b, pitch}, depth, thread);
  }
}

// The first product: a warp computes 16 pixels times 16 channels of the chunk at a time. Returns whether the results of
// this thread, before the clamp, are all finite, if T has 16 bits.
template <typename P, bool vectors, typename T = typename P::Type>
HNE_DEVICE bool expand_chunk(T* expanded, const T* x, const T* weights, const int* places, const T* bias, int present,
                             int columns, const BottleneckPlan<T>& p, const PairClamp<T>& range) {
  const auto [thread, warp, lane] = ThreadPlace{};
  const int shift = columns == 32 ? 1 : 0, channel = (warp & shift) * 16, own = channel + lane % 4 * 2;
  float biases[2][2];
#pragma unroll
  for (int j = 0; j < 2; ++j) load_pair<vectors>(biases[j], bias, own + 8 * j, present);
  uint32_t check = 0;
#pragma unroll 1
  for (int row = (warp >> shift) * 16; row < p.x_rows; row += (kWarps >> shift) * 16) {
    float sums[1][2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[0][j][e] = biases[j][e % 2];
    const Pitched<T> rows{x + row * p.x_pitch, p.x_pitch};
    if (p.depth % 32 == 0)
      multiply_in_steps<P, 32>(sums, rows, weights + channel, p.expand_pitch, p.depth, thread);
    else
      multiply_in_steps<P, 16>(sums, rows, weights + channel, p.expand_pitch, p.depth, thread);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int place = places[row + lane / 4 + 8 * h];
      if (place < 0) continue;  // the depthwise convolution pads with zeros, which are there
#pragma unroll
      for (int j = 0; j < 2; ++j)
        range.store_checked(expanded + place + own + 8 * j, sums[0][j][2 * h], sums[0][j][2 * h + 1], check);
    }
  }
  return !PairClamp<T>::not_finite(check);
}

// Pixel `pixel` of a tile, for which the nearest one that may exist stands in.
template <typename T>
struct TilePixel {
  int y, x;
  HNE_DEVICE TilePixel(int pixel, const BottleneckPlan<T>& p)
      : y(min(pixel >> p.tile_shift, p.last_y)), x(min(pixel & ((1 << p.tile_shift) - 1), p.last_x)) {}
  // Row of the region under it.
  HNE_DEVICE int input_row(const BottleneckPlan<T>& p, int stride) const {
    return (y * stride + p.margin) * p.region_width + x * stride + p.margin;
  }
};

// The depthwise convolution of 3x3 taps in 16 bits: a warp computes 16 pixels times 16 channels. The 8 warps cover a
// tile of 64 pixels and a chunk of 32 channels.
template <typename T, bool vectors>
HNE_DEVICE void filter_on_tensor_cores(T* filtered, const T* expanded, const T* filters, const T* bias, int present,
                                       int columns, int stride, const BottleneckPlan<T>& p, const PairClamp<T>& range) {
  static_assert(kWarps * 16 * 16 >= kTilePixels * kChunk);
  const auto [thread, warp, lane] = ThreadPlace{};
  const int shift = columns == 32 ? 1 : 0, channel = (warp & shift) * 16, own = channel + lane % 4 * 2;
  const int first = (warp >> shift) * 16;
  if (first >= kTilePixels || first >> p.tile_shift > p.last_y) return;
  float sums[2][4];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float pair[2];
    load_pair<vectors>(pair, bias, own + 8 * j, present);
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[j][e] = pair[e % 2];
  }
  const TilePixel<T> pixel(first + lane % 16, p);
  depthwise_product(sums,
                    expanded + (pixel.y * p.halo_width + pixel.x) * stride * kChunkPitch<T> + channel + lane / 16 * 8,
                    p.halo_width * kChunkPitch<T>, kChunkPitch<T>, filters + channel, kChunk, lane);
  T* const to = filtered + (first + lane / 4) * kChunkPitch<T> + own;
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int j = 0; j < 2; ++j) range.store(to + 8 * h * kChunkPitch<T> + 8 * j, sums[j][2 * h], sums[j][2 * h + 1]);
}

// Any depthwise convolution: a thread computes 16 bytes of channels of a pixel at a time.
template <typename T, bool vectors>
HNE_DEVICE void filter_by_channels(T* filtered, const T* expanded, const T* filters, const T* bias, int present,
                                   int columns, int stride, int kernel_size, const BottleneckPlan<T>& p,
                                   const Clamp<float>& range) {
  constexpr int width = 16 / int(sizeof(T));
  const int shift = (columns == 32 ? 5 : 4) - (width == 8 ? 3 : 2);  // vectors of a pixel: 1 << shift
  const int thread = ThreadPlace{}.thread, channel = (thread & ((1 << shift) - 1)) * width;
  const int pixels = (p.last_y + 1) << p.tile_shift;
  float biases[width];
#pragma unroll
  for (int e = 0; e < width; e += 2) {
    float pair[2];
    load_pair<vectors>(pair, bias, channel + e, present);
    biases[e] = pair[0], biases[e + 1] = pair[1];
  }
#pragma unroll 1
  for (int pixel = thread >> shift; pixel < pixels; pixel += kThreads >> shift) {
    const TilePixel<T> place(pixel, p);
    const T* const source = expanded + (place.y * p.halo_width + place.x) * stride * kChunkPitch<T> + channel;
    float sums[width];
#pragma unroll
    for (int e = 0; e < width; ++e) sums[e] = biases[e];
    const auto add_tap = [&](const T* from, const T* filter) {
      float v[width], w[width];
      load<width>(v, from);
      load<width>(w, filter);
#pragma unroll
      for (int e = 0; e < width; ++e) sums[e] += v[e] * w[e];
    };
    if (sizeof(T) == 4 && kernel_size == 3) {
#pragma unroll
      for (int tap = 0; tap < 9; ++tap)
        add_tap(source + (tap / 3 * p.halo_width + tap % 3) * kChunkPitch<T>, filters + tap * kChunk + channel);
    } else {
#pragma unroll 1
      for (int ky = 0; ky < kernel_size; ++ky)
#pragma unroll 1
        for (int kx = 0; kx < kernel_size; ++kx)
          add_tap(source + (ky * p.halo_width + kx) * kChunkPitch<T>,
                  filters + (ky * kernel_size + kx) * kChunk + channel);
    }
#pragma unroll
    for (int e = 0; e < width; ++e)  // infinity times the zeros that stand for absent channels is NaN
      sums[e] = channel + e < present ? clamp(sums[e], range) : 0.0f;
    store<width>(filtered + pixel * kChunkPitch<T> + channel, sums);
  }
}

// A warp's part of the output: 32 pixels times 8 NT channels.
template <int NT>
struct OutputPart {
  ThreadPlace place;
  int row = place.warp / 4 * 32, column = place.warp % 4 * 8 * NT;
  template <typename T>
  HNE_DEVICE bool exists(const BottleneckPlan<T>& p, int channels) const {
    return column < channels && row >> p.tile_shift <= p.last_y;
  }
};

// sums += the residual in 16 bits, by a product with the unit matrix; all values must be finite.
template <typename T, int MT, int NT>
HNE_DEVICE void add_residual_product(float (&sums)[MT][NT][4], const T* x, const BottleneckPlan<T>& p,
                                     const OutputPart<NT>& part) {
  const int lane = part.place.lane;
  const uint32_t unit = unit_matrix<T>(lane);
#pragma unroll
  for (int i = 0; i < MT; ++i) {
    const T* const row =
        x + TilePixel<T>(part.row + 16 * i + lane % 16, p).input_row(p, 1) * p.x_pitch + part.column + lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < NT; j += 2) {
      uint32_t v[4];
      load_matrices(v, row + 8 * j);
      multiply_half_fragments(sums[i][j], v[0], v[1], unit, T{});
      multiply_half_fragments(sums[i][j + 1], v[2], v[3], unit, T{});
    }
  }
}
// sums += the residual.
template <typename T, int MT, int NT>
HNE_DEVICE void add_residual(float (&sums)[MT][NT][4], const T* x, const BottleneckPlan<T>& p,
                             const OutputPart<NT>& part) {
  const int lane = part.place.lane;
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const T* const row = x + TilePixel<T>(part.row + 16 * i + 8 * h + lane / 4, p).input_row(p, 1) * p.x_pitch +
                           part.column + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        float residual[2];
        load<2>(residual, row + 8 * j);
        sums[i][j][2 * h] += residual[0], sums[i][j][2 * h + 1] += residual[1];
      }
    }
}

}  // namespace hne
