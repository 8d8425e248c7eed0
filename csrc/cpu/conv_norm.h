// The training unit around a convolution, dense or depthwise: what it reads is normalised, the statistics of what it
// writes are given, and on the way back the gradient of these joins that of the map where it is read.
#pragma once

#include "convolution.h"
#include "prologue.h"

namespace hne {

// The vectors of a normalisation, or none of them.
struct Normalization {
  std::optional<Tensor> mean, scale, shift;
  std::string activation;

  Normalization(const Tensor& x, const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
                const std::optional<Tensor>& shift, const std::string& activation)
      : mean(contiguous(mean)), scale(contiguous(scale)), shift(contiguous(shift)), activation(activation) {
    STD_TORCH_CHECK(x.dim() == 5, "x: expected 5 dimensions");
    STD_TORCH_CHECK(mean.has_value() == scale.has_value() && mean.has_value() == shift.has_value(),
                    "mean: expected with scale and shift");
    STD_TORCH_CHECK(mean.has_value() || activation == "none", "activation: expected none without a mean");
    if (!mean.has_value()) return;
    check_vector("mean", *mean, x, x.size(0), x.size(4));
    check_vector("scale", *scale, x, x.size(0), x.size(4));
    check_vector("shift", *shift, x, x.size(0), x.size(4));
  }

  template <typename T>
  PrologueInput<T> of(const Tensor& x) const {
    const int64_t rows = x.size(1) * x.size(2) * x.size(3);
    return {data<T>(x),     rows,           x.size(4), data<T>(mean),
            data<T>(scale), data<T>(shift), nullptr,   Clamp<T>::named(activation)};
  }
};

// What comes back to the output of a unit, of a map of n rows:
// grad + grad_mean / n + 2 grad_var (y - mean) / n
struct OutputGradient {
  Tensor grad, y, mean, slope, offset;

  OutputGradient(const Tensor& grad_in, const Tensor& grad_mean, const Tensor& grad_var, const Tensor& y_in,
                 const Tensor& y_mean)
      : grad(torch::stable::contiguous(widen(grad_in))),
        y(torch::stable::contiguous(widen(y_in))),
        mean(torch::stable::contiguous(y_mean)),
        slope(empty(mean, mean.sizes())),
        offset(empty(mean, mean.sizes())) {
    STD_TORCH_CHECK(y_in.dim() == 5, "y: expected 5 dimensions");
    const auto sizes = y_in.sizes();
    check_kind("y", y_in, y_in);
    check_kind("grad", grad_in, y_in);
    check_shape("grad", grad_in, {sizes.begin(), sizes.end()});
    check_vector("y_mean", y_mean, y_in, y_in.size(0), y_in.size(4));
    check_vector("grad_mean", grad_mean, y_in, y_in.size(0), y_in.size(4));
    check_vector("grad_var", grad_var, y_in, y_in.size(0), y_in.size(4));
    const Tensor of_mean = torch::stable::contiguous(grad_mean), of_var = torch::stable::contiguous(grad_var);
    dispatch(y, [&](auto type) {
      using T = decltype(type);
      const T values = T(std::max<int64_t>(y.size(1) * y.size(2) * y.size(3), 1));
      const T *given_mean = data<T>(of_mean), *given_var = data<T>(of_var);
      T *const to_offset = mutable_data<T>(offset), *const to_slope = mutable_data<T>(slope);
      for (int64_t i = 0; i < mean.numel(); ++i) to_offset[i] = given_mean[i] / values;
      for (int64_t i = 0; i < mean.numel(); ++i) to_slope[i] = 2 * given_var[i] / values;
    });
  }

  template <typename T>
  PrologueInput<T> map() const {
    const int64_t rows = y.size(1) * y.size(2) * y.size(3);
    return {data<T>(y), rows, y.size(4), data<T>(mean), data<T>(slope), data<T>(offset), data<T>(grad), {}};
  }
};

// Mean and variance of a convolution's output, which `convolve(written)` writes, at most `block` rows at once.
template <typename T, typename F>
std::tuple<Tensor, Tensor> statistics(const Geometry& g, const Tensor& y, int64_t block, const F& convolve) {
  const int64_t rows = g.batch * g.out_pixels();
  const Tensor mean = empty(y, {g.branches, g.out_channels}), var = empty(y, {g.branches, g.out_channels});
  Moments<T> moments(g.branches, ceil_div(rows, block), g.out_channels);
  convolve([&](int64_t branch, int64_t first, int64_t count) {
    moments.add(branch, first / block, data<T>(y) + (branch * rows + first) * g.out_channels, count);
  });
  moments.finish(g.branches, mutable_data<T>(mean), mutable_data<T>(var));
  return {mean, var};
}

// The ops of a unit. `Convolution` has forward and backward, as in branch_conv2d.h, and says how many rows it writes at
// once, of maps of so many pixels.
template <typename Convolution>
struct ConvNorm {
  static std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x_in, const Tensor& weight_in,
                                                    const std::optional<Tensor>& mean,
                                                    const std::optional<Tensor>& scale,
                                                    const std::optional<Tensor>& shift, const std::string& activation,
                                                    int64_t stride, int64_t padding, int64_t replicate) {
    const Normalization normalization(x_in, mean, scale, shift, activation);
    check_kind("x", x_in, x_in);
    check_kind("weight", weight_in, x_in);
    const Geometry g = Convolution::geometry(x_in, weight_in, stride, padding, replicate);
    const Tensor x = torch::stable::contiguous(widen(x_in)), weight = torch::stable::contiguous(widen(weight_in));
    const Tensor y = empty(x, {g.branches, g.batch, g.out_height, g.out_width, g.out_channels});
    const auto [y_mean, y_var] = dispatch(x, [&](auto type) {
      using T = decltype(type);
      return statistics<T>(g, y, Convolution::block_rows(g.out_pixels()), [&](const RowsWritten& written) {
        Convolution::forward(g, normalization.of<T>(x), weight, mutable_data<T>(y), written);
      });
    });
    return {round_to(y, x_in.scalar_type()), y_mean, y_var};
  }

  // Both gradients, empty where not needed: the output's gradient and x are read once.
  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
      const Tensor& grad, const Tensor& grad_mean, const Tensor& grad_var, const Tensor& y_in, const Tensor& y_mean,
      const Tensor& weight_in, const Tensor& x_in, const std::optional<Tensor>& mean,
      const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, const std::string& activation,
      int64_t stride, int64_t padding, int64_t replicate, bool need_input, bool need_weight) {
    const Normalization normalization(x_in, mean, scale, shift, activation);
    const OutputGradient above(grad, grad_mean, grad_var, y_in, y_mean);
    check_kind("x", x_in, y_in);
    check_kind("weight", weight_in, x_in);
    const Geometry g = Convolution::geometry(x_in, weight_in, stride, padding, replicate);
    check_shape("y", y_in, {g.branches, g.batch, g.out_height, g.out_width, g.out_channels});
    const Tensor weight = torch::stable::contiguous(widen(weight_in)), x = torch::stable::contiguous(widen(x_in));
    const bool need_vectors = need_input && mean.has_value();
    const auto gradient = [&](bool needed, const Tensor& of) {
      return needed ? empty(weight, of.sizes()) : empty(weight, {0});
    };
    const Tensor grad_x = gradient(need_input, x), grad_weight = gradient(need_weight, weight);
    const Tensor grad_scale = gradient(need_vectors, need_vectors ? *scale : x);
    const Tensor grad_shift = gradient(need_vectors, need_vectors ? *shift : x);
    dispatch(x, [&](auto type) {
      using T = decltype(type);
      T* out = need_input ? mutable_data<T>(grad_x) : nullptr;
      const Tensor* out_weight = need_weight ? &grad_weight : nullptr;
      const PrologueInput<T> map = normalization.of<T>(x);
      if (!need_vectors) {
        Convolution::backward(g, above.map<T>(), map, weight, out, out_weight, {});
        return;
      }
      const int64_t block = Convolution::block_rows(g.pixels());
      ChannelSums<T> sums(g.parents, ceil_div(map.rows, block), g.in_channels);
      Convolution::backward(g, above.map<T>(), map, weight, out, out_weight,
                            [&](int64_t branch, int64_t first, int64_t count) {
                              NormRows<T> r = map.norm(branch, first, count);
                              r.grad = r.out = out + (branch * map.rows + first) * g.in_channels;
                              sums.add(branch, first / block, r, kernels<T>().normalize_backward);
                            });
      sums.finish(g.parents, mutable_data<T>(grad_shift), mutable_data<T>(grad_scale));
    });
    return {round_to(grad_x, x_in.scalar_type()), grad_scale, grad_shift, round_to(grad_weight, x_in.scalar_type())};
  }
};

}  // namespace hne
