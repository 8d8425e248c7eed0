// The instruction set of the CPU kernels, chosen once: the best one that this machine supports, or the one named by the
// environment variable HNE_CPU_CAPABILITY ("portable", "avx2", "avx512").
#pragma once

#include <cstdint>

namespace hne {

enum class Capability { portable, avx2, avx512 };

// Throws std::runtime_error if HNE_CPU_CAPABILITY names an instruction set that is unknown or not supported.
Capability capability();

// Name of capability(): "portable", "avx2" or "avx512".
const char* cpu_capability();

// Names of the instruction sets that this machine supports, comma separated, best last.
const char* cpu_capabilities_supported();

// Whether the int8 kernels of capability() use vpdpbusd: if the machine has it, and HNE_CPU_VNNI is not 0.
bool vnni();

// How products of bfloat16 are computed.
enum class Bfloat16Products {
  widened,   // as products of float
  portable,  // by code for any machine, slowly: for tests
  avx512,    // by vdpbf16ps
  amx        // in tiles
};

// AMX, or vdpbf16ps if it has twice the rate of float, which AMD's processors have and Intel's have not; else widened.
// The environment variable HNE_CPU_BF16 forces a choice by its name; 0 is widened, and 1 the best of the others. Throws
// std::runtime_error if it is unknown or this machine lacks it.
Bfloat16Products bfloat16_products();

// Name of bfloat16_products(): "widened", "portable", "avx512" or "amx".
const char* cpu_bfloat16();

inline bool multiplies_bfloat16() { return bfloat16_products() != Bfloat16Products::widened; }

// Bytes of the second cache of a core.
int64_t second_cache_bytes();

}  // namespace hne
