// A whole int8 bottleneck in the cache (inference), as bottleneck.h.
#pragma once

#include "bottleneck_chain.h"
#include "bottleneck_rows.h"
#include "quantized_convolution.h"

namespace hne {

class QuantizedBottleneckWeights {
 public:
  const int64_t branches, in_channels, middle, out_channels, kernel_size, stride, replicate;
  const bool identity, projected;
  const QuantizedMatrices expand;
  const PanelValues<int32_t> expand_bias;
  const PanelValues<float> expand_scale;
  const ConstTensor depthwise, depthwise_bias, depthwise_scale;
  const QuantizedMatrices project;
  const PanelValues<int32_t> project_bias;
  const PanelValues<float> project_scale;
  const std::optional<QuantizedMatrices> shortcut;
  // From the sums of the shortcut, or from the identity, to those of the projection.
  const std::optional<PanelValues<float>> rescale;
  const ConstTensor zeros;  // [branches][3]: zero points of the expanded features, the filtered ones and the output

  QuantizedBottleneckWeights(QuantizedTensors& tensors, int64_t branches, int64_t in_channels, int64_t middle,
                             int64_t out_channels, int64_t kernel_size, int64_t stride, int64_t replicate,
                             bool identity, bool projected)
      : branches(branches),
        in_channels(in_channels),
        middle(middle),
        out_channels(out_channels),
        kernel_size(kernel_size),
        stride(stride),
        replicate(replicate),
        identity(identity),
        projected(projected),
        expand(tensors, branches, middle, in_channels / kGroup),
        expand_bias(tensors, branches, middle),
        expand_scale(tensors, branches, middle),
        depthwise(
            tensors.take(ScalarType::Char, {branches, kernel_size, ceil_div(kernel_size, kGroup), middle, kGroup})),
        depthwise_bias(tensors.take(ScalarType::Int, {branches, middle})),
        depthwise_scale(tensors.take(ScalarType::Float, {branches, middle})),
        project(tensors, branches, out_channels, middle / kGroup),
        project_bias(tensors, branches, out_channels),
        project_scale(tensors, branches, out_channels),
        shortcut(projected ? std::optional<QuantizedMatrices>(std::in_place, tensors, branches, out_channels,
                                                              in_channels / kGroup)
                           : std::nullopt),
        rescale(projected || identity
                    ? std::optional<PanelValues<float>>(std::in_place, tensors, branches, out_channels)
                    : std::nullopt),
        zeros(tensors.take(ScalarType::Int, {branches, 3})) {
    STD_TORCH_CHECK(kernel_size % 2 == 1 && !(identity && projected), "numbers: expected an odd kernel size");
    STD_TORCH_CHECK(!identity || (stride == 1 && replicate >= 1 && in_channels == out_channels),
                    "numbers: expected that the identity keeps size and channels");
  }

  Geometry geometry(const std::vector<int64_t>& shape) const {
    STD_TORCH_CHECK(shape.size() == 5 && shape[4] == in_channels, "x: does not have the channels of expand");
    return forward_geometry(shape, branches, out_channels, kernel_size, stride, kernel_size / 2, replicate);
  }
};

// The expanded feature map is stored with the padding of the depthwise convolution, which is its zero point.
template <>
class Bottleneck<uint8_t> : public BottleneckRows<uint8_t> {
 public:
  Bottleneck(const QuantizedBottleneckWeights& weights, const std::vector<int64_t>& shape)
      : BottleneckRows(weights.geometry(shape), weights.middle, weights.identity), weights_(weights) {
    // The expanded features of a band fill an eighth of the second cache: weights, input and output lie there, too.
    const int64_t rows = second_cache_bytes() / 8 / std::max<int64_t>(g_.stride * row_size(), 1);
    band_ = std::clamp<int64_t>(rows, 1, std::max<int64_t>(g_.out_height, 1));
  }

  void forward(int64_t branch, const uint8_t* x, uint8_t* out, int64_t first, int64_t last) const {
    uint8_t* const expanded = scratch<uint8_t>(3, rows_read(band_) * row_size());
    for (int64_t begin = first, ready = 0; begin < last; begin += band_) {
      const int64_t count = std::min(band_, last - begin), rows = rows_read(count), top = begin * g_.stride;
      expand_rows(branch, x, top + ready, top + rows, expanded, top);
      filter_and_project(branch, x, expanded, out, begin, count);
      ready = std::max<int64_t>(0, g_.kernel_size - g_.stride);  // the next band reads these rows again
      std::copy(expanded + (rows - ready) * row_size(), expanded + rows * row_size(), expanded);
    }
  }

  void expand(int64_t branch, const uint8_t* x, uint8_t* expanded, int64_t first, int64_t last) const {
    const auto [begin, end] = padded_rows(first, last);
    expand_rows(branch, x, begin, end, expanded, 0);
  }

  void forward_expanded(int64_t branch, const uint8_t* x, const uint8_t* expanded, uint8_t* out, int64_t first,
                        int64_t last) const {
    filter_and_project(branch, x, expanded + first * g_.stride * row_size(), out, first, last - first);
  }

 private:
  enum Zero { of_expanded, of_filtered, of_output };

  int32_t zero(int64_t branch, Zero which) const { return weights_.zeros.data<int32_t>()[branch * 3 + which]; }

  // Writes padded rows [first, last), row r to row r - top of `expanded`.
  void expand_rows(int64_t branch, const uint8_t* x, int64_t first, int64_t last, uint8_t* expanded,
                   int64_t top) const {
    const int64_t middle = weights_.middle;
    uint8_t** const pixel_rows = scratch<uint8_t*>(2, std::max<int64_t>(last - first, 0) * g_.width);
    const auto row = [&](int64_t r) { return expanded + (r - top) * row_size(); };
    const int64_t pixels = pad_rows(first, last, uint8_t(zero(branch, of_expanded)), row, pixel_rows);
    const QuantizedTap tap = weights_.expand.tap(branch, first_pixel(x, first), g_.in_channels);
    quantized_kernels().gemm({&tap, 1, pixels, middle, weights_.expand_bias.of(branch), nullptr,
                              weights_.expand_scale.of(branch), zero(branch, of_expanded), pixel_rows, nullptr});
  }

  // Computes output rows [begin, begin + count); `expanded` points to the first padded row that they read.
  void filter_and_project(int64_t branch, const uint8_t* x, const uint8_t* expanded, uint8_t* out, int64_t begin,
                          int64_t count) const {
    const int64_t pixels = count * g_.out_width, channels = g_.in_channels;
    const uint8_t* const filtered = filter(branch, expanded, count);
    QuantizedTap taps[2] = {weights_.project.tap(branch, filtered, weights_.middle), {}};
    QuantizedGemm gemm{taps,
                       1,
                       pixels,
                       g_.out_channels,
                       weights_.project_bias.of(branch),
                       nullptr,
                       weights_.project_scale.of(branch),
                       zero(branch, of_output),
                       out_rows(out, begin, pixels),
                       nullptr};
    if (weights_.shortcut.has_value()) {
      taps[1] = taps[0];
      taps[0] = weights_.shortcut->tap(branch, shortcut_pixels(x, begin, pixels), channels);
      gemm.num_taps = 2;
      gemm.rescale = weights_.rescale->of(branch);
    } else if (weights_.identity) {
      gemm.add = shortcut_pixels(x, begin, pixels), gemm.add_stride = channels;
      gemm.add_scale = weights_.rescale->of(branch);
    }
    quantized_kernels().gemm(gemm);
  }

  // The depthwise convolution for `count` output rows.
  const uint8_t* filter(int64_t branch, const uint8_t* expanded, int64_t count) const {
    const int64_t middle = weights_.middle, k = g_.kernel_size;
    uint8_t* const filtered = scratch<uint8_t>(4, count * g_.out_width * middle);
    quantized_kernels().depthwise(
        {expanded, row_size(), count,
         weights_.depthwise.data<int8_t>() + branch * k * ceil_div(k, kGroup) * middle * kGroup,
         weights_.depthwise_bias.data<int32_t>() + branch * middle,
         weights_.depthwise_scale.data<float>() + branch * middle, zero(branch, of_filtered), filtered, g_.out_width,
         middle, k, g_.stride});
    return filtered;
  }

  const QuantizedBottleneckWeights& weights_;
};

}  // namespace hne
