// The two gradients of the dense branch convolution.
#include "winograd.h"

namespace hne {
namespace {

// Input pixels of one phase (iy % stride, ix % stride) are read by the same taps of the kernel. Every phase is one
// product, over the taps of all children of the parent.
template <typename T>
void convolve_input_packed(const Geometry& g, const PrologueInput<T>& grad, const T* packed, T* out,
                           const RowsWritten& written) {
  const int64_t s = g.stride, tap_size = g.out_channels * kPanel;
  const int64_t panel_stride = g.replicate * g.taps() * tap_size;
  const int64_t parent_size = ceil_div(g.in_channels, kPanel) * panel_stride;
  const std::vector<T> zeros(g.out_channels, T(0));
  const int64_t phase_height = ceil_div(g.height, s), phase_width = ceil_div(g.width, s);
  const int64_t chunks = ceil_div(g.batch * phase_height * phase_width, kBlockRows);
  parallel_tasks(g.parents * s * s * chunks, [&](int64_t task) {
    const int64_t parent = task / (s * s * chunks), phase = task / chunks % (s * s), chunk = task % chunks;
    const int64_t py = phase / s, px = phase % s;
    const int64_t height = ceil_div(g.height - py, s), width = ceil_div(g.width - px, s);  // of this phase
    if (height <= 0 || width <= 0) return;
    const int64_t first = chunk * kBlockRows, count = std::min(kBlockRows, g.batch * height * width - first);
    if (count <= 0) return;
    const int64_t children = std::min(g.replicate, g.branches - parent * g.replicate);
    const T** rows = scratch<const T*>(0, g.replicate * g.taps() * kBlockRows);
    T** out_rows = scratch<T*>(1, kBlockRows);
    Tap<T>* taps = scratch<Tap<T>>(2, g.replicate * g.taps());
    int64_t used = 0;
    for (int64_t child = 0; child < children; ++child) {
      const int64_t branch = parent * g.replicate + child;
      for (int64_t ky = (py + g.padding) % s; ky < g.kernel_size; ky += s)
        for (int64_t kx = (px + g.padding) % s; kx < g.kernel_size; kx += s, ++used) {
          const int64_t tap = child * g.taps() + ky * g.kernel_size + kx;
          taps[used] = {rows + used * kBlockRows, packed + parent * parent_size + tap * tap_size, panel_stride,
                        g.out_channels, g.pointwise() ? g.out_channels : 0};
          if (g.pointwise()) {
            T* memory = scratch<T>(4, g.replicate * kBlockRows * g.out_channels) + child * kBlockRows * g.out_channels;
            rows[used * kBlockRows] = grad.read(branch, first, count, memory);
            continue;
          }
          const int64_t down = (py + g.padding - ky) / s, right = (px + g.padding - kx) / s;  // no remainder
          PixelWalk in(height, width, first);
          for (int64_t m = 0; m < count; ++m, in.next()) {
            const int64_t oy = in.y + down, ox = in.x + right;
            const bool inside = oy >= 0 && ox >= 0 && oy < g.out_height && ox < g.out_width;
            rows[used * kBlockRows + m] =
                inside ? grad.x + ((branch * g.batch + in.b) * g.out_pixels() + oy * g.out_width + ox) * g.out_channels
                       : zeros.data();
          }
        }
    }
    PixelWalk in(height, width, first);
    for (int64_t m = 0; m < count; ++m, in.next()) {
      const int64_t iy = in.y * s + py, ix = in.x * s + px;
      out_rows[m] = out + ((parent * g.batch + in.b) * g.pixels() + iy * g.width + ix) * g.in_channels;
    }
    kernels<T>().gemm({taps, used, count, g.in_channels, out_rows, nullptr, nullptr, Clamp<Sum<T>>{}});
    if (written && s == 1) written(parent, first, count);
  });
  if (!written || s == 1) return;
  const int64_t blocks = ceil_div(g.batch * g.pixels(), kBlockRows);  // phases interleave: no block is done earlier
  parallel_tasks(g.parents * blocks, [&](int64_t task) {
    const int64_t first = task % blocks * kBlockRows;
    written(task / blocks, first, std::min(kBlockRows, g.batch * g.pixels() - first));
  });
}

// The weights of all children of a parent, packed as one matrix from their output channels to the parent's channels.
template <typename T>
Tensor pack_transposed(const Geometry& g, const Tensor& weight) {
  const int64_t child_size = g.taps() * g.out_channels * kPanel, panel_stride = g.replicate * child_size;
  const int64_t parent_size = ceil_div(g.in_channels, kPanel) * panel_stride;
  const Tensor packed = empty(weight, {g.parents * parent_size}, kScalarType<T>);
  parallel_tasks(g.branches, [&](int64_t branch) {
    pack(data<Sum<T>>(weight) + branch * weight.stride(0), g.in_channels, g.out_channels, g.taps(), g.taps(),
         weight.stride(1), panel_stride,
         mutable_data<T>(packed) + branch / g.replicate * parent_size + branch % g.replicate * child_size);
  });
  return packed;
}

}  // namespace

template <typename T>
void convolve_input(const Geometry& g, const PrologueInput<T>& grad, const Tensor& weight, T* out,
                    const RowsWritten& written) {
  Tensor hold = weight;
  const PrologueInput<T> source = g.pointwise() ? grad : in_memory(grad, g.branches, hold);
  if constexpr (kTerms<T> == 1) {
    if (prefers_winograd(g, false)) return convolve_winograd_input<T>(g, source.x, weight, out, written);
  }
  const Tensor packed = pack_transposed<T>(g, weight);
  convolve_input_packed(g, source, data<T>(packed), out, written);
}

namespace {

// Sizes of the gradient of the weights: one matrix [out][in] per tap or, for an image, [tap][in][out] for all taps.
struct WeightSums {
  bool by_lines;
  int64_t matrices, size;  // matrices of a branch, and the size of one
  WeightSums(const Geometry& g, bool x_computed)
      : by_lines(g.in_channels < kFewChannels && !x_computed),
        matrices(by_lines ? 1 : g.taps()),
        size(g.out_channels * g.in_channels * (by_lines ? g.taps() : 1)) {}
};

// Each task sums a part of the rows into its own matrix. The matrices are then added in order, so that the result does
// not depend on the threads.
template <typename T>
void sum_weight_gradient(const Geometry& g, const PrologueInput<T>& grad, const PrologueInput<T>& x, Sum<T>* partial,
                         int64_t parts, Sum<T>* out) {
  const WeightSums sums(g, x.computed());
  const int64_t total = g.batch * g.out_pixels(), chunks = ceil_div(total, kBlockRows);
  const int64_t line_size = g.kernel_size * g.in_channels;
  const std::vector<T> zeros(g.in_channels, T(0));
  parallel_tasks(g.branches * sums.matrices * parts, [&](int64_t task) {
    const int64_t branch = task / (sums.matrices * parts), tap = task / parts % sums.matrices, part = task % parts;
    Sum<T>* sum = partial + task * sums.size;
    std::fill(sum, sum + sums.size, Sum<T>(0));
    const T** grad_rows = scratch<const T*>(0, kBlockRows);
    const T** x_rows = scratch<const T*>(1, g.kernel_size * kBlockRows);
    const int64_t parent = branch / g.replicate;
    const T* branch_x = x.x + parent * g.batch * g.pixels() * g.in_channels;
    const int64_t ky = tap / g.kernel_size, kx = tap % g.kernel_size;
    for (int64_t chunk = chunks * part / parts; chunk < chunks * (part + 1) / parts; ++chunk) {
      const int64_t first = chunk * kBlockRows, count = std::min(kBlockRows, total - first);
      const T* block = grad.read(branch, first, count, scratch<T>(4, kBlockRows * g.out_channels));
      for (int64_t m = 0; m < count; ++m) grad_rows[m] = block + m * g.out_channels;
      if (x.computed()) {
        block = x.read(parent, first, count, scratch<T>(5, kBlockRows * g.in_channels));
        for (int64_t m = 0; m < count; ++m) x_rows[m] = block + m * g.in_channels;
        add_outer(grad_rows, g.out_channels, x_rows, g.in_channels, count, sum);
        continue;
      }
      if (sums.by_lines) {
        gather_lines(g, branch_x, first, count, scratch<T>(3, lines_size(g, kBlockRows)), x_rows, kBlockRows);
        for (int64_t line = 0; line < g.kernel_size; ++line)
          add_outer(x_rows + line * kBlockRows, line_size, grad_rows, g.out_channels, count,
                    sum + line * line_size * g.out_channels);
        continue;
      }
      PixelWalk at(g.out_height, g.out_width, first);
      for (int64_t m = 0; m < count; ++m, at.next()) {
        const int64_t iy = at.y * g.stride + ky - g.padding, ix = at.x * g.stride + kx - g.padding;
        const bool inside = iy >= 0 && iy < g.height && ix >= 0 && ix < g.width;
        x_rows[m] = inside ? branch_x + (at.b * g.pixels() + iy * g.width + ix) * g.in_channels : zeros.data();
      }
      add_outer(grad_rows, g.out_channels, x_rows, g.in_channels, count, sum);
    }
  });
  if (partial == out) return;
  parallel_tasks(g.branches * sums.matrices, [&](int64_t task) {
    Sum<T>* sum = partial + task * parts * sums.size;
    for (int64_t part = 1; part < parts; ++part)
      kernels<Sum<T>>().add_scaled(sum, sum + part * sums.size, Sum<T>(1), sums.size);
    Sum<T>* weight = out + task / sums.matrices * g.out_channels * g.kernel_size * line_size + task % sums.matrices;
    if (!sums.by_lines) {
      for (int64_t i = 0; i < sums.size; ++i) weight[i * g.taps()] = sum[i];
      return;
    }
    for (int64_t tap = 0; tap < g.taps(); ++tap)
      for (int64_t ci = 0; ci < g.in_channels; ++ci)
        for (int64_t co = 0; co < g.out_channels; ++co) weight[(co * g.in_channels + ci) * g.taps() + tap] = *sum++;
  });
}

}  // namespace

template <typename T>
void convolve_weight(const Geometry& g, const PrologueInput<T>& grad_in, const PrologueInput<T>& x_in,
                     const Tensor& out) {
  Tensor hold_grad = out, hold_x = out;
  const PrologueInput<T> x = g.pointwise() ? x_in : in_memory(x_in, g.parents, hold_x);
  if constexpr (kTerms<T> == 1) {
    if (prefers_winograd(g, false))
      return convolve_winograd_weight<T>(g, in_memory(grad_in, g.branches, hold_grad).x, x.x, out);
  }
  const WeightSums sums(g, x.computed());
  const PrologueInput<T> grad = sums.matrices == 1 ? grad_in : in_memory(grad_in, g.branches, hold_grad);
  const int64_t threads = num_threads(), matrices = g.branches * sums.matrices;
  const int64_t chunks = ceil_div(g.batch * g.out_pixels(), kBlockRows);
  const int64_t parts = std::max<int64_t>(1, std::min(chunks, ceil_div(2 * threads, std::max<int64_t>(matrices, 1))));
  const bool direct = sums.matrices == 1 && parts == 1 && !sums.by_lines;  // the only sum is the result
  const Tensor partial = direct ? out : empty(out, {matrices * parts * sums.size});
  sum_weight_gradient(g, grad, x, mutable_data<Sum<T>>(partial), parts, mutable_data<Sum<T>>(out));
}

// Each task takes a part of a parent's rows, one block at a time.
template <typename T>
void pointwise_backward(const Geometry& g, const PrologueInput<T>& grad, const PrologueInput<T>& x,
                        const Tensor& weight, const T* add, T* grad_x, const Tensor* grad_weight,
                        const RowsWritten& written) {
  const int64_t rows = g.batch * g.pixels(), chunks = ceil_div(rows, kBlockRows);
  const int64_t size = g.out_channels * g.in_channels, branches_size = g.branches * size;
  const int64_t threads = num_threads();
  const int64_t parts = std::max<int64_t>(1, std::min(chunks, ceil_div(2 * threads, std::max<int64_t>(g.parents, 1))));
  const Tensor packed = grad_x != nullptr ? pack_transposed<T>(g, weight) : weight;
  const int64_t tap_size = g.out_channels * kPanel, panel_stride = g.replicate * tap_size;
  const int64_t parent_size = ceil_div(g.in_channels, kPanel) * panel_stride;
  // The first part is summed in the result; the others are then added to it in order.
  const Tensor partial = empty(weight, {grad_weight != nullptr ? (parts - 1) * branches_size : 0});
  Sum<T>* const total = grad_weight != nullptr ? mutable_data<Sum<T>>(*grad_weight) : nullptr;
  parallel_tasks(g.parents * parts, [&](int64_t task) {
    const int64_t parent = task / parts, part = task % parts, first_child = parent * g.replicate;
    const int64_t children = std::min(g.replicate, g.branches - first_child);
    Sum<T>* sums = total;
    if (total != nullptr) {
      if (part > 0) sums = mutable_data<Sum<T>>(partial) + (part - 1) * branches_size;
      sums += first_child * size;
      std::fill(sums, sums + children * size, Sum<T>(0));
    }
    Tap<T>* taps = scratch<Tap<T>>(2, g.replicate);
    const T** blocks = scratch<const T*>(0, g.replicate);
    T** out_rows = scratch<T*>(1, kBlockRows);
    const T** add_rows = scratch<const T*>(3, kBlockRows);
    const T** grad_rows = scratch<const T*>(7, kBlockRows);
    const T** x_rows = scratch<const T*>(8, kBlockRows);
    T* memory = scratch<T>(4, g.replicate * kBlockRows * g.out_channels);
    for (int64_t child = 0; child < children; ++child)
      taps[child] = {blocks + child, data<T>(packed) + parent * parent_size + child * tap_size, panel_stride,
                     g.out_channels, g.out_channels};
    for (int64_t chunk = chunks * part / parts; chunk < chunks * (part + 1) / parts; ++chunk) {
      const int64_t first = chunk * kBlockRows, count = std::min(kBlockRows, rows - first);
      const int64_t at = (parent * rows + first) * g.in_channels;
      PrefetchQueue<T> ahead;
      for (int64_t child = 0; child < children; ++child) {
        blocks[child] = grad.read(first_child + child, first, count, memory + child * kBlockRows * g.out_channels);
        grad.add_rows_after(ahead, g.branches, first_child + child, first, count);
      }
      if (total != nullptr) x.add_rows_after(ahead, g.parents, parent, first, count);
      add_rows_after(ahead, add, g.parents * rows, g.in_channels, parent * rows + first, count);
      add_rows_after<T>(ahead, grad_x, g.parents * rows, g.in_channels, parent * rows + first, count);
      if (total != nullptr) {
        const T* x_block = x.read(parent, first, count, scratch<T>(5, kBlockRows * g.in_channels));
        for (int64_t m = 0; m < count; ++m) x_rows[m] = x_block + m * g.in_channels;
        for (int64_t child = 0; child < children; ++child) {
          for (int64_t m = 0; m < count; ++m) grad_rows[m] = blocks[child] + m * g.out_channels;
          add_outer(grad_rows, g.out_channels, x_rows, g.in_channels, count, sums + child * size, &ahead);
        }
      }
      if (grad_x == nullptr) continue;
      for (int64_t m = 0; m < count; ++m) {
        out_rows[m] = grad_x + at + m * g.in_channels;
        if (add != nullptr) add_rows[m] = add + at + m * g.in_channels;
      }
      const T* const* added = add != nullptr ? add_rows : nullptr;
      kernels<T>().gemm({taps, children, count, g.in_channels, out_rows, nullptr, added, Clamp<Sum<T>>{}, &ahead});
      if (written) written(parent, first, count);
    }
  });
  if (total == nullptr || parts == 1) return;
  parallel_tasks(g.branches, [&](int64_t branch) {
    for (int64_t part = 1; part < parts; ++part)
      kernels<Sum<T>>().add_scaled(total + branch * size,
                                   data<Sum<T>>(partial) + (part - 1) * branches_size + branch * size, Sum<T>(1), size);
  });
}

template <typename T>
void convolve_backward(const Geometry& g, const PrologueInput<T>& grad, const PrologueInput<T>& x, const Tensor& weight,
                       T* grad_x, const Tensor* grad_weight, const RowsWritten& written) {
  if (g.pointwise()) return pointwise_backward<T>(g, grad, x, weight, nullptr, grad_x, grad_weight, written);
  Tensor hold = weight;
  const PrologueInput<T> read = grad_x != nullptr && grad_weight != nullptr ? in_memory(grad, g.branches, hold) : grad;
  if (grad_x != nullptr) convolve_input(g, read, weight, grad_x, written);
  if (grad_weight != nullptr) convolve_weight(g, read, x, *grad_weight);
}

#define HNE_INSTANTIATE(T)                                                                                           \
  template void convolve_input(const Geometry&, const PrologueInput<T>&, const Tensor&, T*, const RowsWritten&);     \
  template void convolve_weight(const Geometry&, const PrologueInput<T>&, const PrologueInput<T>&, const Tensor&);   \
  template void pointwise_backward(const Geometry&, const PrologueInput<T>&, const PrologueInput<T>&, const Tensor&, \
                                   const T*, T*, const Tensor*, const RowsWritten&);                                 \
  template void convolve_backward(const Geometry&, const PrologueInput<T>&, const PrologueInput<T>&, const Tensor&,  \
                                  T*, const Tensor*, const RowsWritten&);
HNE_INSTANTIATE(float)
HNE_INSTANTIATE(double)
HNE_INSTANTIATE(bfloat16)
#undef HNE_INSTANTIATE

namespace {

Tensor branch_conv2d_backward_input(const Tensor& grad_in, const Tensor& weight_in, int64_t height, int64_t width,
                                    int64_t stride, int64_t padding, int64_t replicate) {
  STD_TORCH_CHECK(weight_in.dim() == 5, "weight: expected 5 dimensions");
  const Geometry g =
      backward_geometry(grad_in, weight_in.size(2), height, width, weight_in.size(3), stride, padding, replicate);
  check_shape("weight", weight_in, {g.branches, g.out_channels, g.in_channels, g.kernel_size, g.kernel_size});
  check_kind("grad", grad_in, grad_in);
  check_kind("weight", weight_in, grad_in);
  const Tensor grad = read_features(grad_in, g.kernel_size == 1 && keeps_bfloat16(grad_in, {g.out_channels}));
  const Tensor weight = contiguous_filters(widen(weight_in));
  Tensor out = empty(grad, {g.parents, g.batch, height, width, g.in_channels});
  dispatch_features(grad, [&](auto type) {
    using T = decltype(type);
    convolve_input<T>(g, {data<T>(grad), g.batch * g.out_pixels(), g.out_channels}, weight, mutable_data<T>(out));
  });
  return round_to(out, grad_in.scalar_type());
}

Tensor branch_conv2d_backward_weight(const Tensor& grad_in, const Tensor& x_in, int64_t kernel_size, int64_t stride,
                                     int64_t padding, int64_t replicate) {
  STD_TORCH_CHECK(x_in.dim() == 5, "x: expected 5 dimensions");
  const Geometry g =
      backward_geometry(grad_in, x_in.size(4), x_in.size(2), x_in.size(3), kernel_size, stride, padding, replicate);
  check_shape("x", x_in, {g.parents, g.batch, g.height, g.width, g.in_channels});
  check_kind("grad", grad_in, grad_in);
  check_kind("x", x_in, grad_in);
  const bool kept = kernel_size == 1 && keeps_bfloat16(x_in);
  const Tensor grad = read_features(grad_in, kept), x = read_features(x_in, kept);
  const std::vector<int64_t> shape = {g.branches, g.out_channels, g.in_channels, kernel_size, kernel_size};
  Tensor out;
  dispatch_features(grad, [&](auto type) {
    using T = decltype(type);
    out = empty(grad, shape, kScalarType<Sum<T>>);
    convolve_weight<T>(g, {data<T>(grad), g.batch * g.out_pixels(), g.out_channels},
                       {data<T>(x), g.batch * g.pixels(), g.in_channels}, out);
  });
  return round_to(out, grad_in.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) {
  m.impl("branch_conv2d_backward_input", TORCH_BOX(&branch_conv2d_backward_input));
  m.impl("branch_conv2d_backward_weight", TORCH_BOX(&branch_conv2d_backward_weight));
}

}  // namespace hne
