// Several bottlenecks in the cache (inference): a feature map goes through all of them before the next one starts, so
// that features between two bottlenecks never leave the cache.
#pragma once

#include <functional>

#include "bottleneck.h"
#include "convolution_chain.h"

namespace hne {

// Offsets of the layers' buffers in one block of memory. A buffer holds `num_maps` feature maps of one size, and layers
// with feature maps of equal size may share it.
class BufferPlan {
 public:
  explicit BufferPlan(int64_t num_maps) : num_maps_(num_maps) {}

  // Adds the next layer, whose feature maps have `size` values. It shares the buffer of the most recent layer of this
  // size, or gets a new one; the buffer of the layer just before it is shared only if `may_reuse_last`.
  void add(int64_t size, bool may_reuse_last) {
    const auto reusable = [&](size_t layer) { return may_reuse_last || offsets_[layer] != offsets_.back(); };
    size_t layer = offsets_.size();
    while (layer > 0 && !(sizes_[layer - 1] == size && reusable(layer - 1))) --layer;
    offsets_.push_back(layer > 0 ? offsets_[layer - 1] : total_size_);
    sizes_.push_back(size);
    if (layer == 0) total_size_ += ceil_div(num_maps_ * size, kMultiple) * kMultiple;
  }

  int64_t total_size() const { return total_size_; }
  int64_t offset(size_t layer, int64_t map_index) const { return offsets_[layer] + map_index * sizes_[layer]; }

 private:
  static constexpr int64_t kMultiple = 32;  // values: whole cache lines, of 16 bits as well
  int64_t num_maps_, total_size_ = 0;
  std::vector<int64_t> offsets_, sizes_;
};

// A stem of convolutions and then bottlenecks, for `num_maps` feature maps at a time; `threads` threads share each
// feature map, and each of them computes some rows of every bottleneck. The outputs of the stem and of the first
// `num_buffered` bottlenecks lie in the chain's memory, of size() values, which the caller provides.
//
// A thread owning a feature map ping-pongs two buffers, which stay in the second cache beside the weights. Sharing
// threads get buffers per map size: each thread reads and writes the same rows of a buffer, in its own cache.
template <typename T>
class BottleneckChain {
 public:
  BottleneckChain(const ConvolutionChain<T>& stem, const std::vector<Bottleneck<T>>& bottlenecks, size_t num_buffered,
                  int64_t num_maps, int64_t threads)
      : stem_(stem), bottlenecks_(bottlenecks), threads_(threads), outputs_(num_maps), expanded_(num_maps) {
    int64_t max_size = 0, max_expanded_size = 0;
    for (size_t i = 0; i < stem.size(); ++i) max_size = std::max(max_size, stem.out_size(i));
    for (size_t i = 0; i < bottlenecks.size(); ++i) {
      if (i < num_buffered) max_size = std::max(max_size, bottlenecks[i].out_size());
      if (is_pre_expanded(i)) max_expanded_size = std::max(max_expanded_size, bottlenecks[i].expanded_size());
    }
    const bool owns_maps = threads == 1;
    for (size_t i = 0; i < stem.size(); ++i) outputs_.add(owns_maps ? max_size : stem.out_size(i), false);
    for (size_t i = 0; i < bottlenecks.size(); ++i) {
      const bool in_place = i > 0 && (owns_maps || is_pre_expanded(i)) && bottlenecks[i].in_place();
      if (i < num_buffered) outputs_.add(owns_maps ? max_size : bottlenecks[i].out_size(), in_place);
      const int64_t expanded_size = is_pre_expanded(i) ? bottlenecks[i].expanded_size() : 0;
      expanded_.add(owns_maps ? max_expanded_size : expanded_size, owns_maps);
    }
  }

  int64_t size() const { return outputs_.total_size() + kTerms<T> * expanded_.total_size(); }

  // Whether bottleneck i reads an input that has been expanded as a whole.
  bool is_pre_expanded(size_t i) const {
    return i < bottlenecks_.size() &&
           bottlenecks_[i].fits_one_band(ceil_div(bottlenecks_[i].geometry().out_height, threads_));
  }

  // Memory for the output of bottleneck i.
  T* output(T* memory, size_t i, int64_t map_index) const {
    return memory + outputs_.offset(stem_.size() + i, map_index);
  }

  // Applies the stem to `num_maps` contiguous feature maps; returns the input of the first bottleneck.
  const T* forward_stem(T* memory, const T* x, int64_t num_maps) const {
    return stem_.forward(x, num_maps, [&](size_t layer) { return memory + outputs_.offset(layer, 0); });
  }

  // Expands rows [first, last) of x for bottleneck i, if that is pre-expanded.
  void expand(T* memory, size_t i, int64_t map_index, int64_t branch, const T* x, int64_t first, int64_t last) const {
    if (is_pre_expanded(i)) bottlenecks_[i].expand(branch, x, expanded(memory, i, map_index), first, last);
  }

  // Computes output rows [first, last) of bottleneck i, and expands them for the next one.
  void forward(T* memory, size_t i, int64_t map_index, int64_t branch, const T* x, T* out, int64_t first,
               int64_t last) const {
    if (is_pre_expanded(i))
      bottlenecks_[i].forward_expanded(branch, x, expanded(memory, i, map_index), out, first, last);
    else
      bottlenecks_[i].forward(branch, x, out, first, last);
    expand(memory, i + 1, map_index, branch, out, first, last);
  }

 private:
  Sum<T>* expanded(T* memory, size_t i, int64_t map_index) const {
    return reinterpret_cast<Sum<T>*>(memory + outputs_.total_size()) + expanded_.offset(i, map_index);
  }

  const ConvolutionChain<T>& stem_;
  const std::vector<Bottleneck<T>>& bottlenecks_;
  int64_t threads_;  // per feature map
  BufferPlan outputs_, expanded_;
};

// Applies the stem (of one branch; may be empty) and then all bottlenecks to x. With `pool`, a function that computes
// the mean over the pixels of a feature map, `out` is these means. `like` gives the dtype of temporary memory.
template <typename T>
void forward_bottlenecks(const ConvolutionChain<T>& stem, const std::vector<Bottleneck<T>>& bottlenecks, const T* x,
                         T* out, const std::function<void(const T* map, T* mean)>& pool, const Tensor& like) {
  const Geometry& g = bottlenecks.front().geometry();
  const int64_t num_maps = g.branches * g.batch, threads = num_threads();
  const int64_t in_size = stem.size() > 0 ? stem.in_size() : bottlenecks.front().in_size();
  const auto chain_input = [&](int64_t map_index) {
    return x + (map_index / g.batch / g.replicate * g.batch + map_index % g.batch) * in_size;
  };
  const int64_t pixels = bottlenecks.back().geometry().out_pixels();
  const int64_t channels = bottlenecks.back().geometry().out_channels;
  const auto chain_output = [&](int64_t map_index) { return out + map_index * (pool ? 1 : pixels) * channels; };
  const size_t num_buffered = bottlenecks.size() - (pool ? 0 : 1);
  const auto write_mean = [&](const T* features, int64_t map_index) { pool(features, chain_output(map_index)); };

  // Each thread owns the same number of feature maps and takes each of them through all layers.
  const int64_t num_owned = num_maps - num_maps % threads;
  if (num_owned > 0) {
    const BottleneckChain<T> chain(stem, bottlenecks, num_buffered, 1, 1);
    parallel_tasks(num_owned, [&](int64_t map_index) {
      T* const memory = scratch<T>(8, chain.size());
      const int64_t branch = map_index / g.batch;
      const T* input = chain.forward_stem(memory, chain_input(map_index), 1);
      chain.expand(memory, 0, 0, branch, input, 0, g.height);
      for (size_t i = 0; i < bottlenecks.size(); ++i) {
        T* const output = i < num_buffered ? chain.output(memory, i, 0) : chain_output(map_index);
        chain.forward(memory, i, 0, branch, input, output, 0, bottlenecks[i].geometry().out_height);
        input = output;
      }
      if (pool) write_mean(input, map_index);
    });
  }
  if (num_owned == num_maps) return;

  // The remaining feature maps, fewer than threads, are computed layer by layer; several threads share each of them.
  const int64_t num_shared = num_maps - num_owned, threads_per_map = ceil_div(threads, num_shared);
  const BottleneckChain<T> chain(stem, bottlenecks, num_buffered, num_shared, threads_per_map);
  const Tensor memory_tensor = empty(like, {chain.size()});
  T* const memory = mutable_data<T>(memory_tensor);
  const T* const stem_output =
      stem.size() > 0 ? chain.forward_stem(memory, chain_input(num_owned), num_shared) : nullptr;
  const auto layer_input = [&](size_t i, int64_t shared_index) -> const T* {
    if (i > 0) return chain.output(memory, i - 1, shared_index);
    return stem_output != nullptr ? stem_output + shared_index * bottlenecks.front().in_size()
                                  : chain_input(num_owned + shared_index);
  };
  // Calls f(shared_index, begin, end) for all `rows` rows of each shared feature map.
  const auto split_rows = [&](int64_t rows, const auto& f) {
    const int64_t max_rows = ceil_div(rows, threads_per_map);
    parallel_tasks(num_shared * threads_per_map, [&](int64_t task) {
      const int64_t begin = task % threads_per_map * max_rows, end = std::min(begin + max_rows, rows);
      if (begin < end) f(task / threads_per_map, begin, end);
    });
  };
  if (chain.is_pre_expanded(0))
    split_rows(g.height, [&](int64_t shared_index, int64_t begin, int64_t end) {
      chain.expand(memory, 0, shared_index, (num_owned + shared_index) / g.batch, layer_input(0, shared_index), begin,
                   end);
    });
  for (size_t i = 0; i < bottlenecks.size(); ++i)
    split_rows(bottlenecks[i].geometry().out_height, [&](int64_t shared_index, int64_t begin, int64_t end) {
      T* const output =
          i < num_buffered ? chain.output(memory, i, shared_index) : chain_output(num_owned + shared_index);
      chain.forward(memory, i, shared_index, (num_owned + shared_index) / g.batch, layer_input(i, shared_index), output,
                    begin, end);
    });
  if (pool)
    for (int64_t shared_index = 0; shared_index < num_shared; ++shared_index)
      write_mean(layer_input(bottlenecks.size(), shared_index), num_owned + shared_index);
}

}  // namespace hne
