// bfloat16 kernels with AMX; these functions run only if bfloat16_products() is amx.
#if defined(__x86_64__) || defined(HNE_EMULATED_TILES)

#if defined(HNE_EMULATED_TILES)  // for any machine

#define HNE_ISA amx
#define HNE_VECTOR_BYTES 16
#define HNE_REGISTERS 16
#define HNE_BF16 0

#else

// The standard headers come before the target: their inline functions must run on any machine.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "../kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                            \
    __attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define HNE_ISA amx
#define HNE_VECTOR_BYTES 64
#define HNE_REGISTERS 32
#define HNE_BF16 1

#endif

#include "../tile_products.h"
#include "feature_table.h"

namespace hne::amx {

const Kernels<bfloat16>& bfloat16_table() {
  static constexpr Kernels<bfloat16> kernels = [] {
    FeatureKernels<bfloat16> features = kFeatureKernels<bfloat16>;
    features.gemm = tile_gemm, features.outer = tile_outer;
    return Kernels<bfloat16>{features};
  }();
  return kernels;
}

}  // namespace hne::amx

#if defined(__clang__) && !defined(HNE_EMULATED_TILES)
#pragma clang attribute pop
#endif

#endif
