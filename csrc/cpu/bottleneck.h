// Whole bottlenecks in the cache (inference): a band of rows goes through the first 1x1 convolution, the depthwise
// convolution, the second 1x1 convolution and the shortcut before the next band is touched. In a run of bottlenecks a
// map goes through all of them before the next map is touched: what lies between two of them never leaves the cache.
#pragma once

#include "convolution.h"

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
    const int64_t most = std::max(rows_read(band_) * g_.width, band_ * g_.out_width);
    Buffers buffers{scratch<T>(3, rows_read(band_) * row_size()), scratch<T>(4, band_ * g_.out_width * middle_),
                    bias_of_sum(branch), scratch<const T*>(0, most), scratch<T*>(2, most)};
    for (int64_t begin = first, ready = 0; begin < last; begin += band_) {
      const int64_t count = std::min(band_, last - begin);
      expand(branch, x, begin * g_.stride - g_.padding, ready, rows_read(count), buffers);
      filter(branch, count, buffers);
      project(branch, x, out, begin, count, buffers);
      ready = std::max<int64_t>(0, g_.kernel_size - g_.stride);  // rows that the band below reads as well
      T* end = buffers.expanded + rows_read(count) * row_size();
      std::copy(end - ready * row_size(), end, buffers.expanded);
    }
  }

 private:
  struct Buffers {
    T *expanded, *filtered;
    const T* bias;
    const T** rows;
    T** out_rows;
  };

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

  // Rows [top, top + rows) of the map; the first `ready` of them are left from the band above.
  void expand(int64_t branch, const T* x, int64_t top, int64_t ready, int64_t rows, const Buffers& buffers) const {
    const int64_t middle = middle_;
    int64_t pixels = 0;
    for (int64_t r = ready; r < rows; ++r) {
      T* line = buffers.expanded + r * row_size();
      if (top + r < 0 || top + r >= g_.height) {
        std::fill(line, line + row_size(), T(0));
        continue;
      }
      std::fill(line, line + g_.padding * middle, T(0));
      std::fill(line + (g_.padding + g_.width) * middle, line + row_size(), T(0));
      for (int64_t ix = 0; ix < g_.width; ++ix) buffers.out_rows[pixels++] = line + (g_.padding + ix) * middle;
    }
    const T* first_row = x + std::max<int64_t>(top + ready, 0) * g_.width * g_.in_channels;
    const Tap<T> tap = pointwise(w_.expand, branch, middle, g_.in_channels, &first_row);
    kernels<T>().gemm(
        {&tap, 1, pixels, middle, buffers.out_rows, data<T>(w_.expand_bias) + branch * middle, nullptr, clamp_});
  }

  void filter(int64_t branch, int64_t count, const Buffers& buffers) const {
    const int64_t middle = middle_;
    const T** rows = scratch<const T*>(5, g_.kernel_size);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t ky = 0; ky < g_.kernel_size; ++ky) rows[ky] = buffers.expanded + (r * g_.stride + ky) * row_size();
      kernels<T>().depthwise_row({rows, data<T>(w_.depthwise) + branch * g_.taps() * middle,
                                  data<T>(w_.depthwise_bias) + branch * middle,
                                  buffers.filtered + r * g_.out_width * middle, g_.width + 2 * g_.padding, g_.out_width,
                                  middle, g_.kernel_size, g_.stride, 0, false, clamp_});
    }
  }

  void project(int64_t branch, const T* x, T* out, int64_t begin, int64_t count, const Buffers& buffers) const {
    const int64_t pixels = count * g_.out_width, channels = g_.in_channels;
    for (int64_t m = 0; m < pixels; ++m) buffers.out_rows[m] = out + (begin * g_.out_width + m) * g_.out_channels;
    const T* filtered = buffers.filtered;
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
      for (int64_t m = 0; m < pixels; ++m) buffers.rows[m] = source + m * channels;
    kernels<T>().gemm({taps, w_.shortcut.has_value() ? 2 : 1, pixels, g_.out_channels, buffers.out_rows, buffers.bias,
                       w_.identity ? buffers.rows : nullptr, final_clamp_});
  }

  const BottleneckWeights& w_;
  Geometry g_;
  int64_t middle_;
  Clamp<T> clamp_, final_clamp_;
  int64_t band_;
};

// One bottleneck after the other, from x to out: maps, or with `mean` what each map is on average. `like` is for the
// memory between them.
template <typename T>
void run_bottlenecks(const std::vector<Bottleneck<T>>& layers, const T* x, T* out, bool mean, const Tensor& like) {
  const Geometry& g = layers.front().geometry();
  const int64_t maps = g.branches * g.batch, threads = torch::stable::get_num_threads();
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
    const T* from = input(map);
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
  const Tensor between = empty(like, {2, rest * largest});
  const auto buffer = [&](size_t layer, int64_t map) {
    return mutable_data<T>(between) + (int64_t(layer % 2) * rest + map) * largest;
  };
  for (size_t i = 0; i < layers.size(); ++i) {
    const int64_t height = layers[i].geometry().out_height;
    const int64_t parts = std::clamp<int64_t>(ceil_div(threads, rest), 1, std::max<int64_t>(height, 1));
    const int64_t share = ceil_div(height, parts);
    parallel_tasks(rest * parts, [&](int64_t task) {
      const int64_t map = task / parts, first = task % parts * share;
      layers[i].run((each + map) / g.batch, i == 0 ? input(each + map) : buffer(i - 1, map),
                    i + 1 == layers.size() && !mean ? output(each + map) : buffer(i, map), first,
                    std::min(first + share, height));
    });
  }
  for (int64_t map = 0; map < rest; ++map) finish(buffer(layers.size() - 1, map), each + map);
}

}  // namespace hne
