// Batch norm fused into the neighbouring convolutions: applied to the values that a convolution reads, and included in
// the gradient of the values that a convolution wrote. Per-channel vectors are [branch][channel] in float32.
//
//   G branches of C channels      bytes moved at least       operations
//   normalise, and its gradient   12 G C, no feature map     3 a value, 6 a value
//   gradient of the result        12 G C and y               4 a value
#pragma once

#include "channel_sums.h"

namespace hne {

// (v - mean) * scale + shift for the channels of a thread.
template <int width>
struct Affine {
  float mean[width], scale[width], shift[width];

  HNE_DEVICE static Affine from(const float* mean, const float* scale, const float* shift) {
    Affine affine;
    load<width>(affine.mean, mean);
    load<width>(affine.scale, scale);
    load<width>(affine.shift, shift);
    return affine;
  }
  HNE_DEVICE float operator()(int i, float v) const { return (v - mean[i]) * scale[i] + shift[i]; }
};

// The three vectors of an affine function per channel; absent where `mean` is null.
struct ChannelAffine {
  const float *mean = nullptr, *scale = nullptr, *shift = nullptr;
  int channels = 0;

  HNE_BOTH bool present() const { return mean != nullptr; }
  bool vectors() const { return aligned(mean) && aligned(scale) && aligned(shift); }

  template <int width>
  HNE_DEVICE Affine<width> at(int branch, int channel) const {
    const int64_t from = int64_t(branch) * channels + channel;
    return Affine<width>::from(mean + from, scale + from, shift + from);
  }
};

// activation((x - mean) * scale + shift); the identity where absent.
struct Normalization : ChannelAffine {
  Clamp<float> range = {};

  // For the same channels of several pixels; relu has no upper bound to compare with.
  template <int pixels, int width>
  HNE_DEVICE void apply(const Affine<width>& affine, float (&values)[pixels][width]) const {
#pragma unroll
    for (int p = 0; p < pixels; ++p)
#pragma unroll
      for (int i = 0; i < width; ++i) values[p][i] = maximum(affine(i, values[p][i]), range.low);
    if (range.high == INFINITY) return;
#pragma unroll
    for (int p = 0; p < pixels; ++p)
#pragma unroll
      for (int i = 0; i < width; ++i) values[p][i] = minimum(values[p][i], range.high);
  }
  template <int width>
  HNE_DEVICE void apply(const Affine<width>& affine, float (&values)[width]) const {
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = maximum(affine(i, values[i]), range.low);
    if (range.high == INFINITY) return;
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = minimum(values[i], range.high);
  }

  // Turns the gradient of the normalised values into that of x. Adds to `sums` the gradients of scale and shift.
  template <int width>
  HNE_DEVICE void backward(const Affine<width>& affine, const float (&x)[width], float (&gradient)[width],
                           Pair<width>& sums) const {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const float inner = clamp_gradient(gradient[i], affine(i, x[i]), range);
      sums.first[i] += inner * (x[i] - affine.mean[i]);
      sums.second[i] += inner;
      gradient[i] = inner * affine.scale[i];
    }
  }
};

// An affine function with the vectors of a block's channels in shared memory, for kernels short of registers.
struct SharedAffine {
  float* vectors;  // [3][channels]
  int channels;

  static int64_t bytes(int channels) { return 3 * channels * int64_t(sizeof(float)); }

  // A barrier must follow.
  template <typename From>  // Normalization or OutputGradient
  HNE_DEVICE void fill(const From& from, int branch, int first) const {
    for (int channel = int(threadIdx.x); channel < channels; channel += kThreads) {
      if (first + channel >= from.channels) break;
      const Affine<1> one = from.template at<1>(branch, first + channel);
      vectors[channel] = one.mean[0], vectors[channels + channel] = one.scale[0];
      vectors[2 * channels + channel] = one.shift[0];
    }
  }
  template <int width>
  HNE_DEVICE Affine<width> at(int channel) const {
    const float* from = vectors + channel;
    return Affine<width>::from(from, from + channels, from + 2 * channels);
  }
  // Loads 16 bytes of each vector at a time: few registers.
  template <int width>
  HNE_DEVICE void apply(const Clamp<float>& range, int channel, float (&values)[width]) const {
    constexpr int piece = kPiece<float, width>;
#pragma unroll
    for (int at = 0; at < width; at += piece) {
      const auto affine = this->at<piece>(channel + at);
#pragma unroll
      for (int i = 0; i < piece; ++i) values[at + i] = clamp(affine(i, values[at + i]), range);
    }
  }
};

// Gradient of a convolution's result y including its path through the statistics of y,
// grad + grad_mean / n + 2 grad_var (y - mean) / n for n pixels; `grad` alone where absent.
template <typename T>
struct OutputGradient : ChannelAffine {  // scale: grad_var, shift: grad_mean
  const T *grad = nullptr, *y = nullptr;
  float inverse_pixels = 0;  // 1 / n

  template <int width>
  HNE_DEVICE Affine<width> at(int branch, int channel) const {
    const int64_t from = int64_t(branch) * channels + channel;
    Affine<width> affine;
    load<width>(affine.mean, mean + from);
    load<width>(affine.shift, shift + from);  // before scale: fewer registers than ChannelAffine::at
    load<width>(affine.scale, scale + from);
#pragma unroll
    for (int i = 0; i < width; ++i) affine.shift[i] *= inverse_pixels, affine.scale[i] *= 2 * inverse_pixels;
    return affine;
  }
  template <int width>
  HNE_DEVICE void apply(const Affine<width>& affine, float (&gradient)[width], const float (&y_values)[width]) const {
#pragma unroll
    for (int i = 0; i < width; ++i) gradient[i] += affine(i, y_values[i]);
  }
};

// --- on the host -------------------------------------------------------------------------------------------

// Checks values per channel of a feature map with the device of `x`; returns them contiguous.
inline Tensor per_channel(const char* name, const Tensor& t, const std::vector<int64_t>& shape, const Tensor& x) {
  check_shape(name, t, shape);
  STD_TORCH_CHECK(on_device(t) && t.get_device_index() == x.get_device_index(), name, ": expected the device of x");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, ": expected float32");
  return torch::stable::contiguous(t);
}

// Checked normalisation [3, branches, channels] of the feature map x (rows: mean, scale, shift), or none, and the
// tensor that owns its memory.
struct NormalizationArguments {
  std::optional<Tensor> norm;
  Normalization normalization;

  NormalizationArguments(const std::optional<Tensor>& norm_in, const std::string& activation, const Tensor& x) {
    normalization.range = Clamp<float>::named(activation);
    STD_TORCH_CHECK(norm_in.has_value() || !normalization.range.active(), "activation: expected none without a norm");
    if (!norm_in.has_value()) return;
    const int64_t branches = x.size(0), channels = x.size(4), row = branches * channels;
    norm = per_channel("norm", *norm_in, {3, branches, channels}, x);
    normalization.mean = data<float>(norm), normalization.scale = normalization.mean + row;
    normalization.shift = normalization.scale + row, normalization.channels = int(channels);
  }
};

// Checked arguments of OutputGradient, and the tensors that own their memory.
struct OutputGradientArguments {
  Tensor grad;
  std::optional<Tensor> y, mean, grad_mean, grad_var;

  // Of a convolution without statistics.
  explicit OutputGradientArguments(const Tensor& grad_in) : grad(torch::stable::contiguous(grad_in)) {}

  OutputGradientArguments(const Tensor& grad_in, const Tensor& grad_mean_in, const Tensor& grad_var_in,
                          const Tensor& y_in, const Tensor& y_mean_in)
      : OutputGradientArguments(grad_in) {
    check_like("y", y_in, grad_in);
    y = torch::stable::contiguous(y_in);
    const std::vector<int64_t> shape = {grad_in.size(0), grad_in.size(4)};
    mean = per_channel("y_mean", y_mean_in, shape, grad_in);
    grad_mean = per_channel("grad_mean", grad_mean_in, shape, grad_in);
    grad_var = per_channel("grad_var", grad_var_in, shape, grad_in);
  }

  template <typename T>
  OutputGradient<T> operands() const {
    OutputGradient<T> output;
    output.mean = data<float>(mean), output.scale = data<float>(grad_var), output.shift = data<float>(grad_mean);
    output.channels = int(grad.size(4)), output.grad = data<T>(grad), output.y = data<T>(y);
    const int64_t pixels = grad.size(1) * grad.size(2) * grad.size(3);
    output.inverse_pixels = pixels > 0 ? 1 / float(pixels) : 0.0f;
    return output;
  }
};

}  // namespace hne
