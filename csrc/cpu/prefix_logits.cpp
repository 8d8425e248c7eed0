// The linear heads of all leaves, and the ensembles' means while the members' logits are in the cache.
#include "branch_conv2d.h"
#include "prefix.h"

namespace hne {
namespace {

std::tuple<Tensor, Tensor> prefix_logits(const Tensor& features_in, const Tensor& weight_in,
                                         const std::optional<Tensor>& bias_in, const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(features_in.dim() == 3 && weight_in.dim() == 3, "features, weight: expected 3 dimensions");
  const int64_t models = features_in.size(0), batch = features_in.size(1), channels = features_in.size(2);
  const int64_t classes = weight_in.size(1);
  check_shape("weight", weight_in, {models, classes, channels});
  check_kind("features", features_in, features_in);
  check_kind("weight", weight_in, features_in);
  if (bias_in.has_value()) {
    check_shape("bias", *bias_in, {models, classes});
    check_kind("bias", *bias_in, features_in);
  }
  check_prefix_sizes(sizes, models);
  const Tensor features = torch::stable::contiguous(widen(features_in));
  const Tensor weight = torch::stable::contiguous(widen(weight_in));
  const std::optional<Tensor> bias = contiguous(widen(bias_in));
  Tensor member = empty(features, {models, batch, classes});
  Tensor prefix = empty(features, {int64_t(sizes.size()), batch, classes});
  dispatch(features, [&](auto type) {
    using T = decltype(type);
    const int64_t panel_stride = channels * kPanel, head_size = ceil_div(classes, kPanel) * panel_stride;
    const Tensor packed = empty(weight, {models * head_size});
    parallel_tasks(models, [&](int64_t n) {
      pack(data<T>(weight) + n * classes * channels, classes, channels, 1, channels, 1, panel_stride,
           mutable_data<T>(packed) + n * head_size);
    });
    const int64_t chunks = ceil_div(batch, kBlockRows);
    parallel_tasks(models * chunks, [&](int64_t task) {
      const int64_t n = task / chunks, first = task % chunks * kBlockRows, count = std::min(kBlockRows, batch - first);
      T** out_rows = scratch<T*>(1, kBlockRows);
      for (int64_t m = 0; m < count; ++m) out_rows[m] = mutable_data<T>(member) + (n * batch + first + m) * classes;
      const T* rows = data<T>(features) + (n * batch + first) * channels;
      const Tap<T> tap{&rows, data<T>(packed) + n * head_size, panel_stride, channels, channels};
      const T* head_bias = bias.has_value() ? data<T>(bias) + n * classes : nullptr;
      kernels<T>().gemm({&tap, 1, count, classes, out_rows, head_bias, nullptr, Clamp<T>{}});
    });
    const int64_t values = batch * classes, share = 2048;
    parallel_tasks(ceil_div(values, share), [&](int64_t task) {
      const int64_t first = task * share, count = std::min(share, values - first);
      prefix_means(data<T>(member) + first, values, models, sizes, scratch<T>(0, count), count,
                   mutable_data<T>(prefix) + first, values);
    });
  });
  return {round_to(member, features_in.scalar_type()), round_to(prefix, features_in.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) { m.impl("prefix_logits", TORCH_BOX(&prefix_logits)); }

}  // namespace hne
