// The end of a bottleneck, from the map s before its last convolution:
// z = clamp((conv(s) - mean) * scale + shift + residual), and y = next_conv(z) with its statistics. The wide map
// conv(s) exists in the cache alone: on the way back, what its gradient sums is known from the product of the gradient
// and s.
#include "conv_norm.h"
#include "pointwise.h"

namespace hne {
namespace {

constexpr int64_t kStreamBytes = 4 * 1024 * 1024;

// The gradient of z: a map, or, that of a sum over the map, a row that is the same for all pixels of a sample.
struct GradientMap {
  int64_t pixels, channels;
  bool expanded;
  Tensor values;

  GradientMap(const Tensor& grad, const PointwiseSizes& s)
      : pixels(s.maps[2] * s.maps[3]), channels(s.out), values(grad) {
    const auto strides = grad.strides();
    expanded = pixels > 1 && strides[2] == 0 && strides[3] == 0;
    for (const int64_t over : {2, 3})
      if (expanded) values = torch::stable::narrow(values, over, 0, 1);
    values = torch::stable::contiguous(widen(values));
  }

  // Rows from the one numbered `at` of all; those of a sum in `memory`.
  template <typename T>
  const T* read(int64_t at, int64_t count, T* memory) const {
    if (!expanded) return data<T>(values) + at * channels;
    for (int64_t m = 0; m < count; ++m)
      std::copy_n(data<T>(values) + (at + m) / pixels * channels, channels, memory + m * channels);
    return memory;
  }
};

// The residual, normalised by its own vectors where there are any; no map where there is none.
struct Residual {
  std::optional<Tensor> map;
  std::optional<Normalization> normalization;

  Residual(const std::optional<Tensor>& given, const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
           const std::optional<Tensor>& shift, const PointwiseSizes& s, const Tensor& x)
      : map(contiguous(widen(given))) {
    STD_TORCH_CHECK(given.has_value() || !mean.has_value(), "residual_mean: expected with a residual");
    if (!given.has_value()) return;
    check_shape("residual", *given, s.map(s.out));
    check_kind("residual", *given, x);
    normalization.emplace(*given, mean, scale, shift, "none");
  }

  bool normalized() const { return normalization.has_value() && normalization->mean.has_value(); }

  template <typename T>
  PrologueInput<T> of() const {
    return map.has_value() ? normalization->of<T>(*map) : PrologueInput<T>{};
  }
};

// The convolution and the normalisation after it as one convolution with a bias.
struct Folded {
  Tensor weight, bias;  // [branch][out][in], [branch][out]

  Folded(const PointwiseSizes& s, const Tensor& from, const Tensor& mean_in, const Tensor& scale_in,
         const Tensor& shift_in)
      : weight(empty(from, {s.branches, s.out, s.in})), bias(empty(from, {s.branches, s.out})) {
    check_vector("out_mean", mean_in, from, s.branches, s.out);
    check_vector("out_scale", scale_in, from, s.branches, s.out);
    check_vector("out_shift", shift_in, from, s.branches, s.out);
    const Tensor mean = torch::stable::contiguous(mean_in), scale = torch::stable::contiguous(scale_in);
    const Tensor shift = torch::stable::contiguous(shift_in);
    dispatch(from, [&](auto type) {
      using T = decltype(type);
      const T *given = data<T>(from), *m = data<T>(mean), *a = data<T>(scale), *b = data<T>(shift);
      T *const to = mutable_data<T>(weight), *const constant = mutable_data<T>(bias);
      parallel_tasks(s.branches, [&](int64_t branch) {
        for (int64_t i = branch * s.out; i < (branch + 1) * s.out; ++i) {
          kernels<T>().store_scaled(to + i * s.in, given + i * s.in, a[i], s.in);
          constant[i] = b[i] - m[i] * a[i];
        }
      });
    });
  }
};

Tensor matrices(const Tensor& weight) {
  return torch::stable::view(weight, {weight.size(0), weight.size(1), weight.size(2)});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& residual_in,
    const std::optional<Tensor>& next_in, const Tensor& mean, const Tensor& scale, const Tensor& shift,
    const std::string& activation, const Tensor& out_mean, const Tensor& out_scale, const Tensor& out_shift,
    const std::string& out_activation, const std::optional<Tensor>& residual_mean,
    const std::optional<Tensor>& residual_scale, const std::optional<Tensor>& residual_shift) {
  const Normalization normalization(x_in, mean, scale, shift, activation);
  const PointwiseSizes s(x_in, weight_in, next_in);
  const Residual residual(residual_in, residual_mean, residual_scale, residual_shift, s, x_in);
  const Tensor x = torch::stable::contiguous(widen(x_in)), weight = torch::stable::contiguous(widen(weight_in));
  const std::optional<Tensor> next = contiguous(widen(next_in));
  const Folded folded(s, weight, out_mean, out_scale, out_shift);
  const Tensor z = empty(x, s.map(s.out)), y = empty(x, s.map(s.next));
  const Tensor y_mean = empty(mean, {s.branches, s.next}), y_var = empty(mean, {s.branches, s.next});
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const PrologueInput<T> map = normalization.of<T>(x), added = residual.of<T>();
    const Clamp<T> clamp = Clamp<T>::named(out_activation);
    const PackedMatrices<T> project(folded.weight, false);
    std::optional<PackedMatrices<T>> expand;
    if (next.has_value()) expand.emplace(matrices(*next), false);
    const int64_t blocks = ceil_div(s.rows, kBlockRows);
    Moments<T> moments(s.branches, blocks, s.next);
    parallel_tasks(s.branches * blocks, [&](int64_t task) {
      const int64_t branch = task / blocks, first = task % blocks * kBlockRows;
      const int64_t count = std::min(kBlockRows, s.rows - first), at = branch * s.rows + first;
      T* const to = mutable_data<T>(z) + at * s.out;
      const T* const before = map.read(branch, first, count, scratch<T>(4, kBlockRows * s.in));
      const T* const add =
          added.x != nullptr ? added.read(branch, first, count, scratch<T>(5, kBlockRows * s.out)) : nullptr;
      project.multiply(branch, before, count, to, data<T>(folded.bias) + branch * s.out, add, clamp,
                       rows_after(added.x, s.rows, s.out, branch, first, count));
      if (!expand) return;
      T* const next_to = mutable_data<T>(y) + at * s.next;
      expand->multiply(branch, to, count, next_to, nullptr, nullptr, {},
                       rows_after(data<T>(z), s.rows, s.out, branch, first, count));
      moments.add(branch, task % blocks, next_to, count);
    });
    moments.finish(s.branches, mutable_data<T>(y_mean), mutable_data<T>(y_var));
  });
  const ScalarType dtype = x_in.scalar_type();
  return {round_to(z, dtype), round_to(y, dtype), y_mean, y_var};
}

// With m the gradient of z behind the activation: m is that of the residual, sum m of out_shift, sum m (conv(s) - mean)
// = diag(W (sum s m^T)) - mean sum m of out_scale, diag(scale) sum m s^T of W, and m diag(scale) W of s.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_z_in, const Tensor& grad_y, const Tensor& grad_mean, const Tensor& grad_var, const Tensor& z_in,
    const Tensor& y_in, const Tensor& y_mean, const Tensor& x_in, const Tensor& weight_in,
    const std::optional<Tensor>& residual_in, const std::optional<Tensor>& next_in, const Tensor& mean,
    const Tensor& scale, const Tensor& shift, const std::string& activation, const Tensor& out_mean,
    const Tensor& out_scale, const Tensor& out_shift, const std::string& out_activation,
    const std::optional<Tensor>& residual_mean, const std::optional<Tensor>& residual_scale,
    const std::optional<Tensor>& residual_shift, bool has_residual) {
  const Normalization normalization(x_in, mean, scale, shift, activation);
  const PointwiseSizes s(x_in, weight_in, next_in);
  const OutputGradient above(grad_y, grad_mean, grad_var, y_in, y_mean);
  check_shape("y", y_in, s.map(s.next));
  for (const auto& [name, t] : {std::pair{"z", &z_in}, {"grad_z", &grad_z_in}}) {
    check_shape(name, *t, s.map(s.out));
    check_kind(name, *t, x_in);
  }
  const Tensor x = torch::stable::contiguous(widen(x_in)), weight = torch::stable::contiguous(widen(weight_in));
  const Tensor z = torch::stable::contiguous(widen(z_in));
  const GradientMap grad_z(grad_z_in, s);
  STD_TORCH_CHECK(has_residual || !residual_in.has_value(), "residual: expected none");
  const Residual residual(residual_in, residual_mean, residual_scale, residual_shift, s, x_in);
  const std::optional<Tensor> next = contiguous(widen(next_in));
  const Tensor wide_mean = torch::stable::contiguous(out_mean), wide_scale = torch::stable::contiguous(out_scale);
  const Folded folded(s, weight, out_mean, out_scale, out_shift);
  const Tensor grad_x = empty(x, x_in.sizes()), grad_weight = empty(weight, weight_in.sizes());
  const Tensor grad_scale = empty(x, scale.sizes()), grad_shift = empty(x, shift.sizes());
  const Tensor grad_out_scale = empty(x, out_scale.sizes()), grad_out_shift = empty(x, out_shift.sizes());
  const Tensor grad_residual = has_residual ? empty(x, s.map(s.out)) : empty(x, {0});
  const Tensor grad_residual_scale = residual.normalized() ? empty(mean, out_mean.sizes()) : empty(mean, {0});
  const Tensor grad_next = next.has_value() ? empty(x, next_in->sizes()) : empty(x, {0});
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const PrologueInput<T> map = normalization.of<T>(x), above_map = above.map<T>(), added = residual.of<T>();
    const PackedMatrices<T> project(folded.weight, true);
    std::optional<PackedMatrices<T>> expand;
    if (next.has_value()) expand.emplace(matrices(*next), true);
    const RowPartition shares(s.branches, s.rows);
    // A map that no cache holds goes past them; it is read by the op before.
    const bool streams = has_residual && !residual.normalized() && s.out * sizeof(T) % 64 == 0 &&
                         s.rows * s.branches * s.out * int64_t(sizeof(T)) >= kStreamBytes;
    const T* const grad_map = grad_z.expanded ? nullptr : data<T>(grad_z.values);
    const int64_t size = s.in * s.out, next_size = s.next * s.out;
    const Tensor products = empty(x, {s.branches * shares.count, size});  // of s and m, [in][out]
    const Tensor next_products = empty(x, {s.branches * shares.count, next_size});
    ChannelSums<T> sums(s.branches, shares.blocks, s.in), out_sums(s.branches, shares.blocks, s.out);
    ChannelSums<T> residual_sums(s.branches, residual.normalized() ? shares.blocks : 0, s.out);
    parallel_tasks(s.branches * shares.count, [&](int64_t task) {
      const int64_t branch = task / shares.count;
      T* const product = mutable_data<T>(products) + task * size;
      T* const next_product = mutable_data<T>(next_products) + task * next_size;
      std::fill(product, product + size, T(0));
      std::fill(next_product, next_product + next_size, T(0));
      shares.each(task % shares.count, [&](int64_t block, int64_t first, int64_t count) {
        const int64_t at = branch * s.rows + first;
        const T* rows = data<T>(z) + at * s.out;
        const auto after = [&](const T* map) { return rows_after(map, s.rows, s.out, branch, first, count); };
        T* const memory = scratch<T>(8, kBlockRows * s.out);
        const T* grad = grad_z.read(at, count, memory);
        if (expand) {
          const T* grad_after = above_map.read(branch, first, count, scratch<T>(4, kBlockRows * s.next));
          add_outer(grad_after, s.next, rows, s.out, count, next_product, after(grad_map));
          expand->multiply(branch, grad_after, count, memory, nullptr, grad);
          grad = memory;
        }
        T* const there = has_residual ? mutable_data<T>(grad_residual) + at * s.out : nullptr;
        T* const masked = has_residual && !streams && !residual.normalized() ? there : memory;
        NormRows<T> r{};
        r.grad = grad, r.y = rows, r.out = masked, r.clamp = Clamp<T>::named(out_activation);
        r.streamed = streams ? there : nullptr, r.count = count, r.channels = s.out;
        out_sums.add(branch, block, r, kernels<T>().mask);
        if (residual.normalized()) {
          r = added.norm(branch, first, count);
          r.grad = masked, r.out = there;
          residual_sums.add(branch, block, r, kernels<T>().normalize_backward);
        }
        const T* before = map.read(branch, first, count, scratch<T>(5, kBlockRows * s.in));
        add_outer<T>(before, s.in, masked, s.out, count, product, after(data<T>(z)));
        T* const grad_before = scratch<T>(7, kBlockRows * s.in);
        project.multiply(branch, masked, count, grad_before);
        r = map.norm(branch, first, count);
        r.grad = grad_before, r.out = mutable_data<T>(grad_x) + at * s.in;
        sums.add(branch, block, r, kernels<T>().normalize_backward);
      });
    });
    sums.finish(s.branches, mutable_data<T>(grad_shift), mutable_data<T>(grad_scale));
    out_sums.finish(s.branches, mutable_data<T>(grad_out_shift), mutable_data<T>(grad_out_scale));
    if (residual.normalized()) {
      const Tensor again = empty(mean, out_mean.sizes());  // grad_out_shift
      residual_sums.finish(s.branches, mutable_data<T>(again), mutable_data<T>(grad_residual_scale));
    }
    parallel_tasks(s.branches, [&](int64_t branch) {
      T* const product = mutable_data<T>(products) + branch * shares.count * size;
      T* const next_product = mutable_data<T>(next_products) + branch * shares.count * next_size;
      for (int64_t share = 1; share < shares.count; ++share) {
        kernels<T>().add_scaled(product, product + share * size, T(1), size);
        kernels<T>().add_scaled(next_product, next_product + share * next_size, T(1), next_size);
      }
      if (next.has_value())
        std::copy(next_product, next_product + next_size, mutable_data<T>(grad_next) + branch * next_size);
      const T *w = data<T>(weight) + branch * size, *centre = data<T>(wide_mean) + branch * s.out;
      const T *factor = data<T>(wide_scale) + branch * s.out, *total = data<T>(grad_out_shift) + branch * s.out;
      T* const to = mutable_data<T>(grad_weight) + branch * size;
      T* const to_scale = mutable_data<T>(grad_out_scale) + branch * s.out;
      constexpr int64_t kColumns = 16;  // of the product at once: it is turned over within the first cache
      for (int64_t c0 = 0; c0 < s.out; c0 += kColumns) {
        const int64_t end = std::min(c0 + kColumns, s.out);
        double sums[kColumns] = {};
        for (int64_t k = 0; k < s.in; ++k)
          for (int64_t c = c0; c < end; ++c) {
            const T value = product[k * s.out + c];
            sums[c - c0] += double(value) * double(w[c * s.in + k]);
            to[c * s.in + k] = value * factor[c];
          }
        for (int64_t c = c0; c < end; ++c) to_scale[c] = T(sums[c - c0] - double(centre[c]) * double(total[c]));
      }
    });
  });
  const ScalarType dtype = x_in.scalar_type();
  return {round_to(grad_x, dtype),
          round_to(grad_weight, dtype),
          round_to(grad_residual, dtype),
          round_to(grad_next, dtype),
          grad_scale,
          grad_shift,
          grad_out_scale,
          grad_out_shift,
          grad_residual_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) {
  m.impl("branch_projection", TORCH_BOX(&forward));
  m.impl("branch_projection_backward", TORCH_BOX(&backward));
}

}  // namespace hne
