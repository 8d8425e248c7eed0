// A bottleneck or inverted residual: the operands of its kernel, its tiles and their places in shared memory.
#pragma once

#include "bottleneck_parts.h"
#include "shape.h"

namespace hne {

constexpr int kTilePixels = 64;    // output pixels of a block, at most
constexpr int kChunk = 32;         // expanded channels that a block computes at a time, at most
constexpr int kShortcutRows = 32;  // input channels of the shortcut's weights in one buffer
template <typename T>
constexpr int kChunkPitch = kChunk + kRowPadding<T>;  // values of a pixel in `expanded` and `filtered`

template <typename T>
struct Bottleneck {
  Shape s;  // of the depthwise convolution, but with the channels of x and of the output
  const T *x, *expand, *expand_bias, *depthwise, *depthwise_bias, *project, *project_bias, *shortcut, *shortcut_bias;
  T* out;
  int middle;
  bool identity;
  Clamp<float> range, final_range;
};

// Fragments of 8 output channels in each of the 4 warps side by side; 256 output channels at most.
inline int fragments(int out_channels) { return out_channels <= 64 ? 2 : out_channels <= 128 ? 4 : 8; }

// A tile of output pixels, and the region of input pixels that a block loads for it: the tile and its halo, with zeros
// outside of the feature map; or, if one tile holds the whole output, no more than the feature map itself.
template <typename T>
struct BottleneckPlan {
  int tile_height, tile_shift;      // the tile has a width of 1 << tile_shift
  int chunk;                        // 16 or 32
  int last_y, last_x;               // last output pixel of a tile that may exist
  int margin;                       // the region begins this many pixels before the tile's first pixel
  int region_height, region_width;  // in `x`
  int halo_offset;                  // pixel of the halo, in y and in x, where the region begins
  int halo_width, halo_pixels;      // in `expanded`: the tile and its halo
  int depth, x_rows;                // input channels and pixels, in multiples of 16
  int x_pitch, expand_pitch, project_pitch;
  int staged_pitch, staged_step;  // of the staged output: values from pixel to pixel, and of 8 pixels
  int places_at, expand_at, expanded_at, filters_at, filtered_at, project_at, shortcut_at;  // in values
  int64_t shared_bytes, blocks;
  Divisor tiles_x, tiles_y, samples, children, region_columns, x_vectors, out_channels;

  int64_t expand_stride, project_stride, shortcut_stride;  // values in the weights of a branch

  static int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

  // A plan with these tiles; false where the sizes are too large.
  bool make(const Bottleneck<T>& b, int height, int shift, int channels) {
    const Shape& s = b.s;
    const int width = 1 << shift, rows = std::min(height, s.out_height), columns = std::min(width, s.out_width);
    // In 64 bits, since the halo grows with the stride.
    const int64_t halo_y = int64_t(rows - 1) * s.stride + s.kernel_size,
                  halo_x = int64_t(columns - 1) * s.stride + s.kernel_size;
    if (halo_y * halo_x > 65536 || s.in_channels > 65536) return false;
    if (int64_t(s.pixels()) * s.in_channels > INT32_MAX || int64_t(s.out_pixels()) * s.out_channels > INT32_MAX)
      return false;  // offsets within a sample have 32 bits
    const bool whole = s.out_height <= height && s.out_width <= width;
    tile_height = height, tile_shift = shift, chunk = channels;
    last_y = rows - 1, last_x = columns - 1;
    margin = whole ? 0 : s.padding;
    halo_offset = whole ? s.padding : 0;
    region_height = whole ? int(std::min<int64_t>(s.height, halo_y - s.padding)) : int(halo_y);
    region_width = whole ? int(std::min<int64_t>(s.width, halo_x - s.padding)) : int(halo_x);
    halo_width = int(halo_x), halo_pixels = int(halo_y * halo_x);
    depth = int(up(s.in_channels, 16)), x_rows = int(up(region_height * region_width, 16));
    const int out_columns = int(up(s.out_channels, 8 * fragments(s.out_channels)));  // whole warps
    x_pitch = (b.identity ? std::max(depth, out_columns) : depth) + kRowPadding<T>;
    expand_pitch = chunk + kColumnPadding;
    project_pitch = out_columns + kColumnPadding;
    expand_stride = up(b.middle, kPanel) * s.in_channels, project_stride = up(s.out_channels, kPanel) * b.middle;
    shortcut_stride = up(s.out_channels, kPanel) * s.in_channels;

    // x [region][C_in], places of the region's pixels in the halo, weights of the first product [C_in][chunk]; then
    // either the rest of a chunk, expanded [halo][chunk], depthwise filters [tap][chunk], filtered [tile][chunk] and
    // weights of the second product [chunk][C_out], or two buffers for the shortcut's weights. The output is staged in
    // x, in place of the residual, or without one from the beginning of the memory.
    int64_t at = int64_t(x_rows) * x_pitch;
    const auto take = [&at](int64_t values) { return int(std::exchange(at, at + up(values, 16))); };
    places_at = take(int64_t(x_rows) * int64_t(sizeof(int)) / int64_t(sizeof(T)));
    expand_at = take(int64_t(depth) * expand_pitch);
    shortcut_at = int(at);
    expanded_at = take(int64_t(halo_pixels) * kChunkPitch<T>);
    filters_at = take(int64_t(s.taps() + 1) * kChunk);
    filtered_at = take(int64_t(kTilePixels) * kChunkPitch<T>);
    project_at = take(int64_t(chunk) * project_pitch);
    if (b.shortcut != nullptr) at = std::max<int64_t>(at, shortcut_at + 2 * int64_t(kShortcutRows) * project_pitch);
    if (!b.identity) at = std::max<int64_t>(at, int64_t(kTilePixels) * project_pitch);
    shared_bytes = at * int64_t(sizeof(T));

    const int vector = 16 / int(sizeof(T)), y_tiles = int(ceil_div(s.out_height, height)),
              x_tiles = int(ceil_div(s.out_width, width));
    blocks = int64_t(s.branches) * s.batch * y_tiles * x_tiles;
    tiles_x = Divisor(std::max(x_tiles, 1)), tiles_y = Divisor(std::max(y_tiles, 1));
    samples = Divisor(std::max(s.batch, 1)), children = Divisor(s.replicate);
    region_columns = Divisor(std::max(region_width, 1)), x_vectors = Divisor(std::max(depth / vector, 1));
    out_channels = Divisor(std::max(s.out_channels, 1));
    staged_pitch = b.identity ? x_pitch : project_pitch;
    staged_step = (b.identity ? (8 >> shift) * region_width : 8) * staged_pitch;
    return true;
  }
};

// Runs the bottleneck in one kernel; false if the sizes are too large for it. Compiled in fused_bottleneck_kernel.cu.
template <typename T>
bool run_fused(const Device& device, const Bottleneck<T>& b);

}  // namespace hne
