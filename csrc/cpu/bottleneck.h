// A whole bottleneck in the cache (inference): a band of output rows goes through the first 1x1 convolution, the
// depthwise convolution, the second 1x1 convolution and the shortcut before the next band starts.
#pragma once

#include "bottleneck_weights.h"

namespace hne {

// Bytes of the expanded feature map per band: fits the second cache beside the weights.
constexpr int64_t kBandBytes = 192 * 1024;

// One bottleneck for inputs of one shape. The expanded feature map (the output of the first 1x1 convolution) is stored
// with the zero padding of the depthwise convolution: [padded height][padded width][middle].
template <typename T>
class Bottleneck {
 public:
  Bottleneck(const BottleneckWeights& weights, const std::vector<int64_t>& shape)
      : weights_(weights),
        g_(weights.geometry(shape)),
        middle_(weights.middle()),
        clamp_(Clamp<T>::named(weights.activation)),
        final_clamp_(Clamp<T>::named(weights.final_activation)) {
    const int64_t row_bytes = g_.stride * row_size() * int64_t(sizeof(T));
    band_ = std::clamp<int64_t>(kBandBytes / std::max<int64_t>(row_bytes, 1), 1, std::max<int64_t>(g_.out_height, 1));
  }

  const Geometry& geometry() const { return g_; }
  bool identity() const { return weights_.identity; }
  // Values of one feature map: of the input, the output and the expanded one.
  int64_t in_size() const { return g_.pixels() * g_.in_channels; }
  int64_t out_size() const { return g_.out_pixels() * g_.out_channels; }
  int64_t expanded_size() const { return padded_height() * row_size(); }

  // Computes output rows [first, last) of one feature map, band by band.
  void forward(int64_t branch, const T* x, T* out, int64_t first, int64_t last) const {
    T* const expanded = scratch<T>(3, rows_read(band_) * row_size());
    for (int64_t begin = first, ready = 0; begin < last; begin += band_) {
      const int64_t count = std::min(band_, last - begin), rows = rows_read(count);
      expand_rows(branch, x, begin * g_.stride - g_.padding, ready, rows, expanded);
      filter_and_project(branch, x, expanded, out, begin, count);
      ready = std::max<int64_t>(0, g_.kernel_size - g_.stride);  // the next band reads these rows again
      std::copy(expanded + (rows - ready) * row_size(), expanded + rows * row_size(), expanded);
    }
  }

  // Two-step alternative where each thread computes at most one band: expand() the whole feature map, then
  // forward_expanded(). Threads that share a feature map then expand no row twice, and a layer's output is expanded for
  // the next layer while it is in the cache.
  bool fits_one_band(int64_t rows) const { return rows <= band_; }

  // Expands rows [first, last) of x; the first and the last row of x include the zero rows around the feature map.
  void expand(int64_t branch, const T* x, T* expanded, int64_t first, int64_t last) const {
    const auto padded = [&](int64_t row) { return std::min(row + g_.padding, padded_height()); };
    expand_rows(branch, x, -g_.padding, first > 0 ? padded(first) : 0,
                last < g_.height ? padded(last) : padded_height(), expanded);
  }

  // Computes output rows [first, last) from the whole expanded feature map.
  void forward_expanded(int64_t branch, const T* x, const T* expanded, T* out, int64_t first, int64_t last) const {
    filter_and_project(branch, x, expanded + first * g_.stride * row_size(), out, first, last - first);
  }

 private:
  // Padded rows that `rows` output rows read.
  int64_t rows_read(int64_t rows) const { return (rows - 1) * g_.stride + g_.kernel_size; }
  int64_t padded_height() const { return rows_read(g_.out_height); }
  int64_t row_size() const { return (g_.width + 2 * g_.padding) * middle_; }  // values of a padded row

  static Tap<T> pointwise_tap(const ConstTensor& packed, int64_t branch, int64_t channels, int64_t depth,
                              const T* const* rows) {
    return {rows, packed.data<T>() + branch * ceil_div(channels, kPanel) * depth * kPanel, depth * kPanel, depth,
            depth};
  }

  // Writes padded rows [first, last) of `expanded`, whose row 0 is row `top` of x.
  void expand_rows(int64_t branch, const T* x, int64_t top, int64_t first, int64_t last, T* expanded) const {
    const int64_t middle = middle_;
    T** const out_rows = scratch<T*>(2, std::max<int64_t>(last - first, 0) * g_.width);
    int64_t pixels = 0;
    for (int64_t r = first; r < last; ++r) {
      T* row = expanded + r * row_size();
      if (top + r < 0 || top + r >= g_.height) {
        std::fill(row, row + row_size(), T(0));
        continue;
      }
      std::fill(row, row + g_.padding * middle, T(0));
      std::fill(row + (g_.padding + g_.width) * middle, row + row_size(), T(0));
      for (int64_t ix = 0; ix < g_.width; ++ix) out_rows[pixels++] = row + (g_.padding + ix) * middle;
    }
    const T* first_row = x + std::max<int64_t>(top + first, 0) * g_.width * g_.in_channels;
    const Tap<T> tap = pointwise_tap(weights_.expand, branch, middle, g_.in_channels, &first_row);
    const T* const bias = weights_.expand_bias.data<T>() + branch * middle;
    Gemm<T> gemm{&tap, 1, pixels, middle, out_rows, bias, nullptr, clamp_};
    gemm.outputs_cached = true;
    kernels<T>().gemm(gemm);
  }

  // Computes output rows [begin, begin + count); `expanded` points to the first padded row that they read.
  void filter_and_project(int64_t branch, const T* x, const T* expanded, T* out, int64_t begin, int64_t count) const {
    const int64_t pixels = count * g_.out_width, channels = g_.in_channels;
    const T* const filtered = filter(branch, expanded, count);
    const T** const rows = scratch<const T*>(0, pixels);
    T** const out_rows = scratch<T*>(2, pixels);
    for (int64_t m = 0; m < pixels; ++m) out_rows[m] = out + (begin * g_.out_width + m) * g_.out_channels;
    const T* source = x + begin * g_.width * channels;  // input of the shortcut
    Tap<T> taps[2] = {pointwise_tap(weights_.project, branch, g_.out_channels, middle_, &filtered), {}};
    if (weights_.shortcut.has_value()) {
      if (g_.stride > 1) {
        T* strided = scratch<T>(7, pixels * channels);
        for (int64_t m = 0; m < pixels; ++m) {
          const int64_t iy = (begin + m / g_.out_width) * g_.stride, ix = m % g_.out_width * g_.stride;
          const T* pixel = x + (iy * g_.width + ix) * channels;
          std::copy(pixel, pixel + channels, strided + m * channels);
        }
        source = strided;
      }
      taps[1] = pointwise_tap(*weights_.shortcut, branch, g_.out_channels, channels, &source);
    }
    if (weights_.identity)
      for (int64_t m = 0; m < pixels; ++m) rows[m] = source + m * channels;
    const T* const bias = weights_.sum_bias.data<T>() + branch * g_.out_channels;
    const T* const* add = weights_.identity ? rows : nullptr;
    Gemm<T> gemm{taps,        weights_.shortcut.has_value() ? 2 : 1, pixels, g_.out_channels, out_rows, bias, add,
                 final_clamp_};
    gemm.outputs_cached = true;
    kernels<T>().gemm(gemm);
  }

  // The depthwise convolution for `count` output rows.
  const T* filter(int64_t branch, const T* expanded, int64_t count) const {
    const int64_t middle = middle_;
    T* const filtered = scratch<T>(4, count * g_.out_width * middle);
    const T** rows = scratch<const T*>(5, g_.kernel_size);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t ky = 0; ky < g_.kernel_size; ++ky) rows[ky] = expanded + (r * g_.stride + ky) * row_size();
      kernels<T>().depthwise_row({rows, weights_.depthwise.data<T>() + branch * g_.taps() * middle,
                                  weights_.depthwise_bias.data<T>() + branch * middle,
                                  filtered + r * g_.out_width * middle, g_.width + 2 * g_.padding, g_.out_width, middle,
                                  g_.kernel_size, g_.stride, 0, false, clamp_});
    }
    return filtered;
  }

  const BottleneckWeights& weights_;
  Geometry g_;
  int64_t middle_;
  Clamp<T> clamp_, final_clamp_;
  int64_t band_;  // output rows of a band
};

}  // namespace hne
