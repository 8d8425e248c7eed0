// End of a residual block: normalisation by given statistics, residual sum and activation, in one pass; and its
// gradient. normalized_sum.h lists bytes and operations.
#include "normalized_sum.h"

namespace hne {
namespace {

template <typename T>
struct Operands {
  Normalization normalization;
  const T *x, *residual;
  ChannelAffine residual_normalization;
  T* z;

  bool vectors() const {
    return whole_vectors<T>({normalization.channels}, {x, residual, z}) && normalization.vectors() &&
           residual_normalization.vectors();
  }
};

// `normalized`: the residual has a normalisation. Its vectors take registers, so that fewer threads fit.
template <typename T, int width, bool normalized>
__global__ void __launch_bounds__(kThreads, normalized ? 3 : 4)
    normalize(const RowPartition<width> partition, const Operands<T> d) {
  const auto work = partition.work();
  if (!work.inside) return;
  Affine<width> affine = d.normalization.template at<width>(work.place.branch, work.channel);
  Slope<width> added_slope;
  if constexpr (normalized) {
    const Affine<width> of_added = d.residual_normalization.template at<width>(work.place.branch, work.channel);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      added_slope.mean[i] = of_added.mean[i], added_slope.scale[i] = of_added.scale[i];
      affine.shift[i] += of_added.shift[i];
    }
  }
  for (int row = work.begin; row < work.end; row += work.step) {
    const int64_t at = (int64_t(work.place.branch) * partition.rows + row) * partition.channels + work.channel;
    float values[width], added[width] = {};
    load<width>(values, d.x + at);
    if (normalized || d.residual != nullptr) load<width>(added, d.residual + at);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      if constexpr (normalized) added[i] = (added[i] - added_slope.mean[i]) * added_slope.scale[i];
      values[i] = clamp(affine(i, values[i]) + added[i], d.normalization.range);
    }
    store<width>(d.z + at, values);
  }
}

template <typename T, int width, bool normalized>
__global__ void __launch_bounds__(kThreads, 2)
    normalize_backward(const RowPartition<width> partition, const NormalizedSum<T> d, const T* grad,
                       const Partials partials, const Partials residual_partials) {
  const auto work = partition.work();
  Slope<width> of_x = {}, of_residual = {};
  if (work.inside) {
    of_x = Slope<width>::at(d.normalization, work.place.branch, work.channel);
    if constexpr (normalized) of_residual = Slope<width>::at(d.residual_normalization, work.place.branch, work.channel);
  }
  SumGradients<width, normalized> sums;
  for (int row = work.begin; row < work.end; row += work.step) {
    const int64_t at = (int64_t(work.place.branch) * partition.rows + row) * partition.channels + work.channel;
    float gradient[width];
    load<width>(gradient, grad + at);
    d.backward(of_x, of_residual, at, gradient, sums);
  }
  sums.put(partials, residual_partials, work.place, static_cast<float*>(shared_memory()), partition.across);
}

int64_t pixels(const Tensor& x) { return x.size(1) * x.size(2) * x.size(3); }

void check(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 5, "x: expected 5 dimensions");
  check_kind("x", x, x);
  check_sizes(x.size(0), pixels(x), x.size(4));
}

// f(width, normalized)
template <typename T, typename F>
void by_kind(bool vectors, bool normalized, const F& f) {
  dispatch_width<T>(vectors, [&](auto width) {
    if (normalized)
      f(width, std::true_type{});
    else
      f(width, std::false_type{});
  });
}

Tensor branch_normalize(const Tensor& x, const Tensor& norm, const std::optional<Tensor>& residual,
                        const std::optional<Tensor>& residual_norm, const std::string& activation) {
  check(x);
  const ResidualArguments added(residual, residual_norm, x);
  const NormalizationArguments arguments(norm, activation, x);
  return normalize_sum(Device(x), torch::stable::contiguous(x), arguments.normalization, added);
}

// The gradient of a residual without a normalisation is empty without an activation, since it then equals grad. The
// residual is only given together with its normalisation.
std::tuple<Tensor, Tensor, Tensor, Tensor> branch_normalize_backward(const Tensor& grad_in, const Tensor& x_in,
                                                                     const Tensor& y_in, const Tensor& norm,
                                                                     const std::optional<Tensor>& residual,
                                                                     const std::optional<Tensor>& residual_norm,
                                                                     const std::string& activation, bool has_residual) {
  check(x_in);
  check_like("grad", grad_in, x_in);
  check_like("y", y_in, x_in);
  const Device device(x_in);
  const ResidualArguments added(residual, residual_norm, x_in);
  const NormalizationArguments arguments(norm, activation, x_in);
  const Normalization& n = arguments.normalization;
  const bool normalized = added.normalization.present();
  STD_TORCH_CHECK(has_residual || !normalized, "has_residual: expected true with residual_norm");
  const Tensor grad = torch::stable::contiguous(grad_in), x = torch::stable::contiguous(x_in);
  const Tensor y = torch::stable::contiguous(y_in);
  const bool writes_residual = has_residual && (n.range.active() || normalized);
  Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  Tensor grad_residual = writes_residual ? torch::stable::new_empty(x, x.sizes()) : torch::stable::new_empty(x, {0});
  ChannelReduction sums(x, x.size(0), x.size(4)), residual_sums(x, x.size(0), x.size(4));
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const NormalizedSum<T> d{.normalization = n,
                             .x = data<T>(x),
                             .z = n.range.active() ? data<T>(y) : nullptr,
                             .residual = data<T>(added.values),
                             .residual_normalization = added.normalization,
                             .grad_x = mutable_data<T>(grad_x),
                             .grad_residual = writes_residual ? mutable_data<T>(grad_residual) : nullptr};
    by_kind<T>(d.vectors() && aligned(data<T>(grad)), normalized, [&](auto width, auto kind) {
      constexpr int w = decltype(width)::value;
      constexpr bool k = decltype(kind)::value;
      const RowPartition<w> partition(x.size(0), pixels(x), x.size(4));
      const Partials partials = sums.allocate(Pair<w>::kPlanes, partition.splits());
      const Partials residual_partials = k ? residual_sums.allocate(Pair<w>::kPlanes, partition.splits()) : Partials{};
      device.launch(normalize_backward<T, w, k>, partition.blocks(), kThreads, RowPartition<w>::kScratch, partition, d,
                    data<T>(grad), partials, residual_partials);
    });
  });
  const Tensor grad_norm = combine_norm_gradient(device, sums, n.scale);
  const Tensor grad_residual_norm = normalized ? combine_norm_gradient(device, residual_sums, added.normalization.scale)
                                               : torch::stable::new_empty(x, {0}, ScalarType::Float);
  return {grad_x, grad_norm, grad_residual, grad_residual_norm};
}

}  // namespace

Tensor normalize_sum(const Device& device, const Tensor& x, const Normalization& normalization,
                     const ResidualArguments& residual) {
  Tensor z = torch::stable::new_empty(x, x.sizes());
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const Operands<T> d{normalization, data<T>(x), data<T>(residual.values), residual.normalization,
                        mutable_data<T>(z)};
    by_kind<T>(d.vectors(), residual.normalization.present(), [&](auto width, auto kind) {
      constexpr int w = decltype(width)::value;
      const RowPartition<w> partition(x.size(0), pixels(x), x.size(4));
      device.launch(normalize<T, w, decltype(kind)::value>, partition.blocks(), kThreads, 0, partition, d);
    });
  });
  return z;
}

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) {
  m.impl("branch_normalize", TORCH_BOX(&branch_normalize));
  m.impl("branch_normalize_backward", TORCH_BOX(&branch_normalize_backward));
}

}  // namespace hne
