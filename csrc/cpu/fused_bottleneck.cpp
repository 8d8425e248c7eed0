// A whole bottleneck (inference).
#include "bottleneck_chain.h"

namespace hne {
namespace {

Tensor fused_bottleneck(const Tensor& x_in, const Tensor& expand, const Tensor& expand_bias, const Tensor& depthwise,
                        const Tensor& depthwise_bias, const Tensor& project, const Tensor& project_bias,
                        const std::optional<Tensor>& shortcut, const std::optional<Tensor>& shortcut_bias,
                        int64_t stride, int64_t replicate, const std::string& activation, bool identity,
                        const std::string& final_activation) {
  const std::optional<Tensor> tensors[] = {expand,  expand_bias,  depthwise, depthwise_bias,
                                           project, project_bias, shortcut,  shortcut_bias};
  const BottleneckWeights weights(tensors, stride, replicate, activation, identity, final_activation);
  check_kind("x", x_in, expand);
  const Tensor x = torch::stable::contiguous(widen(x_in));
  const auto sizes = x.sizes();
  const std::vector<int64_t> shape(sizes.begin(), sizes.end());
  const Tensor out = empty(x, weights.geometry(shape).out_shape());
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    std::vector<int64_t> in_shape = shape;
    forward_bottlenecks<T>(ConvolutionChain<T>({}, in_shape), {Bottleneck<T>(weights, shape)}, data<T>(x),
                           mutable_data<T>(out), nullptr, out);
  });
  return round_to(out, x_in.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) { m.impl("fused_bottleneck", TORCH_BOX(&fused_bottleneck)); }

}  // namespace hne
