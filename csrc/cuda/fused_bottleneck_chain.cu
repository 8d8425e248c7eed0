// Consecutive bottlenecks on small feature maps, and the mean over each map (inference): in one kernel
// (fused_bottleneck_chain_kernel.cu), or where that does not fit, layer by layer.
#include <array>

#include "bottleneck_chain.h"

namespace hne {
namespace {

// The numbers that describe a layer, in the order of hne_kernels/ops/fused_bottleneck_chain.py.
struct Layer {
  static constexpr size_t kNumbers = 4;
  int64_t replicate;
  std::string activation, final_activation;
  bool identity;

  explicit Layer(const int64_t* n)
      : replicate(n[0]), activation(named(n[1])), final_activation(named(n[3])), identity(n[2] != 0) {}
  static std::string named(int64_t number) {
    constexpr const char* kNames[] = {"none", "relu", "relu6"};
    STD_TORCH_CHECK(number >= 0 && number < 3, "activation: expected a number from 0 to 2");
    return kNames[number];
  }
};

using Weights = std::vector<std::optional<Tensor>>;

// The layers one by one, and the mean, through PyTorch's dispatcher.
Tensor compose(Tensor x, const Weights& weights, const std::vector<Layer>& layers, bool pool) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto* const w = &weights[8 * i];
    const Layer& l = layers[i];
    std::array<StableIValue, 14> stack{from(x),           from(*w[0]),
                                       from(*w[1]),       from(*w[2]),
                                       from(*w[3]),       from(*w[4]),
                                       from(*w[5]),       from(w[6]),
                                       from(w[7]),        from(int64_t{1}),
                                       from(l.replicate), from(l.activation),
                                       from(l.identity),  from(l.final_activation)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("hne::fused_bottleneck", "", stack.data(), TORCH_ABI_VERSION));
    x = to<Tensor>(stack[0]);
  }
  if (!pool) return x;
  std::array<StableIValue, 4> stack{from(x), from(std::optional<std::vector<int64_t>>({2, 3})), from(true),
                                    from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mean", "dim", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

Tensor fused_bottleneck_chain(const Tensor& x_in, const Weights& weights_in, const std::vector<int64_t>& numbers,
                              bool pool) {
  STD_TORCH_CHECK(!numbers.empty() && numbers.size() % Layer::kNumbers == 0, "numbers: expected four for each layer");
  std::vector<Layer> layers;
  for (size_t i = 0; i < numbers.size(); i += Layer::kNumbers) layers.emplace_back(&numbers[i]);
  STD_TORCH_CHECK(weights_in.size() == 8 * layers.size(), "weights: expected eight for each layer");
  check_kind("x", x_in, x_in);
  const auto sizes = x_in.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  Weights weights;
  bool fits = layers.size() <= kMostLayers;
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto* const w = &weights_in[8 * i];
    for (int j = 0; j < 8; ++j) {
      STD_TORCH_CHECK(j >= 6 || w[j].has_value(), "weights: expected all but a shortcut");
      check_kind("weights", w[j], x_in);
      weights.push_back(contiguous(w[j]));
    }
    const Geometry g = bottleneck_geometry(shape, *w[0], *w[1], *w[2], *w[3], *w[4], *w[5], w[6], w[7], 1,
                                           layers[i].replicate, layers[i].identity);
    fits = fits && g.kernel_size == 3 && g.height <= kSide && g.width <= kSide && g.out_channels == g.in_channels &&
           g.in_channels <= 256 && w[2]->size(3) == weights_in[2]->size(3) && w[2]->size(3) <= 65536 &&
           (i == 0 || layers[i].replicate == 1);
    shape = g.out_shape();
  }
  const Device device(x_in);
  const Tensor x = torch::stable::contiguous(x_in);
  if (!fits) return compose(x, weights, layers, pool);
  const int64_t pixels = shape[2] * shape[3];
  const Tensor out =
      torch::stable::new_empty(x, pool ? std::vector<int64_t>{shape[0], shape[1], 1, 1, shape[4]} : shape);
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    Chain<T> c{};
    fits = shape[0] * shape[1] <= INT32_MAX / 2 &&
           whole_vectors<T>({shape[4], weights[2]->size(3)}, {data<T>(x), mutable_data<T>(out)});
    for (const auto& weight : weights) fits = fits && aligned(data<T>(weight));
    if (!fits) return;
    c.x = data<T>(x), c.out = mutable_data<T>(out), c.pool = pool;
    c.count = int(layers.size()), c.branches = int(shape[0]), c.batch = int(shape[1]);
    c.replicate = int(std::min<int64_t>(layers[0].replicate, std::max<int64_t>(shape[0], 1)));
    c.height = int(shape[2]), c.width = int(shape[3]), c.channels = int(shape[4]), c.middle = int(weights[2]->size(3));
    for (size_t i = 0; i < layers.size(); ++i) {
      const auto* const w = &weights[8 * i];
      c.layers[i] = {{data<T>(w[0]), data<T>(w[4]), data<T>(w[6])},
                     {data<T>(w[1]), data<T>(w[5]), data<T>(w[7])},
                     data<T>(w[2]),
                     data<T>(w[3]),
                     Clamp<float>::named(layers[i].activation),
                     Clamp<float>::named(layers[i].final_activation),
                     layers[i].identity};
    }
    fits = pixels * shape[0] * shape[1] == 0 || run_chain(device, c);
  });
  return fits ? out : compose(x, weights, layers, pool);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) {
  m.impl("fused_bottleneck_chain", TORCH_BOX(&fused_bottleneck_chain));
}

}  // namespace hne
