// Shared by all CPU ops: argument checks, dtype dispatch, scratch memory; with thread_team.h, parallel loops.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "microkernels/kernels.h"
#include "runtime/allocator.h"
#include "runtime/thread_team.h"
#include "tensor.h"

namespace hne {

inline void check_kind(const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of the first tensor");
}

// Calls f(T{}) with T = float or double, the types in which the kernels compute.
template <typename F>
auto dispatch(const Tensor& t, const F& f) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double,
                  "expected float32, float64 or bfloat16");
  return t.scalar_type() == ScalarType::Float ? f(float{}) : f(double{});
}

template <typename T>
constexpr ScalarType kScalarType = std::is_same_v<T, double>  ? ScalarType::Double
                                   : std::is_same_v<T, float> ? ScalarType::Float
                                                              : ScalarType::BFloat16;

// The same, and f(bfloat16{}).
template <typename F>
auto dispatch_features(const Tensor& t, const F& f) {
  return t.scalar_type() == ScalarType::BFloat16 ? f(bfloat16{}) : dispatch(t, f);
}

// Whether a training op keeps bfloat16 features as they are, instead of widening them: all products have even numbers
// of channels, and the processor multiplies bfloat16.
inline bool keeps_bfloat16(const Tensor& x, std::initializer_list<int64_t> channels = {}) {
  return x.scalar_type() == ScalarType::BFloat16 && multiplies_bfloat16() &&
         std::all_of(channels.begin(), channels.end(), [](int64_t c) { return c % kTerms<bfloat16> == 0; });
}

// Elsewhere bfloat16 is computed in float32: widened on entry, rounded once on exit.
inline Tensor widen(const Tensor& t) {
  return t.scalar_type() == ScalarType::BFloat16 ? torch::stable::to(t, ScalarType::Float) : t;
}
inline std::optional<Tensor> widen(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(widen(*t)) : std::nullopt;
}
// Features as an op reads them: bfloat16 stays as it is if `kept`.
inline Tensor read_features(const Tensor& t, bool kept) { return torch::stable::contiguous(kept ? t : widen(t)); }
inline std::optional<Tensor> read_features(const std::optional<Tensor>& t, bool kept) {
  return t.has_value() ? std::optional<Tensor>(read_features(*t, kept)) : std::nullopt;
}

// The weight [branch][filter]... with the values of each filter contiguous. Branches and filters keep their strides, so
// that a slice of channels is not copied.
inline Tensor contiguous_filters(const Tensor& weight) {
  int64_t expected = 1;
  for (int64_t d = weight.dim() - 1; d >= 2; --d) {
    if (weight.size(d) != 1 && weight.stride(d) != expected) return torch::stable::contiguous(weight);
    expected *= weight.size(d);
  }
  return weight;
}
inline std::optional<Tensor> contiguous_filters(const std::optional<Tensor>& weight) {
  return weight.has_value() ? std::optional<Tensor>(contiguous_filters(*weight)) : std::nullopt;
}

// A contiguous tensor that does not change, with its data pointer: asking a tensor for it costs time in every loop.
// Of bfloat16 it is a copy in float32, unless `narrow`.
class ConstTensor {
 public:
  explicit ConstTensor(const Tensor& t, bool narrow = false)
      : tensor_(torch::stable::contiguous(narrow ? t : widen(t))), data_(tensor_.const_data_ptr()) {}
  template <typename T>
  const T* data() const {
    return static_cast<const T*>(data_);
  }

 private:
  Tensor tensor_;
  const void* data_;
};

// Packed bfloat16 filters [branch][panel][k][k][depth][kPanel] as products of bfloat16 read them, in pairs of channels:
// [branch][panel][k][k][ceil(depth / 2)][kPanel][2], with zeros for a channel that is missing.
inline ConstTensor pair_filters(const Tensor& packed) {
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::BFloat16 && packed.dim() == 6 &&
                      packed.size(2) == packed.size(3) && packed.size(5) == kPanel,
                  "weight: expected bfloat16 [branches, panels, k, k, channels, 16] on the CPU");
  const Tensor from = torch::stable::contiguous(packed);
  const int64_t depth = from.size(4), pairs = ceil_div(depth, kTerms<bfloat16>), kernel_size = from.size(2);
  const Tensor to = empty(from, {from.size(0), from.size(1), kernel_size, kernel_size, pairs, kPanel, 2});
  const bfloat16* in = data<bfloat16>(from);
  bfloat16* out = mutable_data<bfloat16>(to);
  const int64_t taps = from.size(0) * from.size(1) * kernel_size * kernel_size;
  for (int64_t tap = 0; tap < taps; ++tap, in += depth * kPanel)
    for (int64_t k = 0; k < 2 * pairs; k += 2)
      for (int64_t n = 0; n < kPanel; ++n) {
        *out++ = in[k * kPanel + n];
        *out++ = k + 1 < depth ? in[(k + 1) * kPanel + n] : bfloat16{};
      }
  return ConstTensor(to, true);
}

// Packed filters as products read them: of bfloat16 `in_pairs`, or in float32.
inline ConstTensor packed_filters(const Tensor& packed, bool in_pairs) {
  return in_pairs ? pair_filters(packed) : ConstTensor(packed);
}

// Uninitialised memory of the calling thread for `count` values, kept between tasks. Uses at the same time need
// different slots; the pointer is valid until the next call with this slot.
template <typename T>
T* scratch(int slot, int64_t count) {
  struct Buffer {
    void* memory = nullptr;
    size_t bytes = 0;
    ~Buffer() { std::free(memory); }
  };
  thread_local Buffer buffers[12];
  Buffer& buffer = buffers[slot];
  const size_t bytes = (static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T) + 63) / 64 * 64;
  if (bytes > buffer.bytes) {
    std::free(buffer.memory);
    buffer.bytes = 0;
    buffer.memory = std::aligned_alloc(64, bytes);
    if (buffer.memory == nullptr) throw std::bad_alloc();
#if defined(__SANITIZE_ADDRESS__)
    std::memset(buffer.memory, 0x7f, bytes);  // poison: uninitialised reads overflow
#endif
    buffer.bytes = bytes;
  }
  return static_cast<T*>(buffer.memory);
}

}  // namespace hne
