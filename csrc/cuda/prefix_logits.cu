// The linear heads of all leaves as one batched matrix product, then the ensembles' means.
//
//   N members, P ensembles, B samples, C features, L classes   bytes moved at least                      multiply-adds
//                                                              (B C + L C + B L (2 + P / N)) N values    N B L C
#include "convolution.h"
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
  const Sizes checked(sizes, models);
  const Device device(features_in);
  const Tensor features = torch::stable::contiguous(features_in), weight = torch::stable::contiguous(weight_in);
  const std::optional<Tensor> bias = contiguous(bias_in);
  Tensor member = torch::stable::new_empty(features, {models, batch, classes});
  Tensor prefix = torch::stable::new_empty(features, {int64_t(sizes.size()), batch, classes});
  // A head is a 1x1 convolution of a map of one pixel.
  Geometry g{};
  g.parents = g.branches = models, g.batch = batch, g.in_channels = channels, g.out_channels = classes;
  g.height = g.width = g.out_height = g.out_width = g.kernel_size = g.stride = g.replicate = 1;
  dispatch(features, [&](auto type) {
    using T = decltype(type);
    const Forward<T, false> problem{.s = Shape(g),
                                    .left_base = data<T>(features),
                                    .right_base = data<T>(weight),
                                    .bias = data<T>(bias),
                                    .out = mutable_data<T>(member)};
    run_forward(device, problem);
    run_prefix_means<T>(device, member, prefix, checked);
  });
  return {member, prefix};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) { m.impl("prefix_logits", TORCH_BOX(&prefix_logits)); }

}  // namespace hne
