// Depthwise branch convolution of a map that is normalised as it is read, with the statistics of what is written.
#include "branch_depthwise_conv2d.h"
#include "conv_norm.h"

namespace hne {
namespace {

struct Depthwise {
  static Geometry geometry(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding, int64_t replicate) {
    STD_TORCH_CHECK(weight.dim() == 4, "weight: expected 4 dimensions");
    const Geometry g = forward_geometry(x, weight.size(0), weight.size(1), weight.size(2), stride, padding, replicate);
    STD_TORCH_CHECK(g.out_channels == g.in_channels, "weight: channels do not match x");
    check_shape("weight", weight, weight_shape(g));
    return g;
  }
  static std::vector<int64_t> weight_shape(const Geometry& g) {
    return {g.branches, g.in_channels, g.kernel_size, g.kernel_size};
  }
  static int64_t block_rows(int64_t pixels) { return std::max<int64_t>(pixels, 1); }  // a sample

  template <typename T>
  static void forward(const Geometry& g, const PrologueInput<T>& x, const Tensor& weight, T* out,
                      const RowsWritten& written) {
    filter<T>(g, x, weight, nullptr, out, written);
  }
  template <typename T>
  static void backward(const Geometry& g, const PrologueInput<T>& grad, const PrologueInput<T>& x, const Tensor& weight,
                       T* grad_x, const Tensor* grad_weight, const RowsWritten& written) {
    filter_backward(g, grad, x, weight, grad_x, grad_weight, written);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) {
  m.impl("branch_depthwise_conv2d_stats", TORCH_BOX(&ConvNorm<Depthwise>::forward));
  m.impl("branch_depthwise_conv2d_stats_backward", TORCH_BOX(&ConvNorm<Depthwise>::backward));
}

}  // namespace hne
