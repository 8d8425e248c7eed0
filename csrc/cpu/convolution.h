// Row pointers to the windows of a convolution.
#pragma once

#include "geometry.h"
#include "op.h"

namespace hne {

constexpr int64_t kFewChannels = 8;  // fewer are taken for an image, whose windows are read row by row

// Iterates over the pixels of a batch from pixel number `first`, without a division for each pixel.
struct PixelWalk {
  int64_t height, width, b, y, x;
  PixelWalk(int64_t height, int64_t width, int64_t first)
      : height(height), width(width), b(first / (height * width)), y(first / width % height), x(first % width) {}
  void next() { skip(1); }
  // Moves on within a row, or to the start of the next one.
  void skip(int64_t pixels) {
    if ((x += pixels) < width) return;
    x = 0;
    if (++y < height) return;
    y = 0, ++b;
  }
};

// Pointers to the input pixels that each tap reads, rows[tap * tap_stride + m], for output pixels [first, first +
// count) of a branch (over batch, rows, columns); `zeros` outside the feature map.
template <typename T>
void gather_rows(const Geometry& g, const T* x, const T* zeros, int64_t first, int64_t count, const T** rows,
                 int64_t tap_stride) {
  PixelWalk out(g.out_height, g.out_width, first);
  for (int64_t m = 0; m < count; ++m, out.next()) {
    const T* sample = x + out.b * g.pixels() * g.in_channels;
    for (int64_t ky = 0, tap = 0; ky < g.kernel_size; ++ky) {
      const int64_t iy = out.y * g.stride + ky - g.padding;
      for (int64_t kx = 0; kx < g.kernel_size; ++kx, ++tap) {
        const int64_t ix = out.x * g.stride + kx - g.padding;
        const bool inside = iy >= 0 && iy < g.height && ix >= 0 && ix < g.width;
        rows[tap * tap_stride + m] = inside ? sample + (iy * g.width + ix) * g.in_channels : zeros;
      }
    }
  }
}

// The same with one pointer for each row of the kernel, whose taps [kx][channel] are contiguous:
// lines[ky * line_stride + m]. With few channels (an image) that is faster than a pointer for every tap. The input of
// the output pixels of one row is copied to `memory`, with the padding. Their lines are line_step apart.
inline int64_t line_step(const Geometry& g) { return g.stride * g.in_channels; }
inline int64_t lines_size(const Geometry& g, int64_t count) {
  const int64_t rows = ceil_div(count, std::max<int64_t>(g.out_width, 1)) + 1;  // rows that contain the pixels
  return g.kernel_size * (count * g.stride + rows * g.kernel_size) * g.in_channels;
}

template <typename T>
void gather_lines(const Geometry& g, const T* x, int64_t first, int64_t count, T* memory, const T** lines,
                  int64_t line_stride) {
  const int64_t c = g.in_channels;
  PixelWalk out(g.out_height, g.out_width, first);
  for (int64_t m = 0, pixels; m < count; m += pixels, out.skip(pixels)) {
    pixels = std::min(count - m, g.out_width - out.x);
    const int64_t columns = (pixels - 1) * g.stride + g.kernel_size, left = out.x * g.stride - g.padding;
    const int64_t begin = std::clamp<int64_t>(-left, 0, columns), end = std::clamp(g.width - left, begin, columns);
    for (int64_t ky = 0; ky < g.kernel_size; ++ky, memory += columns * c) {
      const int64_t iy = out.y * g.stride + ky - g.padding;
      if (iy < 0 || iy >= g.height || begin == end) {
        std::fill_n(memory, columns * c, T(0));
      } else {
        std::fill_n(memory, begin * c, T(0));
        std::copy_n(x + ((out.b * g.height + iy) * g.width + left + begin) * c, (end - begin) * c, memory + begin * c);
        std::fill_n(memory + end * c, (columns - end) * c, T(0));
      }
      for (int64_t i = 0; i < pixels; ++i) lines[ky * line_stride + m + i] = memory + i * line_step(g);
    }
  }
}

}  // namespace hne
