// 16 registers of 8 floats; these functions run only if capability() is avx2.
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
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define HNE_ISA avx2
#define HNE_VECTOR_BYTES 32
#define HNE_REGISTERS 16
#define HNE_VNNI 0
#define HNE_BF16 0

#include "../quantized.h"
#include "table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
