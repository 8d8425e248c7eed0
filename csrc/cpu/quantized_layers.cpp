#include "quantized_layers.h"

#include <variant>

#include "layers_registry.h"
#include "quantized_bottleneck.h"

namespace hne {
namespace {

// The numbers that describe a layer, in the order of hne_kernels/ops/quantized_layers.py.
struct QuantizedSpec {
  enum Kind : int64_t { convolution, bottleneck, pool_linear, quantize };
  int64_t kind, branches, in_channels, middle, out_channels, kernel_size, stride, padding, replicate;
  int64_t identity, projected, returned;

  static constexpr int64_t kNumbers = 12;
  explicit QuantizedSpec(const int64_t* n)
      : kind(n[0]),
        branches(n[1]),
        in_channels(n[2]),
        middle(n[3]),
        out_channels(n[4]),
        kernel_size(n[5]),
        stride(n[6]),
        padding(n[7]),
        replicate(n[8]),
        identity(n[9]),
        projected(n[10]),
        returned(n[11]) {
    STD_TORCH_CHECK(kind >= convolution && kind <= quantize, "numbers: expected a kind from 0 to 3");
    STD_TORCH_CHECK(branches >= 1 && in_channels >= 1 && middle >= 0 && out_channels >= 1 && kernel_size >= 1 &&
                        stride >= 1 && padding >= 0 && replicate >= 1,
                    "numbers: out of range");
    STD_TORCH_CHECK(
        (kind == quantize || in_channels % kGroup == 0) && middle % kGroup == 0 && out_channels % kGroup == 0,
        "numbers: expected whole groups of channels");
  }
};

// Images [batch, channel, height, width] as features of one branch.
struct Quantize {
  int64_t channels, out_channels;
  ConstTensor scale, zero;  // [1] each
};

struct QuantizedSequence {
  std::vector<QuantizedConvolution> stem;
  std::vector<QuantizedBottleneckWeights> bottlenecks;
};

// The mean over the pixels of each feature map, and a linear layer, whose output is float32 if `logits`.
struct QuantizedPoolLinear {
  int64_t branches;
  ConstTensor scale, numbers;  // of the mean, [branches][1] and [branches][2]: factor; offset for a pixel, zero point
  QuantizedConvolution linear;
  bool logits;
};

struct QuantizedStage {
  std::variant<Quantize, QuantizedConvolution, QuantizedSequence, QuantizedPoolLinear> operation;
  bool returned;
};

class PreparedQuantizedLayers {
 public:
  PreparedQuantizedLayers(const std::vector<std::optional<Tensor>>& weights, const std::vector<int64_t>& numbers) {
    const int64_t count = int64_t(numbers.size()) / QuantizedSpec::kNumbers;
    STD_TORCH_CHECK(count > 0 && count * QuantizedSpec::kNumbers == int64_t(numbers.size()), "numbers: expected ",
                    QuantizedSpec::kNumbers, " for each of one or more layers");
    QuantizedTensors tensors(weights);
    for (int64_t i = 0; i < count; ++i) {
      const QuantizedSpec spec(&numbers[i * QuantizedSpec::kNumbers]);
      STD_TORCH_CHECK(spec.kind != QuantizedSpec::quantize || i == 0, "numbers: expected images at the first layer");
      add(spec, tensors, i + 1 == count);
      stages_.back().returned = spec.returned != 0;
    }
    STD_TORCH_CHECK(tensors.at_end(), "weights: more than the layers need");
    STD_TORCH_CHECK(stages_.back().returned, "numbers: expected that the last layer's features are returned");
  }

  std::vector<Tensor> operator()(const Tensor& x) const {
    const bool images = std::holds_alternative<Quantize>(stages_.front().operation);
    STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == (images ? ScalarType::Float : ScalarType::Byte),
                    "x: expected float32 images or uint8 features, on the CPU");
    STD_TORCH_CHECK(x.dim() == (images ? 4 : 5), "x: expected 5 dimensions, or 4 of images");
    std::vector<Tensor> results;
    calls_.lead([&] { results = forward(x); });
    return results;
  }

 private:
  void add(const QuantizedSpec& spec, QuantizedTensors& tensors, bool last) {
    const auto convolution = [&](int64_t kernel_size, int64_t stride, int64_t padding, int64_t replicate) {
      return QuantizedConvolution(tensors, spec.branches, spec.in_channels, spec.out_channels, kernel_size, stride,
                                  padding, replicate);
    };
    if (spec.kind == QuantizedSpec::quantize) {
      ConstTensor scale = tensors.take(ScalarType::Float, {1}), zero = tensors.take(ScalarType::Int, {1});
      STD_TORCH_CHECK(spec.out_channels >= spec.in_channels, "numbers: expected at least the channels of the images");
      stages_.push_back({Quantize{spec.in_channels, spec.out_channels, scale, zero}, false});
    } else if (spec.kind == QuantizedSpec::convolution) {
      stages_.push_back({convolution(spec.kernel_size, spec.stride, spec.padding, spec.replicate), false});
    } else if (spec.kind == QuantizedSpec::pool_linear) {
      ConstTensor scale = tensors.take(ScalarType::Float, {spec.branches, 1});
      ConstTensor zeros = tensors.take(ScalarType::Int, {spec.branches, 2});
      // The pooled features of an output branch are its own.
      stages_.push_back({QuantizedPoolLinear{spec.replicate, scale, zeros, convolution(1, 1, 0, 1), last}, false});
    } else {
      QuantizedBottleneckWeights bottleneck(tensors, spec.branches, spec.in_channels, spec.middle, spec.out_channels,
                                            spec.kernel_size, spec.stride, spec.replicate, spec.identity != 0,
                                            spec.projected != 0);
      QuantizedSequence* sequence = stages_.empty() || stages_.back().returned
                                        ? nullptr
                                        : std::get_if<QuantizedSequence>(&stages_.back().operation);
      if (sequence != nullptr && spec.replicate == 1) {
        sequence->bottlenecks.push_back(bottleneck);
      } else {
        std::vector<QuantizedConvolution> stem;
        if (spec.branches == 1) stem = take_convolutions();
        stages_.push_back({QuantizedSequence{std::move(stem), {bottleneck}}, false});
      }
    }
  }

  // Removes the convolutions of one branch at the end of the stages.
  std::vector<QuantizedConvolution> take_convolutions() {
    std::vector<QuantizedConvolution> taken;
    while (!stages_.empty() && !stages_.back().returned) {
      const auto* convolution = std::get_if<QuantizedConvolution>(&stages_.back().operation);
      if (convolution == nullptr || convolution->branches() != 1) break;
      taken.insert(taken.begin(), *convolution);
      stages_.pop_back();
    }
    return taken;
  }

  std::vector<Tensor> forward(const Tensor& x_in) const {
    const auto sizes = x_in.sizes();
    std::vector<int64_t> shape(sizes.begin(), sizes.end());
    Tensor x = x_in.dim() == 5 ? torch::stable::contiguous(x_in) : x_in;
    std::vector<Tensor> results;
    for (const QuantizedStage& stage : stages_) {
      x = std::visit([&](const auto& operation) { return compute(operation, x, shape); }, stage.operation);
      if (stage.returned) results.push_back(x);
    }
    return results;
  }

  Tensor bytes(const std::vector<int64_t>& shape) const { return empty(byte_, shape); }

  Tensor compute(const Quantize& q, const Tensor& x, std::vector<int64_t>& shape) const {
    STD_TORCH_CHECK(shape[1] == q.channels && shape[2] > 0 && shape[3] > 0, "x: does not have the channels of images");
    const int64_t batch = shape[0], height = shape[2], width = shape[3];
    const auto strides = x.strides();
    const int64_t batch_stride = strides[0], channel_stride = strides[1];
    const int64_t row_stride = strides[2], column_stride = strides[3];
    shape = {1, batch, height, width, q.out_channels};
    const Tensor out = bytes(shape);
    const float* const in = data<float>(x);
    uint8_t* const to = mutable_data<uint8_t>(out);
    const int64_t rows = batch * height, task_rows = std::max<int64_t>(1, kTaskPixels / width);
    parallel_tasks(ceil_div(rows, task_rows), [&](int64_t task) {
      for (int64_t r = task * task_rows; r < std::min(rows, (task + 1) * task_rows); ++r)
        quantized_kernels().quantize_row({in + r / height * batch_stride + r % height * row_stride, channel_stride,
                                          column_stride, width, q.channels, *q.scale.data<float>(),
                                          *q.zero.data<int32_t>(), to + r * width * q.out_channels, q.out_channels});
    });
    return out;
  }

  Tensor compute(const QuantizedConvolution& convolution, const Tensor& x, std::vector<int64_t>& shape) const {
    const Geometry g = convolution.geometry(shape);
    shape = g.out_shape();
    const Tensor out = bytes(shape);
    convolution.forward(g, data<uint8_t>(x), mutable_data<uint8_t>(out));
    return out;
  }

  Tensor compute(const QuantizedSequence& sequence, const Tensor& x, std::vector<int64_t>& shape) const {
    const ConvolutionChain<uint8_t> stem(sequence.stem, shape);
    std::vector<Bottleneck<uint8_t>> bottlenecks;
    bottlenecks.reserve(sequence.bottlenecks.size());
    for (const QuantizedBottleneckWeights& weights : sequence.bottlenecks) {
      bottlenecks.emplace_back(weights, shape);
      shape = bottlenecks.back().geometry().out_shape();
    }
    const Tensor out = bytes(shape);
    forward_bottlenecks<uint8_t>(stem, bottlenecks, data<uint8_t>(x), mutable_data<uint8_t>(out), nullptr, out);
    return out;
  }

  Tensor compute(const QuantizedPoolLinear& p, const Tensor& x, std::vector<int64_t>& shape) const {
    const int64_t pixels = shape[2] * shape[3], channels = shape[4], batch = shape[1], branches = p.linear.branches();
    STD_TORCH_CHECK(pixels > 0, "x: expected feature maps of at least one pixel");
    STD_TORCH_CHECK(shape[0] == ceil_div(branches, p.branches), "x: does not have the branches of the layer");
    const uint8_t* const in = data<uint8_t>(x);
    const Tensor pooled = bytes({branches, batch, 1, 1, channels});
    uint8_t* const means = mutable_data<uint8_t>(pooled);
    parallel_tasks(branches * batch, [&](int64_t map) {
      const int64_t branch = map / batch;
      const int32_t* const numbers = p.numbers.data<int32_t>() + 2 * branch;
      quantized_kernels().mean({in + (branch / p.branches * batch + map % batch) * pixels * channels, pixels, channels,
                                int32_t(pixels * numbers[0]), p.scale.data<float>()[branch] / float(pixels), numbers[1],
                                means + map * channels});
    });
    p.linear.geometry({branches, batch, 1, 1, channels});
    shape = {branches, batch, 1, 1, p.linear.out_channels()};
    if (p.logits) {
      const Tensor out = torch::stable::empty({branches, batch, p.linear.out_channels()}, ScalarType::Float);
      p.linear.multiply(batch, means, mutable_data<float>(out));
      return out;
    }
    const Tensor out = bytes(shape);
    p.linear.multiply(batch, means, mutable_data<uint8_t>(out));
    return out;
  }

  static constexpr int64_t kTaskPixels = 1024;                       // of images
  const Tensor byte_ = torch::stable::empty({0}, ScalarType::Byte);  // gives the dtype of features
  std::vector<QuantizedStage> stages_;
  RepeatedCalls calls_;
};

// Never destroyed: Python removes layers until the process ends.
LayersRegistry<PreparedQuantizedLayers>& registry() {
  static auto* registry = new LayersRegistry<PreparedQuantizedLayers>;
  return *registry;
}

int64_t prepare_quantized_layers(const std::vector<std::optional<Tensor>>& weights,
                                 const std::vector<int64_t>& numbers) {
  return registry().add(std::make_shared<const PreparedQuantizedLayers>(weights, numbers));
}

std::vector<Tensor> quantized_layers(const Tensor& x, int64_t layers) { return (*registry().get(layers))(x); }

}  // namespace

void forget_quantized_layers(int64_t handle) { registry().remove(handle); }

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) {
  m.impl("prepare_quantized_layers", TORCH_BOX(&prepare_quantized_layers));
  m.impl("quantized_layers", TORCH_BOX(&quantized_layers));
}

}  // namespace hne
