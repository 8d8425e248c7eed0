// The machine operations that kernels use. nvcc compiles them to the GPU's instructions. Tests compile the same kernels
// for the host, where emulation.h (tests/cuda_emulation) implements each operation as documented here.
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

}  // namespace hne

#ifndef __CUDACC__
#include "emulation.h"
#else

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

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
HNE_DEVICE void warp_sync() { __syncwarp(); }
HNE_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

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
HNE_DEVICE uint32_t round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// --- on the host -------------------------------------------------------------------------------------------

inline bool on_device(const Tensor& t) { return t.is_cuda(); }

// Guard: while it lives, launches go to the device of `t` and to its current stream.
class Device {
 public:
  explicit Device(const Tensor& t) : guard_(t.get_device_index()) {
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
    STD_CUDA_CHECK(cudaLaunchKernelEx(&configuration, kernel, parameters...));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int shared_limit_ = 0;
};

}  // namespace hne
#endif
