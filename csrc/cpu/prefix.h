// Means over the first members of an ensemble.
#pragma once

#include "op.h"

namespace hne {

// means[p] = mean of the first sizes[p] members, for `count` values of each member. Members lie member_stride apart,
// means mean_stride apart; `sum` [count] holds the running sum.
template <typename T>
void prefix_means(const T* member, int64_t member_stride, int64_t models, const std::vector<int64_t>& sizes, T* sum,
                  int64_t count, T* means, int64_t mean_stride) {
  std::fill(sum, sum + count, T(0));
  size_t p = 0;
  for (int64_t n = 0; n < models && p < sizes.size(); ++n) {
    kernels<T>().add_scaled(sum, member + n * member_stride, T(1), count);
    if (sizes[p] == n + 1) kernels<T>().store_scaled(means + p++ * mean_stride, sum, T(1) / T(n + 1), count);
  }
}

}  // namespace hne
