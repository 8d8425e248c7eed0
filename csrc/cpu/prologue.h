// Feature maps that are normalised where they are read, and sums per channel over the rows that are written.
#pragma once

#include <functional>

#include "op.h"

namespace hne {

constexpr int64_t kSumRows = 128;  // rows summed in Sum<T> before they join sums in double

// The dtype of batch statistics and of a normalisation, for a feature map like `t`.
inline ScalarType statistics_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_statistics(const char* name, const Tensor& t, const Tensor& x, const std::vector<int64_t>& shape) {
  check_shape(name, t, shape);
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(t.scalar_type() == statistics_type(x), name, ": expected the dtype of the statistics of x");
}

// A normalisation is one tensor [3][branch][channel].
enum NormRow { kMean, kScale, kShift };

inline void check_norm(const char* name, const Tensor& norm, const Tensor& x, int64_t branches, int64_t channels) {
  check_statistics(name, norm, x, {3, branches, channels});
}

template <typename T>
const T* norm_row(const Tensor& norm, NormRow row) {
  return data<T>(norm) + row * norm.size(1) * norm.size(2);
}

// Adds the `count` rows after rows [first, first + count) of a feature map of `rows` rows, unless it is null.
template <typename T>
void add_rows_after(PrefetchQueue<T>& queue, const T* feature_map, int64_t rows, int64_t channels, int64_t first,
                    int64_t count) {
  if (feature_map == nullptr || first + count >= rows) return;
  queue.add(feature_map + (first + count) * channels, std::min(count, rows - first - count) * channels);
}

// The feature map [branch][row][channel] that a convolution reads: x as it lies in memory or, with a normalisation,
// clamp((x - mean) * scale + shift + add), computed where it is read; `add` may have a normalisation of its own.
// Vectors are [branch][channel].
template <typename T>
struct PrologueInput {
  const T* x;
  int64_t rows, channels;  // of a branch
  const Sum<T>* mean = nullptr;
  const Sum<T>* scale = nullptr;
  const Sum<T>* shift = nullptr;
  const T* add = nullptr;
  Clamp<Sum<T>> clamp = {};
  T* store = nullptr;  // a feature map for the computed rows, or null; each row is then to be read once
  const Sum<T>*add_mean = nullptr, *add_scale = nullptr, *add_shift = nullptr;  // of `add`, or null

  bool computed() const { return mean != nullptr; }

  NormRows<T> norm(int64_t branch, int64_t first, int64_t count) const {
    const int64_t at = (branch * rows + first) * channels, vector = branch * channels;
    NormRows<T> r{};
    r.x = x + at, r.count = count, r.channels = channels, r.clamp = clamp;
    r.mean = mean + vector, r.scale = scale + vector, r.shift = shift + vector;
    r.add = add != nullptr ? add + at : nullptr;
    return r;
  }

  // Rows of a branch. Computed rows go to `store` or else to `memory`, [count][channels].
  const T* read(int64_t branch, int64_t first, int64_t count, T* memory) const {
    const int64_t at = (branch * rows + first) * channels;
    if (!computed()) return x + at;
    NormRows<T> r = with_residual(branch, first, count);
    r.out = store != nullptr ? store + at : memory;
    kernels<T>().normalize(r);
    return r.out;
  }

  // The same as float if they are bfloat16, for depthwise convolutions; not for `store`.
  const Sum<T>* read_sums(int64_t branch, int64_t first, int64_t count, Sum<T>* memory) const {
    if constexpr (kTerms<T> == 1) {
      return read(branch, first, count, memory);
    } else {
      const T* const from = x + (branch * rows + first) * channels;
      if (!computed()) {
        std::transform(from, from + count * channels, memory, to_sum<T>);
        return memory;
      }
      NormRows<T> r = with_residual(branch, first, count);
      r.out_sums = memory;
      kernels<T>().normalize(r);
      return memory;
    }
  }

  // The normalisation, with a residual that is normalised already.
  NormRows<T> with_residual(int64_t branch, int64_t first, int64_t count) const {
    NormRows<T> r = norm(branch, first, count);
    if (add_mean == nullptr) return r;
    NormRows<T> added = added_norm(branch, first, count);
    added.out = scratch<T>(9, count * channels);
    kernels<T>().normalize(added);
    r.add = added.out;
    return r;
  }

  // The rows of `add` and their normalisation.
  NormRows<T> added_norm(int64_t branch, int64_t first, int64_t count) const {
    const PrologueInput added{add, rows, channels, add_mean, add_scale, add_shift};
    return added.norm(branch, first, count);
  }

  // Adds the rows after those that `read` has given; `branches` is the number of branches.
  void add_rows_after(PrefetchQueue<T>& queue, int64_t branches, int64_t branch, int64_t first, int64_t count) const {
    for (const T* feature_map : {x, add})
      hne::add_rows_after(queue, feature_map, branches * rows, channels, branch * rows + first, count);
  }

  void write(int64_t branches, T* out) const {
    constexpr int64_t kRows = 512;
    const int64_t chunks = ceil_div(rows, kRows);
    parallel_tasks(branches * chunks, [&](int64_t task) {
      const int64_t branch = task / chunks, first = task % chunks * kRows;
      read(branch, first, std::min(kRows, rows - first), out + (branch * rows + first) * channels);
    });
  }
};

// Called when rows [first, first + count) of a branch have been written, each row once.
using RowsWritten = std::function<void(int64_t branch, int64_t first, int64_t count)>;

// The same feature map in memory owned by `hold`, for a reader that would otherwise compute a row several times.
template <typename T>
PrologueInput<T> in_memory(const PrologueInput<T>& input, int64_t branches, Tensor& hold) {
  if (!input.computed()) return input;
  hold = empty(hold, {branches, input.rows, input.channels}, kScalarType<T>);
  input.write(branches, mutable_data<T>(hold));
  return {data<T>(hold), input.rows, input.channels};
}

// Two sums per channel and branch, in double. Each task adds to a partial sum of its own; partial sums are added in
// order, so the result does not depend on the number of threads.
template <typename T>
class ChannelSums {
 public:
  // `partials` is the number of partial sums of a branch.
  ChannelSums(int64_t branches, int64_t partials, int64_t channels)
      : branches_(branches), partials_(partials), channels_(channels), sums_(branches * partials * 2 * channels, 0.0) {}

  // Adds the sums that `kernel` takes over the rows of `r`.
  void add(int64_t branch, int64_t partial, NormRows<T> r, void (*kernel)(const NormRows<T>&)) {
    const auto next = [&](auto*& pointer) {
      if (pointer != nullptr) pointer += kSumRows * channels_;
    };
    r.sums = partial_sum(branch, partial), r.partial = scratch<Sum<T>>(6, 2 * channels_);
    for (int64_t left = r.count; left > 0; left -= kSumRows) {
      r.count = std::min(kSumRows, left);
      kernel(r);
      next(r.x), next(r.grad), next(r.y), next(r.out), next(r.out_masked), next(r.streamed);
    }
  }

  double* partial_sum(int64_t branch, int64_t partial) {
    return sums_.data() + (branch * partials_ + partial) * 2 * channels_;
  }

  // Writes the gradient of `norm`, both [3][branch][channel], from the sums of g and of g (x - mean), where g is the
  // gradient of (x - mean) * scale + shift.
  void finish_norm(const Tensor& norm, const Tensor& grad_norm) {
    const Sum<T>* const scale = norm_row<Sum<T>>(norm, kScale);
    Sum<T>* const out = mutable_data<Sum<T>>(grad_norm);
    const int64_t size = branches_ * channels_;
    parallel_tasks(branches_, [&](int64_t branch) {
      std::vector<double> total(2 * channels_, 0.0);
      for (int64_t partial = 0; partial < partials_; ++partial)
        for (int64_t i = 0; i < 2 * channels_; ++i) total[i] += partial_sum(branch, partial)[i];
      for (int64_t c = 0, i = branch * channels_; c < channels_; ++c, ++i) {
        const Sum<T> grad_shift = Sum<T>(total[c]);
        out[kMean * size + i] = -scale[i] * grad_shift;
        out[kScale * size + i] = Sum<T>(total[channels_ + c]);
        out[kShift * size + i] = grad_shift;
      }
    });
  }

 protected:
  int64_t branches_, partials_, channels_;
  std::vector<double> sums_;
};

// Mean and variance per channel and branch. A partial sum is of distances from its first row, and partial sums are
// combined by the formula of Chan et al. (1979): nothing cancels where a mean is large.
template <typename T>
class Moments : ChannelSums<T> {
 public:
  Moments(int64_t branches, int64_t partials, int64_t channels)
      : ChannelSums<T>(branches, partials, channels),
        counts_(branches * partials, 0),
        origins_(branches * partials * channels) {}

  // Sums the rows of a partial sum, which is added once.
  void add(int64_t branch, int64_t partial, const T* rows, int64_t count) {
    const int64_t at = branch * this->partials_ + partial;
    Sum<T>* origin = origins_.data() + at * this->channels_;
    std::transform(rows, rows + this->channels_, origin, to_sum<T>);
    counts_[at] = count;
    NormRows<T> r{};
    r.x = rows, r.shift = origin, r.count = count, r.channels = this->channels_;
    ChannelSums<T>::add(branch, partial, r, kernels<T>().moments);
  }

  void finish(Sum<T>* mean, Sum<T>* var) {
    parallel_tasks(this->branches_, [&](int64_t branch) {
      const int64_t channels = this->channels_;
      std::vector<double> average(channels, 0.0), squares(channels, 0.0);
      double before = 0;
      for (int64_t partial = 0; partial < this->partials_; ++partial) {
        const int64_t at = branch * this->partials_ + partial;
        if (counts_[at] == 0) continue;
        const double count = double(counts_[at]), both = before + count;
        const double* sums = this->partial_sum(branch, partial);
        for (int64_t c = 0; c < channels; ++c) {
          const double distance = sums[c] / count;
          const double apart = double(origins_[at * channels + c]) + distance - average[c];
          average[c] += apart * (count / both);
          squares[c] += sums[channels + c] - sums[c] * distance + apart * apart * (before * count / both);
        }
        before = both;
      }
      for (int64_t c = 0; c < channels; ++c) {
        mean[branch * channels + c] = Sum<T>(average[c]);
        var[branch * channels + c] = Sum<T>(std::max(squares[c] / std::max(before, 1.0), 0.0));  // an empty batch: 0
      }
    });
  }

 private:
  std::vector<int64_t> counts_;
  std::vector<Sum<T>> origins_;
};

}  // namespace hne
