// Batch norm from the statistics of a batch: mean, scale and shift of a feature map, and the running statistics, in one
// launch. Each thread computes one channel and is the only one to write its values, so no barrier is needed.
//
//   G branches of C channels in float32   bytes moved at least                                       operations
//   forward                               28 G C, and 16 G C for the running statistics             10 G C
//   backward                              36 G C                                                     10 G C
#include "batch_norm.h"
#include "op.h"

namespace hne {
namespace {

constexpr int kChannels = 128;  // threads of a block, side by side in one branch

// Values of type P per channel; absent where null.
template <typename P>
struct ChannelValues {
  P* values = nullptr;
  ChannelStrides strides = {};

  HNE_BOTH bool present() const { return values != nullptr; }
  HNE_DEVICE P& at(int branch, int channel) const {
    return values[branch * strides.branch + channel * strides.channel];
  }
};

// The channel of each thread.
struct Grid {
  int branches, channels, groups;

  Grid(int64_t branches_, int64_t channels_) {
    STD_TORCH_CHECK(branches_ * channels_ <= INT32_MAX - 65536, "expected fewer than 2^31 channels");
    branches = int(branches_), channels = int(channels_);
    groups = int(std::max<int64_t>(ceil_div(channels_, kChannels), 1));
  }
  // At least one: without channels, a batch is counted nevertheless.
  int64_t blocks() const { return std::max<int64_t>(int64_t(branches) * groups, 1); }

  HNE_DEVICE int branch() const { return int(blockIdx.x) / groups; }
  HNE_DEVICE int channel() const { return int(blockIdx.x) % groups * kChannels + int(threadIdx.x); }
};

// running + momentum * (batch - running), from the nearer end as in torch.lerp.
HNE_DEVICE float interpolate(float running, float batch, float momentum) {
  return fabsf(momentum) < 0.5f ? running + momentum * (batch - running) : batch - (batch - running) * (1 - momentum);
}

template <typename P>
struct Forward {
  const float *mean, *var, *total;
  ChannelValues<const P> weight, bias;
  ChannelValues<P> running_mean, running_var;
  int64_t* num_batches_tracked;
  float* norm;
  float unbiased, momentum, eps;  // unbiased: where total is null
};

template <typename P>
__global__ void __launch_bounds__(kChannels) scale_shift(const Grid grid, const Forward<P> f) {
  wait_for_previous_kernel();
  launch_next_kernel();
  if (f.num_batches_tracked != nullptr && blockIdx.x == 0 && threadIdx.x == 0) ++*f.num_batches_tracked;
  const int branch = grid.branch(), channel = grid.channel();
  if (branch >= grid.branches || channel >= grid.channels) return;
  const int row = grid.branches * grid.channels, at = branch * grid.channels + channel;
  const float mean = f.mean[at], var = f.var[at], inverse = 1 / sqrtf(var + f.eps);
  f.norm[at] = mean;
  f.norm[int64_t(row) + at] = f.weight.present() ? float(f.weight.at(branch, channel)) * inverse : inverse;
  f.norm[2 * int64_t(row) + at] = f.bias.present() ? float(f.bias.at(branch, channel)) : 0.0f;
  if (!f.running_mean.present()) return;
  const float unbiased = f.total != nullptr ? *f.total / (*f.total - 1) : f.unbiased;
  P &running_mean = f.running_mean.at(branch, channel), &running_var = f.running_var.at(branch, channel);
  running_mean = P(interpolate(float(running_mean), mean, f.momentum));
  running_var = P(interpolate(float(running_var), var * unbiased, f.momentum));
}

template <typename P>
struct Backward {
  const float *grad, *var;
  ChannelValues<const P> weight;
  float *grad_mean, *grad_var;
  P *grad_weight, *grad_bias;  // null where absent
  float eps;
};

template <typename P>
__global__ void __launch_bounds__(kChannels) scale_shift_backward(const Grid grid, const Backward<P> b) {
  wait_for_previous_kernel();
  launch_next_kernel();
  const int branch = grid.branch(), channel = grid.channel();
  if (branch >= grid.branches || channel >= grid.channels) return;
  const int row = grid.branches * grid.channels, at = branch * grid.channels + channel;
  const float inverse = 1 / sqrtf(b.var[at] + b.eps), of_scale = b.grad[int64_t(row) + at];
  const float weight = b.weight.present() ? float(b.weight.at(branch, channel)) : 1.0f;
  b.grad_mean[at] = b.grad[at];
  b.grad_var[at] = -0.5f * of_scale * weight * (inverse * inverse * inverse);
  if (b.grad_weight != nullptr) b.grad_weight[at] = P(of_scale * inverse);
  if (b.grad_bias != nullptr) b.grad_bias[at] = P(b.grad[2 * int64_t(row) + at]);
}

// --- on the host -------------------------------------------------------------------------------------------

void check_statistics(const Tensor& mean, const Tensor& var) {
  STD_TORCH_CHECK(mean.dim() == 2, "mean: expected 2 dimensions");
  check_like("var", var, mean);
  STD_TORCH_CHECK(mean.scalar_type() == ScalarType::Float, "mean: expected float32");
}

// A parameter or running statistic; converted to float32 where the tensors of a call have several dtypes.
class Parameter {
 public:
  Parameter(const char* name, const std::optional<Tensor>& given, const Tensor& mean, bool written = false)
      : given_(given), values_(given), mean_(mean) {
    if (!given.has_value()) return;
    STD_TORCH_CHECK(on_device(*given) && given->get_device_index() == mean.get_device_index(), name,
                    ": expected the device of the first tensor");
    check_parameter_dtype(name, *given, mean);
    strides_ = channel_strides(name, *given, mean.size(0), mean.size(1), written);
  }

  static ScalarType common_dtype(std::initializer_list<const Parameter*> parameters) {
    std::optional<ScalarType> common;
    for (const Parameter* p : parameters) {
      if (!p->given_.has_value()) continue;
      if (common.has_value() && *common != p->given_->scalar_type()) return ScalarType::Float;
      common = p->given_->scalar_type();
    }
    return common.value_or(ScalarType::Float);
  }
  void convert(ScalarType type) {
    if (!given_.has_value() || given_->scalar_type() == type) return;
    values_ = torch::stable::contiguous(torch::stable::to(*given_, type));
    strides_ = {mean_.size(1), 1};
  }
  void write_back() {
    if (given_.has_value() && given_->scalar_type() != values_->scalar_type()) torch::stable::copy_(*given_, *values_);
  }

  template <typename P>
  ChannelValues<const P> values() const {
    return {data<P>(values_), strides_};
  }
  template <typename P>
  ChannelValues<P> mutable_values() const {
    if (!values_.has_value()) return {};
    return {mutable_data<P>(*values_), strides_};
  }

 private:
  std::optional<Tensor> given_, values_;
  Tensor mean_;
  ChannelStrides strides_;
};

// Calls f(P{}), P being the C++ type of `type`.
template <typename F>
void dispatch_type(ScalarType type, const F& f) {
  if (type == ScalarType::Half) return f(half{});
  if (type == ScalarType::BFloat16) return f(bfloat16{});
  f(float{});
}

Tensor batch_norm_scale_shift(const Tensor& mean_in, const Tensor& var_in, const std::optional<Tensor>& weight_in,
                              const std::optional<Tensor>& bias_in, const std::optional<Tensor>& running_mean_in,
                              const std::optional<Tensor>& running_var_in,
                              const std::optional<Tensor>& num_batches_tracked, const std::optional<Tensor>& total,
                              int64_t count, double momentum, double eps) {
  check_kind("mean", mean_in, mean_in);
  check_statistics(mean_in, var_in);
  check_kind("total", total, mean_in);
  check_batch_norm(weight_in, bias_in, running_mean_in, running_var_in, total, count, momentum, eps);
  check_counter(num_batches_tracked);
  STD_TORCH_CHECK(
      !num_batches_tracked.has_value() ||
          (on_device(*num_batches_tracked) && num_batches_tracked->get_device_index() == mean_in.get_device_index()),
      "num_batches_tracked: expected the device of the first tensor");
  const Device device(mean_in);
  const Tensor mean = in_order(mean_in), var = in_order(var_in);
  Parameter weight("weight", weight_in, mean), bias("bias", bias_in, mean);
  Parameter running_mean("running_mean", running_mean_in, mean, true);
  Parameter running_var("running_var", running_var_in, mean, true);
  const ScalarType type = Parameter::common_dtype({&weight, &bias, &running_mean, &running_var});
  for (Parameter* p : {&weight, &bias, &running_mean, &running_var}) p->convert(type);
  const bool updates = total.has_value() || count > 1;  // fewer values have no variance
  const Grid grid(mean.size(0), mean.size(1));
  const Tensor norm = torch::stable::new_empty(mean, {3, mean.size(0), mean.size(1)});
  dispatch_type(type, [&](auto value) {
    using P = decltype(value);
    const Forward<P> f{data<float>(mean),
                       data<float>(var),
                       data<float>(total),
                       weight.values<P>(),
                       bias.values<P>(),
                       updates ? running_mean.mutable_values<P>() : ChannelValues<P>(),
                       updates ? running_var.mutable_values<P>() : ChannelValues<P>(),
                       num_batches_tracked.has_value() ? mutable_data<int64_t>(*num_batches_tracked) : nullptr,
                       mutable_data<float>(norm),
                       float(unbiased_factor(count)),
                       float(momentum),
                       float(eps)};
    device.launch_early(scale_shift<P>, grid.blocks(), kChannels, 0, grid, f);
  });
  running_mean.write_back();
  running_var.write_back();
  return norm;
}

// Gradients of mean, var, weight and bias; empty for an absent parameter. That of the bias has the layout of the
// weight.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_scale_shift_backward(const Tensor& grad_in, const Tensor& var_in,
                                                                           const std::optional<Tensor>& weight_in,
                                                                           bool has_bias, double eps) {
  check_kind("var", var_in, var_in);
  check_statistics(var_in, var_in);
  check_kind("grad", grad_in, var_in);
  const int64_t branches = var_in.size(0), channels = var_in.size(1);
  check_shape("grad", grad_in, {3, branches, channels});
  const Device device(var_in);
  const Tensor grad = in_order(grad_in), var = in_order(var_in);
  const Parameter weight("weight", weight_in, var);
  const Tensor& like = weight_in.has_value() ? *weight_in : var_in;
  const Grid grid(branches, channels);
  const Tensor grad_mean = torch::stable::new_empty(var, {branches, channels});
  const Tensor grad_var = torch::stable::new_empty(var, {branches, channels});
  const auto parameter_gradient = [&](bool present) {
    return present ? torch::stable::new_empty(like, like.sizes()) : torch::stable::new_empty(like, {0});
  };
  const Tensor grad_weight = parameter_gradient(weight_in.has_value()), grad_bias = parameter_gradient(has_bias);
  dispatch_type(like.scalar_type(), [&](auto value) {
    using P = decltype(value);
    const Backward<P> b{data<float>(grad),
                        data<float>(var),
                        weight.values<P>(),
                        mutable_data<float>(grad_mean),
                        mutable_data<float>(grad_var),
                        weight_in.has_value() ? mutable_data<P>(grad_weight) : nullptr,
                        has_bias ? mutable_data<P>(grad_bias) : nullptr,
                        float(eps)};
    device.launch_early(scale_shift_backward<P>, grid.blocks(), kChannels, 0, grid, b);
  });
  return {grad_mean, grad_var, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) {
  m.impl("batch_norm_scale_shift", TORCH_BOX(&batch_norm_scale_shift));
  m.impl("batch_norm_scale_shift_backward", TORCH_BOX(&batch_norm_scale_shift_backward));
}

}  // namespace hne
