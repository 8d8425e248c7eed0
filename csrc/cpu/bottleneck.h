// Whole bottlenecks in the cache (inference): a band of rows goes through the first 1x1 convolution, the depthwise
// convolution, the second 1x1 convolution and the shortcut before the next band is touched. In a run of bottlenecks a
// map goes through all of them before the next map is touched: what lies between two of them never leaves the cache.
#pragma once

#include "convolution.h"
#include "packed_convolution.h"

namespace hne {

constexpr int64_t kBandBytes = 192 * 1024;  // of the expanded map, beside the weights in the second cache

// The weights of one bottleneck, their dtype and layout as the kernels read them.
struct BottleneckWeights {
  Tensor expand, expand_bias, depthwise, depthwise_bias, project, project_bias;
  std::optional<Tensor> shortcut, shortcut_bias;
  int64_t stride, replicate;
  bool identity;
  std::string activation, final_activation;

  // `given` in the order of fused_bottleneck.
  BottleneckWeights(const std::optional<Tensor>* given, int64_t stride, int64_t replicate, std::string activation,
                    bool identity, std::string final_activation)
      : stride(stride),
        replicate(replicate),
        identity(identity),
        activation(std::move(activation)),
        final_activation(std::move(final_activation)) {
    for (int i = 0; i < 8; ++i) {
      if (i < 6) STD_TORCH_CHECK(given[i].has_value(), "weights: only the shortcut may be missing");
      if (given[i].has_value()) check_kind("weights", *given[i], *given[0]);
    }
    STD_TORCH_CHECK(given[0]->dim() == 6 && replicate >= 1, "expand: expected 6 dimensions");
    const int64_t parents = ceil_div(given[0]->size(0), replicate);  // of a map of one pixel: the shapes of the rest
    bottleneck_geometry({parents, 1, 1, 1, given[0]->size(4)}, *given[0], *given[1], *given[2], *given[3], *given[4],
                        *given[5], given[6], given[7], stride, replicate, identity);
    const auto read = [](const Tensor& t) { return torch::stable::contiguous(widen(t)); };
    expand = read(*given[0]), expand_bias = read(*given[1]), depthwise = read(*given[2]);
    depthwise_bias = read(*given[3]), project = read(*given[4]), project_bias = read(*given[5]);
    shortcut = contiguous(widen(given[6])), shortcut_bias = contiguous(widen(given[7]));
  }

  int64_t branches() const { return expand.size(0); }
  int64_t middle() const { return depthwise.size(3); }

  // Of the depthwise convolution, between the channels of x and of the output; `shape` is that of x.
  Geometry geometry(const std::vector<int64_t>& shape) const {
    STD_TORCH_CHECK(shape.size() == 5 && shape[4] == expand.size(4), "x: does not have the channels of expand");
    const int64_t kernel_size = depthwise.size(1);
    return forward_geometry(shape, expand.size(0), project_bias.size(1), kernel_size, stride, kernel_size / 2,
                            replicate);
  }
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
  int64_t in_size() const { return g_.pixels() * g_.in_channels; }  // values of a map
  int64_t out_size() const { return g_.out_pixels() * g_.out_channels; }

  // Output rows [first, last) of a branch, from the map x to the map out.
  void run(int64_t branch, const T* x, T* out, int64_t first, int64_t last) const {
    T* const expanded = scratch<T>(3, rows_read(band_) * row_size());
    for (int64_t begin = first, ready = 0; begin < last; begin += band_) {
      const int64_t count = std::min(band_, last - begin), rows = rows_read(count);
      expand(branch, x, begin * g_.stride - g_.padding, ready, rows, expanded);
      finish(branch, x, expanded, out, begin, count);
      ready = std::max<int64_t>(0, g_.kernel_size - g_.stride);  // rows that the band below reads as well
      std::copy(expanded + (rows - ready) * row_size(), expanded + rows * row_size(), expanded);
    }
  }

  // The same in two steps, for threads that share a map. What the second one reads is the whole expanded map: no thread
  // expands rows of another.
  bool shared(int64_t share) const { return share <= band_; }  // so many output rows are of one thread
  int64_t expanded_rows() const { return rows_read(g_.out_height); }
  int64_t expanded_size() const { return expanded_rows() * row_size(); }
  void run_expand(int64_t branch, const T* x, T* expanded, int64_t first, int64_t last) const {
    expand(branch, x, -g_.padding, first, last, expanded);
  }
  void run_finish(int64_t branch, const T* x, const T* expanded, T* out, int64_t first, int64_t last) const {
    finish(branch, x, expanded + first * g_.stride * row_size(), out, first, last - first);
  }

 private:
  // Rows of the map that a band of `rows` output rows reads.
  int64_t rows_read(int64_t rows) const { return (rows - 1) * g_.stride + g_.kernel_size; }
  // A row of the expanded map has columns of zeros at both ends.
  int64_t row_size() const { return (g_.width + 2 * g_.padding) * middle_; }

  static Tap<T> pointwise(const Tensor& packed, int64_t branch, int64_t channels, int64_t depth, const T* const* rows) {
    return {rows, data<T>(packed) + branch * ceil_div(channels, kPanel) * depth * kPanel, depth * kPanel, depth, depth};
  }

  // Of the projection and the shortcut.
  const T* bias_of_sum(int64_t branch) const {
    const T* bias = data<T>(w_.project_bias) + branch * g_.out_channels;
    if (!w_.shortcut.has_value()) return bias;
    T* both = scratch<T>(6, g_.out_channels);
    for (int64_t c = 0; c < g_.out_channels; ++c)
      both[c] = bias[c] + data<T>(w_.shortcut_bias)[branch * g_.out_channels + c];
    return both;
  }

  // Lines [first, last) of an expanded map whose line 0 is row `top` of the map.
  void expand(int64_t branch, const T* x, int64_t top, int64_t first, int64_t last, T* expanded) const {
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
    kernels<T>().gemm({&tap, 1, pixels, middle, out_rows, data<T>(w_.expand_bias) + branch * middle, nullptr, clamp_});
  }

  // Output rows [begin, begin + count), from the lines of the expanded map that they read.
  void finish(int64_t branch, const T* x, const T* expanded, T* out, int64_t begin, int64_t count) const {
    T* const filtered = scratch<T>(4, count * g_.out_width * middle_);
    filter(branch, expanded, count, filtered);
    project(branch, x, filtered, out, begin, count);
  }

  void filter(int64_t branch, const T* expanded, int64_t count, T* filtered) const {
    const int64_t middle = middle_;
    const T** rows = scratch<const T*>(5, g_.kernel_size);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t ky = 0; ky < g_.kernel_size; ++ky) rows[ky] = expanded + (r * g_.stride + ky) * row_size();
      kernels<T>().depthwise_row({rows, data<T>(w_.depthwise) + branch * g_.taps() * middle,
                                  data<T>(w_.depthwise_bias) + branch * middle, filtered + r * g_.out_width * middle,
                                  g_.width + 2 * g_.padding, g_.out_width, middle, g_.kernel_size, g_.stride, 0, false,
                                  clamp_});
    }
  }

  void project(int64_t branch, const T* x, const T* filtered, T* out, int64_t begin, int64_t count) const {
    const int64_t pixels = count * g_.out_width, channels = g_.in_channels;
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
    kernels<T>().gemm({taps, w_.shortcut.has_value() ? 2 : 1, pixels, g_.out_channels, out_rows, bias_of_sum(branch),
                       w_.identity ? rows : nullptr, final_clamp_});
  }

  const BottleneckWeights& w_;
  Geometry g_;
  int64_t middle_;
  Clamp<T> clamp_, final_clamp_;
  int64_t band_;
};

// One bottleneck after the other, from x to out: maps, or with `mean` what each map is on average. Convolutions may
// come before, where there is one branch. `like` is for the memory between them.
template <typename T>
void run_bottlenecks(const Convolutions<T>& before, const std::vector<Bottleneck<T>>& layers, const T* x, T* out,
                     bool mean, const Tensor& like) {
  const Geometry& g = layers.front().geometry();
  const int64_t maps = g.branches * g.batch, threads = num_threads();
  const auto input = [&](int64_t map) {
    return x + (map / g.batch / g.replicate * g.batch + map % g.batch) * layers.front().in_size();
  };
  const int64_t pixels = layers.back().geometry().out_pixels(), channels = layers.back().geometry().out_channels;
  const auto output = [&](int64_t map) { return out + map * (mean ? 1 : pixels) * channels; };
  int64_t largest = 0;  // of what is not a result
  for (size_t i = 0; i + (mean ? 0 : 1) < layers.size(); ++i) largest = std::max(largest, layers[i].out_size());
  const auto finish = [&](const T* from, int64_t map) {
    if (mean) kernels<T>().mean_rows(from, pixels, channels, output(map));
  };

  // As many maps for each thread,
  const int64_t each = maps - maps % threads;
  parallel_tasks(each, [&](int64_t map) {
    const T* from = before.empty() ? input(map)
                                   : before.run(x + map * before.in_size(), 1, scratch<T>(10, before.largest()),
                                                scratch<T>(11, before.largest()));
    for (size_t i = 0; i < layers.size(); ++i) {
      T* to = i + 1 == layers.size() && !mean ? output(map) : scratch<T>(8 + i % 2, largest);
      layers[i].run(map / g.batch, from, to, 0, layers[i].geometry().out_height);
      from = to;
    }
    finish(from, map);
  });
  if (each == maps) return;

  // and the rest layer by layer, so that all threads share a map.
  const int64_t rest = maps - each;
  const Tensor between = empty(like, {2, rest * largest}), first = empty(like, {2, rest * before.largest()});
  const T* const first_maps = before.empty() ? nullptr
                                             : before.run(x + each * before.in_size(), rest, mutable_data<T>(first),
                                                          mutable_data<T>(first) + rest * before.largest());
  const auto buffer = [&](size_t layer, int64_t map) {
    return mutable_data<T>(between) + (int64_t(layer % 2) * rest + map) * largest;
  };
  for (size_t i = 0; i < layers.size(); ++i) {
    const Bottleneck<T>& layer = layers[i];
    const int64_t height = layer.geometry().out_height;
    const int64_t parts = std::clamp<int64_t>(ceil_div(threads, rest), 1, std::max<int64_t>(height, 1));
    const int64_t share = ceil_div(height, parts);
    const auto source = [&](int64_t map) {
      if (i > 0) return static_cast<const T*>(buffer(i - 1, map));
      return before.empty() ? input(each + map) : first_maps + map * layer.in_size();
    };
    const auto target = [&](int64_t map) {
      return i + 1 == layers.size() && !mean ? output(each + map) : buffer(i, map);
    };
    // f(map, first, last) for all `rows` of each map
    const auto split = [&](int64_t rows, const auto& f) {
      const int64_t most = ceil_div(rows, parts);
      parallel_tasks(rest * parts, [&](int64_t task) {
        const int64_t first = std::min(task % parts * most, rows);
        f(task / parts, first, std::min(first + most, rows));
      });
    };
    if (parts > 1 && layer.shared(share)) {
      T* const expanded = scratch<T>(9, rest * layer.expanded_size());
      const auto map_of = [&](int64_t map) { return expanded + map * layer.expanded_size(); };
      split(layer.expanded_rows(), [&](int64_t map, int64_t first, int64_t last) {
        layer.run_expand((each + map) / g.batch, source(map), map_of(map), first, last);
      });
      split(height, [&](int64_t map, int64_t first, int64_t last) {
        layer.run_finish((each + map) / g.batch, source(map), map_of(map), target(map), first, last);
      });
    } else {
      split(height, [&](int64_t map, int64_t first, int64_t last) {
        layer.run((each + map) / g.batch, source(map), target(map), first, last);
      });
    }
  }
  for (int64_t map = 0; map < rest; ++map) finish(buffer(layers.size() - 1, map), each + map);
}

}  // namespace hne
