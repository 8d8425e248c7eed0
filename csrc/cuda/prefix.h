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

constexpr int kMeanThreads = 64;  // small blocks: the logits of a batch are few

// out[p] = mean of the first sizes[p] members, each of `values` values. Launched early (device.h).
template <typename T, int width>
__global__ void __launch_bounds__(kMeanThreads)
    prefix_means(const T* member, T* out, const int64_t values, const Sizes sizes) {
  constexpr int kAhead = 8;  // members that are loaded together: one latency instead of eight
  const int64_t at = (int64_t(blockIdx.x) * kMeanThreads + threadIdx.x) * width;
  wait_for_previous_kernel();
  launch_next_kernel();
  if (at >= values) return;
  const int models = sizes.count > 0 ? sizes.sizes[sizes.count - 1] : 0;
  float sum[width] = {};
  for (int first = 0, p = 0; first < models; first += kAhead) {
    Vector<T, width> loaded[kAhead] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (first + i < models)
        loaded[i] = *reinterpret_cast<const Vector<T, width>*>(member + (first + i) * values + at);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int n = first + i + 1;
#pragma unroll
      for (int j = 0; j < width; ++j) sum[j] += float(loaded[i].values[j]);
      if (n > models || sizes.sizes[p] != n) continue;
      float mean[width];
#pragma unroll
      for (int j = 0; j < width; ++j) mean[j] = sum[j] / float(n);
      store<width>(out + p++ * values + at, mean);
    }
  }
}

template <typename T>
void run_prefix_means(const Device& device, const Tensor& member, const Tensor& out, const Sizes& sizes) {
  const int64_t values = member.size(1) * member.size(2);
  dispatch_width<T>(whole_vectors<T>({values}, {data<T>(member), data<T>(out)}), [&](auto vector) {
    constexpr int w = decltype(vector)::value;
    device.launch_early(prefix_means<T, w>, ceil_div(values / w, kMeanThreads), kMeanThreads, 0, data<T>(member),
                        mutable_data<T>(out), values, sizes);
  });
}

}  // namespace hne
