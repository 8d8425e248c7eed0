// Depthwise branch convolution: plain, and as a training unit that normalises what it reads and gives its result's
// statistics.
//
//   G branches, M output pixels each   bytes moved at least                           multiply-adds
//   plain                              x + weight + out                               G M C k^2
//   training unit                      x + weight + y (+ statistics of every share)   the same
#include "depthwise.h"
#include "transpose.h"

namespace hne {
namespace {

// Runs of neighbouring output pixels in a row of the map.
template <int length>
struct Runs {
  int per_row;

  HNE_BOTH explicit Runs(const Shape& s) : per_row((s.out_width + length - 1) / length) {}
  HNE_BOTH int64_t count(const Shape& s) const { return int64_t(s.batch) * s.out_height * per_row; }
  // Pixels of a branch that lie before a run.
  HNE_DEVICE int pixels_before(const Shape& s, int run) const {
    return run / per_row * s.out_width + min(run % per_row * length, s.out_width);
  }
};

// Longer runs read less of x again, but their sums would not fit into the registers beside a row of the filter.
template <int kernel>
constexpr int run_length = kernel > 0 ? 2 : 1;

// kernel and stride are 0 where only known at run time.
template <typename T, int width, int kernel, int fixed_stride>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise(const Depthwise<T> d, const RowPartition<width> shares, const Partials partials) {
  constexpr int length = run_length<kernel>;
  const Shape& s = d.s;
  const int size = kernel > 0 ? kernel : s.kernel_size, stride = fixed_stride > 0 ? fixed_stride : s.stride;
  const Runs<length> runs(s);
  const auto here = shares.here();
  const int channel = here.channel, branch = here.place.branch;
  const T* weight = d.weight + int64_t(branch) * s.taps() * s.in_channels + channel;
  float* const scratch = static_cast<float*>(shared_memory());
  const SharedAffine affine{scratch + kThreads * width, shares.across * width};
  if (d.normalization.present()) {
    affine.fill(d.normalization, branch / s.replicate, here.place.channel);
    block_sync();
  }
  Moments<width> moments;

  for (int at = here.begin; at < here.end; at += here.step) {
    const int row = at / runs.per_row, first = (at - row * runs.per_row) * length;
    const int sample = row / s.out_height, oy = row - sample * s.out_height;
    float sums[length][width];
#pragma unroll
    for (int j = 0; j < length; ++j)
#pragma unroll
      for (int i = 0; i < width; ++i) sums[j][i] = 0;
    const T* x = d.x + (int64_t(branch / s.replicate) * s.batch + sample) * s.pixels() * s.in_channels + channel;
#pragma unroll
    for (int ky = 0; ky < size; ++ky) {
      const int iy = oy * stride + ky - s.padding;
      if (iy < 0 || iy >= s.height) continue;
      float filter[kernel > 0 ? kernel : 1][width];
      if constexpr (kernel > 0) {
#pragma unroll
        for (int kx = 0; kx < kernel; ++kx) load<width>(filter[kx], weight + (ky * kernel + kx) * s.in_channels);
      }
#pragma unroll
      for (int column = 0; column < (length - 1) * stride + size; ++column) {
        const int ix = first * stride + column - s.padding;
        if (ix < 0 || ix >= s.width) continue;
        float values[width];
        load<width>(values, x + (int64_t(iy) * s.width + ix) * s.in_channels);
        if (d.normalization.present()) affine.apply(d.normalization.range, channel - here.place.channel, values);
#pragma unroll
        for (int j = 0; j < length; ++j) {
          const int kx = column - j * stride;
          if (kx < 0 || kx >= size) continue;
          if constexpr (kernel == 0) load<width>(filter[0], weight + (ky * size + kx) * s.in_channels);
#pragma unroll
          for (int i = 0; i < width; ++i) sums[j][i] += values[i] * filter[kernel > 0 ? kx : 0][i];
        }
      }
    }

    float bias[width] = {};
    if (d.bias != nullptr) load<width>(bias, d.bias + int64_t(branch) * s.in_channels + channel);
    T* out = d.out + (int64_t(branch) * s.rows() + int64_t(row) * s.out_width) * s.in_channels + channel;
#pragma unroll
    for (int j = 0; j < length; ++j) {
      if (first + j >= s.out_width) break;
#pragma unroll
      for (int i = 0; i < width; ++i) sums[j][i] = clamp(sums[j][i] + bias[i], d.range);
      store<width>(out + (first + j) * int64_t(s.in_channels), sums[j]);
      if (partials.values != nullptr) moments.add(sums[j]);
    }
  }
  if (partials.values == nullptr) return;
  moments.put(partials, here.place, scratch, shares.across,
              runs.pixels_before(s, here.share_end) - runs.pixels_before(s, here.share_begin));
}

}  // namespace

template <typename T>
void run_depthwise(const Device& device, const Depthwise<T>& d, OverPixels* statistics) {
  const Shape& s = d.s;
  const Normalization& n = d.normalization;
  const bool vectors = whole_vectors<T>({s.in_channels}, {d.x, d.weight, d.bias, d.out, n.mean, n.scale, n.shift});
  dispatch_width<T>(vectors, [&](auto width) {
    constexpr int w = decltype(width)::value;
    const auto run = [&](auto kernel, int64_t runs) {
      const RowPartition<w> shares(s.branches, runs, s.in_channels);
      const Partials partials =
          statistics != nullptr ? statistics->partials(Moments<w>::kPlanes, shares.shares()) : Partials{};
      device.launch(+kernel, shares.blocks(), kThreads,
                    RowPartition<w>::kScratch + SharedAffine::bytes(shares.across * w), d, shares, partials);
    };
    if (s.kernel_size == 3 && s.stride == 1)
      run(depthwise<T, w, 3, 1>, Runs<run_length<3>>(s).count(s));
    else if (s.kernel_size == 3 && s.stride == 2)
      run(depthwise<T, w, 3, 2>, Runs<run_length<3>>(s).count(s));
    else
      run(depthwise<T, w, 0, 0>, Runs<run_length<0>>(s).count(s));
  });
}
template void run_depthwise(const Device&, const Depthwise<float>&, OverPixels*);
template void run_depthwise(const Device&, const Depthwise<half>&, OverPixels*);
template void run_depthwise(const Device&, const Depthwise<bfloat16>&, OverPixels*);

namespace {

Geometry check(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding, int64_t replicate) {
  STD_TORCH_CHECK(weight.dim() == 4, "weight: expected 4 dimensions");
  const Geometry g = forward_geometry(x, weight.size(0), weight.size(1), weight.size(2), stride, padding, replicate);
  check_shape("weight", weight, {g.branches, g.in_channels, g.kernel_size, g.kernel_size});
  check_kind("x", x, x);
  check_kind("weight", weight, x);
  return g;
}

Tensor branch_depthwise_conv2d(const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in,
                               int64_t stride, int64_t padding, int64_t replicate) {
  const Geometry g = check(x_in, weight_in, stride, padding, replicate);
  if (bias_in.has_value()) {
    check_shape("bias", *bias_in, {g.branches, g.out_channels});
    check_kind("bias", *bias_in, x_in);
  }
  const Shape shape(g);
  const Device device(x_in);
  const Tensor x = torch::stable::contiguous(x_in), weight = torch::stable::contiguous(weight_in);
  const std::optional<Tensor> bias = contiguous(bias_in);
  Tensor out = torch::stable::new_empty(x, {g.branches, g.batch, g.out_height, g.out_width, g.out_channels});
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const Tensor filters = transposed<T>(device, weight, g.branches, g.in_channels, g.taps());
    run_depthwise(device, Depthwise<T>{.s = shape,
                                       .x = data<T>(x),
                                       .weight = data<T>(filters),
                                       .bias = data<T>(bias),
                                       .out = mutable_data<T>(out)});
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> branch_depthwise_conv2d_stats(const Tensor& x_in, const Tensor& weight_in,
                                                                 const std::optional<Tensor>& mean,
                                                                 const std::optional<Tensor>& scale,
                                                                 const std::optional<Tensor>& shift,
                                                                 const std::string& activation, int64_t stride,
                                                                 int64_t padding, int64_t replicate) {
  const Geometry g = check(x_in, weight_in, stride, padding, replicate);
  const Shape shape(g);
  const Device device(x_in);
  const NormalizationArguments arguments(mean, scale, shift, activation, g.parents, g.in_channels, x_in);
  const Tensor x = torch::stable::contiguous(x_in), weight = torch::stable::contiguous(weight_in);
  Tensor y = torch::stable::new_empty(x, {g.branches, g.batch, g.out_height, g.out_width, g.out_channels});
  OverPixels statistics(x, g.branches, g.out_channels);
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const Tensor filters = transposed<T>(device, weight, g.branches, g.in_channels, g.taps());
    run_depthwise(device,
                  Depthwise<T>{.s = shape,
                               .x = data<T>(x),
                               .weight = data<T>(filters),
                               .out = mutable_data<T>(y),
                               .normalization = arguments.normalization},
                  &statistics);
  });
  combine_moments(device, statistics, g.batch * g.out_pixels());
  return {y, statistics.first, statistics.second};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) {
  m.impl("branch_depthwise_conv2d", TORCH_BOX(&branch_depthwise_conv2d));
  m.impl("branch_depthwise_conv2d_stats", TORCH_BOX(&branch_depthwise_conv2d_stats));
}

}  // namespace hne
