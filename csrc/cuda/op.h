// Shared by every CUDA op: argument checks, dtype dispatch, 16-byte vectors.
#pragma once

#include <cmath>
#include <string>

#include "clamp.h"
#include "device.h"

namespace hne {

inline void check_kind(const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(on_device(t), name, ": expected a CUDA tensor");
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index(), name, ": expected the device of the first tensor");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of the first tensor");
}
inline void check_kind(const char* name, const std::optional<Tensor>& t, const Tensor& like) {
  if (t.has_value()) check_kind(name, *t, like);
}

// Checks that `t` is a tensor of the shape, device and dtype of `like`.
inline void check_like(const char* name, const Tensor& t, const Tensor& like) {
  const auto sizes = like.sizes();
  check_shape(name, t, {sizes.begin(), sizes.end()});
  check_kind(name, t, like);
}

// Calls f(T{}), T being the element type of `t`. Kernels add up in float32 for every T.
template <typename F>
void dispatch(const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(half{});
    case ScalarType::BFloat16:
      return f(bfloat16{});
    default:
      STD_TORCH_CHECK(false, "expected float32, float16 or bfloat16");
  }
}

// Whether float32 products may use tf32 (10 bits of mantissa); hne_kernels/dispatch.py passes on torch's setting.
bool allow_tf32();

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether rows of each of these numbers of channels, from each of these addresses, split into 16-byte vectors.
template <typename T>
bool whole_vectors(std::initializer_list<int64_t> channels, std::initializer_list<const void*> pointers) {
  constexpr int64_t width = 16 / sizeof(T);
  return std::all_of(channels.begin(), channels.end(), [](int64_t c) { return c % width == 0; }) &&
         std::all_of(pointers.begin(), pointers.end(), aligned);
}

// Calls f(width) with the number of values in 16 bytes if `vectors`, else with 1.
template <typename T, typename F>
void dispatch_width(bool vectors, const F& f) {
  if (vectors)
    f(std::integral_constant<int, 16 / int(sizeof(T))>{});
  else
    f(std::integral_constant<int, 1>{});
}

template <typename T, int width>
struct alignas(sizeof(T) * width) Vector {
  T values[width];
};

// Values that one access moves: `width`, but at most 16 bytes.
template <typename T, int width>
constexpr int kPiece = width * int(sizeof(T)) < 16 ? width : 16 / int(sizeof(T));

template <int width, typename T>
HNE_DEVICE void load(float (&values)[width], const T* from) {
  constexpr int piece = kPiece<T, width>;
#pragma unroll
  for (int at = 0; at < width; at += piece) {
    const auto v = *reinterpret_cast<const Vector<T, piece>*>(from + at);
#pragma unroll
    for (int i = 0; i < piece; ++i) values[at + i] = float(v.values[i]);
  }
}

template <int width, typename T>
HNE_DEVICE void store(T* to, const float (&values)[width]) {
  constexpr int piece = kPiece<T, width>;
#pragma unroll
  for (int at = 0; at < width; at += piece) {
    Vector<T, piece> v;
#pragma unroll
    for (int i = 0; i < piece; ++i) v.values[i] = T(values[at + i]);
    *reinterpret_cast<Vector<T, piece>*>(to + at) = v;
  }
}

// NaN stays NaN.
HNE_DEVICE float clamp(float v, const Clamp<float>& range) { return minimum(maximum(v, range.low), range.high); }

// Gradient of clamp at `value`: zero where the clamp is flat. At a NaN the gradient passes unchanged, as in torch.
HNE_DEVICE float clamp_gradient(float gradient, float value, const Clamp<float>& range) {
  const float low = range.low == 0 ? 0.0f : NAN, high = range.high < INFINITY ? range.high : NAN;  // NAN: no bound
  return value <= low || value >= high ? 0.0f : gradient;
}

constexpr int kThreads = 256;  // of a block, unless a kernel says otherwise

}  // namespace hne
