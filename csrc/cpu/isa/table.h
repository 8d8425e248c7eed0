// The kernels of one instruction set, gathered in its table. Included by portable.cpp, avx2.cpp, avx512.cpp.
#include "../batch_norm.h"
#include "../depthwise.h"
#include "../distillation.h"
#include "../gemm.h"

namespace hne::HNE_ISA {

template <typename T>
const Kernels<T>& table() {
  static constexpr Kernels<T> kernels{
      gemm<T>,
      outer<T>,
      depthwise_row<T>,
      depthwise_input_row<T>,
      depthwise_weight_row<T>,
      norm_statistics<T>,
      norm_apply<T>,
      norm_backward_sums<T>,
      norm_backward_apply<T>,
      add_scaled<T>,
      store_scaled<T>,
      distill_sample<T>,
  };
  return kernels;
}

template const Kernels<float>& table<float>();
template const Kernels<double>& table<double>();

}  // namespace hne::HNE_ISA
