// The table of the micro-kernels of bfloat16. Included by portable.cpp and avx512_bf16.cpp.
#include "feature_table.h"

namespace hne::HNE_ISA {

const Kernels<bfloat16>& bfloat16_table() {
  static constexpr Kernels<bfloat16> kernels{kFeatureKernels<bfloat16>};
  return kernels;
}

}  // namespace hne::HNE_ISA
