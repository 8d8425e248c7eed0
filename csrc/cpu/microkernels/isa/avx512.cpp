// 32 registers of 16 floats; these functions run only if capability() is avx512.
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
#include "../quantized_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define HNE_ISA avx512
#define HNE_VECTOR_BYTES 64
#define HNE_REGISTERS 32
#define HNE_VNNI 0
#define HNE_BF16 0

#include "../quantized.h"
#include "table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
