// The instruction set that the CPU kernels use, chosen when the library is loaded: the best that this
// machine has, or what HNE_CPU_CAPABILITY asks for ("portable", "avx2", "avx512").
#pragma once

namespace hne {

enum class Capability { portable, avx2, avx512 };

Capability capability();

// Name of capability(): "portable", "avx2" or "avx512".
const char* cpu_capability();

// Names of all that this machine has, comma separated, best last.
const char* cpu_capabilities_supported();

}  // namespace hne
