// The table of the micro-kernels of one instruction set. Included by portable.cpp, avx2.cpp and avx512.cpp.
#include "../depthwise.h"
#include "../distillation.h"
#include "../gemm.h"
#include "../normalize.h"
#include "../pooling.h"
#include "../transpose.h"
#include "../winograd.h"

namespace hne::HNE_ISA {

template <typename T>
const Kernels<T>& table() {
  static constexpr Kernels<T> kernels{
      gemm<T>,
      outer<T>,
      depthwise_rows<T>,
      depthwise_input_row<T>,
      depthwise_weight_row<T>,
      normalize<T>,
      normalize_backward<T>,
      mask<T>,
      moments<T>,
      mean_rows<T>,
      max_of_rows<T>,
      sum_of_rows<T>,
      transpose_panel<T>,
      add_scaled<T>,
      store_scaled<T>,
      winograd_input<T>,
      winograd_output<T>,
      winograd_output_gradient<T>,
      winograd_filter_gradient<T>,
      distill_sample<T>,
  };
  return kernels;
}

template const Kernels<float>& table<float>();
template const Kernels<double>& table<double>();

}  // namespace hne::HNE_ISA
