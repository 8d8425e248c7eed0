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

  template <int width>
  HNE_DEVICE void apply(const Affine<width>& affine, float (&values)[width]) const {
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = clamp(affine(i, values[i]), range);
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

// Normalization with the vectors of a block's channels in shared memory, for kernels short of registers.
struct SharedAffine {
  float* vectors;  // [3][channels]
  int channels;

  static int64_t bytes(int channels) { return 3 * channels * int64_t(sizeof(float)); }

  // A barrier must follow.
  HNE_DEVICE void fill(const Normalization& normalization, int branch, int first) const {
    for (int channel = int(threadIdx.x); channel < channels; channel += kThreads) {
      if (first + channel >= normalization.channels) break;
      const Affine<1> one = normalization.at<1>(branch, first + channel);
      vectors[channel] = one.mean[0], vectors[channels + channel] = one.scale[0];
      vectors[2 * channels + channel] = one.shift[0];
    }
  }
  // Loads 16 bytes of each vector at a time: few registers.
  template <int width>
  HNE_DEVICE void apply(const Clamp<float>& range, int channel, float (&values)[width]) const {
    constexpr int piece = kPiece<float, width>;
#pragma unroll
    for (int at = 0; at < width; at += piece) {
      const float* from = vectors + channel + at;
      const auto affine = Affine<piece>::from(from, from + channels, from + 2 * channels);
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

// Checks a per-channel vector; returns it contiguous.
inline Tensor channel_vector(const char* name, const Tensor& t, int64_t branches, int64_t channels, const Tensor& x) {
  check_shape(name, t, {branches, channels});
  STD_TORCH_CHECK(on_device(t) && t.get_device_index() == x.get_device_index(), name, ": expected the device of x");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, ": expected float32");
  return torch::stable::contiguous(t);
}

// Checked arguments of a normalisation, and the tensors that own their memory.
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
    mean = channel_vector("mean", *mean_in, branches, channels, x);
    scale = channel_vector("scale", *scale_in, branches, channels, x);
    shift = channel_vector("shift", *shift_in, branches, channels, x);
    normalization.mean = data<float>(mean), normalization.scale = data<float>(scale);
    normalization.shift = data<float>(shift), normalization.channels = int(channels);
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
    const auto sizes = grad_in.sizes();
    check_shape("y", y_in, {sizes.begin(), sizes.end()});
    check_kind("y", y_in, grad_in);
    y = torch::stable::contiguous(y_in);
    mean = channel_vector("y_mean", y_mean_in, sizes[0], sizes[4], grad_in);
    grad_mean = channel_vector("grad_mean", grad_mean_in, sizes[0], sizes[4], grad_in);
    grad_var = channel_vector("grad_var", grad_var_in, sizes[0], sizes[4], grad_in);
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
