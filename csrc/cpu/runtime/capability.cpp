#include "capability.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace hne {
namespace {

bool supported(Capability level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (level == Capability::avx2) return avx2;
  if (level == Capability::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return level == Capability::portable;
}

const char* name(Capability level) {
  switch (level) {
    case Capability::avx512:
      return "avx512";
    case Capability::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

Capability choose() {
  const char* requested = std::getenv("HNE_CPU_CAPABILITY");
  for (Capability level : {Capability::avx512, Capability::avx2, Capability::portable}) {
    if (requested != nullptr && *requested != '\0') {
      if (std::string(requested) != name(level)) continue;
      if (!supported(level))
        throw std::runtime_error(std::string("HNE_CPU_CAPABILITY: this machine has ") + cpu_capabilities_supported() +
                                 ", got " + requested);
      return level;
    }
    if (supported(level)) return level;
  }
  throw std::runtime_error(std::string("HNE_CPU_CAPABILITY: expected portable, avx2 or avx512, got ") + requested);
}

}  // namespace

Capability capability() {
  static const Capability chosen = choose();
  return chosen;
}

const char* cpu_capability() { return name(capability()); }

const char* cpu_capabilities_supported() {
  if (supported(Capability::avx512)) return "portable, avx2, avx512";
  return supported(Capability::avx2) ? "portable, avx2" : "portable";
}

bool vnni() {
  static const bool found = [] {
    const char* asked = std::getenv("HNE_CPU_VNNI");
    if (asked != nullptr && std::string(asked) == "0") return false;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (capability() == Capability::avx512) return __builtin_cpu_supports("avx512vnni") != 0;
    if (capability() == Capability::avx2) return __builtin_cpu_supports("avxvnni") != 0;
#endif
    return false;
  }();
  return found;
}

bool has_bfloat16_products() {
#if defined(__x86_64__)
  static const bool found = capability() == Capability::avx512 && __builtin_cpu_supports("avx512bf16");
  return found;
#else
  return false;
#endif
}

bool multiplies_bfloat16() {
  static const bool chosen = [] {
    const char* asked = std::getenv("HNE_CPU_BF16");
    if (asked != nullptr && *asked != '\0') return std::string(asked) != "0";
#if defined(__x86_64__)
    return has_bfloat16_products() && __builtin_cpu_is("amd");
#else
    return false;
#endif
  }();
  return chosen;
}

int64_t second_cache_bytes() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
    const int64_t found = 0;
#endif
    constexpr int64_t kLeast = 256 << 10, kMost = 4 << 20, kUnknown = 1 << 20;
    return found <= 0 ? kUnknown : std::clamp(found, kLeast, kMost);
  }();
  return bytes;
}

}  // namespace hne
