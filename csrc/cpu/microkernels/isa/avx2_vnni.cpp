// int8 kernels with vpdpbusd for 256 bits; these functions run only if capability() is avx2, and vnni().
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

#include "../quantized_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avxvnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avxvnni,avx2,fma")
#endif

#define HNE_ISA avx2_vnni
#define HNE_VECTOR_BYTES 32
#define HNE_REGISTERS 16
#define HNE_VNNI 1
#define HNE_BF16 0

#include "../quantized.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
