// Shapes and row pointers that the dense and the depthwise convolutions share.
#pragma once

#include "op.h"

namespace hne {

// Sizes of a convolution, named as in hne_kernels: x [parents, batch, height, width, in_channels] to
// [branches, batch, out_height, out_width, out_channels]; branch g reads parent g / replicate, and the last
// parent may have fewer children (a leading slice of the tree).
struct Geometry {
  int64_t parents, branches, batch, height, width, in_channels;
  int64_t out_height, out_width, out_channels;
  int64_t kernel_size, stride, padding, replicate;

  int64_t taps() const { return kernel_size * kernel_size; }
  int64_t pixels() const { return height * width; }
  int64_t out_pixels() const { return out_height * out_width; }

  void check() const {
    STD_TORCH_CHECK(stride >= 1 && padding >= 0 && replicate >= 1 && kernel_size >= 1,
                    "stride, padding, replicate or kernel size out of range");
    STD_TORCH_CHECK(parents == ceil_div(branches, replicate), "weight: branches do not match x and replicate");
    STD_TORCH_CHECK(height + 2 * padding >= kernel_size && width + 2 * padding >= kernel_size,
                    "x: smaller than the kernel");
  }
  static int64_t out_size(int64_t size, int64_t kernel_size, int64_t stride, int64_t padding) {
    return (size + 2 * padding - kernel_size) / stride + 1;
  }
};

inline Geometry forward_geometry(const Tensor& x, int64_t branches, int64_t out_channels, int64_t kernel_size,
                                 int64_t stride, int64_t padding, int64_t replicate) {
  STD_TORCH_CHECK(x.dim() == 5, "x: expected 5 dimensions");
  Geometry g{};
  g.parents = x.size(0), g.batch = x.size(1), g.height = x.size(2), g.width = x.size(3), g.in_channels = x.size(4);
  g.branches = branches, g.out_channels = out_channels;
  g.kernel_size = kernel_size, g.stride = stride, g.padding = padding, g.replicate = replicate;
  g.check();
  g.out_height = Geometry::out_size(g.height, kernel_size, stride, padding);
  g.out_width = Geometry::out_size(g.width, kernel_size, stride, padding);
  return g;
}

inline Geometry backward_geometry(const Tensor& grad, int64_t in_channels, int64_t height, int64_t width,
                                  int64_t kernel_size, int64_t stride, int64_t padding, int64_t replicate) {
  STD_TORCH_CHECK(grad.dim() == 5, "grad: expected 5 dimensions");
  STD_TORCH_CHECK(replicate >= 1, "replicate: expected at least 1");
  Geometry g{};
  g.branches = grad.size(0), g.batch = grad.size(1), g.out_height = grad.size(2), g.out_width = grad.size(3);
  g.out_channels = grad.size(4), g.in_channels = in_channels, g.height = height, g.width = width;
  g.kernel_size = kernel_size, g.stride = stride, g.padding = padding, g.replicate = replicate;
  g.parents = ceil_div(g.branches, replicate);
  g.check();
  STD_TORCH_CHECK(g.out_height == Geometry::out_size(height, kernel_size, stride, padding) &&
                      g.out_width == Geometry::out_size(width, kernel_size, stride, padding),
                  "grad: does not have the size of the convolution's output");
  return g;
}

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
