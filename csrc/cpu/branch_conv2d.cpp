// Dense branch convolution as register-blocked products over row pointers.
#include "winograd.h"

namespace hne {
namespace {

constexpr int64_t kTilePixels = 14;  // of a row, for tiles that do not span rows
constexpr int64_t kTaskPanels = 4;   // least panels of a task, where several tasks divide the output channels
constexpr int64_t kDepth = 192;      // terms of a product: a tile's rows and weights fit the first cache

// Windows that are copied before they are multiplied: equally spaced rows allow larger tiles, and products of few terms
// read their weights from the first cache. A product takes some channels of one tap, or several taps. Sums of bfloat16
// are not divided, as the features between them would be rounded.
struct WindowParts {
  int64_t taps, depth;
  WindowParts(const Geometry& g, int64_t most_terms)
      : taps(std::clamp<int64_t>(most_terms / std::max<int64_t>(g.in_channels, 1), 1, g.taps())),
        depth(ceil_div(g.in_channels, ceil_div(std::max<int64_t>(g.in_channels, 1), most_terms))) {}
};

// Rows of a task, at most kBlockRows: whole tiles, and as many for each task as possible.
int64_t rows_per_task(int64_t total) {
  const int64_t rows = ceil_div(total, std::max<int64_t>(ceil_div(total, kBlockRows), 1));
  return std::max<int64_t>(1, std::min(kBlockRows, ceil_div(rows, kTilePixels) * kTilePixels));
}

}  // namespace

template <typename T>
void convolve_packed(const Geometry& g, const PrologueInput<T>& x, const T* packed, const Sum<T>* bias, Summand<T> add,
                     Clamp<Sum<T>> clamp, T* out, const RowsWritten& written) {
  const int64_t total = g.batch * g.out_pixels(), block = written ? kBlockRows : rows_per_task(total);
  const int64_t chunks = ceil_div(total, block);
  const int64_t tap_size = g.in_channels * kPanel, panel_stride = g.taps() * tap_size;
  const int64_t branch_size = ceil_div(g.out_channels, kPanel) * panel_stride;
  const int64_t line_size = g.kernel_size * g.in_channels;
  const bool by_lines = g.in_channels < kFewChannels && !x.computed();
  const bool by_windows = !by_lines && !g.pointwise();
  const WindowParts parts(g, kTerms<T> > 1 ? std::max<int64_t>(g.taps() * g.in_channels, 1) : kDepth);
  // Lines of the output pixels of one row are equally spaced, which is faster for long rows.
  const bool by_rows = by_lines && g.out_width >= kTilePixels;
  const std::vector<T> zeros(g.in_channels, T(0));
  // With fewer blocks of rows than threads, several tasks divide the output channels of a block.
  const int64_t blocks = g.branches * chunks, panels = ceil_div(g.out_channels, kPanel);
  const int64_t threads = num_threads();
  const int64_t tasks =
      written || blocks == 0 ? 1 : std::clamp<int64_t>(threads / blocks, 1, ceil_div(panels, kTaskPanels));
  const int64_t task_panels = ceil_div(panels, tasks);
  parallel_tasks(blocks * tasks, [&](int64_t task) {
    const int64_t branch = task / tasks / chunks, first = task / tasks % chunks * block;
    const int64_t count = std::min(block, total - first), parent = branch / g.replicate;
    const int64_t panel = task % tasks * task_panels, channel = panel * kPanel;
    const int64_t channels = std::min(task_panels * kPanel, g.out_channels - channel);
    if (channels <= 0) return;
    const T* branch_x = x.x + parent * g.batch * g.pixels() * g.in_channels;
    const T* branch_weight = packed + branch * branch_size + panel * panel_stride;
    const T** rows = scratch<const T*>(0, g.taps() * kBlockRows);
    T** out_rows = scratch<T*>(1, kBlockRows);
    Tap<T>* taps = scratch<Tap<T>>(2, g.taps());
    for (int64_t m = 0; m < count; ++m) out_rows[m] = out + (branch * total + first + m) * g.out_channels + channel;
    const T** add_rows = nullptr;
    if (add.features != nullptr) {
      const T* row = add.features + (branch / add.replicate * total + first) * g.out_channels + channel;
      add_rows = scratch<const T*>(5, kBlockRows);
      for (int64_t m = 0; m < count; ++m, row += g.out_channels) add_rows[m] = row;
    }
    const Sum<T>* branch_bias = bias != nullptr ? bias + branch * g.out_channels + channel : nullptr;
    PrefetchQueue<T> ahead;
    if (by_windows) {
      gather_rows(g, branch_x, zeros.data(), first, count, rows, kBlockRows);
      T* const windows = scratch<T>(3, kBlockRows * parts.taps * parts.depth);
      for (int64_t tap = 0; tap < g.taps(); tap += parts.taps)
        for (int64_t k0 = 0; k0 < g.in_channels; k0 += parts.depth) {
          const int64_t depth = std::min(parts.depth, g.in_channels - k0);
          const int64_t terms = std::min(parts.taps, g.taps() - tap) * depth;
          T* to = windows;
          for (int64_t m = 0; m < count; ++m)
            for (int64_t t = tap; t < std::min(tap + parts.taps, g.taps()); ++t)
              to = std::copy_n(rows[t * kBlockRows + m] + k0, depth, to);
          const T* const left = windows;
          const Tap<T> part = {&left, branch_weight + tap * tap_size + k0 * kPanel, panel_stride, terms, terms};
          const bool starts = tap == 0 && k0 == 0;
          const bool ends = tap + parts.taps >= g.taps() && k0 + depth >= g.in_channels;
          kernels<T>().gemm({&part,
                             1,
                             count,
                             channels,
                             out_rows,
                             starts ? branch_bias : nullptr,
                             starts ? add_rows : out_rows,
                             ends ? clamp : Clamp<Sum<T>>{},
                             {},
                             !starts});
        }
      if (written) written(branch, first, count);
      return;
    }
    if (by_lines) {
      gather_lines(g, branch_x, first, count, scratch<T>(3, lines_size(g, kBlockRows)), rows, kBlockRows);
      for (int64_t ky = 0; ky < g.kernel_size; ++ky)
        taps[ky] = {rows + ky * kBlockRows, branch_weight + ky * line_size * kPanel, panel_stride, line_size,
                    by_rows ? line_step(g) : 0};
    } else {
      rows[0] = x.read(parent, first, count, scratch<T>(4, kBlockRows * g.in_channels));
      if (written) {  // else the next rows may be another thread's
        x.add_rows_after(ahead, g.parents, parent, first, count);
        add_rows_after<T>(ahead, out, g.branches * total, g.out_channels, branch * total + first, count);
      }
      taps[0] = {rows, branch_weight, panel_stride, g.in_channels, g.in_channels};
    }
    for (int64_t m = 0, pixels; m < count; m += pixels) {
      pixels = by_rows ? std::min(count - m, g.out_width - (first + m) % g.out_width) : count;
      kernels<T>().gemm({taps, by_lines ? g.kernel_size : 1, pixels, channels, out_rows + m, branch_bias,
                         add_rows != nullptr ? add_rows + m : nullptr, clamp, &ahead});
      for (int64_t ky = 0; by_rows && ky < g.kernel_size; ++ky) taps[ky].rows += pixels;
    }
    if (written) written(branch, first, count);
  });
}

template <typename T>
void convolve(const Geometry& g, const PrologueInput<T>& x, const Tensor& weight, const Sum<T>* bias, T* out,
              const RowsWritten& written) {
  Tensor hold = weight;  // windows of several pixels would compute each pixel several times
  const PrologueInput<T> source = g.pointwise() ? x : in_memory(x, g.parents, hold);
  if constexpr (kTerms<T> == 1) {
    if (prefers_winograd(g, false)) return convolve_winograd<T>(g, source.x, weight, bias, out, written);
  }
  const int64_t panel_stride = g.taps() * g.in_channels * kPanel;
  const int64_t branch_size = ceil_div(g.out_channels, kPanel) * panel_stride;
  const Tensor packed = empty(weight, {g.branches * branch_size}, kScalarType<T>);
  parallel_tasks(g.branches, [&](int64_t branch) {
    pack(data<Sum<T>>(weight) + branch * weight.stride(0), g.out_channels, g.in_channels, g.taps(), weight.stride(1),
         g.taps(), panel_stride, mutable_data<T>(packed) + branch * branch_size);
  });
  convolve_packed(g, source, data<T>(packed), bias, Summand<T>{}, Clamp<Sum<T>>{}, out, written);
}

#define HNE_INSTANTIATE(T)                                                                                     \
  template void convolve_packed(const Geometry&, const PrologueInput<T>&, const T*, const Sum<T>*, Summand<T>, \
                                Clamp<Sum<T>>, T*, const RowsWritten&);                                        \
  template void convolve(const Geometry&, const PrologueInput<T>&, const Tensor&, const Sum<T>*, T*,           \
                         const RowsWritten&);
HNE_INSTANTIATE(float)
HNE_INSTANTIATE(double)
HNE_INSTANTIATE(bfloat16)
#undef HNE_INSTANTIATE

namespace {

Tensor branch_conv2d(const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in, int64_t stride,
                     int64_t padding, int64_t replicate) {
  STD_TORCH_CHECK(weight_in.dim() == 5, "weight: expected 5 dimensions");
  const Geometry g =
      forward_geometry(x_in, weight_in.size(0), weight_in.size(1), weight_in.size(3), stride, padding, replicate);
  check_shape("weight", weight_in, {g.branches, g.out_channels, g.in_channels, g.kernel_size, g.kernel_size});
  check_kind("x", x_in, x_in);
  check_kind("weight", weight_in, x_in);
  if (bias_in.has_value()) {
    check_shape("bias", *bias_in, {g.branches, g.out_channels});
    check_kind("bias", *bias_in, x_in);
  }
  const Tensor x = read_features(x_in, g.kernel_size == 1 && keeps_bfloat16(x_in, {g.in_channels}));
  const Tensor weight = contiguous_filters(widen(weight_in));
  const std::optional<Tensor> bias = contiguous(widen(bias_in));
  Tensor out = empty(x, {g.branches, g.batch, g.out_height, g.out_width, g.out_channels});
  dispatch_features(x, [&](auto type) {
    using T = decltype(type);
    convolve<T>(g, {data<T>(x), g.batch * g.pixels(), g.in_channels}, weight, data<Sum<T>>(bias), mutable_data<T>(out));
  });
  return round_to(out, x_in.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) { m.impl("branch_conv2d", TORCH_BOX(&branch_conv2d)); }

}  // namespace hne
