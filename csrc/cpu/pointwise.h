// Pointwise convolutions as products of rows of channels with one matrix per branch.
#pragma once

#include "branch_conv2d.h"

namespace hne {

// The sizes of a pointwise convolution of x, and of a second one that may follow it.
struct PointwiseSizes {
  int64_t branches, rows, in, out, next;  // next: output channels of the second convolution, 0 without one
  std::vector<int64_t> x_shape;
  PointwiseSizes(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& next_weight = {}) : next(0) {
    STD_TORCH_CHECK(x.dim() == 5 && weight.dim() == 5, "x, weight: expected 5 dimensions");
    const auto sizes = x.sizes();
    x_shape.assign(sizes.begin(), sizes.end());
    branches = x.size(0), rows = x.size(1) * x.size(2) * x.size(3), in = x.size(4), out = weight.size(1);
    check_shape("weight", weight, {branches, out, in, 1, 1});
    check_kind("x", x, x);
    check_kind("weight", weight, x);
    if (!next_weight.has_value()) return;
    STD_TORCH_CHECK(next_weight->dim() == 5, "next_weight: expected 5 dimensions");
    next = next_weight->size(1);
    check_shape("next_weight", *next_weight, {branches, next, out, 1, 1});
    check_kind("next_weight", *next_weight, x);
  }

  std::vector<int64_t> shape(int64_t channels) const {
    return {x_shape[0], x_shape[1], x_shape[2], x_shape[3], channels};
  }
};

// Pointers to rows that lie `stride` values apart.
template <typename T>
T** row_pointers(T* first, int64_t count, int64_t stride, int slot) {
  T** rows = scratch<T*>(slot, count);
  for (int64_t m = 0; m < count; ++m) rows[m] = first + m * stride;
  return rows;
}

// Packed matrices W [branch][out][in] of type Sum<T>, whose rows are contiguous: `multiply` computes x W^T for rows x,
// or x W if `transposed`.
template <typename T>
class PackedMatrices {
 public:
  PackedMatrices(const Tensor& matrices, bool transposed)
      : out_(matrices.size(transposed ? 2 : 1)),
        in_(matrices.size(transposed ? 1 : 2)),
        size_(ceil_div(out_, kPanel) * in_ * kPanel),
        packed_(empty(matrices, {matrices.size(0), size_}, kScalarType<T>)) {
    const int64_t branch_stride = matrices.stride(0), row_stride = matrices.stride(1);
    parallel_tasks(matrices.size(0), [&](int64_t branch) {
      pack(data<Sum<T>>(matrices) + branch * branch_stride, out_, in_, 1, transposed ? 1 : row_stride,
           transposed ? row_stride : 1, in_ * kPanel, mutable_data<T>(packed_) + branch * size_);
    });
  }

  // to = clamp(rows x matrix + bias + add); bias and add may be null.
  void multiply(int64_t branch, const T* rows, int64_t count, T* to, const Sum<T>* bias = nullptr,
                const T* add = nullptr, Clamp<Sum<T>> clamp = {}, PrefetchQueue<T>* ahead = nullptr) const {
    const Tap<T> tap{&rows, data<T>(packed_) + branch * size_, in_ * kPanel, in_, in_};
    const T* const* added = add != nullptr ? row_pointers(add, count, out_, 0) : nullptr;
    kernels<T>().gemm({&tap, 1, count, out_, row_pointers(to, count, out_, 1), bias, added, clamp, ahead});
  }

  // to = rows x matrix, for rows that lie row_stride values apart.
  void multiply_strided(int64_t branch, const T* rows, int64_t row_stride, int64_t count, T* to) const {
    const Tap<T> tap{row_pointers(rows, count, row_stride, 0), data<T>(packed_) + branch * size_, in_ * kPanel, in_,
                     row_stride};
    kernels<T>().gemm({&tap, 1, count, out_, row_pointers(to, count, out_, 1), nullptr, nullptr, {}, nullptr});
  }

 private:
  int64_t out_, in_, size_;
  Tensor packed_;
};

// sum[i][j] += over rows of left[i] * right[j]
template <typename T>
void add_outer(const T* left, int64_t left_channels, const T* right, int64_t right_channels, int64_t count, Sum<T>* sum,
               PrefetchQueue<T>* ahead = nullptr) {
  const T* const* left_rows = row_pointers(left, count, left_channels, 0);
  const T* const* right_rows = row_pointers(right, count, right_channels, 1);
  add_outer(left_rows, left_channels, right_rows, right_channels, count, sum, ahead);
}

// Sum of products in double, as several independent sums, which a processor adds in parallel.
template <typename T, typename U>
double dot(const T* a, const U* b, int64_t count) {
  constexpr int64_t kSums = 8;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int64_t j = 0; j < kSums; ++j) sums[j] += double(a[i + j]) * double(b[i + j]);
  for (; i < count; ++i) sums[0] += double(a[i]) * double(b[i]);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// The blocks of rows of a branch, divided among tasks. Each task sums on its own, and the sums are added in order.
struct RowPartition {
  int64_t rows, blocks, tasks;  // of a branch
  RowPartition(int64_t branches, int64_t rows)
      : rows(rows),
        blocks(ceil_div(rows, kBlockRows)),
        tasks(std::clamp<int64_t>(ceil_div(2 * num_threads(), std::max<int64_t>(branches, 1)), 1,
                                  std::max<int64_t>(blocks, 1))) {}

  // f(block, first row, rows) for the blocks of a task.
  template <typename F>
  void for_each_block(int64_t task, const F& f) const {
    for (int64_t block = blocks * task / tasks; block < blocks * (task + 1) / tasks; ++block)
      f(block, block * kBlockRows, std::min(kBlockRows, rows - block * kBlockRows));
  }
};

}  // namespace hne
