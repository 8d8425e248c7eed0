#include "fused_layers.h"

#include <utility>
#include <variant>

#include "bottleneck_chain.h"
#include "layer_spec.h"
#include "layers_registry.h"
#include "packed_convolution.h"

namespace hne {
namespace {

// The mean over the pixels of each feature map.
struct GlobalPool {};

// Batch norm by given statistics, and an activation.
class Normalize {
 public:
  Normalize(const Tensor& rows, int64_t replicate, std::string activation)
      : rows_(rows), replicate_(replicate), activation_(std::move(activation)) {
    STD_TORCH_CHECK(rows.dim() == 3 && rows.size(1) == 3, "weights: expected the rows [branch][3][channel]");
    branches_ = rows.size(0), channels_ = rows.size(2);
  }

  void check(const std::vector<int64_t>& shape) const {
    STD_TORCH_CHECK(shape[4] == channels_ && shape[0] == ceil_div(branches_, replicate_),
                    "x: does not have the branches and channels of the normalisation");
  }

  int64_t branches() const { return branches_; }

  // `rows` is the number of rows of a branch.
  template <typename T>
  void forward(const T* x, int64_t rows, T* out) const {
    const int64_t chunks = ceil_div(rows, kRows);
    parallel_tasks(branches_ * chunks, [&](int64_t task) {
      const int64_t branch = task / chunks, first = task % chunks * kRows;
      const T* const norm = rows_.data<T>() + branch * 3 * channels_;
      NormRows<T> r{};
      r.x = x + (branch / replicate_ * rows + first) * channels_, r.out = out + (branch * rows + first) * channels_;
      r.mean = norm, r.scale = norm + channels_, r.shift = norm + 2 * channels_;
      r.count = std::min(kRows, rows - first), r.channels = channels_, r.clamp = Clamp<T>::named(activation_);
      kernels<T>().normalize(r);
    });
  }

 private:
  static constexpr int64_t kRows = 128;
  ConstTensor rows_;
  int64_t branches_, channels_, replicate_;
  std::string activation_;
};

// The maximum or the mean over windows of pixels.
struct WindowPool {
  bool max;
  int64_t window, stride, padding, replicate, branches;

  Geometry geometry(const std::vector<int64_t>& shape) const {
    return forward_geometry(shape, branches, shape[4], window, stride, padding, replicate);
  }

  template <typename T>
  void forward(const Geometry& g, const T* x, T* out) const {
    parallel_tasks(g.branches * g.batch * g.out_height, [&](int64_t task) {
      const int64_t map = task / g.out_height, branch = map / g.batch, y = task % g.out_height * stride - padding;
      const T* const in = x + (branch / replicate * g.batch + map % g.batch) * g.pixels() * g.in_channels;
      T* to = out + task * g.out_width * g.in_channels;
      const T** const rows = scratch<const T*>(0, g.taps());
      for (int64_t i = 0; i < g.out_width; ++i, to += g.in_channels) {
        const int64_t x0 = i * stride - padding;
        int64_t count = 0;
        for (int64_t iy = std::max<int64_t>(y, 0); iy < std::min(y + window, g.height); ++iy)
          for (int64_t ix = std::max<int64_t>(x0, 0); ix < std::min(x0 + window, g.width); ++ix)
            rows[count++] = in + (iy * g.width + ix) * g.in_channels;
        max ? kernels<T>().max_of_rows(rows, count, g.in_channels, to)
            : kernels<T>().sum_of_rows(rows, count, g.in_channels, T(1) / T(g.taps()), to);
      }
    });
  }
};

// Consecutive bottlenecks, with the convolutions of one branch before them and the global pool after them, if any.
struct BottleneckSequence {
  std::vector<PackedConvolution> stem;
  std::vector<BottleneckWeights> bottlenecks;
  bool pool = false;
};

// Layers that are computed together: only the output of the last one is stored for the whole batch. Stages and features
// have numbers: stage s computes features s + 1, and features 0 are the input of all stages.
struct Stage {
  std::variant<GlobalPool, WindowPool, Normalize, PackedConvolution, BottleneckSequence> operation;
  size_t source;                        // the features that it reads
  bool returned = false;                // whether the output is a result of the call
  bool kept = false;                    // whether the output has a reader other than the next layer
  std::optional<size_t> residual = {};  // the features that a convolution adds
  int64_t residual_replicate = 1;
};

// Features [branch, batch, height, width, channel] or, with the same memory, images that lie channels last.
struct Features {
  Tensor values;
  std::vector<int64_t> shape;  // of the features
};

class PreparedLayers {
 public:
  PreparedLayers(const std::vector<std::optional<Tensor>>& weights, const std::vector<int64_t>& numbers) {
    const int64_t count = int64_t(numbers.size()) / LayerSpec::kNumbers;
    STD_TORCH_CHECK(count > 0 && count * LayerSpec::kNumbers == int64_t(numbers.size()), "numbers: expected ",
                    LayerSpec::kNumbers, " for each of one or more layers");
    std::vector<LayerSpec> layers;
    for (int64_t i = 0; i < count; ++i) layers.emplace_back(&numbers[i * LayerSpec::kNumbers]);
    type_ = features_type(layers, weights);
    if (type_ == ScalarType::BFloat16 && multiplies_bfloat16()) paired_channels_ = paired_channels(layers, weights);
    std::vector<bool> kept(count);
    for (int64_t i = 0; i < count; ++i) {
      const LayerSpec& layer = layers[i];
      STD_TORCH_CHECK(i + 1 + layer.source >= 0 && i + 1 + layer.residual >= 0,
                      "numbers: expected that layers read the outputs of earlier ones");
      if (layer.returned != 0) kept[i] = true;
      if (layer.source != -1 && i + layer.source >= 0) kept[i + layer.source] = true;
      if (layer.residual != 0 && i + layer.residual >= 0) kept[i + layer.residual] = true;
    }
    std::vector<size_t> outputs = {0};  // the features that a layer computes, from the layer before the first on
    size_t used = 0;
    for (int64_t i = 0; i < count; ++i) {
      const LayerSpec& layer = layers[i];
      STD_TORCH_CHECK(used + layer.num_weights() <= weights.size(), "weights: fewer than the layers need");
      add(layer, weights.data() + used, outputs[i + 1 + layer.source]);
      used += layer.num_weights();
      Stage& stage = stages_.back();
      stage.returned = layer.returned != 0, stage.kept = kept[i];
      if (layer.residual != 0) stage.residual = outputs[i + 1 + layer.residual];
      stage.residual_replicate = layer.residual_replicate;
      outputs.push_back(stages_.size());
    }
    STD_TORCH_CHECK(used == weights.size(), "weights: more than the layers need");
    STD_TORCH_CHECK(stages_.back().returned, "numbers: expected that the last layer's features are returned");
    ends_linear_ = layers.back().kind == LayerSpec::pool_linear;
    last_readers_.resize(stages_.size() + 1);
    for (size_t s = 0; s < stages_.size(); ++s) {
      last_readers_[stages_[s].source] = s;
      if (stages_[s].residual.has_value()) last_readers_[*stages_[s].residual] = s;
    }
  }

  // The features of the layers to be returned, in order: [branch, batch, height, width, channel]; those of a last
  // linear layer: [branch, batch, channel].
  std::vector<Tensor> operator()(const Tensor& x_in) const {
    STD_TORCH_CHECK(x_in.is_cpu() && x_in.scalar_type() == type_, "x: expected the dtype of the weights, on the CPU");
    const Tensor x = paired_channels_.has_value() ? x_in : widen(x_in);
    std::vector<Tensor> results;
    calls_.lead([&] {
      if (paired_channels_.has_value())
        results = forward_micro_batches<bfloat16>(x);
      else
        results = dispatch(x, [&](auto type) { return forward_micro_batches<decltype(type)>(x); });
    });
    for (Tensor& features : results) features = round_to(features, type_);
    return results;
  }

  // The same for member number `count` of an ensemble. Its logits [1, batch, class] are followed, without the first
  // dimension, by their sum with `total`, of the members before, and by the mean, sum / count.
  std::vector<Tensor> operator()(const Tensor& x, const std::optional<Tensor>& total, int64_t count) const {
    std::vector<Tensor> results = (*this)(x);
    STD_TORCH_CHECK(ends_linear_ && results.back().size(0) == 1, "layers: expected the logits of one branch");
    const Tensor logits = widen(results.back());
    const std::vector<int64_t> shape = {logits.size(1), logits.size(2)};
    if (total.has_value()) {
      STD_TORCH_CHECK(total->is_cpu() && total->scalar_type() == logits.scalar_type() && total->is_contiguous(),
                      "total: expected contiguous float32, or float64 as the logits, on the CPU");
      STD_TORCH_CHECK(total->dim() == 2, "total: expected 2 dimensions");
      check_shape("total", *total, shape);
    }
    const Tensor sum = empty(logits, shape), mean = empty(logits, shape);
    dispatch(logits, [&](auto type) {
      using T = decltype(type);
      const T *member = data<T>(logits), *before = data<T>(total);
      T *sums = mutable_data<T>(sum), *means = mutable_data<T>(mean);
      for (int64_t i = 0; i < shape[0] * shape[1]; ++i) {
        sums[i] = before != nullptr ? before[i] + member[i] : member[i];
        means[i] = sums[i] / T(count);
      }
    });
    results.insert(results.end(), {sum, round_to(mean, type_)});
    return results;
  }

 private:
  // The dtype of the first filters: a normalisation of bfloat16 features is float32.
  static ScalarType features_type(const std::vector<LayerSpec>& layers,
                                  const std::vector<std::optional<Tensor>>& weights) {
    size_t used = 0;
    for (const LayerSpec& layer : layers) {
      if (layer.kind != LayerSpec::normalize && !layer.pools()) break;
      used += layer.num_weights();
    }
    STD_TORCH_CHECK(used < weights.size() && weights[used].has_value(), "weights: expected the filters of a layer");
    return weights[used]->scalar_type();
  }

  // The channels of the input of all layers, if bfloat16 can be multiplied in pairs of channels: by pointwise
  // convolutions, convolutions of images and bottlenecks that read even numbers of channels. The input of all layers
  // may have an odd number, which is padded. Dense convolutions of more channels need fewer products in float32, by
  // Winograd.
  static std::optional<int64_t> paired_channels(const std::vector<LayerSpec>& layers,
                                                const std::vector<std::optional<Tensor>>& weights) {
    std::optional<int64_t> input;
    bool adds_input = false;
    size_t used = 0;
    for (size_t i = 0; i < layers.size(); ++i) {
      const LayerSpec& layer = layers[i];
      if (layer.kind == LayerSpec::normalize || layer.pools()) return {};
      const size_t at = std::exchange(used, used + layer.num_weights());
      if (used > weights.size() || !weights[at].has_value() || weights[at]->dim() != 6) return {};
      const int64_t channels = weights[at]->size(4), kernel_size = weights[at]->size(2);
      const bool bottleneck = layer.kind == LayerSpec::bottleneck, odd = channels % kTerms<bfloat16> != 0;
      if (!bottleneck && kernel_size > 1 && channels > kFewChannels - kTerms<bfloat16>) return {};
      if (bottleneck && (!weights[at + 2].has_value() || weights[at + 2]->dim() != 4)) return {};
      if (bottleneck && weights[at + 2]->size(3) % kTerms<bfloat16> != 0) return {};
      if (int64_t(i) + 1 + layer.source == 0) {
        if (input.value_or(channels) != channels || (odd && bottleneck)) return {};
        input = channels;
      } else if (odd) {
        return {};
      }
      adds_input |= layer.residual != 0 && int64_t(i) + 1 + layer.residual == 0;
    }
    if (adds_input && input.has_value() && *input % kTerms<bfloat16> != 0) return {};
    return input;
  }

  // Adds the layer, which reads the features `source`, to the last stage where it can be computed together with it,
  // else as a new stage.
  void add(const LayerSpec& layer, const std::optional<Tensor>* weights, size_t source) {
    if (layer.pools()) {
      const bool max = layer.kind == LayerSpec::max_pool;
      stages_.push_back(
          {WindowPool{max, layer.window, layer.stride, layer.padding, layer.replicate, layer.branches}, source});
      return;
    }
    const std::string activation = activation_name(layer.activation);
    if (layer.kind == LayerSpec::normalize) {
      STD_TORCH_CHECK(weights[0].has_value(), "weights: expected the rows of a normalisation");
      const ScalarType type = type_ == ScalarType::Double ? type_ : ScalarType::Float;
      STD_TORCH_CHECK(weights[0]->scalar_type() == type, "weights: expected float32 rows, or float64 as the filters");
      stages_.push_back({Normalize(*weights[0], layer.replicate, activation), source});
      return;
    }
    STD_TORCH_CHECK(weights[0].has_value() && weights[0]->scalar_type() == type_, "weights: expected one dtype");
    // A sequence ends where its features have another reader.
    BottleneckSequence* sequence = stages_.empty() || source != stages_.size() || stages_.back().kept
                                       ? nullptr
                                       : std::get_if<BottleneckSequence>(&stages_.back().operation);
    if (layer.kind != LayerSpec::bottleneck) {
      STD_TORCH_CHECK(weights[1].has_value(), "weights: expected a bias");
      if (layer.kind == LayerSpec::pool_linear) {
        if (sequence != nullptr)
          sequence->pool = true;
        else
          stages_.push_back({GlobalPool{}, source});
        source = stages_.size();
      }
      stages_.push_back({PackedConvolution(*weights[0], *weights[1], layer.stride, layer.padding, layer.replicate,
                                           activation, true, paired_channels_.has_value()),
                         source});
      return;
    }
    const BottleneckWeights bottleneck(weights, layer.stride, layer.replicate, activation, layer.identity != 0,
                                       activation_name(layer.final_activation), paired_channels_.has_value());
    if (sequence != nullptr && layer.replicate == 1) {
      sequence->bottlenecks.push_back(bottleneck);
    } else {
      std::vector<PackedConvolution> stem;
      if (bottleneck.branches() == 1) stem = take_convolutions(source);
      stages_.push_back({BottleneckSequence{std::move(stem), {bottleneck}}, source});
    }
  }

  // Removes the convolutions of one branch at the end of the stages that compute the features `source`, as far as these
  // have no other reader and no residual. `source` becomes what the first of them reads.
  std::vector<PackedConvolution> take_convolutions(size_t& source) {
    std::vector<PackedConvolution> taken;
    while (!stages_.empty() && source == stages_.size()) {
      const Stage& last = stages_.back();
      const auto* convolution = std::get_if<PackedConvolution>(&last.operation);
      if (last.kept || last.residual.has_value() || convolution == nullptr || convolution->branches() != 1) break;
      taken.insert(taken.begin(), *convolution);
      source = last.source;
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

  // The most samples whose features between two stages take at most kCachesPerMicroBatch second caches, but at least
  // kMinMicroBatch; the whole batch if features between stages are returned.
  template <typename T>
  int64_t micro_batch_size(const Tensor& x) const {
    std::vector<std::vector<int64_t>> shapes = {features_shape<T>(x)};
    const int64_t batch = shapes[0][1];
    int64_t max_values = 0;  // of one sample between two stages
    for (size_t s = 0; s + 1 < stages_.size(); ++s) {
      if (stages_[s].returned) return batch;
      std::vector<int64_t> shape = shapes[stages_[s].source];
      std::visit([&](const auto& operation) { update_shape(operation, shape); }, stages_[s].operation);
      shapes.push_back(shape);
      int64_t values = 0;
      for (size_t i = 1; i < shapes.size(); ++i)
        if (last_readers_[i] > s) values += shapes[i][0] * shapes[i][2] * shapes[i][3] * shapes[i][4];
      max_values = std::max(max_values, values);
    }
    return std::max(kMinMicroBatch, kCachesPerMicroBatch * second_cache_bytes() /
                                        std::max<int64_t>(max_values * int64_t(sizeof(T)), 1));
  }

  template <typename T>
  std::vector<Tensor> forward(const Tensor& x_in) const {
    std::vector<Features> features(stages_.size() + 1);
    features[0].shape = features_shape<T>(x_in);
    features[0].values = channels_last<T>(x_in, features[0].shape);
    std::vector<Tensor> results;
    // Memory that nobody reads any more is used again.
    const auto release = [&](size_t s) {
      const Stage& stage = stages_[s];
      if (last_readers_[stage.source] == s) features[stage.source].values = Tensor();
      if (stage.residual.has_value() && last_readers_[*stage.residual] == s)
        features[*stage.residual].values = Tensor();
    };
    for (size_t s = 0; s < stages_.size(); ++s) {
      const Features& x = features[stages_[s].source];
      const size_t first = s;
      if (forms_pair<T>(s, x.shape)) ++s;
      const Stage& stage = stages_[s];
      const Features* const residual = stage.residual.has_value() ? &features[*stage.residual] : nullptr;
      const Summand<T> add = {residual != nullptr ? data<T>(residual->values) : nullptr, stage.residual_replicate};
      const auto check_add = [&](const Geometry& g) {
        if (residual != nullptr) check_residual(residual->shape, stage.residual_replicate, g);
      };
      Features& out = features[s + 1];
      out.shape = x.shape;
      if (first < s) {
        const auto& one = std::get<PackedConvolution>(stages_[first].operation);
        const auto& two = std::get<PackedConvolution>(stage.operation);
        out.values = forward_pair<T>(one, two, data<T>(x.values), add, check_add, x_in, out.shape);
      } else {
        if (residual != nullptr) check_add(std::get<PackedConvolution>(stage.operation).geometry(x.shape));
        const bool flat = ends_linear_ && s + 1 == stages_.size();
        out.values = std::visit(
            [&](const auto& operation) {
              return forward_stage<T>(operation, data<T>(x.values), add, x_in, flat, out.shape);
            },
            stage.operation);
      }
      if (stage.returned) results.push_back(out.values);
      for (size_t done = first; done <= s; ++done) release(done);
    }
    return results;
  }

  // Whether stage s and the next are convolutions that are computed together, as in a basic block: the features between
  // them have no other reader, and one feature map of them fits into the second cache beside the filters.
  template <typename T>
  bool forms_pair(size_t s, const std::vector<int64_t>& shape) const {
    const bool flat = ends_linear_ && s + 2 == stages_.size();
    if (s + 1 >= stages_.size() || flat || stages_[s].kept || stages_[s].residual.has_value()) return false;
    const auto* one = std::get_if<PackedConvolution>(&stages_[s].operation);
    const auto* two = std::get_if<PackedConvolution>(&stages_[s + 1].operation);
    if (one == nullptr || two == nullptr || stages_[s + 1].source != s + 1) return false;
    const Geometry first = one->geometry(shape), second = two->geometry(first.out_shape());
    const int64_t map_bytes = first.out_pixels() * first.out_channels * int64_t(sizeof(T));
    const int64_t filters = first.in_channels * first.out_channels + second.in_channels * second.out_channels;
    const int64_t filter_bytes = 16 * filters * int64_t(sizeof(T));  // read once for each map
    return second.replicate == 1 && second.branches * second.batch >= kMapsPerThread * num_threads() &&
           2 * map_bytes <= second_cache_bytes() &&
           filter_bytes <= std::min(second_cache_bytes(), kFiltersPerMap * map_bytes);
  }

  // A thread takes one feature map after another through both convolutions.
  template <typename T, typename F>
  static Tensor forward_pair(const PackedConvolution& one, const PackedConvolution& two, const T* x, Summand<T> add,
                             const F& check_add, const Tensor& like, std::vector<int64_t>& shape) {
    const Geometry first = one.geometry(shape), second = two.geometry(first.out_shape());
    check_add(second);
    shape = second.out_shape();
    Tensor result = empty(like, shape);
    T* const out = mutable_data<T>(result);
    const int64_t in_size = first.pixels() * first.in_channels, size = second.out_pixels() * second.out_channels;
    parallel_tasks(second.branches * second.batch, [&](int64_t map) {
      const int64_t branch = map / second.batch, sample = map % second.batch;
      T* const middle = scratch<T>(8, first.out_pixels() * first.out_channels);
      one.forward_map(first, branch, x + (branch / first.replicate * first.batch + sample) * in_size, middle,
                      static_cast<const T*>(nullptr));
      const T* const summand =
          add.features == nullptr ? nullptr : add.features + (branch / add.replicate * second.batch + sample) * size;
      two.forward_map(second, branch, static_cast<const T*>(middle), out + map * size, summand);
    });
    return result;
  }

  // [branch, batch, height, width, channel], with a whole number of terms of a product as channels; images [batch,
  // channel, height, width] are features of one branch.
  template <typename T>
  std::vector<int64_t> features_shape(const Tensor& x) const {
    const auto sizes = x.sizes();
    STD_TORCH_CHECK(x.dim() == 5 || x.dim() == 4, "x: expected 5 dimensions, or 4 of images");
    const int64_t given = sizes[x.dim() == 5 ? 4 : 1], channels = ceil_div(given, kTerms<T>) * kTerms<T>;
    STD_TORCH_CHECK(given == paired_channels_.value_or(given), "x: does not have the channels of the first layer");
    if (x.dim() == 5) return {sizes[0], sizes[1], sizes[2], sizes[3], channels};
    STD_TORCH_CHECK(sizes[2] > 0 && sizes[3] > 0, "x: expected images of at least one pixel");
    return {1, sizes[0], sizes[2], sizes[3], channels};
  }

  // x as contiguous features of that shape, with zeros as the channels that x lacks; images that lie channels last in
  // memory are not copied.
  template <typename T>
  static Tensor channels_last(const Tensor& x_in, const std::vector<int64_t>& shape) {
    const bool images = x_in.dim() == 4;
    const Tensor x = images ? x_in : torch::stable::contiguous(x_in);
    const int64_t channels = x.size(images ? 1 : 4), out_channels = shape[4];
    if (!images && channels == out_channels) return x;
    // Features are one long image.
    const auto strides = x.strides();
    const int64_t batch = images ? shape[1] : 1, height = images ? shape[2] : 1;
    const int64_t width = images ? shape[3] : shape[0] * shape[1] * shape[2] * shape[3];
    const int64_t batch_stride = images ? strides[0] : 0, channel_stride = images ? strides[1] : 1;
    const int64_t row_stride = images ? strides[2] : 0, column_stride = images ? strides[3] : channels;
    const bool is_channels_last = (channels == 1 || channel_stride == 1) && (width == 1 || column_stride == channels) &&
                                  (height == 1 || row_stride == width * channels) &&
                                  (batch == 1 || batch_stride == height * width * channels);
    if (is_channels_last && channels == out_channels) return x;
    const Tensor copy = empty(x, shape);
    const T* const values = data<T>(x);
    T* const features = mutable_data<T>(copy);
    const int64_t row_size = width * out_channels, rows = batch * height;
    const int64_t task_rows = std::max<int64_t>(1, kCopyValues / std::max<int64_t>(row_size, 1));
    parallel_tasks(ceil_div(rows, task_rows), [&](int64_t task) {
      for (int64_t r = task * task_rows; r < std::min(rows, (task + 1) * task_rows); ++r) {
        const T* in = values + r / height * batch_stride + r % height * row_stride;
        T* out = features + r * row_size;
        if (channel_stride == 1) {
          for (int64_t column = 0; column < width; ++column, in += column_stride) {
            out = std::copy_n(in, channels, out);
            out = std::fill_n(out, out_channels - channels, T(0));
          }
          continue;
        }
        for (int64_t c = 0; c < out_channels; ++c, in += channel_stride, ++out)
          for (int64_t column = 0; column < width; ++column)
            out[column * out_channels] = c < channels ? in[column * column_stride] : T(0);
      }
    });
    return copy;
  }

  // Replaces the shape of a stage's input by the shape of its output, as forward_stage() does.
  static void update_shape(const PackedConvolution& convolution, std::vector<int64_t>& shape) {
    shape = convolution.geometry(shape).out_shape();
  }

  static void update_shape(const WindowPool& pool, std::vector<int64_t>& shape) {
    shape = pool.geometry(shape).out_shape();
  }

  static void update_shape(const Normalize& normalize, std::vector<int64_t>& shape) {
    normalize.check(shape);
    shape[0] = normalize.branches();
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

  // The output of a stage; `shape` changes from the shape of x to that of the output. A convolution adds `add`; `like`
  // gives the dtype.
  template <typename T>
  static Tensor forward_stage(const PackedConvolution& convolution, const T* x, Summand<T> add, const Tensor& like,
                              bool flat, std::vector<int64_t>& shape) {
    const Geometry g = convolution.geometry(shape);
    shape = g.out_shape();
    Tensor out = flat ? empty(like, {shape[0], shape[1], shape[4]}) : empty(like, shape);
    convolution.forward<T>(g, x, mutable_data<T>(out), add);
    return out;
  }

  template <typename T>
  static Tensor forward_stage(const BottleneckSequence& sequence, const T* x, Summand<T>, const Tensor& like, bool,
                              std::vector<int64_t>& shape) {
    const ConvolutionChain<T> stem(sequence.stem, shape);
    std::vector<Bottleneck<T>> bottlenecks;
    bottlenecks.reserve(sequence.bottlenecks.size());
    for (const BottleneckWeights& weights : sequence.bottlenecks) {
      bottlenecks.emplace_back(weights, shape);
      shape = bottlenecks.back().geometry().out_shape();
    }
    for (size_t i = 1; i < bottlenecks.size(); ++i) bottlenecks[i - 1].set_next(bottlenecks[i]);
    const int64_t pixels = shape[2] * shape[3], channels = shape[4];
    std::function<void(const T*, T*)> pool;
    if (sequence.pool) {
      update_shape(GlobalPool{}, shape);
      pool = [=](const T* map, T* mean) { kernels<T>().mean_rows(map, pixels, channels, mean); };
    }
    Tensor out = empty(like, shape);
    forward_bottlenecks<T>(stem, bottlenecks, x, mutable_data<T>(out), pool, out);
    return out;
  }

  template <typename T>
  static Tensor forward_stage(const WindowPool& pool, const T* x, Summand<T>, const Tensor& like, bool,
                              std::vector<int64_t>& shape) {
    const Geometry g = pool.geometry(shape);
    shape = g.out_shape();
    Tensor out = empty(like, shape);
    if constexpr (kTerms<T> == 1) pool.forward<T>(g, x, mutable_data<T>(out));  // else there is none
    return out;
  }

  template <typename T>
  static Tensor forward_stage(const Normalize& normalize, const T* x, Summand<T>, const Tensor& like, bool,
                              std::vector<int64_t>& shape) {
    update_shape(normalize, shape);
    Tensor out = empty(like, shape);
    if constexpr (kTerms<T> == 1)  // else there is none
      normalize.forward<T>(x, shape[1] * shape[2] * shape[3], mutable_data<T>(out));
    return out;
  }

  template <typename T>
  static Tensor forward_stage(const GlobalPool& pool, const T* x, Summand<T>, const Tensor& like, bool,
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

  static constexpr int64_t kMapsPerThread = 2;  // least number for which threads take whole feature maps
  static constexpr int64_t kFiltersPerMap = 6;  // most bytes of filters for a byte that stays in the cache
  static constexpr int64_t kCopyValues = 4096;  // values of images per task
  // Features between two stages: with a second cache of 2 MiB, 8 MiB are 16 images of HNE-ResNet. A micro-batch has at
  // least 8 samples, since each of them reads all weights once.
  static constexpr int64_t kCachesPerMicroBatch = 4, kMinMicroBatch = 8;

  RepeatedCalls calls_;
  ScalarType type_;
  std::optional<int64_t> paired_channels_;  // of the input, if bfloat16 is multiplied as such
  std::vector<Stage> stages_;
  std::vector<size_t> last_readers_;  // by the number of the features: the last stage that reads them
  bool ends_linear_;                  // the last layer is a pool_linear
};

// Never destroyed: Python removes layers until the process ends.
LayersRegistry<PreparedLayers>& registry() {
  static auto* registry = new LayersRegistry<PreparedLayers>;
  return *registry;
}

int64_t prepare_layers(const std::vector<std::optional<Tensor>>& weights, const std::vector<int64_t>& numbers) {
  return registry().add(std::make_shared<const PreparedLayers>(weights, numbers));
}

std::vector<Tensor> fused_layers(const Tensor& x, int64_t layers, const std::optional<Tensor>& total, int64_t count) {
  const auto prepared = registry().get(layers);
  return count == 0 ? (*prepared)(x) : (*prepared)(x, total, count);
}

}  // namespace

void forget_layers(int64_t handle) { registry().remove(handle); }

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) {
  m.impl("prepare_layers", TORCH_BOX(&prepare_layers));
  m.impl("fused_layers", TORCH_BOX(&fused_layers));
}

}  // namespace hne
