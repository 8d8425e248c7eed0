// Means over the first members of an ensemble, and their gradient, in one pass over the logits.
#include "prefix.h"

namespace hne {
namespace {

constexpr int64_t kValues = 2048;  // values of one member per task

Tensor prefix_mean(const Tensor& logits_in, const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(logits_in.dim() == 3, "logits: expected 3 dimensions");
  check_kind("logits", logits_in, logits_in);
  const int64_t models = logits_in.size(0), values = logits_in.size(1) * logits_in.size(2);
  check_prefix_sizes(sizes, models);
  const Tensor logits = torch::stable::contiguous(widen(logits_in));
  Tensor out = empty(logits, {int64_t(sizes.size()), logits_in.size(1), logits_in.size(2)});
  dispatch(logits, [&](auto type) {
    using T = decltype(type);
    const auto compute = [&](int64_t task) {
      const int64_t first = task * kValues, count = std::min(kValues, values - first);
      prefix_means(data<T>(logits) + first, values, models, sizes, scratch<T>(0, count), count,
                   mutable_data<T>(out) + first, values);
    };
    parallel_tasks(ceil_div(values, kValues), compute, ThreadTeam::Helpers::of_library);  // after fused_layers
  });
  return round_to(out, logits_in.scalar_type());
}

Tensor prefix_mean_backward(const Tensor& grad_in, const std::vector<int64_t>& sizes, int64_t models) {
  STD_TORCH_CHECK(grad_in.dim() == 3 && grad_in.size(0) == int64_t(sizes.size()),
                  "grad: expected one ensemble per size");
  check_kind("grad", grad_in, grad_in);
  check_prefix_sizes(sizes, models);
  const Tensor grad = torch::stable::contiguous(widen(grad_in));
  const int64_t values = grad_in.size(1) * grad_in.size(2);
  Tensor out = empty(grad, {models, grad_in.size(1), grad_in.size(2)});
  dispatch(grad, [&](auto type) {
    using T = decltype(type);
    parallel_tasks(ceil_div(values, kValues), [&](int64_t task) {
      const int64_t first = task * kValues, count = std::min(kValues, values - first);
      T* sum = scratch<T>(0, count);
      std::fill(sum, sum + count, T(0));
      int64_t p = int64_t(sizes.size()) - 1;
      // From the last member to the first: `sum` holds the gradient of all ensembles that contain member n.
      for (int64_t n = models - 1; n >= 0; --n) {
        if (p >= 0 && sizes[p] == n + 1) {
          kernels<T>().add_scaled(sum, data<T>(grad) + p * values + first, T(1) / T(n + 1), count);
          --p;
        }
        std::copy(sum, sum + count, mutable_data<T>(out) + n * values + first);
      }
    });
  });
  return round_to(out, grad_in.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) {
  m.impl("prefix_mean", TORCH_BOX(&prefix_mean));
  m.impl("prefix_mean_backward", TORCH_BOX(&prefix_mean_backward));
}

}  // namespace hne
