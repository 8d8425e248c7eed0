// Row pointers that the dense and the depthwise convolutions share.
#pragma once

#include "geometry.h"
#include "op.h"

namespace hne {

// The pixels of a batch of maps one after the other, from the one numbered `first`: no divisions on the way.
struct PixelWalk {
  int64_t height, width, b, y, x;
  PixelWalk(int64_t height, int64_t width, int64_t first)
      : height(height), width(width), b(first / (height * width)), y(first / width % height), x(first % width) {}
  void next() {
    if (++x < width) return;
    x = 0;
    if (++y < height) return;
    y = 0, ++b;
  }
};

// For output pixels [first, first + count) of a branch (over batch, rows, columns) the input row that each tap
// reads: rows[tap * stride_of_tap + m], `zeros` where it lies outside the map.
template <typename T>
void gather_rows(const Geometry& g, const T* x, const T* zeros, int64_t first, int64_t count, const T** rows,
                 int64_t stride_of_tap) {
  PixelWalk out(g.out_height, g.out_width, first);
  for (int64_t m = 0; m < count; ++m, out.next()) {
    const T* sample = x + out.b * g.pixels() * g.in_channels;
    for (int64_t ky = 0, tap = 0; ky < g.kernel_size; ++ky) {
      const int64_t iy = out.y * g.stride + ky - g.padding;
      for (int64_t kx = 0; kx < g.kernel_size; ++kx, ++tap) {
        const int64_t ix = out.x * g.stride + kx - g.padding;
        const bool inside = iy >= 0 && iy < g.height && ix >= 0 && ix < g.width;
        rows[tap * stride_of_tap + m] = inside ? sample + (iy * g.width + ix) * g.in_channels : zeros;
      }
    }
  }
}

// The same for a row of the kernel at a time, whose taps [kx][channel] lie together in x: lines[ky * stride_of_line +
// m]. For a few channels (an image) that is quicker than a pointer for every tap. What juts out of the map at the left
// or right is copied to `edges`, which has room for count * kernel_size lines; `zeros` is a line.
template <typename T>
void gather_lines(const Geometry& g, const T* x, const T* zeros, int64_t first, int64_t count, T* edges,
                  const T** lines, int64_t stride_of_line) {
  const int64_t line_size = g.kernel_size * g.in_channels;
  PixelWalk out(g.out_height, g.out_width, first);
  for (int64_t m = 0; m < count; ++m, out.next()) {
    const int64_t left = out.x * g.stride - g.padding;
    const int64_t begin = std::clamp<int64_t>(-left, 0, g.kernel_size) * g.in_channels;
    const int64_t end = std::clamp<int64_t>(g.width - left, 0, g.kernel_size) * g.in_channels;
    for (int64_t ky = 0; ky < g.kernel_size; ++ky) {
      const int64_t iy = out.y * g.stride + ky - g.padding;
      const int64_t at = ((out.b * g.height + iy) * g.width + left) * g.in_channels;
      const T*& line = lines[ky * stride_of_line + m];
      if (iy < 0 || iy >= g.height || begin >= end) {
        line = zeros;
      } else if (end - begin == line_size) {
        line = x + at;
      } else {
        std::fill(edges, edges + begin, T(0));
        std::copy(x + (at + begin), x + (at + end), edges + begin);
        std::fill(edges + end, edges + line_size, T(0));
        line = edges;
        edges += line_size;
      }
    }
  }
}

}  // namespace hne
