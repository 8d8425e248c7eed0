// bfloat16 kernels with vdpbf16ps; these functions run only if bfloat16_products() is avx512.
#if defined(__x86_64__)

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
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define HNE_ISA avx512_bf16
#define HNE_VECTOR_BYTES 64
#define HNE_REGISTERS 32
#define HNE_BF16 1

#include "bfloat16_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
