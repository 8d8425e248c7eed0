#include "fused_layers.h"

#include <memory>
#include <mutex>
#include <random>
#include <unordered_map>
#include <variant>

#include "bottleneck_chain.h"
#include "packed_convolution.h"

namespace hne {
namespace {

// The eight numbers that describe a layer to prepare_layers, in the order of hne_kernels/ops/fused_layers.py.
struct LayerSpec {
  enum Kind : int64_t { convolution, bottleneck, pool_linear };  // pool_linear: linear layer of the mean over pixels
  int64_t kind, stride, padding, replicate, activation, final_activation, identity, returned;

  static constexpr int64_t kNumbers = 8;
  explicit LayerSpec(const int64_t* n)
      : kind(n[0]),
        stride(n[1]),
        padding(n[2]),
        replicate(n[3]),
        activation(n[4]),
        final_activation(n[5]),
        identity(n[6]),
        returned(n[7]) {
    STD_TORCH_CHECK(kind >= convolution && kind <= pool_linear, "numbers: expected a kind from 0 to 2");
  }

  int64_t num_weights() const { return kind == bottleneck ? 8 : 2; }
};

std::string activation_name(int64_t number) {
  constexpr const char* kNames[] = {"none", "relu", "relu6"};
  STD_TORCH_CHECK(number >= 0 && number < 3, "activation: expected a number from 0 to 2");
  return kNames[number];
}

// The mean over the pixels of each feature map.
struct GlobalPool {};

// Consecutive bottlenecks, with the convolutions of one branch before them and the global pool after them, if any.
struct BottleneckSequence {
  std::vector<PackedConvolution> stem;
  std::vector<BottleneckWeights> bottlenecks;
  bool pool = false;
};

// Layers that are computed together: only the output of the last one is stored for the whole batch.
struct Stage {
  std::variant<GlobalPool, PackedConvolution, BottleneckSequence> operation;
  bool returned;  // whether the output is a result of the call
};

class PreparedLayers {
 public:
  PreparedLayers(const std::vector<std::optional<Tensor>>& weights, const std::vector<int64_t>& numbers) {
    const int64_t count = int64_t(numbers.size()) / LayerSpec::kNumbers;
    STD_TORCH_CHECK(count > 0 && count * LayerSpec::kNumbers == int64_t(numbers.size()),
                    "numbers: expected eight for each of one or more layers");
    STD_TORCH_CHECK(!weights.empty() && weights[0].has_value(), "weights: expected at least one");
    type_ = weights[0]->scalar_type();
    size_t used = 0;
    for (int64_t i = 0; i < count; ++i) {
      const LayerSpec layer(&numbers[i * LayerSpec::kNumbers]);
      STD_TORCH_CHECK(used + layer.num_weights() <= weights.size(), "weights: fewer than the layers need");
      add(layer, &weights[used]);
      used += layer.num_weights();
    }
    STD_TORCH_CHECK(used == weights.size(), "weights: more than the layers need");
    STD_TORCH_CHECK(stages_.back().returned, "numbers: expected that the last layer's features are returned");
    ends_linear_ = LayerSpec(&numbers[(count - 1) * LayerSpec::kNumbers]).kind == LayerSpec::pool_linear;
  }

  // The features of the layers to be returned, in order: [branch, batch, height, width, channel]; those of a last
  // linear layer: [branch, batch, channel].
  std::vector<Tensor> operator()(const Tensor& x_in) const {
    STD_TORCH_CHECK(x_in.is_cpu() && x_in.scalar_type() == type_, "x: expected the dtype of the weights, on the CPU");
    const Tensor x = widen(x_in);
    std::vector<Tensor> results;
    ThreadTeam::lead(
        [&] { results = dispatch(x, [&](auto type) { return forward_micro_batches<decltype(type)>(x); }); });
    for (Tensor& features : results) features = round_to(features, type_);
    return results;
  }

 private:
  // Adds the layer to the last stage where it can be computed together with it, else as a new stage.
  void add(const LayerSpec& layer, const std::optional<Tensor>* weights) {
    STD_TORCH_CHECK(weights[0].has_value() && weights[0]->scalar_type() == type_, "weights: expected one dtype");
    const std::string activation = activation_name(layer.activation);
    // A sequence ends where its features are returned.
    BottleneckSequence* sequence = stages_.empty() || stages_.back().returned
                                       ? nullptr
                                       : std::get_if<BottleneckSequence>(&stages_.back().operation);
    if (layer.kind != LayerSpec::bottleneck) {
      STD_TORCH_CHECK(weights[1].has_value(), "weights: expected a bias");
      if (layer.kind == LayerSpec::pool_linear) {
        if (sequence != nullptr)
          sequence->pool = true;
        else
          stages_.push_back({GlobalPool{}, false});
      }
      stages_.push_back(
          {PackedConvolution(*weights[0], *weights[1], layer.stride, layer.padding, layer.replicate, activation),
           layer.returned != 0});
      return;
    }
    const BottleneckWeights bottleneck(weights, layer.stride, layer.replicate, activation, layer.identity != 0,
                                       activation_name(layer.final_activation));
    if (sequence != nullptr && layer.replicate == 1) {
      sequence->bottlenecks.push_back(bottleneck);
      stages_.back().returned = layer.returned != 0;
    } else {
      std::vector<PackedConvolution> stem;
      if (bottleneck.branches() == 1) stem = take_convolutions();
      stages_.push_back({BottleneckSequence{std::move(stem), {bottleneck}}, layer.returned != 0});
    }
  }

  // Removes the convolutions of one branch at the end of the stages, as far as their features are not returned.
  std::vector<PackedConvolution> take_convolutions() {
    std::vector<PackedConvolution> taken;
    while (!stages_.empty() && !stages_.back().returned) {
      auto* convolution = std::get_if<PackedConvolution>(&stages_.back().operation);
      if (convolution == nullptr || convolution->branches() != 1) break;
      taken.insert(taken.begin(), *convolution);
      stages_.pop_back();
    }
    return taken;
  }

  // Takes one micro-batch after another through all stages: a stage's output is still in the cache when the next stage
  // reads it, and its memory is reused. If features between stages are returned, the batch stays whole.
  template <typename T>
  std::vector<Tensor> forward_micro_batches(Tensor x) const {
    const int64_t batch_dim = x.dim() == 4 ? 0 : 1, batch = x.size(batch_dim);
    const int64_t micro_batches = batch <= kMinMicroBatch ? 1 : ceil_div(batch, micro_batch_size<T>(x));
    if (micro_batches == 1) return forward<T>(x);
    Tensor out;
    for (int64_t i = 0; i < micro_batches; ++i) {
      const int64_t first = batch * i / micro_batches, count = batch * (i + 1) / micro_batches - first;
      const Tensor result = forward<T>(torch::stable::narrow(x, batch_dim, first, count)).back();
      if (i == 0) {
        std::vector<int64_t> shape(result.sizes().begin(), result.sizes().end());
        shape[1] = batch;
        out = empty(result, shape);
      }
      Tensor slice = torch::stable::narrow(out, 1, first, count);
      torch::stable::copy_(slice, result);
    }
    return {out};
  }

  // The most samples whose features between two stages take at most kMicroBatchBytes, but at least kMinMicroBatch; the
  // whole batch if features between stages are returned.
  template <typename T>
  int64_t micro_batch_size(const Tensor& x) const {
    std::vector<int64_t> shape = features_shape(x);
    const int64_t batch = shape[1];
    int64_t max_values = 0;  // of one sample between two stages
    for (const Stage& stage : stages_) {
      if (&stage == &stages_.back()) break;
      if (stage.returned) return batch;
      std::visit([&](const auto& operation) { update_shape(operation, shape); }, stage.operation);
      max_values = std::max(max_values, shape[0] * shape[2] * shape[3] * shape[4]);
    }
    return std::max(kMinMicroBatch, kMicroBatchBytes / std::max<int64_t>(max_values * int64_t(sizeof(T)), 1));
  }

  template <typename T>
  std::vector<Tensor> forward(const Tensor& x_in) const {
    std::vector<int64_t> shape = features_shape(x_in);
    std::vector<Tensor> results;
    Tensor features = channels_last<T>(x_in, shape);
    for (const Stage& stage : stages_) {
      const bool flat = ends_linear_ && &stage == &stages_.back();
      features = std::visit(
          [&](const auto& operation) { return forward_stage<T>(operation, data<T>(features), x_in, flat, shape); },
          stage.operation);
      if (stage.returned) results.push_back(features);
    }
    return results;
  }

  // [branch, batch, height, width, channel]; images [batch, channel, height, width] are features of one branch.
  static std::vector<int64_t> features_shape(const Tensor& x) {
    const auto sizes = x.sizes();
    STD_TORCH_CHECK(x.dim() == 5 || x.dim() == 4, "x: expected 5 dimensions, or 4 of images");
    if (x.dim() == 5) return {sizes.begin(), sizes.end()};
    STD_TORCH_CHECK(sizes[2] > 0 && sizes[3] > 0, "x: expected images of at least one pixel");
    return {1, sizes[0], sizes[2], sizes[3], sizes[1]};
  }

  // x as contiguous features; images that lie channels last in memory are not copied.
  template <typename T>
  static Tensor channels_last(const Tensor& x, const std::vector<int64_t>& shape) {
    if (x.dim() == 5) return torch::stable::contiguous(x);
    const int64_t batch = shape[1], height = shape[2], width = shape[3], channels = shape[4];
    const auto strides = x.strides();
    const int64_t batch_stride = strides[0], channel_stride = strides[1];
    const int64_t row_stride = strides[2], column_stride = strides[3];
    const bool is_channels_last = (channels == 1 || channel_stride == 1) && (width == 1 || column_stride == channels) &&
                                  (height == 1 || row_stride == width * channels) &&
                                  (batch == 1 || batch_stride == height * width * channels);
    if (is_channels_last) return x;
    const Tensor copy = empty(x, shape);
    const T* const images = data<T>(x);
    T* const features = mutable_data<T>(copy);
    const int64_t row_size = width * channels, rows = batch * height;
    const int64_t task_rows = std::max<int64_t>(1, kCopyValues / std::max<int64_t>(row_size, 1));
    parallel_tasks(ceil_div(rows, task_rows), [&](int64_t task) {
      for (int64_t r = task * task_rows; r < std::min(rows, (task + 1) * task_rows); ++r)
        for (int64_t c = 0; c < channels; ++c) {
          const T* in = images + r / height * batch_stride + r % height * row_stride + c * channel_stride;
          T* out = features + r * row_size + c;
          for (int64_t column = 0; column < width; ++column) out[column * channels] = in[column * column_stride];
        }
    });
    return copy;
  }

  // Replaces the shape of a stage's input by the shape of its output, as forward_stage() does.
  static void update_shape(const PackedConvolution& convolution, std::vector<int64_t>& shape) {
    shape = convolution.geometry(shape).out_shape();
  }

  static void update_shape(const BottleneckSequence& sequence, std::vector<int64_t>& shape) {
    for (const PackedConvolution& convolution : sequence.stem) update_shape(convolution, shape);
    for (const BottleneckWeights& bottleneck : sequence.bottlenecks) shape = bottleneck.geometry(shape).out_shape();
    if (sequence.pool) update_shape(GlobalPool{}, shape);
  }

  static void update_shape(const GlobalPool&, std::vector<int64_t>& shape) {
    STD_TORCH_CHECK(shape[2] * shape[3] > 0, "x: expected feature maps of at least one pixel");
    shape[2] = shape[3] = 1;
  }

  // The output of a stage; `shape` changes from the shape of x to that of the output. `like` gives the dtype.
  template <typename T>
  static Tensor forward_stage(const PackedConvolution& convolution, const T* x, const Tensor& like, bool flat,
                              std::vector<int64_t>& shape) {
    const Geometry g = convolution.geometry(shape);
    shape = g.out_shape();
    Tensor out = flat ? empty(like, {shape[0], shape[1], shape[4]}) : empty(like, shape);
    convolution.forward<T>(g, x, mutable_data<T>(out));
    return out;
  }

  template <typename T>
  static Tensor forward_stage(const BottleneckSequence& sequence, const T* x, const Tensor& like, bool,
                              std::vector<int64_t>& shape) {
    const ConvolutionChain<T> stem(sequence.stem, shape);
    std::vector<Bottleneck<T>> bottlenecks;
    bottlenecks.reserve(sequence.bottlenecks.size());
    for (const BottleneckWeights& weights : sequence.bottlenecks) {
      bottlenecks.emplace_back(weights, shape);
      shape = bottlenecks.back().geometry().out_shape();
    }
    if (sequence.pool) update_shape(GlobalPool{}, shape);
    Tensor out = empty(like, shape);
    forward_bottlenecks<T>(stem, bottlenecks, x, mutable_data<T>(out), sequence.pool, out);
    return out;
  }

  template <typename T>
  static Tensor forward_stage(const GlobalPool& pool, const T* x, const Tensor& like, bool,
                              std::vector<int64_t>& shape) {
    const int64_t pixels = shape[2] * shape[3], channels = shape[4];
    update_shape(pool, shape);
    Tensor out = empty(like, shape);
    parallel_tasks(shape[0] * shape[1], [&](int64_t map_index) {
      kernels<T>().mean_rows(x + map_index * pixels * channels, pixels, channels,
                             mutable_data<T>(out) + map_index * channels);
    });
    return out;
  }

  static constexpr int64_t kCopyValues = 4096;  // values of images per task
  // Features between two stages: 8 MiB are 16 images of HNE-ResNet. A micro-batch has at least 8 samples, since each of
  // them reads all weights once.
  static constexpr int64_t kMicroBatchBytes = 8 << 20, kMinMicroBatch = 8;

  ScalarType type_;
  std::vector<Stage> stages_;
  bool ends_linear_;  // the last layer is a pool_linear
};

// The prepared layers of this process by handle.
class LayersRegistry {
 public:
  int64_t add(std::shared_ptr<const PreparedLayers> layers) {
    const std::lock_guard<std::mutex> guard(mutex_);
    int64_t handle = random_handle();
    while (layers_.count(handle) != 0) handle = random_handle();
    layers_[handle] = std::move(layers);
    return handle;
  }

  std::shared_ptr<const PreparedLayers> get(int64_t handle) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = layers_.find(handle);
    STD_TORCH_CHECK(found != layers_.end(), "layers: expected a number of prepare_layers, got ", handle,
                    ", which belongs to another process or to layers that are gone; make hne_kernels.FusedLayers in "
                    "this process");
    return found->second;
  }

  void remove(int64_t handle) {
    std::shared_ptr<const PreparedLayers> removed;  // declared before the guard: frees after the mutex is unlocked
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = layers_.find(handle);
    if (found == layers_.end()) return;
    removed = std::move(found->second);
    layers_.erase(found);
  }

 private:
  // 62 random bits: a handle that another process wrote into a program is none here. Every one is drawn from the
  // system, since a forked process has a copy of all state.
  static int64_t random_handle() {
    std::random_device bits;  // 32 at a time
    return (int64_t(bits() >> 2) << 32 | bits()) + 1;
  }

  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const PreparedLayers>> layers_;
};

// Never destroyed: Python removes layers until the process ends.
LayersRegistry& registry() {
  static LayersRegistry* registry = new LayersRegistry;
  return *registry;
}

int64_t prepare_layers(const std::vector<std::optional<Tensor>>& weights, const std::vector<int64_t>& numbers) {
  return registry().add(std::make_shared<const PreparedLayers>(weights, numbers));
}

std::vector<Tensor> fused_layers(const Tensor& x, int64_t layers) { return (*registry().get(layers))(x); }

}  // namespace

void forget_layers(int64_t handle) { registry().remove(handle); }

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) {
  m.impl("prepare_layers", TORCH_BOX(&prepare_layers));
  m.impl("fused_layers", TORCH_BOX(&fused_layers));
}

}  // namespace hne
