// The end of a bottleneck from the feature map s before its last convolution,
// z = clamp((conv(s) - mean) * scale + shift + residual), and y = next_conv(z) with its statistics. The wide feature
// map conv(s) never lies in memory: backward derives its sums from the products of the gradient and s.
#include "conv_norm.h"
#include "pointwise.h"

namespace hne {
namespace {

constexpr int64_t kStreamBytes = 4 * 1024 * 1024;

// The gradient of z: a feature map or, where the gradient of a sum over pixels was expanded, one row for each sample.
struct ExpandableGradient {
  int64_t pixels, channels;
  bool expanded;
  Tensor values;

  ExpandableGradient(const Tensor& grad, const PointwiseSizes& s, bool kept)
      : pixels(s.x_shape[2] * s.x_shape[3]), channels(s.out), values(grad) {
    const auto strides = grad.strides();
    expanded = pixels > 1 && strides[2] == 0 && strides[3] == 0;
    for (const int64_t over : {2, 3})
      if (expanded) values = torch::stable::narrow(values, over, 0, 1);
    values = read_features(values, kept);
  }

  // Rows [at, at + count) over all branches and samples; expanded ones are written to `memory`.
  template <typename T>
  const T* read(int64_t at, int64_t count, T* memory) const {
    if (!expanded) return data<T>(values) + at * channels;
    for (int64_t m = 0; m < count; ++m)
      std::copy_n(data<T>(values) + (at + m) / pixels * channels, channels, memory + m * channels);
    return memory;
  }
};

bool keeps_features(const PointwiseSizes& s, const Tensor& x) { return keeps_bfloat16(x, {s.in, s.out, s.next}); }

// The residual, if there is one, with its own normalisation, if it has one.
struct OutResidual {
  std::optional<Tensor> values;
  std::optional<Normalization> normalization;

  OutResidual(const std::optional<Tensor>& given, const std::optional<Tensor>& norm, const PointwiseSizes& s,
              const Tensor& x, bool kept)
      : values(read_features(given, kept)) {
    STD_TORCH_CHECK(given.has_value() || !norm.has_value(), "residual_norm: expected with a residual");
    if (!given.has_value()) return;
    check_shape("residual", *given, s.shape(s.out));
    check_kind("residual", *given, x);
    normalization.emplace("residual_norm", *given, norm, "none");
  }

  bool normalized() const { return normalization.has_value() && normalization->norm.has_value(); }

  template <typename T>
  PrologueInput<T> input() const {
    return values.has_value() ? normalization->input<T>(*values) : PrologueInput<T>{};
  }
};

// The convolution and the normalisation of its output as one convolution with a bias.
struct Folded {
  Tensor weight, bias;  // [branch][out][in], [branch][out]

  Folded(const PointwiseSizes& s, const Tensor& from, const Tensor& norm)
      : weight(empty(from, {s.branches, s.out, s.in})), bias(empty(from, {s.branches, s.out})) {
    dispatch(from, [&](auto type) {
      using T = decltype(type);
      const T *mean = norm_row<T>(norm, kMean), *scale = norm_row<T>(norm, kScale), *shift = norm_row<T>(norm, kShift);
      const int64_t branch_stride = from.stride(0), row_stride = from.stride(1);
      T *const to = mutable_data<T>(weight), *const to_bias = mutable_data<T>(bias);
      parallel_tasks(s.branches, [&](int64_t branch) {
        const T* row = data<T>(from) + branch * branch_stride;
        for (int64_t i = branch * s.out; i < (branch + 1) * s.out; ++i, row += row_stride) {
          kernels<T>().store_scaled(to + i * s.in, row, scale[i], s.in);
          to_bias[i] = shift[i] - mean[i] * scale[i];
        }
      });
    });
  }
};

Tensor contiguous_norm(const char* name, const Tensor& norm, const Tensor& x, const PointwiseSizes& s) {
  check_norm(name, norm, x, s.branches, s.out);
  return torch::stable::contiguous(norm);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x_in, const Tensor& weight_in, const Tensor& norm,
                                                   const std::string& activation, const Tensor& out_norm_in,
                                                   const std::string& out_activation,
                                                   const std::optional<Tensor>& residual_in,
                                                   const std::optional<Tensor>& residual_norm,
                                                   const std::optional<Tensor>& next_in) {
  const Normalization normalization("norm", x_in, norm, activation);
  const PointwiseSizes s(x_in, weight_in, next_in);
  const bool kept = keeps_features(s, x_in);
  const OutResidual residual(residual_in, residual_norm, s, x_in, kept);
  const Tensor x = read_features(x_in, kept), weight = contiguous_filters(widen(weight_in));
  const std::optional<Tensor> next = contiguous_filters(widen(next_in));
  const Folded folded(s, weight, contiguous_norm("out_norm", out_norm_in, x_in, s));
  const Tensor z = empty(x, s.shape(s.out)), y = empty(x, s.shape(s.next));
  const Tensor y_mean = empty(norm, {s.branches, s.next}), y_var = empty(norm, {s.branches, s.next});
  dispatch_features(x, [&](auto type) {
    using T = decltype(type);
    const PrologueInput<T> input = normalization.input<T>(x), added = residual.input<T>();
    const Clamp<Sum<T>> clamp = Clamp<Sum<T>>::named(out_activation);
    const PackedMatrices<T> project(folded.weight, false);
    std::optional<PackedMatrices<T>> expand;
    if (next.has_value()) expand.emplace(*next, false);
    const int64_t blocks = ceil_div(s.rows, kBlockRows);
    Moments<T> moments(s.branches, blocks, s.next);
    parallel_tasks(s.branches * blocks, [&](int64_t task) {
      const int64_t branch = task / blocks, first = task % blocks * kBlockRows;
      const int64_t count = std::min(kBlockRows, s.rows - first), at = branch * s.rows + first;
      T* const to = mutable_data<T>(z) + at * s.out;
      const T* const before = input.read(branch, first, count, scratch<T>(4, kBlockRows * s.in));
      const T* const add =
          added.x != nullptr ? added.read(branch, first, count, scratch<T>(5, kBlockRows * s.out)) : nullptr;
      T* const next_to = expand ? mutable_data<T>(y) + at * s.next : nullptr;
      const int64_t total = s.branches * s.rows;
      PrefetchQueue<T> ahead;
      input.add_rows_after(ahead, s.branches, branch, first, count);
      added.add_rows_after(ahead, s.branches, branch, first, count);
      add_rows_after(ahead, data<T>(z), total, s.out, at, count);
      if (expand) add_rows_after(ahead, data<T>(y), total, s.next, at, count);
      project.multiply(branch, before, count, to, data<Sum<T>>(folded.bias) + branch * s.out, add, clamp, &ahead);
      if (!expand) return;
      expand->multiply(branch, to, count, next_to, nullptr, nullptr, {}, &ahead);
      moments.add(branch, task % blocks, next_to, count);
    });
    moments.finish(mutable_data<Sum<T>>(y_mean), mutable_data<Sum<T>>(y_var));
  });
  const ScalarType dtype = x_in.scalar_type();
  return {round_to(z, dtype), round_to(y, dtype), y_mean, y_var};
}

// With m the gradient of z before the activation, the gradients are: m of the residual; sum m of the shift;
// sum m (conv(s) - mean) = diag(W (sum s m^T)) - mean sum m of the scale; diag(scale) sum m s^T of W;
// m diag(scale) W of s.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_z_in, const Tensor& grad_y, const Tensor& grad_mean, const Tensor& grad_var, const Tensor& z_in,
    const Tensor& y_in, const Tensor& y_mean, const Tensor& x_in, const Tensor& weight_in, const Tensor& norm,
    const std::string& activation, const Tensor& out_norm_in, const std::string& out_activation,
    const std::optional<Tensor>& residual_in, const std::optional<Tensor>& residual_norm,
    const std::optional<Tensor>& next_in, bool has_residual) {
  const Normalization normalization("norm", x_in, norm, activation);
  const PointwiseSizes s(x_in, weight_in, next_in);
  const bool kept = keeps_features(s, x_in);
  const OutputGradient next_output(grad_y, grad_mean, grad_var, y_in, y_mean, kept);
  check_shape("y", y_in, s.shape(s.next));
  for (const auto& [name, t] : {std::pair{"z", &z_in}, {"grad_z", &grad_z_in}}) {
    check_shape(name, *t, s.shape(s.out));
    check_kind(name, *t, x_in);
  }
  const Tensor x = read_features(x_in, kept), weight = contiguous_filters(widen(weight_in));
  const Tensor z = read_features(z_in, kept);
  const ExpandableGradient grad_z(grad_z_in, s, kept);
  STD_TORCH_CHECK(has_residual || !residual_in.has_value(), "residual: expected none");
  const OutResidual residual(residual_in, residual_norm, s, x_in, kept);
  const std::optional<Tensor> next = contiguous_filters(widen(next_in));
  const Tensor out_norm = contiguous_norm("out_norm", out_norm_in, x_in, s);
  const Folded folded(s, weight, out_norm);
  const Tensor grad_x = empty(x, x_in.sizes()), grad_weight = empty(weight, weight_in.sizes());
  const Tensor grad_norm = empty(norm, norm.sizes()), grad_out_norm = empty(norm, out_norm.sizes());
  const Tensor grad_residual = has_residual ? empty(x, s.shape(s.out)) : empty(x, {0});
  const Tensor grad_residual_norm = residual.normalized() ? empty(norm, out_norm.sizes()) : empty(norm, {0});
  const Tensor grad_next = next.has_value() ? empty(weight, next_in->sizes()) : empty(weight, {0});
  dispatch_features(x, [&](auto type) {
    using T = decltype(type);
    const PrologueInput<T> input = normalization.input<T>(x), added = residual.input<T>();
    const PrologueInput<T> grad_y_input = next_output.input<T>();
    const PackedMatrices<T> project(folded.weight, true);
    std::optional<PackedMatrices<T>> expand;
    if (next.has_value()) expand.emplace(*next, true);
    const RowPartition partition(s.branches, s.rows);
    // A gradient that fits no cache is written past the caches, as another op reads it; bfloat16 fills no whole lines.
    const bool streams = kTerms<T> == 1 && has_residual && !residual.normalized() && s.out * sizeof(T) % 64 == 0 &&
                         s.rows * s.branches * s.out * int64_t(sizeof(T)) >= kStreamBytes;
    const T* const grad_z_rows = grad_z.expanded ? nullptr : data<T>(grad_z.values);
    const int64_t size = s.in * s.out, next_size = s.next * s.out;
    const Tensor products = empty(weight, {s.branches * partition.tasks, size});  // sum s m^T, [in][out]
    const Tensor next_products = empty(weight, {s.branches * partition.tasks, next_size});
    ChannelSums<T> sums(s.branches, partition.blocks, s.in), out_sums(s.branches, partition.blocks, s.out);
    ChannelSums<T> residual_sums(s.branches, residual.normalized() ? partition.blocks : 0, s.out);
    parallel_tasks(s.branches * partition.tasks, [&](int64_t task) {
      const int64_t branch = task / partition.tasks;
      Sum<T>* const product = mutable_data<Sum<T>>(products) + task * size;
      Sum<T>* const next_product = mutable_data<Sum<T>>(next_products) + task * next_size;
      std::fill(product, product + size, Sum<T>(0));
      std::fill(next_product, next_product + next_size, Sum<T>(0));
      partition.for_each_block(task % partition.tasks, [&](int64_t block, int64_t first, int64_t count) {
        const int64_t at = branch * s.rows + first;
        const T* rows = data<T>(z) + at * s.out;
        const int64_t total = s.branches * s.rows;
        PrefetchQueue<T> ahead;
        if (expand) grad_y_input.add_rows_after(ahead, s.branches, branch, first, count);
        add_rows_after(ahead, data<T>(z), total, s.out, at, count);
        add_rows_after(ahead, grad_z_rows, total, s.out, at, count);
        if (residual.normalized()) added.add_rows_after(ahead, s.branches, branch, first, count);
        input.add_rows_after(ahead, s.branches, branch, first, count);
        add_rows_after(ahead, data<T>(grad_x), total, s.in, at, count);
        if (has_residual && !streams) add_rows_after(ahead, data<T>(grad_residual), total, s.out, at, count);
        T* const memory = scratch<T>(8, kBlockRows * s.out);
        const T* grad = grad_z.read(at, count, memory);
        if (expand) {
          const T* grad_y_rows = grad_y_input.read(branch, first, count, scratch<T>(4, kBlockRows * s.next));
          add_outer(grad_y_rows, s.next, rows, s.out, count, next_product, &ahead);
          expand->multiply(branch, grad_y_rows, count, memory, nullptr, grad, {}, &ahead);
          grad = memory;
        }
        T* const to_residual = has_residual ? mutable_data<T>(grad_residual) + at * s.out : nullptr;
        T* const masked = has_residual && !streams && !residual.normalized() ? to_residual : memory;
        NormRows<T> r{};
        r.grad = grad, r.y = rows, r.out = masked, r.clamp = Clamp<Sum<T>>::named(out_activation);
        r.streamed = streams ? to_residual : nullptr, r.count = count, r.channels = s.out;
        out_sums.add(branch, block, r, kernels<T>().mask);
        if (residual.normalized()) {
          r = added.norm(branch, first, count);
          r.grad = masked, r.out = to_residual;
          residual_sums.add(branch, block, r, kernels<T>().normalize_backward);
        }
        const T* before = input.read(branch, first, count, scratch<T>(5, kBlockRows * s.in));
        add_outer<T>(before, s.in, masked, s.out, count, product, &ahead);
        T* const grad_before = scratch<T>(7, kBlockRows * s.in);
        project.multiply(branch, masked, count, grad_before, nullptr, nullptr, {}, &ahead);
        r = input.norm(branch, first, count);
        r.grad = grad_before, r.out = mutable_data<T>(grad_x) + at * s.in;
        sums.add(branch, block, r, kernels<T>().normalize_backward);
      });
    });
    const int64_t branch_stride = weight.stride(0), row_stride = weight.stride(1);
    sums.finish_norm(*normalization.norm, grad_norm);
    out_sums.finish_norm(out_norm, grad_out_norm);  // but for the scale, which the products give
    if (residual.normalized()) residual_sums.finish_norm(*residual.normalization->norm, grad_residual_norm);
    parallel_tasks(s.branches, [&](int64_t branch) {
      Sum<T>* const product = mutable_data<Sum<T>>(products) + branch * partition.tasks * size;
      Sum<T>* const next_product = mutable_data<Sum<T>>(next_products) + branch * partition.tasks * next_size;
      for (int64_t task = 1; task < partition.tasks; ++task) {
        kernels<Sum<T>>().add_scaled(product, product + task * size, Sum<T>(1), size);
        kernels<Sum<T>>().add_scaled(next_product, next_product + task * next_size, Sum<T>(1), next_size);
      }
      if (next.has_value())
        std::copy(next_product, next_product + next_size, mutable_data<Sum<T>>(grad_next) + branch * next_size);
      const Sum<T>* const w = data<Sum<T>>(weight) + branch * branch_stride;
      const Sum<T>* const mean = norm_row<Sum<T>>(out_norm, kMean) + branch * s.out;
      const Sum<T>* const scale = norm_row<Sum<T>>(out_norm, kScale) + branch * s.out;
      const Sum<T>* const grad_shift = norm_row<Sum<T>>(grad_out_norm, kShift) + branch * s.out;
      Sum<T>* const to = mutable_data<Sum<T>>(grad_weight) + branch * size;
      Sum<T>* const to_scale = mutable_data<Sum<T>>(grad_out_norm) + (kScale * s.branches + branch) * s.out;
      constexpr int64_t kColumns = 16;  // transposed at once, within the first cache
      for (int64_t c0 = 0; c0 < s.out; c0 += kColumns) {
        const int64_t end = std::min(c0 + kColumns, s.out);
        double sums[kColumns] = {};
        for (int64_t k = 0; k < s.in; ++k)
          for (int64_t c = c0; c < end; ++c) {
            const Sum<T> value = product[k * s.out + c];
            sums[c - c0] += double(value) * double(w[c * row_stride + k]);
            to[c * s.in + k] = value * scale[c];
          }
        for (int64_t c = c0; c < end; ++c) to_scale[c] = Sum<T>(sums[c - c0] - double(mean[c]) * double(grad_shift[c]));
      }
    });
  });
  const ScalarType dtype = x_in.scalar_type();
  return {
      round_to(grad_x, dtype), round_to(grad_weight, dtype), grad_norm, grad_out_norm, round_to(grad_residual, dtype),
      grad_residual_norm,      round_to(grad_next, dtype)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) {
  m.impl("branch_pointwise_norm_conv2d", TORCH_BOX(&forward));
  m.impl("branch_pointwise_norm_conv2d_backward", TORCH_BOX(&backward));
}

}  // namespace hne
