// The linear heads of all leaves, and the means over the first members while the members' logits are in the cache.
#include "branch_conv2d.h"
#include "prefix.h"

namespace hne {
namespace {

constexpr int64_t kPackedBytes = 512 * 1024;  // packed weights per task: fit the second cache beside the features
constexpr int64_t kValues = 2048;             // values of one member per task of the means

std::tuple<Tensor, Tensor> prefix_logits(const Tensor& features_in, const Tensor& weight_in,
                                         const std::optional<Tensor>& bias_in, const std::vector<int64_t>& sizes) {
  const Geometry g = heads_geometry(features_in, weight_in, bias_in);
  const int64_t models = g.branches, batch = g.batch, channels = g.in_channels, classes = g.out_channels;
  check_kind("features", features_in, features_in);
  check_kind("weight", weight_in, features_in);
  if (bias_in.has_value()) check_kind("bias", *bias_in, features_in);
  check_prefix_sizes(sizes, models);
  const Tensor features = torch::stable::contiguous(widen(features_in));
  const Tensor weight = contiguous_filters(widen(weight_in));
  const int64_t head_stride = weight.stride(0), class_stride = weight.stride(1);
  const std::optional<Tensor> bias = contiguous(widen(bias_in));
  Tensor member = empty(features, {models, batch, classes});
  Tensor prefix = empty(features, {int64_t(sizes.size()), batch, classes});
  dispatch(features, [&](auto type) {
    using T = decltype(type);
    // A task packs a group of panels of one head and applies it to the batch block by block: both stay in the cache.
    const int64_t panel_size = channels * kPanel, panels = ceil_div(classes, kPanel);
    const int64_t max_panels = kPackedBytes / int64_t(sizeof(T)) / std::max<int64_t>(panel_size, 1);
    const int64_t group_panels = std::clamp<int64_t>(max_panels, 1, std::max<int64_t>(panels, 1));
    const int64_t groups = ceil_div(panels, group_panels), blocks = ceil_div(batch, kBlockRows);
    parallel_tasks(batch == 0 ? 0 : models * groups, [&](int64_t task) {
      const int64_t n = task / groups, column = task % groups * group_panels * kPanel;
      const int64_t columns = std::min(group_panels * kPanel, classes - column);
      T* packed = scratch<T>(0, group_panels * panel_size);
      const T* const head = data<T>(weight) + n * head_stride + column * class_stride;
      pack(head, columns, channels, 1, class_stride, 1, panel_size, packed);
      const T* head_bias = bias.has_value() ? data<T>(bias) + n * classes + column : nullptr;
      T* const head_out = mutable_data<T>(member) + n * batch * classes + column;
      T** out_rows = scratch<T*>(1, kBlockRows);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = batch * block / blocks, count = batch * (block + 1) / blocks - first;
        for (int64_t m = 0; m < count; ++m) out_rows[m] = head_out + (first + m) * classes;
        const T* rows = data<T>(features) + (n * batch + first) * channels;
        const Tap<T> tap{&rows, packed, panel_size, channels, channels};
        PrefetchQueue<T> ahead;
        add_rows_after(ahead, data<T>(features), models * batch, channels, n * batch + first, count);
        kernels<T>().gemm({&tap, 1, count, columns, out_rows, head_bias, nullptr, Clamp<T>{}, &ahead});
      }
    });
    const int64_t values = batch * classes;
    parallel_tasks(ceil_div(values, kValues), [&](int64_t task) {
      const int64_t first = task * kValues, count = std::min(kValues, values - first);
      prefix_means(data<T>(member) + first, values, models, sizes, scratch<T>(0, count), count,
                   mutable_data<T>(prefix) + first, values);
    });
  });
  return {round_to(member, features_in.scalar_type()), round_to(prefix, features_in.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) { m.impl("prefix_logits", TORCH_BOX(&prefix_logits)); }

}  // namespace hne
