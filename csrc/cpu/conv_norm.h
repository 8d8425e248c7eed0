// The operands of a convolution that is trained together with its batch norm: the normalised input, the statistics of
// the output, and the gradient of the output.
#pragma once

#include "convolution.h"
#include "prologue.h"

namespace hne {

// The normalisation [3][branch][channel] of a feature map and the activation after it, or neither.
struct Normalization {
  std::optional<Tensor> norm;
  std::string activation;

  Normalization(const char* name, const Tensor& x, const std::optional<Tensor>& norm_in, const std::string& activation)
      : norm(contiguous(norm_in)), activation(activation) {
    STD_TORCH_CHECK(x.dim() == 5, "x: expected 5 dimensions");
    STD_TORCH_CHECK(norm.has_value() || activation == "none", "activation: expected none without a normalisation");
    if (norm.has_value()) check_norm(name, *norm, x, x.size(0), x.size(4));
  }

  // The normalised feature map x, which must be contiguous.
  template <typename T>
  PrologueInput<T> input(const Tensor& x) const {
    PrologueInput<T> input{data<T>(x), x.size(1) * x.size(2) * x.size(3), x.size(4)};
    if (!norm.has_value()) return input;
    input.mean = norm_row<Sum<T>>(*norm, kMean), input.scale = norm_row<Sum<T>>(*norm, kScale);
    input.shift = norm_row<Sum<T>>(*norm, kShift), input.clamp = Clamp<Sum<T>>::named(activation);
    return input;
  }
};

// The feature map that is added to a normalised x before the activation, and its own normalisation; both may be absent.
struct Residual {
  std::optional<Tensor> values, norm;

  Residual(const std::optional<Tensor>& given, const std::optional<Tensor>& norm_in, const Tensor& x, bool kept)
      : values(read_features(given, kept)), norm(contiguous(norm_in)) {
    STD_TORCH_CHECK(given.has_value() || !norm.has_value(), "residual_norm: expected with a residual");
    if (given.has_value()) {
      const auto sizes = x.sizes();
      check_shape("residual", *given, {sizes.begin(), sizes.end()});
      check_kind("residual", *given, x);
    }
    if (norm.has_value()) check_norm("residual_norm", *norm, x, x.size(0), x.size(4));
  }

  template <typename T>
  void add_to(PrologueInput<T>& input) const {
    input.add = data<T>(values);
    if (!norm.has_value()) return;
    input.add_mean = norm_row<Sum<T>>(*norm, kMean), input.add_scale = norm_row<Sum<T>>(*norm, kScale);
    input.add_shift = norm_row<Sum<T>>(*norm, kShift);
  }
};

// The whole gradient of a feature map y with n rows, of which mean and variance are results, too:
// grad + grad_mean / n + 2 grad_var (y - mean) / n. It is computed where it is read, as a normalisation of y.
struct OutputGradient {
  Tensor grad, y, mean, slope, offset;

  OutputGradient(const Tensor& grad_in, const Tensor& grad_mean_in, const Tensor& grad_var_in, const Tensor& y_in,
                 const Tensor& y_mean, bool kept)
      : grad(read_features(grad_in, kept)),
        y(read_features(y_in, kept)),
        mean(torch::stable::contiguous(y_mean)),
        slope(empty(mean, mean.sizes())),
        offset(empty(mean, mean.sizes())) {
    STD_TORCH_CHECK(y_in.dim() == 5, "y: expected 5 dimensions");
    const auto sizes = y_in.sizes();
    check_kind("y", y_in, y_in);
    check_kind("grad_y", grad_in, y_in);
    check_shape("grad_y", grad_in, {sizes.begin(), sizes.end()});
    for (const auto& [name, t] :
         {std::pair{"y_mean", &y_mean}, {"grad_mean", &grad_mean_in}, {"grad_var", &grad_var_in}})
      check_statistics(name, *t, y_in, {y_in.size(0), y_in.size(4)});
    const Tensor grad_mean = torch::stable::contiguous(grad_mean_in), grad_var = torch::stable::contiguous(grad_var_in);
    dispatch(mean, [&](auto type) {
      using T = decltype(type);
      const T rows = T(std::max<int64_t>(y.size(1) * y.size(2) * y.size(3), 1));
      const T *from_mean = data<T>(grad_mean), *from_var = data<T>(grad_var);
      T *const to_offset = mutable_data<T>(offset), *const to_slope = mutable_data<T>(slope);
      for (int64_t i = 0; i < mean.numel(); ++i) to_offset[i] = from_mean[i] / rows;
      for (int64_t i = 0; i < mean.numel(); ++i) to_slope[i] = 2 * from_var[i] / rows;
    });
  }

  template <typename T>
  PrologueInput<T> input() const {
    const int64_t rows = y.size(1) * y.size(2) * y.size(3);
    return {data<T>(y),           rows,          y.size(4), data<Sum<T>>(mean), data<Sum<T>>(slope),
            data<Sum<T>>(offset), data<T>(grad), {}};
  }
};

// Mean and variance of the output y of `convolve(written)`, which writes at most `block` rows at once.
template <typename T, typename F>
std::tuple<Tensor, Tensor> statistics(const Geometry& g, const Tensor& y, int64_t block, const F& convolve) {
  const int64_t rows = g.batch * g.out_pixels();
  const std::vector<int64_t> shape = {g.branches, g.out_channels};
  const Tensor mean = empty(y, shape, kScalarType<Sum<T>>), var = empty(y, shape, kScalarType<Sum<T>>);
  Moments<T> moments(g.branches, ceil_div(rows, block), g.out_channels);
  convolve([&](int64_t branch, int64_t first, int64_t count) {
    moments.add(branch, first / block, data<T>(y) + (branch * rows + first) * g.out_channels, count);
  });
  moments.finish(mutable_data<Sum<T>>(mean), mutable_data<Sum<T>>(var));
  return {mean, var};
}

}  // namespace hne
