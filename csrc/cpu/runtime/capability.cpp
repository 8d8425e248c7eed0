#include "capability.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
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

#if defined(HNE_EMULATED_TILES)
constexpr bool kEmulatedTiles = true;  // only chosen by name
#else
constexpr bool kEmulatedTiles = false;
#endif

// Whether the processor has AMX for bfloat16, and the system lets this process use its registers.
bool has_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBfloat16 = 1u << 22, kTile = 1u << 24;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kBfloat16) == 0 || (d & kTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool supported(Bfloat16Products products) {
  switch (products) {
    case Bfloat16Products::amx:
      return kEmulatedTiles || (supported(Bfloat16Products::avx512) && has_tiles());
    case Bfloat16Products::avx512:
#if defined(__x86_64__)
      return capability() == Capability::avx512 && __builtin_cpu_supports("avx512bf16");
#else
      return false;
#endif
    default:
      return true;
  }
}

const char* name(Bfloat16Products products) {
  switch (products) {
    case Bfloat16Products::amx:
      return "amx";
    case Bfloat16Products::avx512:
      return "avx512";
    case Bfloat16Products::portable:
      return "portable";
    default:
      return "widened";
  }
}

// Whether vdpbf16ps multiplies more in a second than products of float do.
bool avx512_is_faster() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

Bfloat16Products choose_bfloat16() {
  using enum Bfloat16Products;
  const char* variable = std::getenv("HNE_CPU_BF16");
  const std::string asked = variable != nullptr ? variable : "";
  if (asked == "0") return widened;
  for (const Bfloat16Products products : {amx, avx512, portable, widened}) {
    if (asked == name(products)) {
      if (!supported(products))
        throw std::runtime_error("HNE_CPU_BF16: these products are not supported here: " + asked);
      return products;
    }
    const bool fast = products == amx || (products == avx512 && avx512_is_faster()) || products == widened;
    const bool wanted = (asked == "1" || (asked.empty() && fast)) && !(products == amx && kEmulatedTiles);
    if (wanted && supported(products)) return products;
  }
  throw std::runtime_error("HNE_CPU_BF16: expected 0, 1, widened, portable, avx512 or amx, got " + asked);
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

Bfloat16Products bfloat16_products() {
  static const Bfloat16Products chosen = choose_bfloat16();
  return chosen;
}

const char* cpu_bfloat16() { return name(bfloat16_products()); }

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
