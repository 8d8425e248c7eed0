// int8 convolutions (inference).
#pragma once

#include "convolution_chain.h"
#include "quantized_weights.h"

namespace hne {

class QuantizedConvolution {
 public:
  // `linear`: the output is float32.
  QuantizedConvolution(QuantizedTensors& tensors, int64_t branches, int64_t in_channels, int64_t out_channels,
                       int64_t kernel_size, int64_t stride, int64_t padding, int64_t replicate)
      : branches_(branches),
        in_channels_(in_channels),
        out_channels_(out_channels),
        kernel_size_(kernel_size),
        stride_(stride),
        padding_(padding),
        replicate_(replicate),
        matrices_(tensors, branches, out_channels, kernel_size * kernel_size * in_channels / kGroup),
        bias_(tensors, branches, out_channels),
        scale_(tensors, branches, out_channels),
        zeros_(tensors.take(ScalarType::Int, {branches, 2})) {}

  int64_t branches() const { return branches_; }
  int64_t out_channels() const { return out_channels_; }

  Geometry geometry(const std::vector<int64_t>& shape) const {
    STD_TORCH_CHECK(shape.size() == 5 && shape[4] == in_channels_, "x: does not have the channels of weight");
    return forward_geometry(shape, branches_, out_channels_, kernel_size_, stride_, padding_, replicate_);
  }

  void forward(const Geometry& g, const uint8_t* x, uint8_t* out) const {
    const int64_t block = std::max<int64_t>(1, kBlockPixels / std::max<int64_t>(g.out_width, 1));
    const int64_t blocks = ceil_div(g.out_height, block);
    parallel_tasks(g.branches * g.batch * blocks, [&](int64_t task) {
      const int64_t map = task / blocks, branch = map / g.batch, begin = task % blocks * block;
      const int64_t end = std::min(begin + block, g.out_height), count = (end - begin) * g.out_width;
      const uint8_t* in = x + (branch / g.replicate * g.batch + map % g.batch) * g.pixels() * g.in_channels;
      const int64_t row_size = g.taps() * g.in_channels;
      const uint8_t* rows = in + begin * g.width * g.in_channels;
      if (!g.pointwise()) rows = gather(g, in, uint8_t(zeros_.data<int32_t>()[2 * branch]), begin, end);
      uint8_t** const out_rows = scratch<uint8_t*>(2, count);
      uint8_t* const to = out + (map * g.out_pixels() + begin * g.out_width) * g.out_channels;
      for (int64_t m = 0; m < count; ++m) out_rows[m] = to + m * g.out_channels;
      const QuantizedTap tap = matrices_.tap(branch, rows, row_size);
      quantized_kernels().gemm({&tap, 1, count, g.out_channels, bias_.of(branch), nullptr, scale_.of(branch),
                                zeros_.data<int32_t>()[2 * branch + 1], out_rows, nullptr});
    });
  }

  // A linear layer for `count` rows of each branch, which are one feature map of `x` each: uint8 or float.
  template <typename T>
  void multiply(int64_t count, const uint8_t* x, T* out) const {
    const int64_t tasks = ceil_div(out_channels_, kTaskChannels);
    parallel_tasks(branches_ * tasks, [&](int64_t task) {
      const int64_t branch = task / tasks, first = task % tasks * kTaskChannels;
      T** const out_rows = scratch<T*>(2, count);
      for (int64_t m = 0; m < count; ++m) out_rows[m] = out + (branch * count + m) * out_channels_ + first;
      QuantizedTap tap = matrices_.tap(branch, x + branch / replicate_ * count * in_channels_, in_channels_);
      tap.weight += first / kPanel * matrices_.panel_size();
      QuantizedGemm gemm{&tap,
                         1,
                         count,
                         std::min(kTaskChannels, out_channels_ - first),
                         bias_.of(branch) + first,
                         nullptr,
                         scale_.of(branch) + first,
                         zeros_.data<int32_t>()[2 * branch + 1],
                         nullptr,
                         nullptr};
      if constexpr (std::is_same_v<T, float>)
        gemm.out_float = out_rows;
      else
        gemm.out = out_rows;
      quantized_kernels().gemm(gemm);
    });
  }

 private:
  static constexpr int64_t kBlockPixels = 256;          // output pixels of a task
  static constexpr int64_t kTaskChannels = 8 * kPanel;  // of a linear layer

  // What the output pixels of rows [begin, end) read, one after another: [pixel][kernel_size][kernel_size][channels].
  static const uint8_t* gather(const Geometry& g, const uint8_t* in, uint8_t zero, int64_t begin, int64_t end) {
    const int64_t row_size = g.taps() * g.in_channels, line = g.kernel_size * g.in_channels;
    uint8_t* const rows = scratch<uint8_t>(1, (end - begin) * g.out_width * row_size);
    uint8_t* to = rows;
    for (int64_t oy = begin; oy < end; ++oy)
      for (int64_t ox = 0; ox < g.out_width; ++ox) {
        const int64_t iy = oy * g.stride - g.padding, ix = ox * g.stride - g.padding;
        const bool inside = iy >= 0 && iy + g.kernel_size <= g.height && ix >= 0 && ix + g.kernel_size <= g.width;
        for (int64_t ky = 0; ky < g.kernel_size; ++ky, to += line) {
          const int64_t from = ((iy + ky) * g.width + ix) * g.in_channels;
          if (inside) {
            copy_groups(in + from, line, to);
            continue;
          }
          const bool row_inside = iy + ky >= 0 && iy + ky < g.height;
          for (int64_t kx = 0; kx < g.kernel_size; ++kx) {
            const bool pixel_inside = row_inside && ix + kx >= 0 && ix + kx < g.width;
            uint8_t* const pixel = to + kx * g.in_channels;
            if (pixel_inside)
              copy_groups(in + from + kx * g.in_channels, g.in_channels, pixel);
            else
              std::fill_n(pixel, g.in_channels, zero);
          }
        }
      }
    return rows;
  }

  static void copy_groups(const uint8_t* from, int64_t bytes, uint8_t* to) {
    if (bytes == 3 * kGroup) {  // three pixels of an image
      std::memcpy(to, from, 3 * kGroup);
      return;
    }
    for (int64_t i = 0; i < bytes; i += kGroup) std::memcpy(to + i, from + i, kGroup);
  }

  int64_t branches_, in_channels_, out_channels_, kernel_size_, stride_, padding_, replicate_;
  QuantizedMatrices matrices_;
  PanelValues<int32_t> bias_;
  PanelValues<float> scale_;
  ConstTensor zeros_;  // [branches][2]: the zero points of the input and of the output
};

template <>
struct ChainedConvolution<uint8_t> {
  using type = QuantizedConvolution;
};

}  // namespace hne
