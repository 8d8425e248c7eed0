// Mean and variance of y = W s, a pointwise convolution that is not computed: the mean is W mean(s), and the variances
// are the diagonal of W cov(s) W^T.
#include "conv_norm.h"
#include "pointwise.h"

namespace hne {
namespace {

// Mean and biased covariance of the channels of a branch. A task sums distances from its first row, and the sums of
// tasks are combined by the formula of Chan et al. (1979): nothing cancels where a mean is large.
template <typename T>
class Covariance {
 public:
  Covariance(const PrologueInput<T>& input, const PointwiseSizes& sizes, const Tensor& like)
      : input_(input),
        branches_(sizes.branches),
        channels_(sizes.in),
        partition_(sizes.branches, sizes.rows),
        sums_(sizes.branches, partition_.tasks, channels_),
        origins_(empty(like, {sizes.branches * partition_.tasks, channels_}, kScalarType<Sum<T>>)),
        products_(empty(like, {sizes.branches * partition_.tasks, channels_ * channels_}, kScalarType<Sum<T>>)) {
    parallel_tasks(sizes.branches * partition_.tasks, [&](int64_t task) { sum(task); });
  }

  // mean [in], covariance [in][in] of a branch
  void finish(int64_t branch, double* mean, double* covariance) {
    std::fill(mean, mean + channels_, 0.0);
    std::fill(covariance, covariance + channels_ * channels_, 0.0);
    std::vector<double> apart(channels_);
    double before = 0;
    for (int64_t part = 0; part < partition_.tasks; ++part) {
      const int64_t task = branch * partition_.tasks + part;
      double count = 0;
      partition_.for_each_block(part, [&](int64_t, int64_t, int64_t rows) { count += double(rows); });
      if (count == 0) continue;
      const double *sums = sums_.partial_sum(branch, part), both = before + count;
      const Sum<T>* origin = data<Sum<T>>(origins_) + task * channels_;
      const Sum<T>* product = data<Sum<T>>(products_) + task * channels_ * channels_;
      for (int64_t c = 0; c < channels_; ++c) apart[c] = double(origin[c]) + sums[c] / count - mean[c];
      for (int64_t i = 0; i < channels_; ++i)
        for (int64_t j = 0; j < channels_; ++j)
          covariance[i * channels_ + j] += double(product[i * channels_ + j]) - sums[i] * (sums[j] / count) +
                                           apart[i] * (apart[j] * (before * count / both));
      for (int64_t c = 0; c < channels_; ++c) mean[c] += apart[c] * (count / both);
      before = both;
    }
    for (int64_t i = 0; i < channels_ * channels_; ++i) covariance[i] /= std::max(before, 1.0);
  }

 private:
  void sum(int64_t task) {
    const int64_t branch = task / partition_.tasks, part = task % partition_.tasks;
    Sum<T>* const origin = mutable_data<Sum<T>>(origins_) + task * channels_;
    Sum<T>* const product = mutable_data<Sum<T>>(products_) + task * channels_ * channels_;
    std::fill(product, product + channels_ * channels_, Sum<T>(0));
    bool begins = true;
    partition_.for_each_block(part, [&](int64_t, int64_t first, int64_t count) {
      T* const distances = scratch<T>(4, kBlockRows * channels_);
      const T* rows = input_.read(branch, first, count, distances);
      if (std::exchange(begins, false)) std::transform(rows, rows + channels_, origin, to_sum<T>);
      NormRows<T> r{};
      r.x = rows, r.shift = origin, r.out = distances, r.count = count, r.channels = channels_;
      sums_.add(branch, part, r, kernels<T>().moments);
      PrefetchQueue<T> ahead;
      input_.add_rows_after(ahead, branches_, branch, first, count);
      add_outer<T>(distances, channels_, distances, channels_, count, product, &ahead);
    });
  }

  const PrologueInput<T>& input_;
  int64_t branches_, channels_;
  RowPartition partition_;
  ChannelSums<T> sums_;
  Tensor origins_, products_;
};

// Mean and variance of y and, for the backward pass, the mean of s and the product W cov(s).
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x_in, const Tensor& weight_in, const Tensor& norm,
                                                   const std::string& activation) {
  const Normalization normalization("norm", x_in, norm, activation);
  const PointwiseSizes s(x_in, weight_in);
  const Tensor x = read_features(x_in, keeps_bfloat16(x_in, {s.in})), weight = contiguous_filters(widen(weight_in));
  const Tensor y_mean = empty(norm, {s.branches, s.out}), y_var = empty(norm, {s.branches, s.out});
  const Tensor x_mean = empty(norm, {s.branches, s.in}), product = empty(norm, {s.branches, s.out, s.in});
  const int64_t branch_stride = weight.stride(0), row_stride = weight.stride(1);
  dispatch_features(x, [&](auto type) {
    using T = decltype(type);
    using U = Sum<T>;
    const PrologueInput<T> input = normalization.input<T>(x);
    Covariance<T> moments(input, s, x);
    const Tensor covariance = empty(weight, {s.branches, s.in, s.in});
    parallel_tasks(s.branches, [&](int64_t branch) {
      std::vector<double> average(s.in), square(s.in * s.in);
      moments.finish(branch, average.data(), square.data());
      std::copy(average.begin(), average.end(), mutable_data<U>(x_mean) + branch * s.in);
      std::copy(square.begin(), square.end(), mutable_data<U>(covariance) + branch * s.in * s.in);
      const U* w = data<U>(weight) + branch * branch_stride;
      U* const to = mutable_data<U>(y_mean) + branch * s.out;
      for (int64_t c = 0; c < s.out; ++c) to[c] = U(dot(w + c * row_stride, average.data(), s.in));
    });
    const PackedMatrices<U> packed(covariance, false);  // symmetric
    parallel_tasks(s.branches, [&](int64_t branch) {
      const U* w = data<U>(weight) + branch * branch_stride;
      U* const to = mutable_data<U>(product) + branch * s.out * s.in;
      packed.multiply_strided(branch, w, row_stride, s.out, to);
      U* const var = mutable_data<U>(y_var) + branch * s.out;
      for (int64_t c = 0; c < s.out; ++c) var[c] = U(std::max(dot(w + c * row_stride, to + c * s.in, s.in), 0.0));
    });
  });
  return {y_mean, y_var, x_mean, product};
}

// With n rows, the gradient of a row s is W^T (grad_mean / n) + B (s - mean(s)), where B = W^T diag(2 grad_var / n) W.
// The gradient of W is grad_mean mean(s)^T + diag(2 grad_var) W cov(s).
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_mean_in, const Tensor& grad_var_in,
                                            const Tensor& x_mean_in, const Tensor& product_in, const Tensor& x_in,
                                            const Tensor& weight_in, const Tensor& norm,
                                            const std::string& activation) {
  const Normalization normalization("norm", x_in, norm, activation);
  const PointwiseSizes s(x_in, weight_in);
  for (const auto& [name, t] : {std::pair{"grad_mean", &grad_mean_in}, {"grad_var", &grad_var_in}})
    check_statistics(name, *t, x_in, {s.branches, s.out});
  check_statistics("x_mean", x_mean_in, x_in, {s.branches, s.in});
  check_statistics("product", product_in, x_in, {s.branches, s.out, s.in});
  const Tensor x = read_features(x_in, keeps_bfloat16(x_in, {s.in})), weight = contiguous_filters(widen(weight_in));
  const Tensor grad_mean = torch::stable::contiguous(grad_mean_in), grad_var = torch::stable::contiguous(grad_var_in);
  const Tensor x_mean = torch::stable::contiguous(x_mean_in), product = torch::stable::contiguous(product_in);
  const Tensor grad_x = empty(x, x_in.sizes()), grad_weight = empty(weight, weight_in.sizes());
  const Tensor grad_norm = empty(norm, norm.sizes());
  const int64_t branch_stride = weight.stride(0), row_stride = weight.stride(1);
  dispatch_features(x, [&](auto type) {
    using T = decltype(type);
    const PrologueInput<T> input = normalization.input<T>(x);
    using U = Sum<T>;
    const U rows = U(std::max<int64_t>(s.rows, 1));
    const Tensor square = empty(weight, {s.branches, s.in, s.in}), constant = empty(weight, {s.branches, s.in});
    parallel_tasks(s.branches, [&](int64_t branch) {
      const U* w = data<U>(weight) + branch * branch_stride;
      const U* average = data<U>(x_mean) + branch * s.in;
      const U *from_mean = data<U>(grad_mean) + branch * s.out, *from_var = data<U>(grad_var) + branch * s.out;
      const U* w_cov = data<U>(product) + branch * s.out * s.in;
      U* const to = mutable_data<U>(grad_weight) + branch * s.out * s.in;
      U* const scaled = scratch<U>(4, s.out * s.in);
      U* const b = mutable_data<U>(square) + branch * s.in * s.in;
      std::vector<double> sum(s.in, 0.0);
      for (int64_t c = 0, i = 0; c < s.out; ++c) {
        const U mean_of_row = from_mean[c] / rows, var_of_row = 2 * from_var[c] / rows;
        for (int64_t k = 0; k < s.in; ++k, ++i) {
          to[i] = from_mean[c] * average[k] + 2 * from_var[c] * w_cov[i];
          const U value = w[c * row_stride + k];
          scaled[i] = var_of_row * value;
          sum[k] += double(mean_of_row * value);
        }
      }
      std::fill(b, b + s.in * s.in, U(0));
      const U* const* rows_of_w = row_pointers(w, s.out, row_stride, 1);
      kernels<U>().outer({row_pointers(scaled, s.out, s.in, 0), rows_of_w, s.out, s.in, s.in, b, nullptr});
      for (int64_t j = 0; j < s.in; ++j)
        for (int64_t k = 0; k < s.in; ++k) sum[k] -= double(average[j] * b[j * s.in + k]);
      std::copy(sum.begin(), sum.end(), mutable_data<U>(constant) + branch * s.in);
    });
    const PackedMatrices<T> packed(square, true);
    const int64_t blocks = ceil_div(s.rows, kBlockRows);
    ChannelSums<T> sums(s.branches, blocks, s.in);
    parallel_tasks(s.branches * blocks, [&](int64_t task) {
      const int64_t branch = task / blocks, first = task % blocks * kBlockRows;
      const int64_t count = std::min(kBlockRows, s.rows - first);
      T* const grad = scratch<T>(7, kBlockRows * s.in);
      const int64_t at = branch * s.rows + first;
      PrefetchQueue<T> ahead;
      input.add_rows_after(ahead, s.branches, branch, first, count);
      add_rows_after(ahead, data<T>(grad_x), s.branches * s.rows, s.in, at, count);
      packed.multiply(branch, input.read(branch, first, count, scratch<T>(5, kBlockRows * s.in)), count, grad,
                      data<Sum<T>>(constant) + branch * s.in, nullptr, {}, &ahead);
      NormRows<T> r = input.norm(branch, first, count);
      r.grad = grad, r.out = mutable_data<T>(grad_x) + at * s.in;
      sums.add(branch, task % blocks, r, kernels<T>().normalize_backward);
    });
    sums.finish_norm(*normalization.norm, grad_norm);
  });
  const ScalarType dtype = x_in.scalar_type();
  return {round_to(grad_x, dtype), round_to(grad_weight, dtype), grad_norm};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, CPU, m) {
  m.impl("branch_pointwise_stats", TORCH_BOX(&forward));
  m.impl("branch_pointwise_stats_backward", TORCH_BOX(&backward));
}

}  // namespace hne
