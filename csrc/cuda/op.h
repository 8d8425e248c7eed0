// What every CUDA op needs: argument checks, dtype dispatch, vectors of 16 bytes.
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

// f(T{}) with T the type of the values of `t`; sums are kept in float32.
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

// Whether float32 may be multiplied with 10 bits of mantissa; set by hne_kernels/extension.py from torch's own setting.
bool allow_tf32();

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether rows of each of these numbers of channels, from each of these addresses, split into 16-byte vectors.
template <typename T>
bool whole_vectors(std::initializer_list<int64_t> channels, std::initializer_list<const void*> pointers) {
  constexpr int64_t width = 16 / sizeof(T);
  return std::all_of(channels.begin(), channels.end(), [](int64_t c) { return c % width == 0; }) &&
         std::all_of(pointers.begin(), pointers.end(), aligned);
}

// f(width), with as many values as 16 bytes hold or with 1.
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

// As many of `width` values as one access has, of at most 16 bytes.
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

// NaN stays NaN: both comparisons are then false.
HNE_DEVICE float clamp(float v, const Clamp<float>& range) {
  v = v < range.low ? range.low : v;
  return v > range.high ? range.high : v;
}

// The gradient behind an activation of `value`: none where that is flat. A NaN lets it pass, as in torch.
HNE_DEVICE float behind_activation(float gradient, float value, const Clamp<float>& range) {
  const bool flat = value <= range.low || (value >= range.high && range.high < INFINITY);
  return range.low == 0 && flat ? 0.0f : gradient;
}

constexpr int kThreads = 256;  // of a block, where nothing speaks for another number

}  // namespace hne
