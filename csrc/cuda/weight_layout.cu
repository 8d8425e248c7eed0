// Exchanges the last two dimensions of a weight, and adds up partial weight gradients on the way.
//
//   W weights, S splits of the pixels   bytes moved at least   operations
//   taps_first                          2 W values             none
//   taps_last                           4 S W + W values       S W
#include "weight_layout.h"

namespace hne {
namespace {

// to[matrix][column][row] = from[matrix][row][column]
template <typename T>
__global__ void __launch_bounds__(kThreads)
    transpose(const T* from, T* to, const int64_t count, const int64_t rows, const int64_t columns) {
  wait_for_previous_kernel();
  launch_next_kernel();
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= count * rows * columns) return;
  const int64_t row = at % rows, column = at / rows % columns, matrix = at / rows / columns;
  to[at] = from[(matrix * rows + row) * columns + column];
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

Tensor taps_first(const Device& device, const Tensor& weight, const Geometry& g) {
  if (g.taps() == 1) return weight;
  const int64_t filters = weight.dim() == 5 ? g.out_channels * g.in_channels : g.in_channels;
  Tensor out = torch::stable::new_empty(weight, {g.branches, g.taps(), filters});
  dispatch(weight, [&](auto type) {
    using T = decltype(type);
    device.launch_early(transpose<T>, ceil_div(g.branches * filters * g.taps(), kThreads), kThreads, 0, data<T>(weight),
                        mutable_data<T>(out), g.branches, filters, g.taps());
  });
  return out;
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
