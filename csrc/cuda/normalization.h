// Batch norm as the convolutions on either side of it see it: applied to what is read, and in the gradient of what was
// written. Per-channel vectors are [branches][channels] in float32.
//
//   G branches of C channels      bytes moved at least   operations
//   normalised, and its reverse   12 G C, no map         3 a value, 6 a value
//   gradient of the result        12 G C and y           4 a value
#pragma once

#include "channel_sums.h"

namespace hne {

// What a thread needs of Normalization for its channels.
template <int width>
struct Affine {
  float mean[width], scale[width], shift[width];

  HNE_DEVICE void operator()(float (&values)[width]) const {
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = (values[i] - mean[i]) * scale[i] + shift[i];
  }
};

// activation((x - mean) * scale + shift); x as it is where `mean` is null.
struct Normalization {
  const float *mean = nullptr, *scale = nullptr, *shift = nullptr;
  int channels = 0;
  Clamp<float> range = {};

  HNE_BOTH bool present() const { return mean != nullptr; }

  template <int width>
  HNE_DEVICE Affine<width> at(int branch, int channel) const {
    Affine<width> affine;
    const int64_t from = int64_t(branch) * channels + channel;
    load<width>(affine.mean, mean + from);
    load<width>(affine.scale, scale + from);
    load<width>(affine.shift, shift + from);
    return affine;
  }
  template <int width>
  HNE_DEVICE void apply(const Affine<width>& affine, float (&values)[width]) const {
    affine(values);
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = clamp(values[i], range);
  }

  // From the gradient of the normalised values to that of x, and the terms of the gradients of scale and shift.
  template <int width>
  HNE_DEVICE void back(const Affine<width>& affine, const float (&x)[width], float (&gradient)[width],
                       Pair<width>& terms) const {
    float normal[width];
#pragma unroll
    for (int i = 0; i < width; ++i) normal[i] = x[i];
    affine(normal);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const float behind = behind_activation(gradient[i], normal[i], range);
      terms.first[i] += behind * (x[i] - affine.mean[i]);
      terms.second[i] += behind;
      gradient[i] = behind * affine.scale[i];
    }
  }
};

// The same for the channels of a block, in shared memory: for kernels whose registers are full.
struct SharedAffine {
  float* vectors;  // [3][channels]
  int channels;

  static int64_t bytes(int channels) { return 3 * channels * int64_t(sizeof(float)); }

  // There after a barrier.
  HNE_DEVICE void fill(const Normalization& normalization, int branch, int first) const {
    for (int channel = int(threadIdx.x); channel < channels; channel += kThreads) {
      if (first + channel >= normalization.channels) break;
      const Affine<1> one = normalization.at<1>(branch, first + channel);
      vectors[channel] = one.mean[0], vectors[channels + channel] = one.scale[0];
      vectors[2 * channels + channel] = one.shift[0];
    }
  }
  // 16 bytes of each vector at a time.
  template <int width>
  HNE_DEVICE void apply(const Clamp<float>& range, int channel, float (&values)[width]) const {
    constexpr int piece = kPiece<float, width>;
#pragma unroll
    for (int at = 0; at < width; at += piece) {
      float mean[piece], scale[piece], shift[piece];
      load<piece>(mean, vectors + channel + at);
      load<piece>(scale, vectors + channels + channel + at);
      load<piece>(shift, vectors + 2 * channels + channel + at);
#pragma unroll
      for (int i = 0; i < piece; ++i) values[at + i] = clamp((values[at + i] - mean[i]) * scale[i] + shift[i], range);
    }
  }
};

// What a thread needs of OutputGradient for its channels.
template <int width>
struct Correction {
  float constant[width], slope[width], mean[width];

  HNE_DEVICE void operator()(float (&gradient)[width], const float (&y)[width]) const {
#pragma unroll
    for (int i = 0; i < width; ++i) gradient[i] += constant[i] + slope[i] * (y[i] - mean[i]);
  }
};

// The gradient of a convolution's result y with what comes through its statistics,
// grad + grad_mean / n + grad_var * 2 (y - mean) / n for n pixels; grad alone where `mean` is null.
struct OutputGradient {
  const float *mean = nullptr, *grad_mean = nullptr, *grad_var = nullptr;
  int channels = 0;
  float share = 0;  // 1 / n

  HNE_BOTH bool present() const { return mean != nullptr; }

  template <int width>
  HNE_DEVICE Correction<width> at(int branch, int channel) const {
    Correction<width> correction;
    const int64_t from = int64_t(branch) * channels + channel;
    load<width>(correction.mean, mean + from);
    load<width>(correction.constant, grad_mean + from);
    load<width>(correction.slope, grad_var + from);
#pragma unroll
    for (int i = 0; i < width; ++i) correction.constant[i] *= share, correction.slope[i] *= 2 * share;
    return correction;
  }
};

// --- on the host -------------------------------------------------------------------------------------------

// A per-channel vector, contiguous.
inline Tensor statistics(const char* name, const Tensor& t, int64_t branches, int64_t channels, const Tensor& x) {
  check_shape(name, t, {branches, channels});
  STD_TORCH_CHECK(on_device(t) && t.get_device_index() == x.get_device_index(), name, ": expected the device of x");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, ": expected float32");
  return torch::stable::contiguous(t);
}

// Checked arguments of a normalisation, and the memory they lie in.
struct NormalizationArguments {
  std::optional<Tensor> mean, scale, shift;
  Normalization normalization;

  NormalizationArguments(const std::optional<Tensor>& mean_in, const std::optional<Tensor>& scale_in,
                         const std::optional<Tensor>& shift_in, const std::string& activation, int64_t branches,
                         int64_t channels, const Tensor& x) {
    STD_TORCH_CHECK(mean_in.has_value() == scale_in.has_value() && mean_in.has_value() == shift_in.has_value(),
                    "mean, scale, shift: expected all three or none");
    normalization.range = Clamp<float>::named(activation);
    STD_TORCH_CHECK(mean_in.has_value() || !normalization.range.active(), "activation: expected none without a mean");
    if (!mean_in.has_value()) return;
    mean = statistics("mean", *mean_in, branches, channels, x);
    scale = statistics("scale", *scale_in, branches, channels, x);
    shift = statistics("shift", *shift_in, branches, channels, x);
    normalization.mean = data<float>(mean), normalization.scale = data<float>(scale);
    normalization.shift = data<float>(shift), normalization.channels = int(channels);
  }
};

// Checked arguments that give the gradient of a convolution's result y, and the memory they lie in.
struct OutputGradientArguments {
  Tensor grad, y, grad_mean, grad_var, mean;
  OutputGradient gradient;

  OutputGradientArguments(const Tensor& grad_in, const Tensor& grad_mean_in, const Tensor& grad_var_in,
                          const Tensor& y_in, const Tensor& y_mean_in, const Tensor& x)
      : grad(torch::stable::contiguous(grad_in)), y(torch::stable::contiguous(y_in)) {
    const int64_t branches = grad_in.size(0), channels = grad_in.size(4);
    check_kind("grad", grad_in, x);
    check_kind("y", y_in, x);
    const auto sizes = grad_in.sizes();
    check_shape("y", y_in, {sizes.begin(), sizes.end()});
    mean = statistics("y_mean", y_mean_in, branches, channels, x);
    grad_mean = statistics("grad_mean", grad_mean_in, branches, channels, x);
    grad_var = statistics("grad_var", grad_var_in, branches, channels, x);
    const int64_t pixels = grad_in.size(1) * grad_in.size(2) * grad_in.size(3);
    gradient = {data<float>(mean), data<float>(grad_mean), data<float>(grad_var), int(channels),
                pixels > 0 ? 1 / float(pixels) : 0.0f};
  }
};

}  // namespace hne
