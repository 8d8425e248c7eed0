// The linear heads of all leaves as one batched matrix product, then the mean logits of the ensembles.
//
//   N members, P ensembles, B samples, C features, L classes   bytes moved at least                      multiply-adds
//                                                              (B C + L C + B L (2 + P / N)) N values    N B L C
#include "convolution.h"
#include "prefix.h"
#include "small_product.h"
#include "weight_layout.h"

namespace hne {
namespace {

std::tuple<Tensor, Tensor> prefix_logits(const Tensor& features_in, const Tensor& weight_in,
                                         const std::optional<Tensor>& bias_in, const std::vector<int64_t>& sizes) {
  const Geometry g = heads_geometry(features_in, weight_in, bias_in);
  check_kind("features", features_in, features_in);
  check_kind("weight", weight_in, features_in);
  check_kind("bias", bias_in, features_in);
  const Sizes checked(sizes, g.branches);
  const Shape shape(g);
  const Device device(features_in);
  const Tensor features = torch::stable::contiguous(features_in);
  const TapsFirst weight = filters_in_place(weight_in);
  const std::optional<Tensor> bias = contiguous(bias_in);
  Tensor member = torch::stable::new_empty(features, {g.branches, g.batch, g.out_channels});
  Tensor prefix = torch::stable::new_empty(features, {int64_t(sizes.size()), g.batch, g.out_channels});
  dispatch(features, [&](auto type) {
    using T = decltype(type);
    const Convolution<T> heads{.s = shape,
                               .x = data<T>(features),
                               .filters = data<T>(weight.values),
                               .strides = weight.strides,
                               .bias = data<T>(bias),
                               .out = mutable_data<T>(member)};
    if (!run_small_product<T, false>(device, heads)) dense_forward(device, heads);
    run_prefix_means<T>(device, member, prefix, checked);
  });
  return {member, prefix};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) { m.impl("prefix_logits", TORCH_BOX(&prefix_logits)); }

}  // namespace hne
