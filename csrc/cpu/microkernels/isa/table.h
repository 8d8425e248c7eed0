// The table of the micro-kernels of one instruction set. Included by portable.cpp, avx2.cpp and avx512.cpp.
#include "../transpose.h"
#include "../winograd.h"
#include "feature_table.h"

namespace hne::HNE_ISA {

template <typename T>
const Kernels<T>& table() {
  static constexpr Kernels<T> kernels{
      kFeatureKernels<T>,
      depthwise_weight_row<T>,
      max_of_rows<T>,
      sum_of_rows<T>,
      transpose_panel<T>,
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
