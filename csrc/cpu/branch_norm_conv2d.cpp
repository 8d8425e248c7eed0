// A convolution between two batch norms, dense or depthwise: it normalises its input where it reads it, and gives the
// batch statistics of its output. Backward, the gradients of output and statistics are added where they are read.
#include "branch_conv2d.h"
#include "branch_depthwise_conv2d.h"
#include "conv_norm.h"

namespace hne {
namespace {

struct Dense {
  static Geometry geometry(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding, int64_t replicate) {
    const Geometry g = forward_geometry(x, weight.size(0), weight.size(1), weight.size(3), stride, padding, replicate);
    check_shape("weight", weight, {g.branches, g.out_channels, g.in_channels, g.kernel_size, g.kernel_size});
    return g;
  }
  // Rows that are written at once, of a feature map of this many pixels.
  static int64_t block_rows(int64_t) { return kBlockRows; }
  static bool keeps_features(const Geometry& g, const Tensor& x) {
    return g.kernel_size == 1 && keeps_bfloat16(x, {g.in_channels, g.out_channels});
  }

  template <typename T>
  static void forward(const Geometry& g, const PrologueInput<T>& x, const Tensor& weight, T* out,
                      const RowsWritten& written) {
    convolve<T>(g, x, weight, nullptr, out, written);
  }
  template <typename T>
  static void backward(const Geometry& g, const PrologueInput<T>& grad, const PrologueInput<T>& x, const Tensor& weight,
                       T* grad_x, const Tensor* grad_weight, const RowsWritten& written) {
    convolve_backward(g, grad, x, weight, grad_x, grad_weight, written);
  }
};

struct Depthwise {
  static Geometry geometry(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding, int64_t replicate) {
    const Geometry g = forward_geometry(x, weight.size(0), weight.size(1), weight.size(2), stride, padding, replicate);
    check_shape("weight", weight, {g.branches, g.in_channels, g.kernel_size, g.kernel_size});
    return g;
  }
  static int64_t block_rows(int64_t pixels) { return std::max<int64_t>(pixels, 1); }
  static bool keeps_features(const Geometry& g, const Tensor& x) { return keeps_depthwise(g, x); }

  template <typename T>
  static void forward(const Geometry& g, const PrologueInput<T>& x, const Tensor& weight, T* out,
                      const RowsWritten& written) {
    filter<T>(g, x, weight, nullptr, out, written);
  }
  template <typename T>
  static void backward(const Geometry& g, const PrologueInput<T>& grad, const PrologueInput<T>& x, const Tensor& weight,
                       T* grad_x, const Tensor* grad_weight, const RowsWritten& written) {
    filter_backward(g, grad, x, weight, grad_x, grad_weight, written);
  }
};

// f(Dense{}) or f(Depthwise{}), by the dimensions of the weight.
template <typename F>
auto by_kind(const Tensor& weight, const F& f) {
  STD_TORCH_CHECK(weight.dim() == 5 || weight.dim() == 4, "weight: expected 5 (dense) or 4 (depthwise) dimensions");
  return weight.dim() == 5 ? f(Dense{}) : f(Depthwise{});
}

void check_like(const char* name, const Tensor& t, const Tensor& x) {
  const auto sizes = x.sizes();
  check_shape(name, t, {sizes.begin(), sizes.end()});
  check_kind(name, t, x);
}

void check_materialize(const Tensor& weight, bool normalized) {
  STD_TORCH_CHECK(normalized && weight.dim() == 5, "materialize: expected a normalisation and a dense convolution");
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// y, its mean and variance, and z, the normalised input, which is empty unless it is to be materialised.
template <typename Convolution>
Results forward(const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& norm,
                const std::optional<Tensor>& residual_in, const std::optional<Tensor>& residual_norm,
                const std::string& activation, int64_t stride, int64_t padding, int64_t replicate, bool materialize) {
  const Normalization normalization("norm", x_in, norm, activation);
  check_kind("x", x_in, x_in);
  check_kind("weight", weight_in, x_in);
  const Geometry g = Convolution::geometry(x_in, weight_in, stride, padding, replicate);
  if (materialize) check_materialize(weight_in, norm.has_value());
  STD_TORCH_CHECK(materialize || !residual_in.has_value(), "residual: expected none unless z is materialised");
  const bool kept = Convolution::keeps_features(g, x_in);
  const Residual residual(residual_in, residual_norm, x_in, kept);
  const Tensor x = read_features(x_in, kept), weight = contiguous_filters(widen(weight_in));
  const Tensor y = empty(x, g.out_shape()), z = materialize ? empty(x, x_in.sizes()) : empty(x, {0});
  const auto [mean, var] = dispatch_features(x, [&](auto type) {
    using T = decltype(type);
    PrologueInput<T> input = normalization.input<T>(x);
    residual.add_to(input);
    if (materialize && g.pointwise() && g.replicate == 1) {  // the convolution reads a row once, and may store it
      input.store = mutable_data<T>(z);
    } else if (materialize) {
      input.write(g.parents, mutable_data<T>(z));
      input = {data<T>(z), input.rows, input.channels};
    }
    return statistics<T>(g, y, Convolution::block_rows(g.out_pixels()), [&](const RowsWritten& written) {
      Convolution::forward(g, input, weight, mutable_data<T>(y), written);
    });
  });
  const ScalarType dtype = x_in.scalar_type();
  return {round_to(y, dtype), mean, var, round_to(z, dtype)};
}

// Gradients of x, weight, norm, residual and residual_norm. `need_input` is for all but the weight. The residual is
// only given together with its normalisation.
template <typename Convolution>
Gradients backward(const Tensor& grad_y, const Tensor& grad_mean, const Tensor& grad_var,
                   const std::optional<Tensor>& grad_z_in, const Tensor& y_in, const Tensor& y_mean,
                   const std::optional<Tensor>& z_in, const Tensor& x_in, const Tensor& weight_in,
                   const std::optional<Tensor>& norm, const std::optional<Tensor>& residual_in,
                   const std::optional<Tensor>& residual_norm, const std::string& activation, int64_t stride,
                   int64_t padding, int64_t replicate, bool has_residual, bool need_input, bool need_weight) {
  const Normalization normalization("norm", x_in, norm, activation);
  check_kind("x", x_in, y_in);
  check_kind("weight", weight_in, x_in);
  const Geometry g = Convolution::geometry(x_in, weight_in, stride, padding, replicate);
  const bool kept = Convolution::keeps_features(g, x_in);
  const OutputGradient output(grad_y, grad_mean, grad_var, y_in, y_mean, kept);
  check_shape("y", y_in, g.out_shape());
  const bool materialized = z_in.has_value();
  STD_TORCH_CHECK(materialized == grad_z_in.has_value(), "grad_z: expected with z");
  STD_TORCH_CHECK(materialized || !(has_residual || residual_in.has_value()), "residual: expected none without z");
  STD_TORCH_CHECK(has_residual || !residual_norm.has_value(), "has_residual: expected true with residual_norm");
  const Residual residual(residual_in, residual_norm, x_in, kept);
  if (materialized) {
    check_materialize(weight_in, norm.has_value());
    check_like("z", *z_in, x_in);
    check_like("grad_z", *grad_z_in, x_in);
  }
  const Tensor weight = contiguous_filters(widen(weight_in)), x = read_features(x_in, kept);
  const std::optional<Tensor> z = read_features(z_in, kept), grad_z = read_features(grad_z_in, kept);
  const bool need_norm = need_input && norm.has_value();
  const Tensor grad_x = need_input ? empty(x, x_in.sizes()) : empty(x, {0});
  const Tensor grad_weight = need_weight ? empty(weight, weight_in.sizes()) : empty(weight, {0});
  const Tensor grad_norm = need_norm ? empty(*norm, norm->sizes()) : empty(y_mean, {0});
  const Tensor grad_residual = need_input && has_residual ? empty(x, x_in.sizes()) : empty(x, {0});
  const bool need_residual_norm = need_input && residual.norm.has_value();
  const Tensor grad_residual_norm = need_residual_norm ? empty(*norm, norm->sizes()) : empty(y_mean, {0});
  dispatch_features(x, [&](auto type) {
    using T = decltype(type);
    PrologueInput<T> input = normalization.input<T>(x);
    residual.add_to(input);
    const Tensor* const to_weight = need_weight ? &grad_weight : nullptr;
    T* const to_x = need_input ? mutable_data<T>(grad_x) : nullptr;
    T* const to_residual = need_input && has_residual ? mutable_data<T>(grad_residual) : nullptr;
    // The gradient of the convolution's input, until it is taken back through the normalisation.
    T* const to_input = to_residual != nullptr ? to_residual : to_x;
    const int64_t block = Convolution::block_rows(g.pixels());
    const int64_t blocks = ceil_div(input.rows, block);
    ChannelSums<T> sums(g.parents, need_norm ? blocks : 0, g.in_channels);
    ChannelSums<T> residual_sums(g.parents, need_residual_norm ? blocks : 0, g.in_channels);
    const T* const add_after = g.pointwise() ? nullptr : data<T>(grad_z);  // else the product adds it
    const auto normalize_backward = [&](int64_t branch, int64_t first, int64_t count) {
      const int64_t at = (branch * input.rows + first) * g.in_channels;
      if (add_after != nullptr)
        kernels<T>().add_scaled(to_input + at, add_after + at, Sum<T>(1), count * g.in_channels);
      NormRows<T> r = input.norm(branch, first, count);
      r.grad = to_input + at, r.y = materialized ? data<T>(*z) + at : nullptr;
      r.out = to_x + at, r.out_masked = to_residual != nullptr ? to_residual + at : nullptr;
      sums.add(branch, first / block, r, kernels<T>().normalize_backward);
      if (!need_residual_norm) return;
      r = input.added_norm(branch, first, count);
      r.grad = to_residual + at, r.out = to_residual + at;
      residual_sums.add(branch, first / block, r, kernels<T>().normalize_backward);
    };
    const RowsWritten written = need_norm ? RowsWritten(normalize_backward) : RowsWritten();
    const PrologueInput<T> stored{data<T>(z), input.rows, g.in_channels};
    if (materialized && g.pointwise()) {
      pointwise_backward(g, output.input<T>(), stored, weight, data<T>(grad_z), to_input, to_weight, written);
    } else {
      const PrologueInput<T>& source = materialized ? stored : input;
      Convolution::backward(g, output.input<T>(), source, weight, to_input, to_weight, written);
    }
    if (need_norm) sums.finish_norm(*normalization.norm, grad_norm);
    if (need_residual_norm) residual_sums.finish_norm(*residual.norm, grad_residual_norm);
  });
  const ScalarType dtype = x_in.scalar_type();
  return {round_to(grad_x, dtype), round_to(grad_weight, dtype), grad_norm, round_to(grad_residual, dtype),
          grad_residual_norm};
}

Results branch_norm_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& norm,
                           const std::optional<Tensor>& residual, const std::optional<Tensor>& residual_norm,
                           const std::string& activation, int64_t stride, int64_t padding, int64_t replicate,
                           bool materialize) {
  return by_kind(weight, [&](auto kind) {
    return forward<decltype(kind)>(x, weight, norm, residual, residual_norm, activation, stride, padding, replicate,
                                   materialize);
  });
}

Gradients branch_norm_conv2d_backward(const Tensor& grad_y, const Tensor& grad_mean, const Tensor& grad_var,
                                      const std::optional<Tensor>& grad_z, const Tensor& y, const Tensor& y_mean,
                                      const std::optional<Tensor>& z, const Tensor& x, const Tensor& weight,
                                      const std::optional<Tensor>& norm, const std::optional<Tensor>& residual,
                                      const std::optional<Tensor>& residual_norm, const std::string& activation,
                                      int64_t stride, int64_t padding, int64_t replicate, bool has_residual,
                                      bool need_input, bool need_weight) {
  return by_kind(weight, [&](auto kind) {
    return backward<decltype(kind)>(grad_y, grad_mean, grad_var, grad_z, y, y_mean, z, x, weight, norm, residual,
                                    residual_norm, activation, stride, padding, replicate, has_residual, need_input,
                                    need_weight);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) {
  m.impl("branch_norm_conv2d", TORCH_BOX(&branch_norm_conv2d));
  m.impl("branch_norm_conv2d_backward", TORCH_BOX(&branch_norm_conv2d_backward));
}

}  // namespace hne
