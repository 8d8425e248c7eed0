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
  }

  // The features after every layer that is kept.
  std::vector<Tensor> operator()(const Tensor& x_in) const {
    STD_TORCH_CHECK(x_in.is_cpu() && x_in.scalar_type() == type_, "x: expected the dtype of the weights, on the CPU");
    const Tensor x = torch::stable::contiguous(widen(x_in));
    std::vector<Tensor> kept;
    Team::gather([&] { dispatch(x, [&](auto type) { run<decltype(type)>(x, kept); }); });
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

  template <typename T>
  void run(Tensor x, std::vector<Tensor>& kept) const {
    const auto sizes = x.sizes();
    std::vector<int64_t> shape(sizes.begin(), sizes.end());
    STD_TORCH_CHECK(shape.size() == 5, "x: expected 5 dimensions");
    for (const Step& step : steps_) {
      x = std::visit([&](const auto& what) { return compute<T>(what, x, shape); }, step.what);
      if (step.kept) kept.push_back(x);
    }
  }

  // The features after a step, and their shape instead of that of x.
  template <typename T>
  static Tensor compute(const PackedConvolution& convolution, const Tensor& x, std::vector<int64_t>& shape) {
    const Geometry g = convolution.geometry(shape);
    shape = g.out_shape();
    Tensor out = empty(x, shape);
    convolution.run<T>(g, data<T>(x), mutable_data<T>(out));
    return out;
  }

  template <typename T>
  static Tensor compute(const BottleneckRun& run, const Tensor& x, std::vector<int64_t>& shape) {
    const Convolutions<T> before(run.before, shape);
    std::vector<Bottleneck<T>> layers;
    layers.reserve(run.bottlenecks.size());
    for (const BottleneckWeights& weights : run.bottlenecks) {
      layers.emplace_back(weights, shape);
      shape = layers.back().geometry().out_shape();
    }
    if (run.mean) to_one_pixel(shape);
    Tensor out = empty(x, shape);
    run_bottlenecks<T>(before, layers, data<T>(x), mutable_data<T>(out), run.mean, out);
    return out;
  }

  template <typename T>
  static Tensor compute(const Mean&, const Tensor& x, std::vector<int64_t>& shape) {
    const int64_t pixels = shape[2] * shape[3], channels = shape[4];
    to_one_pixel(shape);
    Tensor out = empty(x, shape);
    parallel_tasks(shape[0] * shape[1], [&](int64_t map) {
      kernels<T>().mean_rows(data<T>(x) + map * pixels * channels, pixels, channels,
                             mutable_data<T>(out) + map * channels);
    });
    return out;
  }

  static void to_one_pixel(std::vector<int64_t>& shape) {
    STD_TORCH_CHECK(shape[2] * shape[3] > 0, "x: expected maps of at least one pixel");
    shape[2] = shape[3] = 1;
  }

  ScalarType type_;
  std::vector<Step> steps_;
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
