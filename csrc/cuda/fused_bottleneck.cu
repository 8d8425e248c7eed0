// A bottleneck or inverted residual with batch norm folded into its weights (inference): in one kernel
// (fused_bottleneck_kernel.cu), or where that has no room, as three or four convolutions.
//
//   G branches, M output pixels, N input pixels, E expanded channels   bytes moved at least
//   in one kernel                                                      x + weights + out
//   as convolutions                                                    x + weights + out + 2 G (N + M) E values
//                                                                      (+ x + 2 out for a shortcut)
#include "bottleneck.h"
#include "convolution.h"

namespace hne {
namespace {

template <typename T>
void run_composed(const Device& device, const Geometry& g, const Bottleneck<T>& b, const Tensor& like) {
  Geometry expand = g, filter = g, project = g, shortcut = g;
  expand.kernel_size = expand.stride = 1, expand.padding = 0;
  expand.out_height = g.height, expand.out_width = g.width, expand.out_channels = b.middle;
  const Tensor expanded = torch::stable::new_empty(like, expand.out_shape());
  dense_forward_packed(device, Convolution<T>{.s = Shape(expand),
                                              .range = b.range,
                                              .x = b.x,
                                              .filters = b.expand,
                                              .bias = b.expand_bias,
                                              .out = mutable_data<T>(expanded)});

  filter.replicate = 1, filter.parents = g.branches, filter.in_channels = filter.out_channels = b.middle;
  const Tensor filtered = torch::stable::new_empty(like, filter.out_shape());
  depthwise_forward(device, Convolution<T>{.s = Shape(filter),
                                           .range = b.range,
                                           .x = data<T>(expanded),
                                           .filters = b.depthwise,
                                           .bias = b.depthwise_bias,
                                           .out = mutable_data<T>(filtered)});

  std::optional<Tensor> residual;  // owns the memory of `add`
  const T* add = b.identity ? b.x : nullptr;
  int add_replicate = int(g.replicate);
  if (b.shortcut != nullptr) {
    shortcut.kernel_size = 1, shortcut.padding = 0;
    residual = torch::stable::new_empty(like, g.out_shape());
    dense_forward_packed(device, Convolution<T>{.s = Shape(shortcut),
                                                .x = b.x,
                                                .filters = b.shortcut,
                                                .bias = b.shortcut_bias,
                                                .out = mutable_data<T>(*residual)});
    add = data<T>(residual), add_replicate = 1;
  }

  project = filter;
  project.kernel_size = project.stride = 1, project.padding = 0, project.out_channels = g.out_channels;
  project.height = g.out_height, project.width = g.out_width;
  dense_forward_packed(device,
                       Convolution<T>{.s = Shape(project),
                                      .range = b.final_range,
                                      .x = data<T>(filtered),
                                      .filters = b.project,
                                      .bias = b.project_bias,
                                      .out = b.out},
                       add, add_replicate);
}

Tensor fused_bottleneck(const Tensor& x_in, const Tensor& expand_in, const Tensor& expand_bias_in,
                        const Tensor& depthwise_in, const Tensor& depthwise_bias_in, const Tensor& project_in,
                        const Tensor& project_bias_in, const std::optional<Tensor>& shortcut_in,
                        const std::optional<Tensor>& shortcut_bias_in, int64_t stride, int64_t replicate,
                        const std::string& activation, bool identity, const std::string& final_activation) {
  const auto sizes = x_in.sizes();
  const Geometry g =
      bottleneck_geometry({sizes.begin(), sizes.end()}, expand_in, expand_bias_in, depthwise_in, depthwise_bias_in,
                          project_in, project_bias_in, shortcut_in, shortcut_bias_in, stride, replicate, identity);
  check_kind("x", x_in, x_in);
  const auto prepare = [&](const Tensor& t) {
    check_kind("weights", t, x_in);
    return torch::stable::contiguous(t);
  };
  const auto prepare_optional = [&](const std::optional<Tensor>& t) {
    return t.has_value() ? std::optional<Tensor>(prepare(*t)) : std::nullopt;
  };
  const Shape shape(g);
  Geometry middle = g;
  middle.in_channels = middle.out_channels = depthwise_in.size(3);
  Shape{middle};  // raises where 32 bits are too few
  const Device device(x_in);
  const Tensor x = prepare(x_in), expand = prepare(expand_in), expand_bias = prepare(expand_bias_in);
  const Tensor depthwise = prepare(depthwise_in), depthwise_bias = prepare(depthwise_bias_in);
  const Tensor project = prepare(project_in), project_bias = prepare(project_bias_in);
  const std::optional<Tensor> shortcut = prepare_optional(shortcut_in),
                              shortcut_bias = prepare_optional(shortcut_bias_in);
  Tensor out = torch::stable::new_empty(x, g.out_shape());
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const Bottleneck<T> b{shape,
                          data<T>(x),
                          data<T>(expand),
                          data<T>(expand_bias),
                          data<T>(depthwise),
                          data<T>(depthwise_bias),
                          data<T>(project),
                          data<T>(project_bias),
                          data<T>(shortcut),
                          data<T>(shortcut_bias),
                          mutable_data<T>(out),
                          int(depthwise.size(3)),
                          identity,
                          Clamp<float>::named(activation),
                          Clamp<float>::named(final_activation)};
    if (!run_fused(device, b)) run_composed(device, g, b, x);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) { m.impl("fused_bottleneck", TORCH_BOX(&fused_bottleneck)); }

}  // namespace hne
