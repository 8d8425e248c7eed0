// Whole bottlenecks in the cache (inference): a band of rows goes through the first 1x1 convolution, the depthwise
// convolution, the second 1x1 convolution and the shortcut before the next band is touched. In a run of bottlenecks a
// map goes through all of them before the next map is touched: what lies between two of them never leaves the cache.
#pragma once

#include "convolution.h"
#include "packed_convolution.h"

namespace hne {

constexpr int64_t kBandBytes = 192 * 1024;  // of the expanded map, beside the weights in the second cache

// The weights of one bottleneck as the kernels read them, checked.
class BottleneckWeights {
 public:
  const ConstTensor expand, expand_bias, depthwise, depthwise_bias, project;
  const std::optional<ConstTensor> shortcut;
  const ConstTensor sum_bias;  // of the projection and the shortcut
  const int64_t stride, replicate;
  const bool identity;
  const std::string activation, final_activation;

  // `given` in the order of fused_bottleneck.
  BottleneckWeights(const std::optional<Tensor>* given, int64_t stride, int64_t replicate, std::string activation,
                    bool identity, std::string final_activation)
      : BottleneckWeights(checked(given, stride, replicate, identity), given, stride, replicate, std::move(activation),
                          identity, std::move(final_activation)) {}

  int64_t branches() const { return of_a_pixel_.branches; }

  // Of the depthwise convolution, between the channels of x and of the output; `shape` is that of x.
  Geometry geometry(const std::vector<int64_t>& shape) const {
    const Geometry& g = of_a_pixel_;
    STD_TORCH_CHECK(shape.size() == 5 && shape[4] == g.in_channels, "x: does not have the channels of expand");
    return forward_geometry(shape, g.branches, g.out_channels, g.kernel_size, stride, g.padding, replicate);
  }
  int64_t middle() const { return middle_; }  // channels of the depthwise convolution

 private:
  BottleneckWeights(Geometry of_a_pixel, const std::optional<Tensor>* given, int64_t stride, int64_t replicate,
                    std::string activation, bool identity, std::string final_activation)
      : expand(*given[0]),
        expand_bias(*given[1]),
        depthwise(*given[2]),
        depthwise_bias(*given[3]),
        project(*given[4]),
        shortcut(given[6].has_value() ? std::optional<ConstTensor>(*given[6]) : std::nullopt),
        sum_bias(sum(*given[5], given[7])),
        stride(stride),
        replicate(replicate),
        identity(identity),
        activation(std::move(activation)),
        final_activation(std::move(final_activation)),
        of_a_pixel_(of_a_pixel),
        middle_(given[2]->size(3)) {}

  // The geometry of a map of one pixel: the shapes of the rest.
  static Geometry checked(const std::optional<Tensor>* given, int64_t stride, int64_t replicate, bool identity) {
    for (int i = 0; i < 8; ++i) {
      if (i < 6) STD_TORCH_CHECK(given[i].has_value(), "weights: only the shortcut may be missing");
      if (given[i].has_value()) check_kind("weights", *given[i], *given[0]);
    }
    STD_TORCH_CHECK(given[0]->dim() == 6 && replicate >= 1, "expand: expected 6 dimensions");
    const int64_t parents = ceil_div(given[0]->size(0), replicate);
    return bottleneck_geometry({parents, 1, 1, 1, given[0]->size(4)}, *given[0], *given[1], *given[2], *given[3],
                               *given[4], *given[5], given[6], given[7], stride, replicate, identity);
  }

  static Tensor sum(const Tensor& bias, const std::optional<Tensor>& other) {
    const Tensor first = torch::stable::contiguous(widen(bias));
    if (!other.has_value()) return first;
    const Tensor second = torch::stable::contiguous(widen(*other)), both = empty(first, first.sizes());
    dispatch(first, [&](auto type) {
      using T = decltype(type);
      const T *a = data<T>(first), *b = data<T>(second);
      std::transform(a, a + first.numel(), b, mutable_data<T>(both), std::plus<T>());
    });
    return both;
  }

  Geometry of_a_pixel_;
  int64_t middle_;
};

template <typename T>
class Bottleneck {
 public:
  Bottleneck(const BottleneckWeights& weights, const std::vector<int64_t>& shape)
      : w_(weights),
        g_(weights.geometry(shape)),
        middle_(weights.middle()),
        clamp_(Clamp<T>::named(weights.activation)),
        final_clamp_(Clamp<T>::named(weights.final_activation)) {
    const int64_t row_bytes = g_.stride * row_size() * int64_t(sizeof(T));
    band_ = std::clamp<int64_t>(kBandBytes / std::max<int64_t>(row_bytes, 1), 1, std::max<int64_t>(g_.out_height, 1));
  }

  const Geometry& geometry() const { return g_; }
  bool identity() const { return w_.identity; }
  int64_t in_size() const { return g_.pixels() * g_.in_channels; }  // values of a map
  int64_t out_size() const { return g_.out_pixels() * g_.out_channels; }

  // Output rows [first, last) of a branch, from the map x to the map out.
  void run(int64_t branch, const T* x, T* out, int64_t first, int64_t last) const {
    T* const expanded = scratch<T>(3, rows_read(band_) * row_size());
    for (int64_t begin = first, ready = 0; begin < last; begin += band_) {
      const int64_t count = std::min(band_, last - begin), rows = rows_read(count);
      expand_lines(branch, x, begin * g_.stride - g_.padding, ready, rows, expanded);
      project(branch, x, expanded, out, begin, count);
      ready = std::max<int64_t>(0, g_.kernel_size - g_.stride);  // rows that the band below reads as well
      std::copy(expanded + (rows - ready) * row_size(), expanded + rows * row_size(), expanded);
    }
  }

  // The same in two steps, where the expanded map stays in the cache as a whole: if each thread has so many output
  // rows. No thread expands rows of another, and what a layer has written is expanded for the next one at once.
  bool whole(int64_t rows) const { return rows <= band_; }
  int64_t expanded_size() const { return lines() * row_size(); }

  // Rows [first, last) of the map x, and with the first and the last of them the zeros around it.
  void expand(int64_t branch, const T* x, T* expanded, int64_t first, int64_t last) const {
    const auto line = [&](int64_t row) { return std::min(row + g_.padding, lines()); };
    expand_lines(branch, x, -g_.padding, first > 0 ? line(first) : 0, last < g_.height ? line(last) : lines(),
                 expanded);
  }

  // Output rows [first, last).
  void finish(int64_t branch, const T* x, const T* expanded, T* out, int64_t first, int64_t last) const {
    project(branch, x, expanded + first * g_.stride * row_size(), out, first, last - first);
  }

 private:
  // Rows of the map that a band of `rows` output rows reads.
  int64_t rows_read(int64_t rows) const { return (rows - 1) * g_.stride + g_.kernel_size; }
  int64_t lines() const { return rows_read(g_.out_height); }  // of the whole expanded map
  // A row of the expanded map has columns of zeros at both ends.
  int64_t row_size() const { return (g_.width + 2 * g_.padding) * middle_; }

  static Tap<T> pointwise(const ConstTensor& packed, int64_t branch, int64_t channels, int64_t depth,
                          const T* const* rows) {
    return {rows, packed.data<T>() + branch * ceil_div(channels, kPanel) * depth * kPanel, depth * kPanel, depth,
            depth};
  }

  // Lines [first, last) of an expanded map whose line 0 is row `top` of the map.
  void expand_lines(int64_t branch, const T* x, int64_t top, int64_t first, int64_t last, T* expanded) const {
    const int64_t middle = middle_;
    T** const out_rows = scratch<T*>(2, std::max<int64_t>(last - first, 0) * g_.width);
    int64_t pixels = 0;
    for (int64_t r = first; r < last; ++r) {
      T* line = expanded + r * row_size();
      if (top + r < 0 || top + r >= g_.height) {
        std::fill(line, line + row_size(), T(0));
        continue;
      }
      std::fill(line, line + g_.padding * middle, T(0));
      std::fill(line + (g_.padding + g_.width) * middle, line + row_size(), T(0));
      for (int64_t ix = 0; ix < g_.width; ++ix) out_rows[pixels++] = line + (g_.padding + ix) * middle;
    }
    const T* first_row = x + std::max<int64_t>(top + first, 0) * g_.width * g_.in_channels;
    const Tap<T> tap = pointwise(w_.expand, branch, middle, g_.in_channels, &first_row);
    const T* const bias = w_.expand_bias.data<T>() + branch * middle;
    Gemm<T> gemm{&tap, 1, pixels, middle, out_rows, bias, nullptr, clamp_};
    gemm.cached = true;
    kernels<T>().gemm(gemm);
  }

  // Output rows [begin, begin + count), from the lines of the expanded map that they read.
  void project(int64_t branch, const T* x, const T* expanded, T* out, int64_t begin, int64_t count) const {
    const int64_t pixels = count * g_.out_width, channels = g_.in_channels;
    const T* const filtered = filter(branch, expanded, count);
    const T** const rows = scratch<const T*>(0, pixels);
    T** const out_rows = scratch<T*>(2, pixels);
    for (int64_t m = 0; m < pixels; ++m) out_rows[m] = out + (begin * g_.out_width + m) * g_.out_channels;
    const T* source = x + begin * g_.width * channels;  // what the shortcut reads
    Tap<T> taps[2] = {pointwise(w_.project, branch, g_.out_channels, middle_, &filtered), {}};
    if (w_.shortcut.has_value()) {
      if (g_.stride > 1) {
        T* strided = scratch<T>(7, pixels * channels);
        for (int64_t m = 0; m < pixels; ++m) {
          const int64_t iy = (begin + m / g_.out_width) * g_.stride, ix = m % g_.out_width * g_.stride;
          const T* pixel = x + (iy * g_.width + ix) * channels;
          std::copy(pixel, pixel + channels, strided + m * channels);
        }
        source = strided;
      }
      taps[1] = pointwise(*w_.shortcut, branch, g_.out_channels, channels, &source);
    }
    if (w_.identity)
      for (int64_t m = 0; m < pixels; ++m) rows[m] = source + m * channels;
    const T* const bias = w_.sum_bias.data<T>() + branch * g_.out_channels;
    const T* const* const added = w_.identity ? rows : nullptr;
    Gemm<T> gemm{taps, w_.shortcut.has_value() ? 2 : 1, pixels, g_.out_channels, out_rows, bias, added, final_clamp_};
    gemm.cached = true;
    kernels<T>().gemm(gemm);
  }

  // The depthwise convolution of so many output rows.
  const T* filter(int64_t branch, const T* expanded, int64_t count) const {
    const int64_t middle = middle_;
    T* const filtered = scratch<T>(4, count * g_.out_width * middle);
    const T** rows = scratch<const T*>(5, g_.kernel_size);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t ky = 0; ky < g_.kernel_size; ++ky) rows[ky] = expanded + (r * g_.stride + ky) * row_size();
      kernels<T>().depthwise_row({rows, w_.depthwise.data<T>() + branch * g_.taps() * middle,
                                  w_.depthwise_bias.data<T>() + branch * middle, filtered + r * g_.out_width * middle,
                                  g_.width + 2 * g_.padding, g_.out_width, middle, g_.kernel_size, g_.stride, 0, false,
                                  clamp_});
    }
    return filtered;
  }

  const BottleneckWeights& w_;
  Geometry g_;
  int64_t middle_;
  Clamp<T> clamp_, final_clamp_;
  int64_t band_;
};

// Places in memory that layers take in turn, each of them for so many maps.
class BufferPlan {
 public:
  explicit BufferPlan(int64_t maps) : maps_(maps) {}

  // The place of the next layer: that of one before it whose maps are as large, the last one only if it may be, or else
  // a new one.
  void add(int64_t size, bool of_the_last) {
    const auto free = [&](size_t layer) { return of_the_last || at_[layer] != at_.back(); };
    size_t layer = at_.size();
    while (layer > 0 && !(sizes_[layer - 1] == size && free(layer - 1))) --layer;
    at_.push_back(layer > 0 ? at_[layer - 1] : total_);
    sizes_.push_back(size);
    if (layer == 0) total_ += ceil_div(maps_ * size, kPanel) * kPanel;
  }

  int64_t total() const { return total_; }
  int64_t at(size_t layer, int64_t map) const { return at_[layer] + map * sizes_[layer]; }

 private:
  int64_t maps_, total_ = 0;
  std::vector<int64_t> at_, sizes_;
};

// A run of bottlenecks, from map to map, after convolutions: so many maps at once, each of them shared by some threads,
// which have some rows of every layer. Outputs of the first `between` layers lie in its memory, those of others are
// results.
//
// A thread alone has two places in turn, for all sizes: they stay in the second cache beside the weights. Threads that
// share a map have places for every size of it: they find their part where they wrote one before, in their own caches.
template <typename T>
class BottleneckChain {
 public:
  BottleneckChain(const Convolutions<T>& before, const std::vector<Bottleneck<T>>& layers, size_t between, int64_t maps,
                  int64_t threads)
      : before_(before), layers_(layers), threads_(threads), out_(maps), expanded_(maps) {
    int64_t most = 0, most_expanded = 0;
    for (size_t i = 0; i < before.size(); ++i) most = std::max(most, before.out_size(i));
    for (size_t i = 0; i < layers.size(); ++i) {
      if (i < between) most = std::max(most, layers[i].out_size());
      if (whole(i)) most_expanded = std::max(most_expanded, layers[i].expanded_size());
    }
    const bool alone = threads == 1;
    for (size_t i = 0; i < before.size(); ++i) out_.add(alone ? most : before.out_size(i), false);
    for (size_t i = 0; i < layers.size(); ++i) {
      // Onto the map that it reads and adds: all of that is expanded already, and a value is added where it is written.
      const bool in_place = i > 0 && whole(i) && layers[i].identity();
      if (i < between) out_.add(alone ? most : layers[i].out_size(), in_place);
      expanded_.add(alone ? most_expanded : whole(i) ? layers[i].expanded_size() : 0, alone);
    }
  }

  int64_t size() const { return out_.total() + expanded_.total(); }  // of the memory

  // Whether a layer finds what it reads expanded.
  bool whole(size_t layer) const {
    return layer < layers_.size() && layers_[layer].whole(ceil_div(layers_[layer].geometry().out_height, threads_));
  }

  T* out(T* memory, size_t layer, int64_t map) const { return memory + out_.at(before_.size() + layer, map); }

  // What the first layer reads of some maps that follow each other, from x.
  const T* enter(T* memory, const T* x, int64_t maps) const {
    return before_.run(x, maps, [&](size_t layer) { return memory + out_.at(layer, 0); });
  }

  // Rows [first, last) of what a layer reads.
  void expand(T* memory, size_t layer, int64_t map, int64_t branch, const T* x, int64_t first, int64_t last) const {
    if (whole(layer)) layers_[layer].expand(branch, x, expanded(memory, layer, map), first, last);
  }

  // Output rows [first, last) of a layer, from x to out, expanded for the next one.
  void step(T* memory, size_t layer, int64_t map, int64_t branch, const T* x, T* out, int64_t first,
            int64_t last) const {
    if (whole(layer))
      layers_[layer].finish(branch, x, expanded(memory, layer, map), out, first, last);
    else
      layers_[layer].run(branch, x, out, first, last);
    expand(memory, layer + 1, map, branch, out, first, last);
  }

 private:
  T* expanded(T* memory, size_t layer, int64_t map) const { return memory + out_.total() + expanded_.at(layer, map); }

  const Convolutions<T>& before_;
  const std::vector<Bottleneck<T>>& layers_;
  int64_t threads_;  // of a map
  BufferPlan out_, expanded_;
};

// One bottleneck after the other, from x to out: maps, or with `mean` what each map is on average. Convolutions may
// come before, where there is one branch. `like` is for the memory between them.
template <typename T>
void run_bottlenecks(const Convolutions<T>& before, const std::vector<Bottleneck<T>>& layers, const T* x, T* out,
                     bool mean, const Tensor& like) {
  const Geometry& g = layers.front().geometry();
  const int64_t maps = g.branches * g.batch, threads = num_threads();
  const int64_t in_size = before.size() > 0 ? before.in_size() : layers.front().in_size();
  const auto input = [&](int64_t map) { return x + (map / g.batch / g.replicate * g.batch + map % g.batch) * in_size; };
  const int64_t pixels = layers.back().geometry().out_pixels(), channels = layers.back().geometry().out_channels;
  const auto output = [&](int64_t map) { return out + map * (mean ? 1 : pixels) * channels; };
  const size_t between = layers.size() - (mean ? 0 : 1);  // layers whose output is no result
  const auto take_mean = [&](const T* from, int64_t map) {
    kernels<T>().mean_rows(from, pixels, channels, output(map));
  };

  // As many maps for each thread,
  const int64_t each = maps - maps % threads;
  if (each > 0) {
    const BottleneckChain<T> alone(before, layers, between, 1, 1);
    parallel_tasks(each, [&](int64_t map) {
      T* const memory = scratch<T>(8, alone.size());
      const int64_t branch = map / g.batch;
      const T* from = alone.enter(memory, input(map), 1);
      alone.expand(memory, 0, 0, branch, from, 0, g.height);
      for (size_t i = 0; i < layers.size(); ++i) {
        T* const to = i < between ? alone.out(memory, i, 0) : output(map);
        alone.step(memory, i, 0, branch, from, to, 0, layers[i].geometry().out_height);
        from = to;
      }
      if (mean) take_mean(from, map);
    });
  }
  if (each == maps) return;

  // and the rest layer by layer, so that all threads share a map.
  const int64_t rest = maps - each, parts = ceil_div(threads, rest);
  const BottleneckChain<T> shared(before, layers, between, rest, parts);
  const Tensor memory_of_maps = empty(like, {shared.size()});
  T* const memory = mutable_data<T>(memory_of_maps);
  const T* const first = before.size() > 0 ? shared.enter(memory, input(each), rest) : nullptr;
  const auto source = [&](size_t layer, int64_t map) -> const T* {
    if (layer > 0) return shared.out(memory, layer - 1, map);
    return first != nullptr ? first + map * layers.front().in_size() : input(each + map);
  };
  // f(map, begin, end) for all `rows` of each map
  const auto split = [&](int64_t rows, const auto& f) {
    const int64_t most = ceil_div(rows, parts);
    parallel_tasks(rest * parts, [&](int64_t task) {
      const int64_t begin = task % parts * most, end = std::min(begin + most, rows);
      if (begin < end) f(task / parts, begin, end);
    });
  };
  if (shared.whole(0))
    split(g.height, [&](int64_t map, int64_t begin, int64_t end) {
      shared.expand(memory, 0, map, (each + map) / g.batch, source(0, map), begin, end);
    });
  for (size_t i = 0; i < layers.size(); ++i)
    split(layers[i].geometry().out_height, [&](int64_t map, int64_t begin, int64_t end) {
      T* const to = i < between ? shared.out(memory, i, map) : output(each + map);
      shared.step(memory, i, map, (each + map) / g.batch, source(i, map), to, begin, end);
    });
  if (mean)
    for (int64_t map = 0; map < rest; ++map) take_mean(source(layers.size(), map), each + map);
}

}  // namespace hne
