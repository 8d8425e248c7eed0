// A whole bottleneck in the cache (inference): a band of rows goes through the first 1x1 convolution, the
// depthwise convolution, the second 1x1 convolution and the shortcut before the next band is touched. Only x
// is read from memory and only the output written.
#include "convolution.h"

namespace hne {
namespace {

constexpr int64_t kBandBytes = 192 * 1024;  // of the expanded map, beside the weights in the second cache

template <typename T>
struct Bottleneck {
  const T *x, *expand, *expand_bias, *depthwise, *depthwise_bias, *project, *project_bias, *shortcut, *shortcut_bias;
  T* out;
  int64_t middle;
  bool identity;
  Clamp<T> clamp, final_clamp;
};

// Rows of the map that a band of `rows` output rows reads.
int64_t rows_read(const Geometry& g, int64_t rows) { return (rows - 1) * g.stride + g.kernel_size; }

// Output rows [first, last) of one sample of one branch.
template <typename T>
void run_rows(const Geometry& g, const Bottleneck<T>& n, int64_t branch, int64_t b, int64_t first, int64_t last,
              int64_t band) {
  const int64_t width = g.width + 2 * g.padding, row_size = width * n.middle;  // columns of zeros at both ends
  const T* x = n.x + (branch / g.replicate * g.batch + b) * g.pixels() * g.in_channels;
  T* out = n.out + (branch * g.batch + b) * g.out_pixels() * g.out_channels;
  const auto panels = [](int64_t channels, int64_t depth) { return ceil_div(channels, kPanel) * depth * kPanel; };

  T* expanded = scratch<T>(3, rows_read(g, band) * row_size);
  T* filtered = scratch<T>(4, band * g.out_width * n.middle);
  const int64_t most = std::max(rows_read(g, band) * g.width, band * g.out_width);
  const T** rows = scratch<const T*>(0, most);
  const T** input_rows = scratch<const T*>(1, most);
  T** out_rows = scratch<T*>(2, most);
  const T** depthwise_rows = scratch<const T*>(5, g.kernel_size);
  const T* projection_bias = n.project_bias + branch * g.out_channels;
  if (n.shortcut != nullptr) {  // both biases at once
    T* both = scratch<T>(6, g.out_channels);
    for (int64_t c = 0; c < g.out_channels; ++c)
      both[c] = projection_bias[c] + n.shortcut_bias[branch * g.out_channels + c];
    projection_bias = both;
  }

  for (int64_t begin = first, ready = 0; begin < last; begin += band) {
    const int64_t count = std::min(band, last - begin), top = begin * g.stride - g.padding;
    // Expand the input rows [top, bottom); the first `ready` of them are left from the band above.
    int64_t pixels = 0;
    for (int64_t r = ready; r < rows_read(g, count); ++r) {
      T* line = expanded + r * row_size;
      const int64_t iy = top + r;
      if (iy < 0 || iy >= g.height) {
        std::fill(line, line + row_size, T(0));
        continue;
      }
      std::fill(line, line + g.padding * n.middle, T(0));
      std::fill(line + (g.padding + g.width) * n.middle, line + row_size, T(0));
      for (int64_t ix = 0; ix < g.width; ++ix, ++pixels) {
        rows[pixels] = x + (iy * g.width + ix) * g.in_channels;
        out_rows[pixels] = line + (g.padding + ix) * n.middle;
      }
    }
    const Tap<T> expansion{rows, n.expand + branch * panels(n.middle, g.in_channels), g.in_channels * kPanel,
                           g.in_channels};
    kernels<T>().gemm({&expansion, 1, pixels, n.middle, out_rows, n.expand_bias + branch * n.middle, nullptr, n.clamp});

    for (int64_t r = 0; r < count; ++r) {
      for (int64_t ky = 0; ky < g.kernel_size; ++ky) depthwise_rows[ky] = expanded + (r * g.stride + ky) * row_size;
      kernels<T>().depthwise_row({depthwise_rows, n.depthwise + branch * g.taps() * n.middle,
                                  n.depthwise_bias + branch * n.middle, filtered + r * g.out_width * n.middle, width,
                                  g.out_width, n.middle, g.kernel_size, g.stride, 0, false, n.clamp});
    }

    for (int64_t m = 0; m < count * g.out_width; ++m) {
      const int64_t oy = begin + m / g.out_width, ox = m % g.out_width;
      rows[m] = filtered + m * n.middle;
      input_rows[m] = x + (oy * g.stride * g.width + ox * g.stride) * g.in_channels;
      out_rows[m] = out + (oy * g.out_width + ox) * g.out_channels;
    }
    Tap<T> taps[2] = {{rows, n.project + branch * panels(g.out_channels, n.middle), n.middle * kPanel, n.middle}, {}};
    if (n.shortcut != nullptr)
      taps[1] = {input_rows, n.shortcut + branch * panels(g.out_channels, g.in_channels), g.in_channels * kPanel,
                 g.in_channels};
    kernels<T>().gemm({taps, n.shortcut != nullptr ? 2 : 1, count * g.out_width, g.out_channels, out_rows,
                       projection_bias, n.identity ? input_rows : nullptr, n.final_clamp});

    ready = std::max<int64_t>(0, g.kernel_size - g.stride);
    std::copy(expanded + (rows_read(g, count) - ready) * row_size, expanded + rows_read(g, count) * row_size, expanded);
  }
}

Tensor fused_bottleneck(const Tensor& x_in, const Tensor& expand_in, const Tensor& expand_bias_in,
                        const Tensor& depthwise_in, const Tensor& depthwise_bias_in, const Tensor& project_in,
                        const Tensor& project_bias_in, const std::optional<Tensor>& shortcut_in,
                        const std::optional<Tensor>& shortcut_bias_in, int64_t stride, int64_t replicate,
                        const std::string& activation, bool identity, const std::string& final_activation) {
  const Geometry g = bottleneck_geometry(x_in, expand_in, expand_bias_in, depthwise_in, depthwise_bias_in, project_in,
                                         project_bias_in, shortcut_in, shortcut_bias_in, stride, replicate, identity);
  const int64_t middle = depthwise_in.size(3);
  const auto prepare = [&](const Tensor& t) {
    check_kind("weights", t, x_in);
    return torch::stable::contiguous(widen(t));
  };
  const auto prepare_optional = [&](const std::optional<Tensor>& t) {
    return t.has_value() ? std::optional<Tensor>(prepare(*t)) : std::nullopt;
  };
  const Tensor x = prepare(x_in), expand = prepare(expand_in), expand_bias = prepare(expand_bias_in);
  const Tensor depthwise = prepare(depthwise_in), depthwise_bias = prepare(depthwise_bias_in);
  const Tensor project = prepare(project_in), project_bias = prepare(project_bias_in);
  const std::optional<Tensor> shortcut = prepare_optional(shortcut_in),
                              shortcut_bias = prepare_optional(shortcut_bias_in);
  Tensor out = torch::stable::new_empty(x, {g.branches, g.batch, g.out_height, g.out_width, g.out_channels});
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const Bottleneck<T> n{data<T>(x),
                          data<T>(expand),
                          data<T>(expand_bias),
                          data<T>(depthwise),
                          data<T>(depthwise_bias),
                          data<T>(project),
                          data<T>(project_bias),
                          data<T>(shortcut),
                          data<T>(shortcut_bias),
                          mutable_data<T>(out),
                          middle,
                          identity,
                          Clamp<T>::named(activation),
                          Clamp<T>::named(final_activation)};
    // Split a map between threads only where there are too few maps to keep them busy.
    const int64_t maps = g.branches * g.batch, threads = torch::stable::get_num_threads();
    const int64_t parts = maps >= 4 * threads
                              ? 1
                              : std::clamp<int64_t>(ceil_div(2 * threads, std::max<int64_t>(maps, 1)), 1, g.out_height);
    const int64_t row_bytes = g.stride * (g.width + 2 * g.padding) * middle * int64_t(sizeof(T));
    const int64_t share = ceil_div(g.out_height, parts);
    const int64_t band = std::clamp<int64_t>(kBandBytes / std::max<int64_t>(row_bytes, 1), 1, share);
    parallel_tasks(maps * parts, [&](int64_t task) {
      const int64_t map = task / parts, first = task % parts * share;
      run_rows(g, n, map / g.batch, map % g.batch, first, std::min(first + share, g.out_height), band);
    });
  });
  return round_to(out, x_in.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) { m.impl("fused_bottleneck", TORCH_BOX(&fused_bottleneck)); }

}  // namespace hne
