// Emulates the machine operations of csrc/cuda/device.h in one thread of the host: the threads of a block are fibers,
// blocks run one after the other. Shared memory is a heap block of exactly the requested size, so that AddressSanitizer
// detects accesses out of range, and starts full of NaN, so that uninitialised reads show. A barrier that only some
// threads reach ends the process.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "record.h"

#define HNE_DISPATCH_KEY CPU
#define HNE_DEVICE inline
#define HNE_BOTH inline
#define __global__ static
#define __launch_bounds__(...)

namespace hne {

using std::max;
using std::min;

struct Index {
  unsigned x;
};
extern thread_local Index threadIdx, blockIdx;

void* shared_memory();
void block_sync();
bool block_sync_or(bool value);
void warp_sync();
void wait_for_previous_kernel();
void launch_next_kernel();
void prefetch(const void* p);
inline void keep(uint32_t&) {}
void copy16(void* shared, const void* from, bool valid);
void copy_commit();
void copy_wait_for(int pending);
template <int pending>
void copy_wait() {
  copy_wait_for(pending);
}

// Waits until all 32 lanes of the warp have called it, then runs the instruction once on the operands of every lane.
using WarpInstruction = void (*)(void* const (&operands)[32]);
void run_with_warp(WarpInstruction instruction, void* operands);

float shuffle_xor(float value, int mask);
void load_matrices(uint32_t (&m)[4], const void* row);
void load_matrices_transposed(uint32_t (&m)[4], const void* row);
void multiply_fragments(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, half);
void multiply_fragments(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bfloat16);
void multiply_fragments(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float);
inline float fast_reciprocal(float value) { return 1 / value; }
inline float maximum(float a, float b) { return std::isnan(a) || !(a < b || std::isnan(b)) ? a : b; }
inline float minimum(float a, float b) { return std::isnan(a) || !(a > b || std::isnan(b)) ? a : b; }
uint32_t round_to_tf32(float value);
void multiply_half_fragments(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t b, half);
void multiply_half_fragments(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t b, bfloat16);

// Calls f with the two values of each word and returns the two results.
template <typename T, typename F, typename... Words>
uint32_t for_pair(const F& f, Words... words) {
  uint32_t result = 0;
  for (int i = 0; i < 2; ++i) {
    [[maybe_unused]] const auto value = [&](uint32_t word) {
      const uint16_t bits = static_cast<uint16_t>(word >> (16 * i));
      T typed;
      std::memcpy(&typed, &bits, sizeof typed);
      return float(typed);
    };
    const T typed(f(value(words)...));
    uint16_t bits;
    std::memcpy(&bits, &typed, sizeof bits);
    result |= uint32_t(bits) << (16 * i);
  }
  return result;
}
template <typename T>
uint32_t pack_pair(float first, float second, T) {
  int i = 0;
  return for_pair<T>([&] { return i++ == 0 ? first : second; });
}
template <typename T>
uint32_t clamp_pair(uint32_t pair, uint32_t low, uint32_t high, T) {
  const auto clamp = [](float v, float lo, float hi) { return std::isnan(v) ? v : std::min(std::max(v, lo), hi); };
  return for_pair<T>(clamp, pair, low, high);
}
template <typename T>
uint32_t add_zero_times_pair(uint32_t pair, uint32_t sum, T) {
  return for_pair<T>([](float v, float s) { return v * 0.0f + s; }, pair, sum);
}

template <typename T>
T recompute(T value) {
  return value;
}

// With `early`, a thread that breaks a rule of programmatic dependent launch (csrc/cuda/device.h) ends the process.
// Reads and writes before the wait are noticed in asynchronous copies alone.
void run_blocks(bool early, int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel);

inline bool on_device(const Tensor& t) { return t.is_cpu(); }

class Device {
 public:
  explicit Device(const Tensor&) {}

  int64_t shared_limit() const;

  template <typename... Parameters>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
              const std::type_identity_t<Parameters>&... parameters) const {
    if (record_launch(reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes, parameters...)) return;
    run_blocks(false, blocks, threads, shared_bytes, [&] { kernel(parameters...); });
  }
  template <typename... Parameters>
  void launch_early(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
                    const std::type_identity_t<Parameters>&... parameters) const {
    if (record_launch(reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes, parameters...)) return;
    run_blocks(true, blocks, threads, shared_bytes, [&] { kernel(parameters...); });
  }
};

}  // namespace hne
