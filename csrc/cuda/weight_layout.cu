// Exchanges the last two dimensions of a weight, and adds up partial weight gradients on the way.
//
//   W weights, S splits of the pixels   bytes moved at least   operations
//   taps_first                          2 W values             none
//   taps_last                           4 S W + W values       S W
#include "weight_layout.h"

namespace hne {
namespace {

// Sizes of stored filters, and the strides of all but the taps, which lie side by side. Depthwise: one input channel.
struct StoredFilters {
  int64_t branches, out, in, taps;
  int64_t branch_stride, out_stride, in_stride;

  HNE_BOTH int64_t size() const { return branches * taps * out * in; }
};

// to[branch][tap][out][in] = from[branch][out][in][tap]
template <typename T>
__global__ void __launch_bounds__(kThreads) transpose(const T* from, T* to, const StoredFilters f) {
  wait_for_previous_kernel();
  launch_next_kernel();
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= f.size()) return;
  const int64_t filter = at / f.in, matrix = filter / f.out, branch = matrix / f.taps;
  const int64_t in = at - filter * f.in, out = filter - matrix * f.out, tap = matrix - branch * f.taps;
  to[at] = from[branch * f.branch_stride + out * f.out_stride + in * f.in_stride + tap];
}

// to[matrix][column][row] = sum over splits, in order, of partial[split][matrix][row][column]
template <typename T>
__global__ void __launch_bounds__(kThreads)
    transpose_sum(const float* partial, T* to, const int splits, const int64_t count, const int64_t rows,
                  const int64_t columns) {
  wait_for_previous_kernel();
  launch_next_kernel();
  const int64_t size = count * rows * columns, at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= size) return;
  float sum = 0;
#pragma unroll 4
  for (int split = 0; split < splits; ++split) sum += partial[split * size + at];
  const int64_t column = at % columns, row = at / columns % rows, matrix = at / columns / rows;
  to[(matrix * columns + column) * rows + row] = T(sum);
}

}  // namespace

TapsFirst filters_in_place(const Tensor& filters) {
  const auto stride = [&](int64_t dim) { return filters.size(dim) > 1 ? filters.stride(dim) : 0; };
  const FilterStrides strides{.branch = stride(0), .out = stride(1)};
  const int64_t out = filters.size(1), in = filters.size(2);
  bool reads = false;
  dispatch(filters, [&](auto type) {
    using T = decltype(type);
    reads = !whole_vectors<T>({out, in}, {}) || whole_vectors<T>({strides.branch, strides.out}, {data<T>(filters)});
  });
  if ((in == 1 || filters.stride(2) == 1) && reads) return {filters, strides};
  return {torch::stable::contiguous(filters), {.branch = out * in, .out = in}};
}

TapsFirst taps_first(const Device& device, const Tensor& weight_in, const Geometry& g) {
  const int64_t dims = weight_in.dim();
  if (g.taps() == 1 && dims == 5) return filters_in_place(weight_in);
  if (g.taps() == 1) return {torch::stable::contiguous(weight_in)};
  const bool side_by_side = weight_in.stride(dims - 1) == 1 && weight_in.stride(dims - 2) == g.kernel_size;
  const Tensor weight = side_by_side ? weight_in : torch::stable::contiguous(weight_in);
  const bool dense = dims == 5;
  const StoredFilters filters{.branches = g.branches,
                              .out = dense ? g.out_channels : g.in_channels,
                              .in = dense ? g.in_channels : 1,
                              .taps = g.taps(),
                              .branch_stride = weight.stride(0),
                              .out_stride = weight.stride(1),
                              .in_stride = dense ? weight.stride(2) : 0};
  Tensor out = torch::stable::new_empty(weight, {g.branches, g.taps(), filters.out * filters.in});
  dispatch(weight, [&](auto type) {
    using T = decltype(type);
    device.launch_early(transpose<T>, ceil_div(filters.size(), kThreads), kThreads, 0, data<T>(weight),
                        mutable_data<T>(out), filters);
  });
  if (!dense) return {out};
  return {out, {.branch = filters.taps * filters.out * filters.in, .out = filters.in}};
}

void taps_last(const Device& device, const Tensor& partial, const Tensor& out) {
  const int64_t splits = partial.size(0), count = partial.size(1), taps = partial.size(2), channels = partial.size(3);
  dispatch(out, [&](auto type) {
    using T = decltype(type);
    device.launch_early(transpose_sum<T>, ceil_div(count * taps * channels, kThreads), kThreads, 0,
                        data<float>(partial), mutable_data<T>(out), int(splits), count, taps, channels);
  });
}

}  // namespace hne
