// Mean logits of the first n members, and their gradient.
//
//   N members, P ensembles, V = batch * classes   bytes moved at least   operations
//   forward, backward                             (N + P) V values       (N + P) V
#include "prefix.h"

namespace hne {
namespace {

Tensor prefix_mean(const Tensor& logits_in, const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(logits_in.dim() == 3, "logits: expected 3 dimensions");
  check_kind("logits", logits_in, logits_in);
  const Sizes checked(sizes, logits_in.size(0));
  const Device device(logits_in);
  const Tensor logits = torch::stable::contiguous(logits_in);
  Tensor out = torch::stable::new_empty(logits, {int64_t(sizes.size()), logits.size(1), logits.size(2)});
  dispatch(logits, [&](auto type) { run_prefix_means<decltype(type)>(device, logits, out, checked); });
  return out;
}

// A member's gradient is the sum over the ensembles that contain it: add up from the last member down. Launched early
// (device.h).
template <typename T, int width>
__global__ void __launch_bounds__(kMeanThreads)
    prefix_means_backward(const T* grad, T* out, const int64_t values, const int models, const Sizes sizes) {
  const int64_t at = (int64_t(blockIdx.x) * kMeanThreads + threadIdx.x) * width;
  wait_for_previous_kernel();
  launch_next_kernel();
  if (at >= values) return;
  float sum[width] = {};
  int p = sizes.count - 1;
  for (int n = models - 1; n >= 0; --n) {
    if (p >= 0 && sizes.sizes[p] == n + 1) {
      float value[width];
      load<width>(value, grad + p-- * values + at);
#pragma unroll
      for (int i = 0; i < width; ++i) sum[i] += value[i] / float(n + 1);
    }
    store<width>(out + n * values + at, sum);
  }
}

Tensor prefix_mean_backward(const Tensor& grad_in, const std::vector<int64_t>& sizes, int64_t models) {
  STD_TORCH_CHECK(grad_in.dim() == 3 && grad_in.size(0) == int64_t(sizes.size()),
                  "grad: expected one ensemble per size");
  check_kind("grad", grad_in, grad_in);
  const Sizes checked(sizes, models);
  const Device device(grad_in);
  const Tensor grad = torch::stable::contiguous(grad_in);
  const int64_t values = grad.size(1) * grad.size(2);
  Tensor out = torch::stable::new_empty(grad, {models, grad.size(1), grad.size(2)});
  dispatch(grad, [&](auto type) {
    using T = decltype(type);
    dispatch_width<T>(whole_vectors<T>({values}, {data<T>(grad), data<T>(out)}), [&](auto vector) {
      constexpr int w = decltype(vector)::value;
      device.launch_early(prefix_means_backward<T, w>, ceil_div(values / w, kMeanThreads), kMeanThreads, 0,
                          data<T>(grad), mutable_data<T>(out), values, int(models), checked);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) {
  m.impl("prefix_mean", TORCH_BOX(&prefix_mean));
  m.impl("prefix_mean_backward", TORCH_BOX(&prefix_mean_backward));
}

}  // namespace hne
