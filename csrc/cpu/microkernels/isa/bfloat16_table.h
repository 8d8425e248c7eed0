// The table of the micro-kernels of bfloat16. Included by portable.cpp and avx512_bf16.cpp.
#include "../depthwise.h"
#include "../gemm.h"
#include "../pooling.h"

namespace hne::HNE_ISA {

const Kernels<bfloat16>& bfloat16_table() {
  static constexpr Kernels<bfloat16> kernels{gemm<bfloat16>, depthwise_rows<bfloat16>, mean_rows<bfloat16>};
  return kernels;
}

}  // namespace hne::HNE_ISA
