// Helpers for tensors of the stable ABI, for every device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "panel.h"

namespace hne {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Protects memory accesses. hne_kernels/checks.py runs first and has the detailed messages.
inline void check_shape(const char* name, const Tensor& t, const std::vector<int64_t>& expected) {
  const auto sizes = t.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), name, ": unexpected shape");
}

inline Tensor round_to(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
const T* data(const std::optional<Tensor>& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}
template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline void check_prefix_sizes(const std::vector<int64_t>& sizes, int64_t models) {
  int64_t previous = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size > previous && size <= models, "sizes: expected to rise from 1 to the number of models");
    previous = size;
  }
}

}  // namespace hne
