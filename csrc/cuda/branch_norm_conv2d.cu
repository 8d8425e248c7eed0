// Convolution between two batch norms in training, dense or depthwise: it normalises its input as it reads it and gives
// the batch statistics of its output. Where the input has other readers, too, it is stored; its gradient is then the
// sum over the readers. The kernels are those of the plain convolutions, whose files list bytes and operations; each
// gradient has a kernel of its own.
#include "branch_conv.h"

namespace hne {
namespace {

// f(Dense{}) or f(Depthwise{}), by the dimensions of the weight.
template <typename F>
auto by_kind(const Tensor& weight, const F& f) {
  STD_TORCH_CHECK(weight.dim() == 5 || weight.dim() == 4, "weight: expected 5 (dense) or 4 (depthwise) dimensions");
  return weight.dim() == 5 ? f(Dense{}) : f(Depthwise{});
}

void check_materialize(const Tensor& weight, bool normalized) {
  STD_TORCH_CHECK(normalized && weight.dim() == 5, "materialize: expected a normalisation and a dense convolution");
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// y, its mean and variance, and z, the normalised input, which is empty unless it is to be materialised.
Results branch_norm_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& norm,
                           const std::optional<Tensor>& residual, const std::optional<Tensor>& residual_norm,
                           const std::string& activation, int64_t stride, int64_t padding, int64_t replicate,
                           bool materialize) {
  STD_TORCH_CHECK(materialize || !(residual.has_value() || residual_norm.has_value()),
                  "residual: expected none unless z is materialised");
  if (materialize) check_materialize(weight, norm.has_value());
  return by_kind(weight, [&](auto kind) -> Results {
    using Kind = decltype(kind);
    const Geometry g = check_forward<Kind>(x, weight, stride, padding, replicate);
    const NormalizationArguments arguments(norm, activation, x);
    const ResidualArguments added(residual, residual_norm, x);
    const Device device(x);
    const Tensor z = materialize ? normalize_sum(device, torch::stable::contiguous(x), arguments.normalization, added)
                                 : torch::stable::new_empty(x, {0});
    ChannelReduction moments(x, g.branches, g.out_channels);
    const Tensor y = materialize
                         ? convolve<Kind>(device, g, z, weight, std::nullopt, {}, &moments)
                         : convolve<Kind>(device, g, x, weight, std::nullopt, arguments.normalization, &moments);
    const auto [mean, var] = combine_moments(device, moments, g.batch * g.out_pixels());
    return {y, mean, var, z};
  });
}

// The gradient of a stored input's x, with the results of the other readers' gradients in one pass.
struct SumResults {
  Tensor grad_x, grad_norm, grad_residual, grad_residual_norm;

  SumResults(const Device& device, const Geometry& g, const OutputGradientArguments& output, const Tensor& weight,
             const Tensor& x_in, const Tensor& z_in, const Tensor& grad_z_in, const Normalization& normalization,
             const ResidualArguments& added, bool has_residual)
      : grad_x(torch::stable::new_empty(x_in, x_in.sizes())),
        grad_norm(grad_x),
        grad_residual(has_residual ? torch::stable::new_empty(x_in, x_in.sizes())
                                   : torch::stable::new_empty(x_in, {0})),
        grad_residual_norm(torch::stable::new_empty(x_in, {0}, ScalarType::Float)) {
    const Tensor x = torch::stable::contiguous(x_in);
    const Tensor z = torch::stable::contiguous(z_in), grad_z = torch::stable::contiguous(grad_z_in);
    const bool normalized = added.normalization.present();
    ChannelReduction sums(x, g.parents, g.in_channels), residual_sums(x, g.parents, g.in_channels);
    dispatch(x, [&](auto type) {
      using T = decltype(type);
      const TapsFirst filters = taps_first(device, weight, g);
      const InputGradient<T> d{.s = Shape(g),
                               .output = output.operands<T>(),
                               .filters = data<T>(filters.values),
                               .strides = filters.strides,
                               .out = nullptr};
      const NormalizedSum<T> sum{.normalization = normalization,
                                 .x = data<T>(x),
                                 .z = normalization.range.active() ? data<T>(z) : nullptr,
                                 .residual = data<T>(added.values),
                                 .residual_normalization = added.normalization,
                                 .grad_x = mutable_data<T>(grad_x),
                                 .grad_residual = has_residual ? mutable_data<T>(grad_residual) : nullptr};
      dense_backward_sum(device, d, data<T>(grad_z), sum, sums, normalized ? &residual_sums : nullptr);
    });
    grad_norm = combine_norm_gradient(device, sums, normalization.scale);
    if (normalized) grad_residual_norm = combine_norm_gradient(device, residual_sums, added.normalization.scale);
  }
};

// Gradients of x, weight, norm, residual and residual_norm. `need_input` is for all but the weight; a gradient that is
// not needed is an empty tensor. The residual is only given together with its normalisation.
Gradients branch_norm_conv2d_backward(const Tensor& grad_y, const Tensor& grad_mean, const Tensor& grad_var,
                                      const std::optional<Tensor>& grad_z, const Tensor& y, const Tensor& y_mean,
                                      const std::optional<Tensor>& z, const Tensor& x, const Tensor& weight,
                                      const std::optional<Tensor>& norm, const std::optional<Tensor>& residual,
                                      const std::optional<Tensor>& residual_norm, const std::string& activation,
                                      int64_t stride, int64_t padding, int64_t replicate, bool has_residual,
                                      bool need_input, bool need_weight) {
  const bool materialized = z.has_value();
  STD_TORCH_CHECK(materialized == grad_z.has_value(), "grad_z: expected with z");
  STD_TORCH_CHECK(materialized || !(has_residual || residual.has_value()), "residual: expected none without z");
  STD_TORCH_CHECK(has_residual || !residual_norm.has_value(), "has_residual: expected true with residual_norm");
  STD_TORCH_CHECK(x.dim() == 5, "x: expected 5 dimensions");
  if (materialized) check_materialize(weight, norm.has_value());
  return by_kind(weight, [&](auto kind) -> Gradients {
    using Kind = decltype(kind);
    const Geometry g = check_backward<Kind>(grad_y, x.size(4), x.size(2), x.size(3), kernel_size_of<Kind>(weight),
                                            stride, padding, replicate);
    check_input(x, g, grad_y);
    check_weight<Kind>(weight, g, grad_y);
    if (materialized) {
      check_like("z", *z, x);
      check_like("grad_z", *grad_z, x);
    }
    const OutputGradientArguments output(grad_y, grad_mean, grad_var, y, y_mean);
    const NormalizationArguments arguments(norm, activation, x);
    const ResidualArguments added(residual, residual_norm, x);
    const Normalization& normalization = arguments.normalization;
    const Device device(x);
    // An op's results must not share memory, not even where they are empty.
    const auto none = [&] { return torch::stable::new_empty(x, {0}); };
    const auto no_norm = [&] { return torch::stable::new_empty(x, {0}, ScalarType::Float); };
    Tensor grad_x = none(), grad_weight = none(), grad_norm = no_norm(), grad_residual = none();
    Tensor grad_residual_norm = no_norm();
    if (need_input && materialized) {
      const SumResults results(device, g, output, weight, x, *z, *grad_z, normalization, added, has_residual);
      grad_x = results.grad_x, grad_norm = results.grad_norm;
      grad_residual = results.grad_residual, grad_residual_norm = results.grad_residual_norm;
    } else if (need_input && norm.has_value()) {
      ChannelReduction sums(x, g.parents, g.in_channels);
      grad_x = input_gradient<Kind>(device, g, output, weight, x, normalization, &sums);
      grad_norm = combine_norm_gradient(device, sums, normalization.scale);
    } else if (need_input) {
      grad_x = input_gradient<Kind>(device, g, output, weight);
    }
    if (need_weight) {
      grad_weight = materialized ? weight_gradient<Kind>(device, g, output, *z)
                                 : weight_gradient<Kind>(device, g, output, x, normalization);
    }
    return {grad_x, grad_weight, grad_norm, grad_residual, grad_residual_norm};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) {
  m.impl("branch_norm_conv2d", TORCH_BOX(&branch_norm_conv2d));
  m.impl("branch_norm_conv2d_backward", TORCH_BOX(&branch_norm_conv2d_backward));
}

}  // namespace hne
