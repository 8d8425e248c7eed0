// The end of a residual block, z = activation((x - mean) * scale + shift + residual), and its gradient. The residual
// may have a normalisation of its own. The gradient is computed by a kernel of its own (branch_normalize.cu), or in the
// epilogue of the convolution that reads z (branch_conv2d_backward_input.cu), which adds the gradient of z's other
// readers.
//
//   G branches, M pixels, C channels   bytes moved at least                           operations
//   forward                            x + residual + z                               5 G M C
//   backward                           gradient + x + z + grad_x + grad_residual      6 G M C
//   with a normalised residual         + residual                                     8, 10 G M C
#pragma once

#include "normalization.h"

namespace hne {

// Mean and scale for the channels of a thread.
template <int width>
struct Slope {
  float mean[width], scale[width];

  HNE_DEVICE static Slope at(const ChannelAffine& affine, int branch, int channel) {
    const int64_t from = int64_t(branch) * affine.channels + channel;
    Slope slope;
    load<width>(slope.mean, affine.mean + from);
    load<width>(slope.scale, affine.scale + from);
    return slope;
  }
};

// Sums over the pixels of a thread: the gradients of scale and shift, and of the scale of a normalised residual, whose
// shift has the gradient of the other shift.
template <int width, bool normalized>
struct SumGradients : Pair<width> {
  float third[normalized ? width : 1] = {};

  // `residual`: null where the residual is not normalised.
  HNE_DEVICE void put(const Partials& partials, const Partials& residual, const Place& place, float* scratch,
                      int across) const {
    const int channel = place.channel + int(threadIdx.x);
    const bool writes = int(threadIdx.x) < across * width && channel < partials.channels;
    add_lanes(scratch, this->first, across);
    if (writes) partials.put(0, place.branch, place.split, channel, scratch[threadIdx.x]);
    add_lanes(scratch, this->second, across);
    if (writes) partials.put(1, place.branch, place.split, channel, scratch[threadIdx.x]);
    if constexpr (normalized) {
      if (writes) residual.put(1, place.branch, place.split, channel, scratch[threadIdx.x]);
      add_lanes(scratch, third, across);
      if (writes) residual.put(0, place.branch, place.split, channel, scratch[threadIdx.x]);
    }
  }
};

// Takes the gradient of z back through activation, sum and normalisations.
template <typename T>
struct NormalizedSum {
  Normalization normalization;
  const T *x, *z;  // z: null without an activation
  const T* residual = nullptr;
  ChannelAffine residual_normalization = {};  // absent: the residual is added as it is, and not read here
  T* grad_x;
  T* grad_residual = nullptr;  // null where it is not wanted

  bool vectors() const {
    return whole_vectors<T>({normalization.channels}, {x, z, residual, grad_x, grad_residual}) &&
           normalization.vectors() && residual_normalization.vectors();
  }

  // `gradient` is that of z at `at`, and changes. `of_residual` is not read unless the residual is normalised.
  template <int width, bool normalized>
  HNE_DEVICE void backward(const Slope<width>& of_x, const Slope<width>& of_residual, int64_t at,
                           float (&gradient)[width], SumGradients<width, normalized>& sums) const {
    float values[width], others[width], added[width];
    load<width>(values, x + at);
    if constexpr (normalized) load<width>(added, residual + at);
    if (z != nullptr) {
      load<width>(others, z + at);
#pragma unroll
      for (int i = 0; i < width; ++i) gradient[i] = clamp_gradient(gradient[i], others[i], normalization.range);
    }
#pragma unroll
    for (int i = 0; i < width; ++i) {
      sums.first[i] += gradient[i] * (values[i] - of_x.mean[i]);
      sums.second[i] += gradient[i];
      values[i] = gradient[i] * of_x.scale[i];
    }
    store<width>(grad_x + at, values);
    if constexpr (normalized) {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        sums.third[i] += gradient[i] * (added[i] - of_residual.mean[i]);
        gradient[i] *= of_residual.scale[i];
      }
    }
    if (grad_residual != nullptr) store<width>(grad_residual + at, gradient);
  }
};

// --- on the host -------------------------------------------------------------------------------------------

// Checked residual of the feature map x, which may be absent, and the tensors that own its memory.
struct ResidualArguments {
  std::optional<Tensor> values, norm;
  ChannelAffine normalization;

  ResidualArguments(const std::optional<Tensor>& residual, const std::optional<Tensor>& residual_norm,
                    const Tensor& x) {
    STD_TORCH_CHECK(residual.has_value() || !residual_norm.has_value(), "residual_norm: expected with a residual");
    if (!residual.has_value()) return;
    check_like("residual", *residual, x);
    values = torch::stable::contiguous(*residual);
    if (!residual_norm.has_value()) return;
    const int64_t branches = x.size(0), channels = x.size(4), row = branches * channels;
    norm = per_channel("residual_norm", *residual_norm, {3, branches, channels}, x);
    normalization.mean = data<float>(norm), normalization.scale = normalization.mean + row;
    normalization.shift = normalization.scale + row, normalization.channels = int(channels);
  }
};

// z for a normalisation that is present; x is contiguous.
Tensor normalize_sum(const Device& device, const Tensor& x, const Normalization& normalization,
                     const ResidualArguments& residual);

}  // namespace hne
