// Winograd's convolution F(2x2, 3x3) for dense 3x3 kernels with stride 1 (Lavin & Gray, "Fast Algorithms for
// Convolutional Neural Networks", 2016): 16 products per 2x2 outputs and pair of channels instead of 36. The products
// are matrix products, one for each of 16 frequencies.
#pragma once

#include <memory>

#include "branch_conv2d.h"

namespace hne {

// The filters of one branch at the 16 frequencies, in the order in which a product reads them.
struct WinogradFilters {
  void* values;
  explicit WinogradFilters(size_t bytes);
  ~WinogradFilters();
  WinogradFilters(const WinogradFilters&) = delete;
  WinogradFilters& operator=(const WinogradFilters&) = delete;
};

// Filters that are used many times (inference), by branch.
using WinogradWeights = std::vector<std::shared_ptr<const WinogradFilters>>;

// Whether Winograd's convolution takes less time than the direct one, with weights that are transformed already, or in
// every call.
bool prefers_winograd(const Geometry& g, bool transformed);

// Transforms packed filters [branch][panel][3][3][in_channels][kPanel]. Equal filters share memory: those of a smaller
// ensemble are filters of the whole one.
template <typename T>
WinogradWeights transform_packed(const T* packed, int64_t branches, int64_t in_channels, int64_t out_channels);

// out = clamp(conv(x, weights) + bias + add), as convolve_packed().
template <typename T>
void convolve_winograd(const Geometry& g, const T* x, const WinogradWeights& weights, const T* bias, Summand<T> add,
                       Clamp<T> clamp, T* out);

// The same as convolve(), convolve_input() and convolve_weight(), for feature maps in memory.
template <typename T>
void convolve_winograd(const Geometry& g, const T* x, const Tensor& weight, const T* bias, T* out,
                       const RowsWritten& written);
template <typename T>
void convolve_winograd_input(const Geometry& g, const T* grad, const Tensor& weight, T* out,
                             const RowsWritten& written);
template <typename T>
void convolve_winograd_weight(const Geometry& g, const T* grad, const T* x, const Tensor& out);

}  // namespace hne
