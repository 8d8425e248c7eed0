// Row pointers that the dense and the depthwise convolutions share.
#pragma once

#include "geometry.h"
#include "op.h"

namespace hne {

// For output pixels [first, first + count) of a branch (over batch, rows, columns) the input row that each tap
// reads: rows[tap * stride_of_tap + m], `zeros` where it lies outside the map.
template <typename T>
void gather_rows(const Geometry& g, const T* x, const T* zeros, int64_t first, int64_t count, const T** rows,
                 int64_t stride_of_tap) {
  int64_t ox = first % g.out_width, oy = first / g.out_width % g.out_height, b = first / g.out_pixels();
  for (int64_t m = 0; m < count; ++m) {
    const T* sample = x + b * g.pixels() * g.in_channels;
    for (int64_t ky = 0, tap = 0; ky < g.kernel_size; ++ky) {
      const int64_t iy = oy * g.stride + ky - g.padding;
      for (int64_t kx = 0; kx < g.kernel_size; ++kx, ++tap) {
        const int64_t ix = ox * g.stride + kx - g.padding;
        const bool inside = iy >= 0 && iy < g.height && ix >= 0 && ix < g.width;
        rows[tap * stride_of_tap + m] = inside ? sample + (iy * g.width + ix) * g.in_channels : zeros;
      }
    }
    if (++ox == g.out_width) {
      ox = 0;
      if (++oy == g.out_height) oy = 0, ++b;
    }
  }
}

}  // namespace hne
