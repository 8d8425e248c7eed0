// The machine operations that kernels use. nvcc compiles them to the GPU's instructions. Tests compile the same kernels
// for the host, where emulation.h (tests/cuda_emulation) implements each operation as documented here.
//
// Programmatic dependent launch. A small kernel takes about as long to start as to run. Device::launch_early lets its
// blocks start before the previous kernel of the stream has ended: as soon as each block of that kernel has called
// launch_next_kernel or has ended. Memory stays right under three rules. The emulation checks the first, the third, and
// asynchronous copies for the second.
//
//   1. Every thread of such a kernel calls wait_for_previous_kernel before it ends. It returns when the previous kernel
//      has ended and its writes are visible. That kernel has waited for its own predecessor, so all kernels before have
//      ended, too.
//   2. Before the wait, a thread neither reads nor writes device memory. An earlier kernel may still write the input;
//      also weights: where they are folded in the same stream, the folding kernel can be the direct predecessor. And it
//      may still read memory that the allocator has meanwhile given to the output. Only `prefetch` is allowed: it
//      brings values to the L2 cache, which all multiprocessors share, so that a later write updates them.
//   3. launch_next_kernel comes after the wait. So at most two kernels overlap, and the chain of rule 1 holds.
//
// Kernels of others, such as PyTorch's, need no rules: a kernel that is launched as usual starts after all earlier ones
// have ended, and one that never calls launch_next_kernel counts as having called it at its end. A captured CUDA graph
// has programmatic edges in the same places (from CUDA 12.3 on).
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "tensor.h"

namespace hne {

using bfloat16 = torch::headeronly::BFloat16;
using half = torch::headeronly::Half;

// Bytes of shared memory per block on the smallest supported GPU, compute capability 8.0.
constexpr int kLeastShared = 163 * 1024;
// Blocks that give every multiprocessor of a large GPU work. The choice of a kernel depends on the shapes alone: the
// same order of additions on every GPU.
constexpr int64_t kManyBlocks = 132;

}  // namespace hne

#ifndef __CUDACC__
#include "emulation.h"
#else

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <array>
#include <atomic>

#define HNE_DISPATCH_KEY CUDA
#define HNE_DEVICE __device__ __forceinline__
#define HNE_BOTH __host__ __device__ __forceinline__

namespace hne {

// --- on the device -----------------------------------------------------------------------------------------

HNE_DEVICE void* shared_memory() {
  extern __shared__ __align__(16) unsigned char hne_shared_memory[];
  return hne_shared_memory;
}

HNE_DEVICE void block_sync() { __syncthreads(); }
// A barrier that returns whether any thread of the block passed true.
HNE_DEVICE bool block_sync_or(bool value) { return __syncthreads_or(value) != 0; }
HNE_DEVICE void warp_sync() { __syncwarp(); }

// Programmatic dependent launch, see above. Without effect in a kernel that was launched as usual.
HNE_DEVICE void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
HNE_DEVICE void launch_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Brings the 128 bytes around an address in device memory to the L2 cache.
HNE_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Keeps a value in its register: the compiler cannot decide to compute it again.
HNE_DEVICE void keep(uint32_t& value) { asm volatile("" : "+r"(value)); }

HNE_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Returns `value`, unknown to the compiler: it then computes addresses anew in each phase of a kernel instead of
// holding all of them in registers.
HNE_DEVICE int recompute(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
// The same for an address in device memory that only copy16 reads: the sum of such an address and an offset of 32 bits
// is one instruction.
template <typename T>
HNE_DEVICE const T* recompute(const T* address) {
  asm volatile("" : "+l"(address));
  return address;
}

HNE_DEVICE unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// Starts a copy of 16 bytes to shared memory, zeros if not `valid`. It is complete after copy_wait and a barrier.
HNE_DEVICE void copy16(void* shared, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(from), "r"(bytes)
               : "memory");
}
HNE_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the `pending` newest groups of this thread's copies are in flight.
template <int pending>
HNE_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Loads four 8x8 matrices of 16-bit values: lane 8i + j passes the address of row j of matrix i. With g = lane / 4 and
// t = lane % 4, a lane receives values 2t and 2t + 1 of row g of each matrix (transposed: of column g).
HNE_DEVICE void load_matrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}
HNE_DEVICE void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

// sum += a b: 16x16 times 16x8 in 16 bits, 16x8 times 8x8 in tf32; fragments as in the PTX manual.
HNE_DEVICE void multiply_fragments(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
HNE_DEVICE void multiply_fragments(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
HNE_DEVICE void multiply_fragments(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// 1 / value with an error of one unit in the last place, for normal numbers.
HNE_DEVICE float fast_reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
// The larger and the smaller of two values; NaN if one is NaN.
HNE_DEVICE float maximum(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
HNE_DEVICE float minimum(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
HNE_DEVICE uint32_t round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// sum += a b: 16x8 times 8x8 in 16 bits. Lane 4g + t has values 2t and 2t + 1 of rows g (a0) and
// g + 8 (a1) of a, and of column g of b.
HNE_DEVICE void multiply_half_fragments(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t b, half) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a0), "r"(a1), "r"(b));
}
HNE_DEVICE void multiply_half_fragments(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t b, bfloat16) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a0), "r"(a1), "r"(b));
}

// Pairs of 16-bit values in one word, the first in its low half. `pack_pair` rounds to nearest even.
HNE_DEVICE uint32_t pack_pair(float first, float second, half) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
HNE_DEVICE uint32_t pack_pair(float first, float second, bfloat16) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
// NaN stays NaN.
HNE_DEVICE uint32_t clamp_pair(uint32_t pair, uint32_t low, uint32_t high, half) {
  asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(low));
  asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(high));
  return pair;
}
HNE_DEVICE uint32_t clamp_pair(uint32_t pair, uint32_t low, uint32_t high, bfloat16) {
  asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(low));
  asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(high));
  return pair;
}
// Adds zero times each value to `sum`, which becomes NaN at the first value that is not finite.
HNE_DEVICE uint32_t add_zero_times_pair(uint32_t pair, uint32_t sum, half) {
  asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(pair), "r"(0));
  return sum;
}
HNE_DEVICE uint32_t add_zero_times_pair(uint32_t pair, uint32_t sum, bfloat16) {
  asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(pair), "r"(0));
  return sum;
}

// --- on the host -------------------------------------------------------------------------------------------

inline bool on_device(const Tensor& t) { return t.is_cuda(); }

// Guard: while it lives, launches go to the device of `t` and to its current stream.
class Device {
 public:
  explicit Device(const Tensor& t) : guard_(t.get_device_index()), device_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared_limit_, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                          static_cast<int>(t.get_device_index())));
  }

  // Largest shared memory of a block, in bytes.
  int64_t shared_limit() const { return shared_limit_; }

  template <typename... Parameters>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
              const std::type_identity_t<Parameters>&... parameters) const {
    start(false, kernel, blocks, threads, shared_bytes, parameters...);
  }

  // Launches a kernel that may start before the previous one has ended. It must keep the rules above.
  template <typename... Parameters>
  void launch_early(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
                    const std::type_identity_t<Parameters>&... parameters) const {
    start(true, kernel, blocks, threads, shared_bytes, parameters...);
  }

 private:
  template <typename... Parameters>
  void start(bool early, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
             const Parameters&... parameters) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= INT32_MAX, "too many elements for one launch");
    STD_TORCH_CHECK(shared_bytes <= shared_limit_, "more shared memory than a block may have");
    if (shared_bytes > 48 * 1024)  // the maximum, since another thread may launch the same kernel with a different size
      STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit_));
    cudaLaunchConfig_t configuration{};
    configuration.gridDim = dim3(static_cast<unsigned>(blocks));
    configuration.blockDim = dim3(static_cast<unsigned>(threads));
    configuration.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    configuration.stream = stream_;
    cudaLaunchAttribute attribute{};
    if (early && waits(reinterpret_cast<const void*>(kernel))) {
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
      configuration.attrs = &attribute, configuration.numAttrs = 1;
    }
    STD_CUDA_CHECK(cudaLaunchKernelEx(&configuration, kernel, parameters...));
  }

  // Whether `kernel` has the instruction that waits, and the driver can capture such launches. All kernels are compiled
  // for the same targets, so the answer depends on the device alone. The GPU's own compute capability does not tell:
  // the driver can translate code for an older GPU, which lacks the instruction.
  bool waits(const void* kernel) const {
    static std::array<std::atomic<int>, 64> known{};  // by device: 0 unknown, 1 no, 2 yes
    if (device_ >= int64_t(known.size())) return false;
    std::atomic<int>& answer = known[device_];
    if (answer == 0) {
      int driver = 0;
      cudaFuncAttributes attributes{};
      STD_CUDA_CHECK(cudaDriverGetVersion(&driver));
      STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
      answer = driver >= 12030 && attributes.ptxVersion >= 90 ? 2 : 1;
    }
    return answer == 2;
  }

  torch::stable::accelerator::DeviceGuard guard_;
  int64_t device_;
  cudaStream_t stream_ = nullptr;
  int shared_limit_ = 0;
};

}  // namespace hne
#endif
