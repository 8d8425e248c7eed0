// Products with a matrix per branch, rows of channels against rows of channels: what the pointwise convolutions of the
// end of a bottleneck are made of.
#pragma once

#include "branch_conv2d.h"

namespace hne {

// A pointwise convolution, from x, and one that may follow it.
struct PointwiseSizes {
  int64_t branches, rows, in, out, next;  // next is 0 where no convolution follows
  std::vector<int64_t> maps;              // of x
  PointwiseSizes(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& next_weight = {}) : next(0) {
    STD_TORCH_CHECK(x.dim() == 5 && weight.dim() == 5, "x, weight: expected 5 dimensions");
    const auto sizes = x.sizes();
    maps.assign(sizes.begin(), sizes.end());
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

  std::vector<int64_t> map(int64_t channels) const { return {maps[0], maps[1], maps[2], maps[3], channels}; }
};

// Pointers to rows that follow each other.
template <typename T>
T** row_pointers(T* first, int64_t count, int64_t channels, int slot) {
  T** rows = scratch<T*>(slot, count);
  for (int64_t m = 0; m < count; ++m) rows[m] = first + m * channels;
  return rows;
}

// Matrices [branch][out][in], packed: of rows x, `multiply` gives x W^T, or x W where they are transposed.
template <typename T>
class PackedMatrices {
 public:
  PackedMatrices(const Tensor& matrices, bool transposed)
      : out_(matrices.size(transposed ? 2 : 1)),
        in_(matrices.size(transposed ? 1 : 2)),
        size_(ceil_div(out_, kPanel) * in_ * kPanel),
        packed_(empty(matrices, {matrices.size(0), size_})) {
    parallel_tasks(matrices.size(0), [&](int64_t branch) {
      pack(data<T>(matrices) + branch * out_ * in_, out_, in_, 1, transposed ? 1 : in_, transposed ? out_ : 1,
           in_ * kPanel, mutable_data<T>(packed_) + branch * size_);
    });
  }

  // to = clamp(rows x matrix + bias + add); bias and add may be null.
  void multiply(int64_t branch, const T* rows, int64_t count, T* to, const T* bias = nullptr, const T* add = nullptr,
                Clamp<T> clamp = {}, Prefetch<T> ahead = {}) const {
    const Tap<T> tap{&rows, data<T>(packed_) + branch * size_, in_ * kPanel, in_, in_};
    const T* const* added = add != nullptr ? row_pointers(add, count, out_, 0) : nullptr;
    kernels<T>().gemm({&tap, 1, count, out_, row_pointers(to, count, out_, 1), bias, added, clamp, ahead});
  }

 private:
  int64_t out_, in_, size_;
  Tensor packed_;
};

// sum[i][j] += over rows of left[i] * right[j]
template <typename T>
void add_outer(const T* left, int64_t left_channels, const T* right, int64_t right_channels, int64_t count, T* sum,
               Prefetch<T> ahead = {}) {
  const T* const* left_rows = row_pointers(left, count, left_channels, 0);
  const T* const* right_rows = row_pointers(right, count, right_channels, 1);
  kernels<T>().outer({left_rows, right_rows, count, left_channels, right_channels, sum, {ahead}});
}

// Sum of products in double, of several sums that do not wait for each other.
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

// Blocks of rows of a branch, shared by tasks: sums of a share are of its own, and added in order.
struct RowPartition {
  int64_t rows, blocks, count;  // count of a branch
  RowPartition(int64_t branches, int64_t rows)
      : rows(rows),
        blocks(ceil_div(rows, kBlockRows)),
        count(std::clamp<int64_t>(ceil_div(2 * num_threads(), std::max<int64_t>(branches, 1)), 1,
                                  std::max<int64_t>(blocks, 1))) {}

  // f(block, first, count) for the blocks of a share
  template <typename F>
  void each(int64_t share, const F& f) const {
    for (int64_t block = blocks * share / count; block < blocks * (share + 1) / count; ++block)
      f(block, block * kBlockRows, std::min(kBlockRows, rows - block * kBlockRows));
  }
};

}  // namespace hne
