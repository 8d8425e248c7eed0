// A whole bottleneck in the cache (inference): a band of output rows goes through the first 1x1 convolution, the
// depthwise convolution, the second 1x1 convolution and the shortcut before the next band starts.
#pragma once

#include "bottleneck_weights.h"

namespace hne {

constexpr int64_t kBandPixels = 48;     // least pixels of a band: each band reads all weights once
constexpr int64_t kNextWeights = 4096;  // of the next product, prefetched at the end of a product: its first panels

// One bottleneck for inputs of one shape. The expanded feature map (the output of the first 1x1 convolution) is stored
// with the zero padding of the depthwise convolution, in rows of [padded width][middle].
template <typename T>
class Bottleneck {
 public:
  Bottleneck(const BottleneckWeights& weights, const std::vector<int64_t>& shape)
      : weights_(weights),
        g_(weights.geometry(shape)),
        middle_(weights.middle()),
        clamp_(Clamp<T>::named(weights.activation)),
        final_clamp_(Clamp<T>::named(weights.final_activation)) {
    // A band's features and the weights fill half of the second cache, or more if the pixels of a band would be few.
    const int64_t values = second_cache_bytes() / int64_t(2 * sizeof(T)), row_size = band_values(2) - band_values(1);
    const int64_t rows = (values - band_values(0)) / std::max<int64_t>(row_size, 1);
    const int64_t least = ceil_div(kBandPixels, std::max<int64_t>(g_.out_width, 1));
    const int64_t height = std::max<int64_t>(g_.out_height, 1), bands = ceil_div(height, std::max(rows, least));
    band_ = ceil_div(height, bands);  // bands of equal size
  }

  const Geometry& geometry() const { return g_; }
  // Values of one feature map: of the input, the output and the expanded one.
  int64_t in_size() const { return g_.pixels() * g_.in_channels; }
  int64_t out_size() const { return g_.out_pixels() * g_.out_channels; }
  int64_t expanded_size() const { return padded_height() * row_size(); }

  // Tells that the output is the input of `next`, whose first weights are then prefetched.
  void set_next(const Bottleneck& next) { next_ = &next; }

  // Whether the output may overwrite the input: a band reads each value before it is written, and no later band does.
  bool in_place() const { return weights_.identity; }

  // Computes output rows [first, last) of one feature map, band by band. `x` may be `out` if in_place().
  void forward(int64_t branch, const T* x, T* out, int64_t first, int64_t last) const {
    const int64_t ring = rows_read(band_);  // rows of the expanded feature map: row r lies in row r % ring of memory
    T* const expanded = scratch<T>(3, ring * row_size());
    int64_t ready = first * g_.stride;  // expanded rows before this one are there, or not needed
    for (int64_t begin = first; begin < last; begin += band_) {
      const int64_t count = std::min(band_, last - begin), end = begin * g_.stride + rows_read(count);
      expand_rows(branch, x, std::max(ready, begin * g_.stride), end, expanded, ring);
      filter_and_project(branch, x, expanded, ring, out, begin, count);
      ready = end;
    }
  }

  // Two-step alternative where each thread computes at most one band: expand() the whole feature map, then
  // forward_expanded(). Threads that share a feature map then expand no row twice, and a layer's output is expanded for
  // the next layer while it is in the cache.
  bool fits_one_band(int64_t rows) const { return rows <= band_; }

  // Expands rows [first, last) of x; the first and the last row of x include the zero rows around the feature map.
  void expand(int64_t branch, const T* x, T* expanded, int64_t first, int64_t last) const {
    const auto padded = [&](int64_t row) { return std::min(row + g_.padding, padded_height()); };
    expand_rows(branch, x, first > 0 ? padded(first) : 0, last < g_.height ? padded(last) : padded_height(), expanded,
                padded_height());
  }

  // Computes output rows [first, last) from the whole expanded feature map.
  void forward_expanded(int64_t branch, const T* x, const T* expanded, T* out, int64_t first, int64_t last) const {
    filter_and_project(branch, x, expanded, padded_height(), out, first, last - first);
  }

 private:
  // Padded rows that `rows` output rows read.
  int64_t rows_read(int64_t rows) const { return (rows - 1) * g_.stride + g_.kernel_size; }
  int64_t padded_height() const { return rows_read(g_.out_height); }
  int64_t row_size() const { return (g_.width + 2 * g_.padding) * middle_; }  // values of a padded row

  // Values that a band of `rows` output rows reads and writes, weights included.
  int64_t band_values(int64_t rows) const {
    const int64_t weights = middle_ * (g_.in_channels + g_.taps() + g_.out_channels) +
                            (weights_.shortcut.has_value() ? g_.in_channels * g_.out_channels : 0);
    const int64_t in = rows * g_.stride * g_.width * g_.in_channels, out = rows * g_.out_width * g_.out_channels;
    return weights + rows_read(rows) * row_size() + rows * g_.out_width * middle_ + in + (in_place() ? 0 : out);
  }

  static Tap<T> pointwise_tap(const ConstTensor& packed, int64_t branch, int64_t channels, int64_t depth,
                              const T* const* rows) {
    return {rows, packed.data<T>() + branch * ceil_div(channels, kPanel) * depth * kPanel, depth * kPanel, depth,
            depth};
  }

  // Lets `gemm` prefetch the first weights of the product that follows.
  static void prefetch(Gemm<T>& gemm, const ConstTensor& packed, int64_t branch, int64_t channels, int64_t depth) {
    gemm.next_weights = pointwise_tap(packed, branch, channels, depth, nullptr).weight;
    gemm.next_count = std::min(ceil_div(channels, kPanel) * kPanel * depth, kNextWeights);
  }

  // Writes padded rows [first, last), row r to row r % ring of `expanded`.
  void expand_rows(int64_t branch, const T* x, int64_t first, int64_t last, T* expanded, int64_t ring) const {
    const int64_t middle = middle_, top = first - g_.padding;  // the row of x
    T** const out_rows = scratch<T*>(2, std::max<int64_t>(last - first, 0) * g_.width);
    int64_t pixels = 0;
    for (int64_t r = first; r < last; ++r) {
      T* row = expanded + r % ring * row_size();
      if (r < g_.padding || r - g_.padding >= g_.height) {
        std::fill(row, row + row_size(), T(0));
        continue;
      }
      std::fill(row, row + g_.padding * middle, T(0));
      std::fill(row + (g_.padding + g_.width) * middle, row + row_size(), T(0));
      for (int64_t ix = 0; ix < g_.width; ++ix) out_rows[pixels++] = row + (g_.padding + ix) * middle;
    }
    const T* first_row = x + std::max<int64_t>(top, 0) * g_.width * g_.in_channels;
    const Tap<T> tap = pointwise_tap(weights_.expand, branch, middle, g_.in_channels, &first_row);
    const T* const bias = weights_.expand_bias.data<T>() + branch * middle;
    Gemm<T> gemm{&tap, 1, pixels, middle, out_rows, bias, nullptr, clamp_};
    gemm.outputs_cached = true;
    prefetch(gemm, weights_.project, branch, g_.out_channels, middle);
    kernels<T>().gemm(gemm);
  }

  // Computes output rows [begin, begin + count).
  void filter_and_project(int64_t branch, const T* x, const T* expanded, int64_t ring, T* out, int64_t begin,
                          int64_t count) const {
    const int64_t pixels = count * g_.out_width, channels = g_.in_channels;
    const T* const filtered = filter(branch, expanded, ring, begin, count);
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
    if (next_ != nullptr) prefetch(gemm, next_->weights_.expand, branch, next_->middle_, g_.out_channels);
    kernels<T>().gemm(gemm);
  }

  // The depthwise convolution for output rows [begin, begin + count).
  const T* filter(int64_t branch, const T* expanded, int64_t ring, int64_t begin, int64_t count) const {
    const int64_t middle = middle_;
    T* const filtered = scratch<T>(4, count * g_.out_width * middle);
    const T** rows = scratch<const T*>(5, rows_read(count));
    for (int64_t r = 0; r < rows_read(count); ++r) rows[r] = expanded + (begin * g_.stride + r) % ring * row_size();
    kernels<T>().depthwise_rows({rows, weights_.depthwise.data<T>() + branch * g_.taps() * middle,
                                 weights_.depthwise_bias.data<T>() + branch * middle, filtered,
                                 g_.width + 2 * g_.padding, g_.out_width, middle, g_.kernel_size, g_.stride, 0, false,
                                 clamp_, count});
    return filtered;
  }

  const BottleneckWeights& weights_;
  Geometry g_;
  int64_t middle_;
  Clamp<T> clamp_, final_clamp_;
  int64_t band_;  // output rows of a band
  const Bottleneck* next_ = nullptr;
};

}  // namespace hne
