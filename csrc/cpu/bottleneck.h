// A whole bottleneck in the cache (inference): a band of output rows goes through the first 1x1 convolution, the
// depthwise convolution, the second 1x1 convolution and the shortcut before the next band starts.
#pragma once

#include "bottleneck_rows.h"
#include "bottleneck_weights.h"

namespace hne {

constexpr int64_t kBandPixels = 48;     // least pixels of a band: each band reads all weights once
constexpr int64_t kNextWeights = 4096;  // of the next product, prefetched at the end of a product: its first panels

// One bottleneck for inputs of one shape.
template <typename T>
class Bottleneck : public BottleneckRows<T> {
 public:
  Bottleneck(const BottleneckWeights& weights, const std::vector<int64_t>& shape)
      : BottleneckRows<T>(weights.geometry(shape), weights.middle(), weights.identity),
        weights_(weights),
        clamp_(Clamp<Sum<T>>::named(weights.activation)),
        final_clamp_(Clamp<Sum<T>>::named(weights.final_activation)) {
    // A band's features and the weights fill half of the second cache, or more if the pixels of a band would be few.
    const int64_t row_bytes = band_bytes(2) - band_bytes(1);
    const int64_t rows = (second_cache_bytes() / 2 - band_bytes(0)) / std::max<int64_t>(row_bytes, 1);
    const int64_t least = ceil_div(kBandPixels, std::max<int64_t>(g_.out_width, 1));
    const int64_t height = std::max<int64_t>(g_.out_height, 1), bands = ceil_div(height, std::max(rows, least));
    band_ = ceil_div(height, bands);  // bands of equal size
  }

  // Tells that the output is the input of `next`, whose first weights are then prefetched.
  void set_next(const Bottleneck& next) { next_ = &next; }

  // Computes output rows [first, last) of one feature map, band by band. `x` may be `out` if in_place().
  void forward(int64_t branch, const T* x, T* out, int64_t first, int64_t last) const {
    const int64_t ring = rows_read(band_);  // rows of the expanded feature map: row r lies in row r % ring of memory
    Sum<T>* const expanded = scratch<Sum<T>>(3, ring * row_size());
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
  void expand(int64_t branch, const T* x, Sum<T>* expanded, int64_t first, int64_t last) const {
    const auto [begin, end] = this->padded_rows(first, last);
    expand_rows(branch, x, begin, end, expanded, padded_height());
  }

  // Computes output rows [first, last) from the whole expanded feature map.
  void forward_expanded(int64_t branch, const T* x, const Sum<T>* expanded, T* out, int64_t first, int64_t last) const {
    filter_and_project(branch, x, expanded, padded_height(), out, first, last - first);
  }

 private:
  using BottleneckRows<T>::g_, BottleneckRows<T>::middle_, BottleneckRows<T>::band_;
  using BottleneckRows<T>::rows_read, BottleneckRows<T>::padded_height, BottleneckRows<T>::row_size;

  // Bytes that a band of `rows` output rows reads and writes, weights included.
  int64_t band_bytes(int64_t rows) const {
    const int64_t weights = middle_ * (g_.in_channels + g_.out_channels) +
                            (weights_.shortcut.has_value() ? g_.in_channels * g_.out_channels : 0);
    const int64_t in = rows * g_.stride * g_.width * g_.in_channels, out = rows * g_.out_width * g_.out_channels;
    const int64_t values = weights + rows * g_.out_width * middle_ + in + (this->in_place() ? 0 : out);
    const int64_t sums = rows_read(rows) * row_size() + middle_ * g_.taps();
    return values * int64_t(sizeof(T)) + sums * int64_t(sizeof(Sum<T>));
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
  void expand_rows(int64_t branch, const T* x, int64_t first, int64_t last, Sum<T>* expanded, int64_t ring) const {
    Sum<T>** const pixel_rows = scratch<Sum<T>*>(2, std::max<int64_t>(last - first, 0) * g_.width);
    const auto row = [&](int64_t r) { return expanded + r % ring * row_size(); };
    const int64_t pixels = this->pad_rows(first, last, Sum<T>(0), row, pixel_rows);
    const T* first_pixel = this->first_pixel(x, first);
    const Tap<T> tap = pointwise_tap(weights_.expand, branch, middle_, g_.in_channels, &first_pixel);
    const Sum<T>* const bias = weights_.expand_bias.data<Sum<T>>() + branch * middle_;
    Gemm<T> gemm{&tap, 1, pixels, middle_, nullptr, bias, nullptr, clamp_};
    if constexpr (kTerms<T> == 1)
      gemm.out = pixel_rows;
    else
      gemm.sums = pixel_rows;
    gemm.outputs_cached = true;
    prefetch(gemm, weights_.project, branch, g_.out_channels, middle_);
    kernels<T>().gemm(gemm);
  }

  // Computes output rows [begin, begin + count).
  void filter_and_project(int64_t branch, const T* x, const Sum<T>* expanded, int64_t ring, T* out, int64_t begin,
                          int64_t count) const {
    const int64_t pixels = count * g_.out_width, channels = g_.in_channels;
    const T* const filtered = filter(branch, expanded, ring, begin, count);
    const T** const rows = scratch<const T*>(0, pixels);
    T** const out_rows = this->out_rows(out, begin, pixels);
    const bool has_shortcut = weights_.identity || weights_.shortcut.has_value();
    const T* const source = has_shortcut ? this->shortcut_pixels(x, begin, pixels) : nullptr;
    Tap<T> taps[2] = {pointwise_tap(weights_.project, branch, g_.out_channels, middle_, &filtered), {}};
    if (weights_.shortcut.has_value())
      taps[1] = pointwise_tap(*weights_.shortcut, branch, g_.out_channels, channels, &source);
    if (weights_.identity)
      for (int64_t m = 0; m < pixels; ++m) rows[m] = source + m * channels;
    const Sum<T>* const bias = weights_.sum_bias.data<Sum<T>>() + branch * g_.out_channels;
    const T* const* add = weights_.identity ? rows : nullptr;
    Gemm<T> gemm{taps,        weights_.shortcut.has_value() ? 2 : 1, pixels, g_.out_channels, out_rows, bias, add,
                 final_clamp_};
    gemm.outputs_cached = true;
    if (next_ != nullptr) prefetch(gemm, next_->weights_.expand, branch, next_->middle_, g_.out_channels);
    kernels<T>().gemm(gemm);
  }

  // The depthwise convolution for output rows [begin, begin + count).
  const T* filter(int64_t branch, const Sum<T>* expanded, int64_t ring, int64_t begin, int64_t count) const {
    const int64_t middle = middle_;
    T* const filtered = scratch<T>(4, count * g_.out_width * middle);
    const Sum<T>** rows = scratch<const Sum<T>*>(5, rows_read(count));
    for (int64_t r = 0; r < rows_read(count); ++r) rows[r] = expanded + (begin * g_.stride + r) % ring * row_size();
    kernels<T>().depthwise_rows({rows, weights_.depthwise.data<Sum<T>>() + branch * g_.taps() * middle,
                                 weights_.depthwise_bias.data<Sum<T>>() + branch * middle, filtered,
                                 g_.width + 2 * g_.padding, g_.out_width, middle, g_.kernel_size, g_.stride, 0, false,
                                 clamp_, count});
    return filtered;
  }

  const BottleneckWeights& weights_;
  Clamp<Sum<T>> clamp_, final_clamp_;
  const Bottleneck* next_ = nullptr;
};

}  // namespace hne
