// End of a residual block: normalisation by given statistics, residual sum and activation, in one pass.
//
//   G branches, M pixels, C channels   bytes moved at least                     operations
//   forward                            x + residual + y                         5 G M C
//   backward                           grad + x + y + grad_x + grad_residual    6 G M C
#include "normalization.h"

namespace hne {
namespace {

template <typename T, int width>
__global__ void __launch_bounds__(kThreads, 4)
    normalize(const RowPartition<width> partition, const Normalization normalization, const T* x, const T* residual,
              T* y) {
  const auto work = partition.work();
  if (!work.inside) return;
  const Affine<width> affine = normalization.at<width>(work.place.branch, work.channel);
  for (int row = work.begin; row < work.end; row += work.step) {
    const int64_t at = (int64_t(work.place.branch) * partition.rows + row) * partition.channels + work.channel;
    float values[width], added[width] = {};
    load<width>(values, x + at);
    if (residual != nullptr) load<width>(added, residual + at);
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = clamp(affine(i, values[i]) + added[i], normalization.range);
    store<width>(y + at, values);
  }
}

template <typename T>
struct Gradient {
  const T *grad, *x, *y;
  const float *mean, *scale;
  Clamp<float> range;
  T *grad_x, *grad_residual;  // grad_residual: null without an activation, since it then equals grad
};

template <typename T, int width>
__global__ void __launch_bounds__(kThreads, 2)
    normalize_backward(const RowPartition<width> partition, const Gradient<T> d, const Partials partials) {
  const auto work = partition.work();
  float mean[width] = {}, scale[width] = {};
  if (work.inside) {
    const int64_t from = int64_t(work.place.branch) * partition.channels + work.channel;
    load<width>(mean, d.mean + from);
    load<width>(scale, d.scale + from);
  }
  Pair<width> sums;  // gradients of scale and shift
  for (int row = work.begin; row < work.end; row += work.step) {
    const int64_t at = (int64_t(work.place.branch) * partition.rows + row) * partition.channels + work.channel;
    float g[width], x[width];
    load<width>(g, d.grad + at);
    load<width>(x, d.x + at);
    if (d.grad_residual != nullptr) {
      float y[width];
      load<width>(y, d.y + at);
#pragma unroll
      for (int i = 0; i < width; ++i) g[i] = clamp_gradient(g[i], y[i], d.range);
      store<width>(d.grad_residual + at, g);
    }
#pragma unroll
    for (int i = 0; i < width; ++i) {
      sums.first[i] += g[i] * (x[i] - mean[i]);
      sums.second[i] += g[i];
      g[i] *= scale[i];
    }
    store<width>(d.grad_x + at, g);
  }
  sums.put(partials, work.place, static_cast<float*>(shared_memory()), partition.across);
}

int64_t pixels(const Tensor& x) { return x.size(1) * x.size(2) * x.size(3); }

void check(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 5, "x: expected 5 dimensions");
  check_kind("x", x, x);
  check_sizes(x.size(0), pixels(x), x.size(4));
}

Tensor branch_normalize(const Tensor& x_in, const Tensor& norm, const std::optional<Tensor>& residual_in,
                        const std::string& activation) {
  check(x_in);
  if (residual_in.has_value()) check_like("residual", *residual_in, x_in);
  const Device device(x_in);
  const NormalizationArguments arguments(norm, activation, x_in);
  const Normalization& n = arguments.normalization;
  const Tensor x = torch::stable::contiguous(x_in);
  const std::optional<Tensor> residual = contiguous(residual_in);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const bool vectors =
        whole_vectors<T>({x.size(4)}, {data<T>(x), data<T>(residual), data<T>(y), n.mean, n.scale, n.shift});
    dispatch_width<T>(vectors, [&](auto width) {
      constexpr int w = decltype(width)::value;
      const RowPartition<w> partition(x.size(0), pixels(x), x.size(4));
      device.launch(normalize<T, w>, partition.blocks(), kThreads, 0, partition, n, data<T>(x), data<T>(residual),
                    mutable_data<T>(y));
    });
  });
  return y;
}

// The gradient of the residual is empty without an activation, since it then equals grad.
std::tuple<Tensor, Tensor, Tensor> branch_normalize_backward(const Tensor& grad_in, const Tensor& x_in,
                                                             const Tensor& y_in, const Tensor& norm,
                                                             const std::string& activation) {
  check(x_in);
  check_like("grad", grad_in, x_in);
  check_like("y", y_in, x_in);
  const Device device(x_in);
  const NormalizationArguments arguments(norm, activation, x_in);
  const Normalization& n = arguments.normalization;
  const Tensor grad = torch::stable::contiguous(grad_in), x = torch::stable::contiguous(x_in);
  const Tensor y = torch::stable::contiguous(y_in);
  const bool activates = n.range.active();
  Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  Tensor grad_residual = activates ? torch::stable::new_empty(x, x.sizes()) : torch::stable::new_empty(x, {0});
  ChannelReduction sums(x, x.size(0), x.size(4));  // gradients of scale and shift
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const Gradient<T> d{data<T>(grad),
                        data<T>(x),
                        data<T>(y),
                        n.mean,
                        n.scale,
                        n.range,
                        mutable_data<T>(grad_x),
                        activates ? mutable_data<T>(grad_residual) : nullptr};
    const bool vectors = whole_vectors<T>({x.size(4)}, {d.grad, d.x, d.y, d.mean, d.scale, d.grad_x, d.grad_residual});
    dispatch_width<T>(vectors, [&](auto width) {
      constexpr int w = decltype(width)::value;
      const RowPartition<w> partition(x.size(0), pixels(x), x.size(4));
      device.launch(normalize_backward<T, w>, partition.blocks(), kThreads, RowPartition<w>::kScratch, partition, d,
                    sums.allocate(Pair<w>::kPlanes, partition.splits()));
    });
  });
  return {grad_x, combine_norm_gradient(device, sums, n.scale), grad_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) {
  m.impl("branch_normalize", TORCH_BOX(&branch_normalize));
  m.impl("branch_normalize_backward", TORCH_BOX(&branch_normalize_backward));
}

}  // namespace hne
