// Depthwise branch convolution and its two gradients, a row of pixels at a time.
#include "branch_depthwise_conv2d.h"

namespace hne {
namespace {

// Transposes [branch][channel][tap] to [branch][tap][channel]; `flip` reverses the taps, for the gradient of the input.
template <typename T>
Tensor channels_last(const Tensor& weight, int64_t taps, bool flip) {
  const int64_t branches = weight.size(0), channels = weight.size(1);
  const int64_t branch_stride = weight.stride(0), channel_stride = weight.stride(1);
  const Tensor out = empty(weight, {branches, taps, channels});
  const T* from = data<T>(weight);
  T* to = mutable_data<T>(out);
  for (int64_t branch = 0; branch < branches; ++branch)
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t c = 0; c < channels; ++c)
        to[(branch * taps + tap) * channels + c] =
            from[branch * branch_stride + c * channel_stride + (flip ? taps - 1 - tap : tap)];
  return out;
}

// Rows of pixels of a sample, as float if they are bfloat16. Those that are computed or converted are so once: a window
// of the last kernel_size rows stays in memory.
template <typename T>
class Rows {
 public:
  Rows(const PrologueInput<T>& input, int64_t branch, int64_t first, int64_t width, int64_t window, int slot)
      : input_(input), branch_(branch), first_(first), width_(width), window_(window) {
    if (kTerms<T> == 1 && !input.computed()) return;
    memory_ = scratch<Sum<T>>(slot, window * width * input.channels);
    rows_.assign(window, -1);
  }

  const Sum<T>* operator[](int64_t row) {
    Sum<T>* memory = memory_ + row % window_ * width_ * input_.channels;
    if (memory_ != nullptr && std::exchange(rows_[row % window_], row) == row) return memory;
    return input_.read_sums(branch_, first_ + row * width_, width_, memory);
  }

 private:
  const PrologueInput<T>& input_;
  int64_t branch_, first_, width_, window_;
  Sum<T>* memory_ = nullptr;
  std::vector<int64_t> rows_;  // the row in each place of the window
};

}  // namespace

template <typename T>
void filter(const Geometry& g, const PrologueInput<T>& x, const Tensor& weight, const Sum<T>* bias, T* out,
            const RowsWritten& written) {
  const Tensor filters = channels_last<Sum<T>>(weight, g.taps(), false);
  const int64_t channels = g.in_channels;
  const std::vector<Sum<T>> zeros(g.width * channels, Sum<T>(0));
  parallel_tasks(g.branches * g.batch, [&](int64_t task) {
    const int64_t branch = task / g.batch, b = task % g.batch;
    Rows<T> sample(x, branch / g.replicate, b * g.pixels(), g.width, g.kernel_size, 4);
    T* out_sample = out + task * g.out_pixels() * channels;
    const Sum<T>** rows = scratch<const Sum<T>*>(0, g.kernel_size);
    for (int64_t oy = 0; oy < g.out_height; ++oy) {
      for (int64_t ky = 0; ky < g.kernel_size; ++ky) {
        const int64_t iy = oy * g.stride + ky - g.padding;
        rows[ky] = iy >= 0 && iy < g.height ? sample[iy] : zeros.data();
      }
      const Sum<T>* branch_bias = bias != nullptr ? bias + branch * channels : nullptr;
      kernels<T>().depthwise_rows({rows, data<Sum<T>>(filters) + branch * g.taps() * channels, branch_bias,
                                   out_sample + oy * g.out_width * channels, g.width, g.out_width, channels,
                                   g.kernel_size, g.stride, g.padding, false, Clamp<Sum<T>>{}});
    }
    if (written) written(branch, b * g.out_pixels(), g.out_pixels());
  });
}

namespace {

// The gradient of x, one row of pixels at a time.
template <typename T>
class InputGradient {
 public:
  InputGradient(const Geometry& g, const Tensor& weight)
      : g_(g),
        correlate_(g.stride == 1 && g.padding < g.kernel_size),
        filters_(channels_last<Sum<T>>(weight, g.taps(), correlate_)),
        zeros_(g.out_width * g.in_channels, Sum<T>(0)) {}

  // Adds the contribution of `branch` to row `iy` of its parent's `sample`, which the first child initialises.
  void row(int64_t branch, int64_t iy, Rows<T>& grad, T* sample) const {
    const int64_t k = g_.kernel_size, channels = g_.in_channels, size = g_.width * channels;
    const bool first = branch % g_.replicate == 0;
    const Sum<T>* filter = data<Sum<T>>(filters_) + branch * g_.taps() * channels;
    const Sum<T>** rows = scratch<const Sum<T>*>(0, k);
    T* out = sample + iy * size;
    for (int64_t ky = 0; ky < k; ++ky) {
      const int64_t dy = iy + g_.padding - (correlate_ ? k - 1 - ky : ky);
      const bool inside = dy >= 0 && dy % g_.stride == 0 && dy / g_.stride < g_.out_height;
      rows[ky] = inside ? grad[dy / g_.stride] : correlate_ ? zeros_.data() : nullptr;
    }
    if (correlate_) {
      kernels<T>().depthwise_rows({rows, filter, nullptr, out, g_.out_width, g_.width, channels, k, 1,
                                   k - 1 - g_.padding, !first, Clamp<Sum<T>>{}});
      return;
    }
    if (first) std::fill(out, out + size, T(0));
    kernels<T>().depthwise_input_row({rows, filter, out, g_.width, g_.out_width, channels, k, g_.stride, g_.padding});
  }

 private:
  const Geometry& g_;
  bool correlate_;  // with stride 1, the gradient is a convolution with the flipped filter and full padding
  Tensor filters_;
  std::vector<Sum<T>> zeros_;
};

// Adds the contribution of row `oy` of a sample to the gradient of the weight, [tap][channel].
template <typename T>
void add_weight_gradient(const Geometry& g, int64_t oy, Rows<T>& grad, Rows<T>& x, Sum<T>* sum) {
  const Sum<T>** rows = scratch<const Sum<T>*>(0, g.kernel_size);
  for (int64_t ky = 0; ky < g.kernel_size; ++ky) {
    const int64_t iy = oy * g.stride + ky - g.padding;
    rows[ky] = iy >= 0 && iy < g.height ? x[iy] : nullptr;
  }
  kernels<Sum<T>>().depthwise_weight_row(
      {grad[oy], rows, sum, g.width, g.out_width, g.in_channels, g.kernel_size, g.stride, g.padding});
}

}  // namespace

template <typename T>
void filter_backward(const Geometry& g, const PrologueInput<T>& grad, const PrologueInput<T>& x, const Tensor& weight,
                     T* grad_x, const Tensor* grad_weight, const RowsWritten& written) {
  const int64_t channels = g.in_channels, size = g.taps() * channels;
  std::optional<InputGradient<T>> input;
  if (grad_x != nullptr) input.emplace(g, weight);
  // One sum per sample. They are added in order, so that the result does not depend on the number of threads.
  const Tensor partial = empty(weight, {grad_weight != nullptr ? g.branches * g.batch * size : 0});
  parallel_tasks(g.parents * g.batch, [&](int64_t task) {
    const int64_t parent = task / g.batch, b = task % g.batch;
    T* sample = grad_x != nullptr ? grad_x + task * g.pixels() * channels : nullptr;
    const int64_t last = std::min(g.branches, (parent + 1) * g.replicate);
    for (int64_t branch = parent * g.replicate; branch < last; ++branch) {
      // Both gradients advance through the rows together, so that each row is computed once.
      Rows<T> grads(grad, branch, b * g.out_pixels(), g.out_width, g.kernel_size, 4);
      Rows<T> values(x, parent, b * g.pixels(), g.width, g.kernel_size, 5);
      Sum<T>* sum = nullptr;
      if (grad_weight != nullptr) {
        sum = mutable_data<Sum<T>>(partial) + (branch * g.batch + b) * size;
        std::fill(sum, sum + size, Sum<T>(0));
      }
      int64_t oy = 0;
      for (int64_t iy = 0; iy < g.height; ++iy) {
        if (input) input->row(branch, iy, grads, sample);
        for (; sum != nullptr && oy < g.out_height && (oy * g.stride <= iy || iy == g.height - 1); ++oy)
          add_weight_gradient(g, oy, grads, values, sum);
      }
    }
    if (written) written(parent, b * g.pixels(), g.pixels());
  });
  if (grad_weight == nullptr) return;
  parallel_tasks(g.branches, [&](int64_t branch) {
    Sum<T>* sum = scratch<Sum<T>>(0, size);
    std::fill(sum, sum + size, Sum<T>(0));
    for (int64_t b = 0; b < g.batch; ++b)
      kernels<Sum<T>>().add_scaled(sum, data<Sum<T>>(partial) + (branch * g.batch + b) * size, Sum<T>(1), size);
    Sum<T>* out = mutable_data<Sum<T>>(*grad_weight) + branch * size;
    for (int64_t tap = 0; tap < g.taps(); ++tap)
      for (int64_t c = 0; c < channels; ++c) out[c * g.taps() + tap] = sum[tap * channels + c];
  });
}

#define HNE_INSTANTIATE(T)                                                                                            \
  template void filter(const Geometry&, const PrologueInput<T>&, const Tensor&, const Sum<T>*, T*,                    \
                       const RowsWritten&);                                                                           \
  template void filter_backward(const Geometry&, const PrologueInput<T>&, const PrologueInput<T>&, const Tensor&, T*, \
                                const Tensor*, const RowsWritten&);
HNE_INSTANTIATE(float)
HNE_INSTANTIATE(double)
HNE_INSTANTIATE(bfloat16)
#undef HNE_INSTANTIATE

namespace {

Geometry check_forward(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding, int64_t replicate) {
  STD_TORCH_CHECK(weight.dim() == 4, "weight: expected 4 dimensions");
  const Geometry g = forward_geometry(x, weight.size(0), weight.size(1), weight.size(2), stride, padding, replicate);
  check_shape("weight", weight, {g.branches, g.in_channels, g.kernel_size, g.kernel_size});
  check_kind("x", x, x);
  check_kind("weight", weight, x);
  return g;
}

Tensor branch_depthwise_conv2d(const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in,
                               int64_t stride, int64_t padding, int64_t replicate) {
  const Geometry g = check_forward(x_in, weight_in, stride, padding, replicate);
  if (bias_in.has_value()) {
    check_shape("bias", *bias_in, {g.branches, g.out_channels});
    check_kind("bias", *bias_in, x_in);
  }
  const Tensor x = read_features(x_in, keeps_depthwise(g, x_in)), weight = contiguous_filters(widen(weight_in));
  const std::optional<Tensor> bias = contiguous(widen(bias_in));
  Tensor out = empty(x, {g.branches, g.batch, g.out_height, g.out_width, g.out_channels});
  dispatch_features(x, [&](auto type) {
    using T = decltype(type);
    filter<T>(g, {data<T>(x), g.batch * g.pixels(), g.in_channels}, weight, data<Sum<T>>(bias), mutable_data<T>(out));
  });
  return round_to(out, x_in.scalar_type());
}

Tensor branch_depthwise_conv2d_backward_input(const Tensor& grad_in, const Tensor& weight_in, int64_t height,
                                              int64_t width, int64_t stride, int64_t padding, int64_t replicate) {
  STD_TORCH_CHECK(weight_in.dim() == 4, "weight: expected 4 dimensions");
  const Geometry g =
      backward_geometry(grad_in, weight_in.size(1), height, width, weight_in.size(2), stride, padding, replicate);
  check_shape("weight", weight_in, {g.branches, g.in_channels, g.kernel_size, g.kernel_size});
  STD_TORCH_CHECK(g.out_channels == g.in_channels, "grad: channels do not match weight");
  check_kind("grad", grad_in, grad_in);
  check_kind("weight", weight_in, grad_in);
  const Tensor grad = read_features(grad_in, keeps_depthwise(g, grad_in));
  const Tensor weight = contiguous_filters(widen(weight_in));
  Tensor out = empty(grad, {g.parents, g.batch, height, width, g.in_channels});
  dispatch_features(grad, [&](auto type) {
    using T = decltype(type);
    filter_backward<T>(g, {data<T>(grad), g.batch * g.out_pixels(), g.out_channels}, {}, weight, mutable_data<T>(out),
                       nullptr);
  });
  return round_to(out, grad_in.scalar_type());
}

Tensor branch_depthwise_conv2d_backward_weight(const Tensor& grad_in, const Tensor& x_in, int64_t kernel_size,
                                               int64_t stride, int64_t padding, int64_t replicate) {
  STD_TORCH_CHECK(x_in.dim() == 5, "x: expected 5 dimensions");
  const Geometry g =
      backward_geometry(grad_in, x_in.size(4), x_in.size(2), x_in.size(3), kernel_size, stride, padding, replicate);
  check_shape("x", x_in, {g.parents, g.batch, g.height, g.width, g.in_channels});
  STD_TORCH_CHECK(g.out_channels == g.in_channels, "grad: channels do not match x");
  check_kind("grad", grad_in, grad_in);
  check_kind("x", x_in, grad_in);
  const bool kept = keeps_depthwise(g, x_in);
  const Tensor grad = read_features(grad_in, kept), x = read_features(x_in, kept);
  const std::vector<int64_t> shape = {g.branches, g.in_channels, kernel_size, kernel_size};
  Tensor out;
  dispatch_features(grad, [&](auto type) {
    using T = decltype(type);
    out = empty(grad, shape, kScalarType<Sum<T>>);
    filter_backward<T>(g, {data<T>(grad), g.batch * g.out_pixels(), g.out_channels},
                       {data<T>(x), g.batch * g.pixels(), g.in_channels}, out, nullptr, &out);
  });
  return round_to(out, grad_in.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) {
  m.impl("branch_depthwise_conv2d", TORCH_BOX(&branch_depthwise_conv2d));
  m.impl("branch_depthwise_conv2d_backward_input", TORCH_BOX(&branch_depthwise_conv2d_backward_input));
  m.impl("branch_depthwise_conv2d_backward_weight", TORCH_BOX(&branch_depthwise_conv2d_backward_weight));
}

}  // namespace hne
