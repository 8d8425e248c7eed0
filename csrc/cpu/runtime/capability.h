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

// Whether inference in bfloat16 multiplies bfloat16, instead of float: if the machine has vdpbf16ps at twice the rate
// of float, which AMD's processors have and Intel's have not, or HNE_CPU_BF16 is 1, and not if it is 0.
bool multiplies_bfloat16();

// Whether those products are vdpbf16ps. Without it they are portable code, for tests.
bool has_bfloat16_products();

// Bytes of the second cache of a core.
int64_t second_cache_bytes();

}  // namespace hne
