// Mean logits of nested ensembles, in one pass over the members.
//
//   N members, P ensembles, V = batch * classes   bytes moved at least   operations
//                                                 (N + P) V values       (N + P) V
#pragma once

#include "op.h"

namespace hne {

constexpr int kMostSizes = 256;

// Ensemble sizes, passed by value to kernels: no copy to the device, no memory to keep alive.
struct Sizes {
  int count;
  int sizes[kMostSizes];

  Sizes(const std::vector<int64_t>& from, int64_t models) : count(int(from.size())) {
    check_prefix_sizes(from, models);
    STD_TORCH_CHECK(from.size() <= kMostSizes && models <= INT32_MAX, "sizes: expected at most ", kMostSizes);
    std::copy(from.begin(), from.end(), sizes);
  }
};

// out[p] = mean of the first sizes[p] members, each of `values` values.
template <typename T, int width>
__global__ void __launch_bounds__(kThreads)
    prefix_means(const T* member, T* out, const int64_t values, const Sizes sizes) {
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * width;
  if (at >= values) return;
  float sum[width] = {};
  for (int n = 0, p = 0; p < sizes.count; ++n) {
    float value[width];
    load<width>(value, member + n * values + at);
#pragma unroll
    for (int i = 0; i < width; ++i) sum[i] += value[i];
    if (sizes.sizes[p] != n + 1) continue;
#pragma unroll
    for (int i = 0; i < width; ++i) value[i] = sum[i] / float(n + 1);
    store<width>(out + p++ * values + at, value);
  }
}

template <typename T>
void run_prefix_means(const Device& device, const Tensor& member, const Tensor& out, const Sizes& sizes) {
  const int64_t values = member.size(1) * member.size(2);
  dispatch_width<T>(whole_vectors<T>({values}, {data<T>(member), data<T>(out)}), [&](auto vector) {
    constexpr int w = decltype(vector)::value;
    device.launch(prefix_means<T, w>, ceil_div(values / w, kThreads), kThreads, 0, data<T>(member),
                  mutable_data<T>(out), values, sizes);
  });
}

}  // namespace hne
