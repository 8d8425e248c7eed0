// Training batch norm with the residual sum and the activation. Sums over pixels in two levels: each block adds a
// share, a second kernel adds the shares in order. No atomics: the same bits every time.
//
//   G branches, M pixels, C channels   bytes moved at least                        operations
//   forward                            x twice + residual + y                      8 G M C
//   backward                           grad, x, y twice + grad_x (+ residual's)    14 G M C
#include "op.h"

namespace hne {
namespace {

struct Norm {
  int64_t branches, rows, channels, shares;

  Norm(int64_t branches_, int64_t rows_, int64_t channels_) : branches(branches_), rows(rows_), channels(channels_) {
    // From the shapes alone, so that the sums are the same on every GPU.
    const int64_t groups = std::max<int64_t>(branches * ceil_div(channels, 64), 1);
    shares = std::clamp<int64_t>(1024 / groups, 1, std::max<int64_t>(ceil_div(rows, 128), 1));
  }
};

// The two terms of the forward sums: x - first row, so that a large mean does not cancel, and its square.
template <typename T>
struct Moments {
  const T* x;

  template <int width>
  HNE_DEVICE void operator()(const Norm& n, int64_t branch, int64_t row, int64_t channel, float (&first)[width],
                             float (&second)[width]) const {
    float origin[width];
    load<width>(first, x + (branch * n.rows + row) * n.channels + channel);
    load<width>(origin, x + branch * n.rows * n.channels + channel);
#pragma unroll
    for (int i = 0; i < width; ++i) first[i] -= origin[i], second[i] = first[i] * first[i];
  }
};

template <typename T>
struct Gradient {
  const T *grad, *x, *y;
  const float* mean;
  Clamp<float> range;

  // The gradient behind the activation: zero where y lies at an end of the clamp. And x - mean.
  template <int width>
  HNE_DEVICE void read(const Norm& n, int64_t branch, int64_t row, int64_t channel, float (&g)[width],
                       float (&deviation)[width]) const {
    const int64_t at = (branch * n.rows + row) * n.channels + channel;
    load<width>(g, grad + at);
    load<width>(deviation, x + at);
    if (range.low == 0) {  // there is an activation
      float output[width];
      load<width>(output, y + at);
#pragma unroll
      for (int i = 0; i < width; ++i) g[i] = output[i] <= range.low || output[i] >= range.high ? 0.0f : g[i];
    }
#pragma unroll
    for (int i = 0; i < width; ++i) deviation[i] -= mean[branch * n.channels + channel + i];
  }

  // The two terms of the backward sums.
  template <int width>
  HNE_DEVICE void operator()(const Norm& n, int64_t branch, int64_t row, int64_t channel, float (&first)[width],
                             float (&second)[width]) const {
    read(n, branch, row, channel, first, second);
#pragma unroll
    for (int i = 0; i < width; ++i) second[i] *= first[i];
  }
};

// partial[share][branch][2][channel]. `across` threads stand side by side over the channels, the others on further
// rows.
template <typename Terms, int width>
__global__ void __launch_bounds__(kThreads)
    channel_sums(const Norm n, const Terms terms, float* partial, const int across) {
  const int64_t vectors = n.channels / width, groups = (vectors + across - 1) / across;
  const int down = kThreads / across, lane = int(threadIdx.x) % across, row_lane = int(threadIdx.x) / across;
  uint32_t at = blockIdx.x;
  const int64_t vector = int64_t(at % uint32_t(groups)) * across + lane;
  at /= uint32_t(groups);
  const int64_t branch = at % uint32_t(n.branches), share = at / uint32_t(n.branches);
  float sums[2][width] = {};
  if (vector < vectors) {
    const int64_t end = n.rows * (share + 1) / n.shares;
    for (int64_t row = n.rows * share / n.shares + row_lane; row < end; row += down) {
      float first[width], second[width];
      terms(n, branch, row, vector * width, first, second);
#pragma unroll
      for (int i = 0; i < width; ++i) sums[0][i] += first[i], sums[1][i] += second[i];
    }
  }
  float* const all = static_cast<float*>(shared_memory());  // [down][2][across * width]
  const int columns = across * width;
#pragma unroll
  for (int k = 0; k < 2; ++k)
#pragma unroll
    for (int i = 0; i < width; ++i) all[(row_lane * 2 + k) * columns + lane * width + i] = sums[k][i];
  block_sync();
  const int64_t first_channel = (vector - lane) * width;
  for (int i = int(threadIdx.x); i < 2 * columns; i += kThreads) {
    const int64_t channel = first_channel + i % columns;
    if (channel >= n.channels) continue;
    float sum = 0;
    for (int d = 0; d < down; ++d) sum += all[d * 2 * columns + i];
    partial[((share * n.branches + branch) * 2 + i / columns) * n.channels + channel] = sum;
  }
}

template <int width, typename Terms>
Tensor sums_of_shares(const Device& device, const Norm& n, const Terms& terms, const Tensor& like) {
  Tensor partial = torch::stable::new_empty(like, {n.shares, n.branches, 2, n.channels}, ScalarType::Float);
  int across = 8;
  while (across > 1 && across / 2 * width >= n.channels) across /= 2;
  device.launch(channel_sums<Terms, width>, ceil_div(n.channels / width, across) * n.branches * n.shares, kThreads,
                2 * width * kThreads * int64_t(sizeof(float)), n, terms, mutable_data<float>(partial), across);
  return partial;
}

// Both sums of a channel, over all shares.
HNE_DEVICE void add_shares(const Norm& n, const float* partial, int64_t branch, int64_t channel, double& first,
                           double& second) {
  first = second = 0;
  for (int64_t share = 0; share < n.shares; ++share) {
    const float* from = partial + (share * n.branches + branch) * 2 * n.channels + channel;
    first += from[0], second += from[n.channels];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    finish_moments(const Norm n, const T* x, const float* partial, const float* weight, const double eps, float* mean,
                   float* var, float* scale) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= n.branches * n.channels) return;
  const int64_t branch = at / n.channels, channel = at % n.channels;
  double first, second;
  add_shares(n, partial, branch, channel, first, second);
  const double values = n.rows > 0 ? double(n.rows) : 1.0;  // an empty batch has mean and variance 0
  first /= values, second /= values;
  const double origin = n.rows > 0 ? double(float(x[branch * n.rows * n.channels + channel])) : 0.0;
  const double variance = second - first * first;
  mean[at] = float(origin + first);
  var[at] = variance < 0 ? 0.0f : float(variance);
  scale[at] = float(double(weight[at]) / sqrt(double(var[at]) + eps));
}

template <typename T, int width>
__global__ void __launch_bounds__(kThreads)
    normalise(const Norm n, const T* x, const T* residual, const float* mean, const float* scale, const float* bias,
              const Clamp<float> range, T* y) {
  const uint32_t vectors = uint32_t(n.channels / width), number = thread_number(), row = number / vectors;
  const int64_t branch = row / uint32_t(n.rows), at = int64_t(number) * width;
  if (branch >= n.branches) return;
  const int64_t of = branch * n.channels + (number - row * vectors) * width;
  float values[width], added[width] = {};
  load<width>(values, x + at);
  if (residual != nullptr) load<width>(added, residual + at);
#pragma unroll
  for (int i = 0; i < width; ++i)
    values[i] = clamp((values[i] - mean[of + i]) * scale[of + i] + bias[of + i] + added[i], range);
  store<width>(y + at, values);
}

__global__ void __launch_bounds__(kThreads)
    finish_gradient(const Norm n, const float* partial, const float* weight, const float* var, const double eps,
                    float* grad_weight, float* grad_bias, float* scale, float* shift, float* slope) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= n.branches * n.channels) return;
  double sum, product;
  add_shares(n, partial, at / n.channels, at % n.channels, sum, product);
  const double precision = 1 / (double(var[at]) + eps), values = n.rows > 0 ? double(n.rows) : 1.0;
  grad_bias[at] = float(sum);
  grad_weight[at] = float(product * sqrt(precision));
  scale[at] = float(weight[at] * sqrt(precision));
  shift[at] = float(sum / values), slope[at] = float(product * precision / values);
}

// grad_x = scale * (gradient - shift - (x - mean) * slope); grad_residual = gradient
template <typename T, int width>
__global__ void __launch_bounds__(kThreads)
    apply_gradient(const Norm n, const Gradient<T> gradient, const float* scale, const float* shift, const float* slope,
                   T* grad_x, T* grad_residual) {
  const uint32_t vectors = uint32_t(n.channels / width), number = thread_number(), row = number / vectors;
  const uint32_t branch = row / uint32_t(n.rows), channel = (number - row * vectors) * width;
  const int64_t at = int64_t(number) * width;
  if (branch >= n.branches) return;
  float g[width], out[width];
  gradient.read(n, branch, row - branch * uint32_t(n.rows), channel, g, out);
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const int64_t of = branch * n.channels + channel + i;
    out[i] = (g[i] - shift[of] - out[i] * slope[of]) * scale[of];
  }
  store<width>(grad_x + at, out);
  if (grad_residual != nullptr) store<width>(grad_residual + at, g);
}

// Statistics and parameters are few: kept in float32, whatever their dtype.
Tensor in_float(const Tensor& t) { return torch::stable::contiguous(round_to(t, ScalarType::Float)); }
Tensor new_float(const Tensor& like, int64_t branches, int64_t channels) {
  return torch::stable::new_empty(like, {branches, channels}, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor> branch_batch_norm(const Tensor& x_in, const Tensor& weight_in, const Tensor& bias_in,
                                                     const std::optional<Tensor>& residual_in,
                                                     const std::string& activation, double eps) {
  STD_TORCH_CHECK(x_in.dim() == 5, "x: expected 5 dimensions");
  const Norm n(x_in.size(0), x_in.size(1) * x_in.size(2) * x_in.size(3), x_in.size(4));
  check_shape("weight", weight_in, {n.branches, n.channels});
  check_shape("bias", bias_in, {n.branches, n.channels});
  check_kind("x", x_in, x_in);
  check_kind("bias", bias_in, weight_in);
  if (residual_in.has_value()) {
    const auto sizes = x_in.sizes();
    check_shape("residual", *residual_in, {sizes.begin(), sizes.end()});
    check_kind("residual", *residual_in, x_in);
  }
  STD_TORCH_CHECK(weight_in.get_device_index() == x_in.get_device_index(), "weight: expected the device of x");
  const Device device(x_in);
  const Tensor x = torch::stable::contiguous(x_in), weight = in_float(weight_in), bias = in_float(bias_in);
  const std::optional<Tensor> residual = contiguous(residual_in);
  Tensor y = torch::stable::new_empty(x, x_in.sizes());
  const Tensor mean = new_float(x, n.branches, n.channels), var = new_float(x, n.branches, n.channels);
  const Tensor scale = new_float(x, n.branches, n.channels);
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const bool vectors = whole_vectors<T>({n.channels}, {data<T>(x), data<T>(residual), data<T>(y)});
    dispatch_width<T>(vectors, [&](auto vector) {
      constexpr int w = decltype(vector)::value;
      const Tensor partial = sums_of_shares<w>(device, n, Moments<T>{data<T>(x)}, x);
      device.launch(finish_moments<T>, ceil_div(n.branches * n.channels, kThreads), kThreads, 0, n, data<T>(x),
                    data<float>(partial), data<float>(weight), eps, mutable_data<float>(mean), mutable_data<float>(var),
                    mutable_data<float>(scale));
      device.launch(normalise<T, w>, blocks_of_threads(n.branches * n.rows * n.channels / w), kThreads, 0, n,
                    data<T>(x), data<T>(residual), data<float>(mean), data<float>(scale), data<float>(bias),
                    Clamp<float>::named(activation), mutable_data<T>(y));
    });
  });
  return {y, round_to(mean, weight_in.scalar_type()), round_to(var, weight_in.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> branch_batch_norm_backward(const Tensor& grad_in, const Tensor& x_in,
                                                                      const Tensor& y_in, const Tensor& weight_in,
                                                                      const Tensor& mean_in, const Tensor& var_in,
                                                                      bool with_residual, const std::string& activation,
                                                                      double eps) {
  STD_TORCH_CHECK(x_in.dim() == 5, "x: expected 5 dimensions");
  const Norm n(x_in.size(0), x_in.size(1) * x_in.size(2) * x_in.size(3), x_in.size(4));
  const auto sizes = x_in.sizes();
  for (const auto& [name, t] : {std::pair{"grad", &grad_in}, {"y", &y_in}}) {
    check_shape(name, *t, {sizes.begin(), sizes.end()});
    check_kind(name, *t, x_in);
  }
  for (const auto& [name, t] : {std::pair{"weight", &weight_in}, {"mean", &mean_in}, {"var", &var_in}}) {
    check_shape(name, *t, {n.branches, n.channels});
    check_kind(name, *t, weight_in);
  }
  check_kind("x", x_in, x_in);
  STD_TORCH_CHECK(weight_in.get_device_index() == x_in.get_device_index(), "weight: expected the device of x");
  const Device device(x_in);
  const Tensor grad = torch::stable::contiguous(grad_in), x = torch::stable::contiguous(x_in);
  const Tensor y = torch::stable::contiguous(y_in), weight = in_float(weight_in);
  const Tensor mean = in_float(mean_in), var = in_float(var_in);
  Tensor grad_x = torch::stable::new_empty(x, x_in.sizes());
  Tensor grad_residual = with_residual ? torch::stable::new_empty(x, x_in.sizes()) : torch::stable::new_empty(x, {0});
  const Tensor grad_weight = new_float(x, n.branches, n.channels), grad_bias = new_float(x, n.branches, n.channels);
  const Tensor scale = new_float(x, n.branches, n.channels), shift = new_float(x, n.branches, n.channels);
  const Tensor slope = new_float(x, n.branches, n.channels);
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const Gradient<T> gradient{data<T>(grad), data<T>(x), data<T>(y), data<float>(mean),
                               Clamp<float>::named(activation)};
    T* const residual = with_residual ? mutable_data<T>(grad_residual) : nullptr;
    const bool vectors =
        whole_vectors<T>({n.channels}, {gradient.grad, gradient.x, gradient.y, data<T>(grad_x), residual});
    dispatch_width<T>(vectors, [&](auto vector) {
      constexpr int w = decltype(vector)::value;
      const Tensor partial = sums_of_shares<w>(device, n, gradient, x);
      device.launch(finish_gradient, ceil_div(n.branches * n.channels, kThreads), kThreads, 0, n, data<float>(partial),
                    data<float>(weight), data<float>(var), eps, mutable_data<float>(grad_weight),
                    mutable_data<float>(grad_bias), mutable_data<float>(scale), mutable_data<float>(shift),
                    mutable_data<float>(slope));
      device.launch(apply_gradient<T, w>, blocks_of_threads(n.branches * n.rows * n.channels / w), kThreads, 0, n,
                    gradient, data<float>(scale), data<float>(shift), data<float>(slope), mutable_data<T>(grad_x),
                    residual);
    });
  });
  return {grad_x, round_to(grad_weight, weight_in.scalar_type()), round_to(grad_bias, weight_in.scalar_type()),
          grad_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) {
  m.impl("branch_batch_norm", TORCH_BOX(&branch_batch_norm));
  m.impl("branch_batch_norm_backward", TORCH_BOX(&branch_batch_norm_backward));
}

}  // namespace hne
