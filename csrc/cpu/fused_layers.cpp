#include "fused_layers.h"

#include <memory>
#include <mutex>
#include <unordered_map>
#include <variant>

#include "bottleneck.h"
#include "packed_convolution.h"

namespace hne {
namespace {

// A layer as prepare_layers is told of it, in the order of hne_kernels/fused_layers.py.
struct Description {
  enum Kind : int64_t { convolution, bottleneck, linear_of_mean };
  int64_t kind, stride, padding, replicate, activation, final_activation, identity, kept;

  static constexpr int64_t kNumbers = 8;
  explicit Description(const int64_t* n)
      : kind(n[0]),
        stride(n[1]),
        padding(n[2]),
        replicate(n[3]),
        activation(n[4]),
        final_activation(n[5]),
        identity(n[6]),
        kept(n[7]) {
    STD_TORCH_CHECK(kind >= convolution && kind <= linear_of_mean, "numbers: expected a kind from 0 to 2");
  }

  int64_t num_weights() const { return kind == bottleneck ? 8 : 2; }
};

std::string activation_name(int64_t number) {
  constexpr const char* kNames[] = {"none", "relu", "relu6"};
  STD_TORCH_CHECK(number >= 0 && number < 3, "activation: expected a number from 0 to 2");
  return kNames[number];
}

// The mean over every map.
struct Mean {};

// Bottlenecks one after the other, the convolutions before them where all of it is one branch, and the mean over the
// maps of the last if it is wanted.
struct BottleneckRun {
  std::vector<PackedConvolution> before;
  std::vector<BottleneckWeights> bottlenecks;
  bool mean = false;
};

struct Step {
  std::variant<Mean, PackedConvolution, BottleneckRun> what;
  bool kept;
};

class Layers {
 public:
  Layers(const std::vector<std::optional<Tensor>>& weights, const std::vector<int64_t>& numbers) {
    const int64_t count = int64_t(numbers.size()) / Description::kNumbers;
    STD_TORCH_CHECK(count > 0 && count * Description::kNumbers == int64_t(numbers.size()),
                    "numbers: expected eight for each of one or more layers");
    STD_TORCH_CHECK(!weights.empty() && weights[0].has_value(), "weights: expected one at least");
    type_ = weights[0]->scalar_type();
    size_t used = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Description layer(&numbers[i * Description::kNumbers]);
      STD_TORCH_CHECK(used + layer.num_weights() <= weights.size(), "weights: expected more of them");
      add(layer, &weights[used]);
      used += layer.num_weights();
    }
    STD_TORCH_CHECK(used == weights.size() && steps_.back().kept, "weights: expected fewer of them");
    linear_ = Description(&numbers[(count - 1) * Description::kNumbers]).kind == Description::linear_of_mean;
  }

  // The features after every layer that is kept; those of the last one, if it is linear, without height and width.
  std::vector<Tensor> operator()(const Tensor& x_in) const {
    STD_TORCH_CHECK(x_in.is_cpu() && x_in.scalar_type() == type_, "x: expected the dtype of the weights, on the CPU");
    const Tensor x = widen(x_in);
    std::vector<Tensor> kept;
    Team::gather([&] { kept = dispatch(x, [&](auto type) { return run_in_parts<decltype(type)>(x); }); });
    for (Tensor& features : kept) features = round_to(features, type_);
    return kept;
  }

 private:
  void add(const Description& layer, const std::optional<Tensor>* weights) {
    STD_TORCH_CHECK(weights[0].has_value() && weights[0]->scalar_type() == type_, "weights: expected one dtype");
    const std::string activation = activation_name(layer.activation);
    // A run goes on while its features are no result.
    BottleneckRun* run =
        steps_.empty() || steps_.back().kept ? nullptr : std::get_if<BottleneckRun>(&steps_.back().what);
    if (layer.kind != Description::bottleneck) {
      STD_TORCH_CHECK(weights[1].has_value(), "weights: expected a bias");
      if (layer.kind == Description::linear_of_mean) {
        if (run != nullptr)
          run->mean = true;
        else
          steps_.push_back({Mean{}, false});
      }
      steps_.push_back(
          {PackedConvolution(*weights[0], *weights[1], layer.stride, layer.padding, layer.replicate, activation),
           layer.kept != 0});
      return;
    }
    const BottleneckWeights bottleneck(weights, layer.stride, layer.replicate, activation, layer.identity != 0,
                                       activation_name(layer.final_activation));
    if (run != nullptr && layer.replicate == 1) {
      run->bottlenecks.push_back(bottleneck);
      steps_.back().kept = layer.kept != 0;
    } else {
      std::vector<PackedConvolution> before;
      if (bottleneck.branches() == 1) before = take_convolutions();
      steps_.push_back({BottleneckRun{std::move(before), {bottleneck}}, layer.kept != 0});
    }
  }

  // The last steps, as far as they are convolutions whose features are no result.
  std::vector<PackedConvolution> take_convolutions() {
    std::vector<PackedConvolution> taken;
    while (!steps_.empty() && !steps_.back().kept) {
      auto* convolution = std::get_if<PackedConvolution>(&steps_.back().what);
      if (convolution == nullptr || convolution->branches() != 1) break;
      taken.insert(taken.begin(), *convolution);
      steps_.pop_back();
    }
    return taken;
  }

  // Where features lie between steps, a few samples at a time go through all of them: what one step has written is in
  // the cache when the next one reads it, and its memory is used again. Features that are kept stay in memory anyway.
  template <typename T>
  std::vector<Tensor> run_in_parts(Tensor x) const {
    const int64_t dimension = x.dim() == 4 ? 0 : 1;  // of the batch
    const int64_t batch = x.size(dimension), parts = batch <= kFewSamples ? 1 : ceil_div(batch, samples<T>(x));
    if (parts == 1) return run<T>(x);
    Tensor whole;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = batch * part / parts, count = batch * (part + 1) / parts - first;
      const Tensor result = run<T>(torch::stable::narrow(x, dimension, first, count)).back();
      if (part == 0) {
        std::vector<int64_t> shape(result.sizes().begin(), result.sizes().end());
        shape[1] = batch;
        whole = empty(result, shape);
      }
      Tensor place = torch::stable::narrow(whole, 1, first, count);
      torch::stable::copy_(place, result);
    }
    return {whole};
  }

  // Samples of a part.
  template <typename T>
  int64_t samples(const Tensor& x) const {
    std::vector<int64_t> shape = shape_of(x);
    const int64_t batch = shape[1];
    int64_t most = 0;  // values of a sample between two steps
    for (const Step& step : steps_) {
      if (&step == &steps_.back()) break;
      if (step.kept) return batch;
      std::visit([&](const auto& what) { reshape(what, shape); }, step.what);
      most = std::max(most, shape[0] * shape[2] * shape[3] * shape[4]);
    }
    return std::max(kFewSamples, kPartBytes / std::max<int64_t>(most * int64_t(sizeof(T)), 1));
  }

  template <typename T>
  std::vector<Tensor> run(const Tensor& x_in) const {
    std::vector<int64_t> shape = shape_of(x_in);
    std::vector<Tensor> kept;
    Tensor last = in_order<T>(x_in, shape);  // what the next step reads
    for (const Step& step : steps_) {
      const bool flat = linear_ && &step == &steps_.back();
      last =
          std::visit([&](const auto& what) { return compute<T>(what, data<T>(last), x_in, flat, shape); }, step.what);
      if (step.kept) kept.push_back(last);
    }
    return kept;
  }

  // Images [batch, channels, height, width] are features of one branch.
  static std::vector<int64_t> shape_of(const Tensor& x) {
    const auto sizes = x.sizes();
    STD_TORCH_CHECK(x.dim() == 5 || x.dim() == 4, "x: expected 5 dimensions, or 4 of images");
    if (x.dim() == 5) return {sizes.begin(), sizes.end()};
    STD_TORCH_CHECK(sizes[2] > 0 && sizes[3] > 0, "x: expected images of at least one pixel");
    return {1, sizes[0], sizes[2], sizes[3], sizes[1]};
  }

  // Features as they follow each other in memory; images in place where they lie channels last.
  template <typename T>
  static Tensor in_order(const Tensor& x, const std::vector<int64_t>& shape) {
    if (x.dim() == 5) return torch::stable::contiguous(x);
    const int64_t batch = shape[1], height = shape[2], width = shape[3], channels = shape[4];
    const auto strides = x.strides();
    const int64_t of_batch = strides[0], of_channel = strides[1], of_row = strides[2], of_column = strides[3];
    const bool in_place = (channels == 1 || of_channel == 1) && (width == 1 || of_column == channels) &&
                          (height == 1 || of_row == width * channels) &&
                          (batch == 1 || of_batch == height * width * channels);
    if (in_place) return x;
    const Tensor copy = empty(x, shape);
    const T* const from = data<T>(x);
    T* const to = mutable_data<T>(copy);
    const int64_t row = width * channels, rows = batch * height;
    const int64_t most = std::max<int64_t>(1, kCopied / std::max<int64_t>(row, 1));  // rows of a task
    parallel_tasks(ceil_div(rows, most), [&](int64_t task) {
      for (int64_t r = task * most; r < std::min(rows, (task + 1) * most); ++r)
        for (int64_t c = 0; c < channels; ++c) {
          const T* in = from + r / height * of_batch + r % height * of_row + c * of_channel;
          T* out = to + r * row + c;
          for (int64_t column = 0; column < width; ++column) out[column * channels] = in[column * of_column];
        }
    });
    return copy;
  }

  // The shape of the features after a step instead of that of x; compute() finds the same.
  static void reshape(const PackedConvolution& convolution, std::vector<int64_t>& shape) {
    shape = convolution.geometry(shape).out_shape();
  }

  static void reshape(const BottleneckRun& run, std::vector<int64_t>& shape) {
    for (const PackedConvolution& convolution : run.before) reshape(convolution, shape);
    for (const BottleneckWeights& bottleneck : run.bottlenecks) shape = bottleneck.geometry(shape).out_shape();
    if (run.mean) reshape(Mean{}, shape);
  }

  static void reshape(const Mean&, std::vector<int64_t>& shape) {
    STD_TORCH_CHECK(shape[2] * shape[3] > 0, "x: expected maps of at least one pixel");
    shape[2] = shape[3] = 1;
  }

  // The features after a step, and their shape instead of that of x. `like` is for their memory.
  template <typename T>
  static Tensor compute(const PackedConvolution& convolution, const T* x, const Tensor& like, bool flat,
                        std::vector<int64_t>& shape) {
    const Geometry g = convolution.geometry(shape);
    shape = g.out_shape();
    Tensor out = flat ? empty(like, {shape[0], shape[1], shape[4]}) : empty(like, shape);
    convolution.run<T>(g, x, mutable_data<T>(out));
    return out;
  }

  template <typename T>
  static Tensor compute(const BottleneckRun& run, const T* x, const Tensor& like, bool, std::vector<int64_t>& shape) {
    const Convolutions<T> before(run.before, shape);
    std::vector<Bottleneck<T>> layers;
    layers.reserve(run.bottlenecks.size());
    for (const BottleneckWeights& weights : run.bottlenecks) {
      layers.emplace_back(weights, shape);
      shape = layers.back().geometry().out_shape();
    }
    if (run.mean) reshape(Mean{}, shape);
    Tensor out = empty(like, shape);
    run_bottlenecks<T>(before, layers, x, mutable_data<T>(out), run.mean, out);
    return out;
  }

  template <typename T>
  static Tensor compute(const Mean& mean, const T* x, const Tensor& like, bool, std::vector<int64_t>& shape) {
    const int64_t pixels = shape[2] * shape[3], channels = shape[4];
    reshape(mean, shape);
    Tensor out = empty(like, shape);
    parallel_tasks(shape[0] * shape[1], [&](int64_t map) {
      kernels<T>().mean_rows(x + map * pixels * channels, pixels, channels, mutable_data<T>(out) + map * channels);
    });
    return out;
  }

  static constexpr int64_t kCopied = 4096;  // values of an image that a thread copies at once
  // Of a part of the batch: features between steps, 16 images of HNE-ResNet; but weights are read once for a part.
  static constexpr int64_t kPartBytes = 8 << 20, kFewSamples = 8;

  ScalarType type_;
  std::vector<Step> steps_;
  bool linear_;  // the last layer
};

// What has been prepared, by number; nothing else can be asked for.
class Prepared {
 public:
  int64_t add(std::shared_ptr<const Layers> layers) {
    const std::lock_guard<std::mutex> guard(mutex_);
    layers_[++last_] = std::move(layers);
    return last_;
  }

  std::shared_ptr<const Layers> get(int64_t number) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = layers_.find(number);
    STD_TORCH_CHECK(found != layers_.end(), "layers: expected a number of prepare_layers, got ", number);
    return found->second;
  }

  void forget(int64_t number) {
    std::shared_ptr<const Layers> last;  // what it holds is freed without the lock
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = layers_.find(number);
    if (found == layers_.end()) return;
    last = std::move(found->second);
    layers_.erase(found);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const Layers>> layers_;
  int64_t last_ = 0;
};

// Never destroyed: Python forgets its layers until the process ends.
Prepared& prepared() {
  static Prepared* prepared = new Prepared;
  return *prepared;
}

int64_t prepare_layers(const std::vector<std::optional<Tensor>>& weights, const std::vector<int64_t>& numbers) {
  return prepared().add(std::make_shared<const Layers>(weights, numbers));
}

std::vector<Tensor> fused_layers(const Tensor& x, int64_t layers) { return (*prepared().get(layers))(x); }

}  // namespace

void forget_layers(int64_t layers) { prepared().forget(layers); }

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) {
  m.impl("prepare_layers", TORCH_BOX(&prepare_layers));
  m.impl("fused_layers", TORCH_BOX(&fused_layers));
}

}  // namespace hne
