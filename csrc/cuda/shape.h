// Sizes of a convolution for kernels: in 32 bits, since a division in 64 bits costs ten times as much.
#pragma once

#include "geometry.h"
#include "op.h"

namespace hne {

// Division of a number from 0 to 2^31 - 1 by a number known on the host (0 counts as 1): a multiplication, an addition
// and a shift.
// Granlund and Montgomery, "Division by Invariant Integers using Multiplication" (PLDI 1994).
struct Divider {
  unsigned multiplier = 1, shift = 0;

  Divider() = default;
  explicit Divider(int by) {
    const int divisor = std::max(by, 1);
    while ((uint64_t{1} << shift) < uint64_t(divisor)) ++shift;
    multiplier = unsigned(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - uint64_t(divisor))) / uint64_t(divisor) + 1);
  }
  HNE_DEVICE int operator()(int n) const {
    return int((unsigned((uint64_t(unsigned(n)) * multiplier) >> 32) + unsigned(n)) >> shift);
  }
};

struct Shape {
  int parents, branches, batch, height, width, in_channels, out_height, out_width, out_channels;
  int kernel_size, stride, padding, replicate;

  explicit Shape(const Geometry& g)
      : parents(int(g.parents)),
        branches(int(g.branches)),
        batch(int(g.batch)),
        height(int(g.height)),
        width(int(g.width)),
        in_channels(int(g.in_channels)),
        out_height(int(g.out_height)),
        out_width(int(g.out_width)),
        out_channels(int(g.out_channels)),
        kernel_size(int(g.kernel_size)),
        stride(int(g.stride)),
        padding(int(g.padding)),
        replicate(int(std::min(g.replicate, std::max<int64_t>(g.branches, 1)))) {  // beyond `branches` no change
    const auto fits = [](int64_t a, int64_t b) { return a == 0 || b <= (INT32_MAX - 65536) / a; };
    const int64_t most = std::max(g.pixels(), g.out_pixels());
    STD_TORCH_CHECK(fits(g.height + 2 * g.padding, g.width + 2 * g.padding) && fits(g.out_height, g.out_width) &&
                        fits(g.batch, std::max<int64_t>(most, 1)) && fits(g.taps(), g.in_channels) &&
                        fits(g.taps() * replicate, g.out_channels) && g.branches <= INT32_MAX / 2 &&
                        g.stride <= INT32_MAX / 2,
                    "expected fewer than 2^31 pixels in a branch, and values in a filter");
  }

  HNE_BOTH int taps() const { return kernel_size * kernel_size; }
  HNE_BOTH int pixels() const { return height * width; }
  HNE_BOTH int out_pixels() const { return out_height * out_width; }
  HNE_BOTH int rows() const { return batch * out_pixels(); }  // output pixels of a branch
  HNE_BOTH int in_rows() const { return batch * pixels(); }   // input pixels of a branch
  HNE_BOTH bool pointwise() const { return kernel_size == 1 && stride == 1 && padding == 0; }

  // Input pixel of a branch under a tap of output pixel `row`, or -1 in the padding.
  HNE_DEVICE int64_t source(int row, int ky, int kx) const {
    const int sample = row / out_pixels(), within = row - sample * out_pixels();
    const int oy = within / out_width, ox = within - oy * out_width;
    const int iy = oy * stride - padding + ky, ix = ox * stride - padding + kx;
    const bool inside = iy >= 0 && iy < height && ix >= 0 && ix < width;
    return inside ? int64_t(sample) * pixels() + iy * width + ix : -1;
  }
  HNE_DEVICE int64_t source(int row, int tap) const { return source(row, tap / kernel_size, tap % kernel_size); }
};

}  // namespace hne
