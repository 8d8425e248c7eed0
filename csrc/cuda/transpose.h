// Filters laid out for reading: the last two dimensions of [count][rows][columns] exchanged.
//
//   of a weight   bytes moved at least   operations
//                 weight twice           none
#pragma once

#include "geometry.h"
#include "op.h"

namespace hne {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    transpose(const T* from, T* to, const int64_t count, const int64_t rows, const int64_t columns) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= count * rows * columns) return;
  const int64_t row = at % rows, column = at / rows % columns, matrix = at / rows / columns;
  to[at] = from[(matrix * rows + row) * columns + column];
}

// `weight` is contiguous; nothing is done for one column.
template <typename T>
Tensor transposed(const Device& device, const Tensor& weight, int64_t count, int64_t rows, int64_t columns) {
  if (columns == 1) return weight;
  Tensor out = torch::stable::new_empty(weight, {count, columns, rows});
  device.launch(transpose<T>, ceil_div(count * rows * columns, kThreads), kThreads, 0, data<T>(weight),
                mutable_data<T>(out), count, rows, columns);
  return out;
}

// [branch][out][in][tap] to [branch][tap][out][in]
template <typename T>
Tensor taps_first(const Device& device, const Tensor& weight, const Geometry& g) {
  return transposed<T>(device, weight, g.branches, g.out_channels * g.in_channels, g.taps());
}

}  // namespace hne
