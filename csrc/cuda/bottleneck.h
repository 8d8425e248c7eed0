// A bottleneck or inverted residual: the operands of its kernel, and their places in shared memory.
#pragma once

#include "matrix.h"
#include "shape.h"

namespace hne {

constexpr int kTilePixels = 64, kChunk = 32;  // output pixels of a block; expanded channels that it computes at a time

template <typename T>
struct Bottleneck {
  Shape s;  // of the depthwise convolution, but with the channels of x and of the output
  const T *x, *expand, *expand_bias, *depthwise, *depthwise_bias, *project, *project_bias, *shortcut, *shortcut_bias;
  T* out;
  int middle, tile_height, tile_width;
  bool identity;
  Clamp<float> range, final_range;

  HNE_BOTH static int up(int a, int b) { return (a + b - 1) / b * b; }
  HNE_BOTH int tiles_y() const { return (s.out_height + tile_height - 1) / tile_height; }
  HNE_BOTH int tiles_x() const { return (s.out_width + tile_width - 1) / tile_width; }
  int64_t blocks() const { return int64_t(s.branches) * s.batch * tiles_y() * tiles_x(); }

  // Input pixels of a tile and its halo; the rows of a matrix come in multiples of 16.
  HNE_BOTH int halo_height() const { return (tile_height - 1) * s.stride + s.kernel_size; }
  HNE_BOTH int halo_width() const { return (tile_width - 1) * s.stride + s.kernel_size; }
  HNE_BOTH int halo_rows() const { return up(halo_height() * halo_width(), 16); }

  // Shared memory, in values: x [halo][C_in], expanded [halo][chunk], filtered [64][chunk], weights of the first
  // product [C_in][chunk] and of the second [chunk][C_out]. The output is staged in the memory of the weights.
  HNE_BOTH int depth() const { return up(s.in_channels, 16); }
  HNE_BOTH int columns() const { return up(s.out_channels, 64); }
  HNE_BOTH int x_pitch() const { return depth() + kRowPadding<T>; }
  HNE_BOTH int chunk_pitch() const { return kChunk + kRowPadding<T>; }
  HNE_BOTH int expand_pitch() const { return kChunk + kColumnPadding; }
  HNE_BOTH int project_pitch() const { return columns() + kColumnPadding; }
  HNE_BOTH int expanded_at() const { return halo_rows() * x_pitch(); }
  HNE_BOTH int filtered_at() const { return expanded_at() + halo_rows() * chunk_pitch(); }
  HNE_BOTH int expand_at() const { return filtered_at() + kTilePixels * chunk_pitch(); }
  HNE_BOTH int project_at() const { return expand_at() + depth() * expand_pitch(); }
  HNE_BOTH int64_t shared_bytes() const {
    const int64_t weights = int64_t(depth()) * expand_pitch() + kChunk * project_pitch();
    const int64_t staged = int64_t(kTilePixels) * project_pitch();
    return (int64_t(halo_rows()) * (x_pitch() + chunk_pitch()) + kTilePixels * chunk_pitch() +
            (weights > staged ? weights : staged)) *
           int64_t(sizeof(T));
  }
};

// Runs the bottleneck in one kernel; false if the sizes are too large for it. Compiled in fused_bottleneck_kernel.cu.
template <typename T>
bool run_fused(const Device& device, Bottleneck<T> b);

}  // namespace hne
