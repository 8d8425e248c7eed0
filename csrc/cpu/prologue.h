// Maps that are normalised where they are read, and sums over the rows that are written.
#pragma once

#include <functional>

#include "op.h"

namespace hne {

constexpr int64_t kSumRows = 128;  // rows summed in the tensor's own precision before they join sums in double

// The statistics of a tensor of this type, and what is made of them.
inline ScalarType statistics_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_vector(const char* name, const Tensor& t, const Tensor& x, int64_t branches, int64_t channels) {
  check_shape(name, t, {branches, channels});
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(t.scalar_type() == statistics_type(x), name, ": expected the dtype of the statistics of x");
}

// Of a map [branch][row][channel] the rows that come after some of them, to be fetched; of no map none.
template <typename T>
Prefetch<T> rows_after(const T* map, int64_t rows, int64_t channels, int64_t branch, int64_t first, int64_t count) {
  if (map == nullptr || first + count >= rows) return {};
  return {map + (branch * rows + first + count) * channels, std::min(count, rows - first - count) * channels};
}

// A map [branch][row][channel] as a convolution reads it: as it lies in memory, or, where there is a mean,
// clamp((x - mean) * scale + shift + add). The vectors are [branch][channel].
// What is computed can be kept: for maps that are read once.
template <typename T>
struct PrologueInput {
  const T* x;
  int64_t rows, channels;  // of a branch
  const T* mean = nullptr;
  const T* scale = nullptr;
  const T* shift = nullptr;
  const T* add = nullptr;
  Clamp<T> clamp = {};
  T* kept = nullptr;

  bool computed() const { return mean != nullptr; }

  NormRows<T> norm(int64_t branch, int64_t first, int64_t count) const {
    const int64_t at = (branch * rows + first) * channels, vector = branch * channels;
    NormRows<T> r{};
    r.x = x + at, r.count = count, r.channels = channels, r.clamp = clamp;
    r.mean = mean + vector, r.scale = scale + vector, r.shift = shift + vector;
    r.add = add != nullptr ? add + at : nullptr;
    return r;
  }

  // Rows of a branch; if they are computed, then where they are kept, or into `memory`, [count][channels].
  const T* read(int64_t branch, int64_t first, int64_t count, T* memory) const {
    if (!computed()) return x + (branch * rows + first) * channels;
    NormRows<T> r = norm(branch, first, count);
    r.out = kept != nullptr ? kept + (branch * rows + first) * channels : memory;
    kernels<T>().normalize(r);
    return r.out;
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

// Told when rows [first, first + count) of a branch have been written, each of them once.
using RowsWritten = std::function<void(int64_t branch, int64_t first, int64_t count)>;

// The same map in memory, kept by `hold`: for a reader that would compute a row again and again.
template <typename T>
PrologueInput<T> in_memory(const PrologueInput<T>& map, int64_t branches, Tensor& hold) {
  if (!map.computed()) return map;
  hold = empty(hold, {branches, map.rows, map.channels});
  map.write(branches, mutable_data<T>(hold));
  return {data<T>(hold), map.rows, map.channels};
}

// Two sums per channel of every branch, in double. Each task has a share of its own, and shares are added in order:
// the same result for any number of threads.
template <typename T>
class ChannelSums {
 public:
  ChannelSums(int64_t branches, int64_t shares, int64_t channels)
      : shares_(shares), channels_(channels), sums_(branches * shares * 2 * channels, 0.0) {}

  // Adds what `kernel` sums over the rows of `r`.
  void add(int64_t branch, int64_t share, NormRows<T> r, void (*kernel)(const NormRows<T>&)) {
    const auto next = [&](auto*& pointer) {
      if (pointer != nullptr) pointer += kSumRows * channels_;
    };
    r.sums = share_of(branch, share), r.partial = scratch<T>(6, 2 * channels_);
    for (int64_t left = r.count; left > 0; left -= kSumRows) {
      r.count = std::min(kSumRows, left);
      kernel(r);
      next(r.x), next(r.grad), next(r.y), next(r.out), next(r.out_masked), next(r.streamed);
    }
  }

  double* share_of(int64_t branch, int64_t share) { return sums_.data() + (branch * shares_ + share) * 2 * channels_; }

  // The sums of all shares, [branch][channel] each.
  void finish(int64_t branches, T* first, T* second) {
    parallel_tasks(branches, [&](int64_t branch) {
      std::vector<double> total(2 * channels_, 0.0);
      for (int64_t share = 0; share < shares_; ++share)
        for (int64_t i = 0; i < 2 * channels_; ++i) total[i] += share_of(branch, share)[i];
      std::copy(total.begin(), total.begin() + channels_, first + branch * channels_);
      std::copy(total.begin() + channels_, total.end(), second + branch * channels_);
    });
  }

 protected:
  int64_t shares_, channels_;
  std::vector<double> sums_;
};

// Mean and variance per channel of every branch. A share sums the distances from its first row, and shares are united
// by the formula of Chan et al. (1979): nothing cancels where a mean is large.
template <typename T>
class Moments : ChannelSums<T> {
 public:
  Moments(int64_t branches, int64_t shares, int64_t channels)
      : ChannelSums<T>(branches, shares, channels),
        counts_(branches * shares, 0),
        origins_(branches * shares * channels) {}

  // A share is added once.
  void add(int64_t branch, int64_t share, const T* rows, int64_t count) {
    const int64_t at = branch * this->shares_ + share;
    T* origin = origins_.data() + at * this->channels_;
    std::copy(rows, rows + this->channels_, origin);
    counts_[at] = count;
    NormRows<T> r{};
    r.x = rows, r.shift = origin, r.count = count, r.channels = this->channels_;
    ChannelSums<T>::add(branch, share, r, kernels<T>().moments);
  }

  void finish(int64_t branches, T* mean, T* var) {
    parallel_tasks(branches, [&](int64_t branch) {
      const int64_t channels = this->channels_;
      std::vector<double> average(channels, 0.0), squares(channels, 0.0);
      double before = 0;
      for (int64_t share = 0; share < this->shares_; ++share) {
        const int64_t at = branch * this->shares_ + share;
        if (counts_[at] == 0) continue;
        const double count = double(counts_[at]), both = before + count;
        const double* sums = this->share_of(branch, share);
        for (int64_t c = 0; c < channels; ++c) {
          const double distance = sums[c] / count;
          const double apart = double(origins_[at * channels + c]) + distance - average[c];
          average[c] += apart * (count / both);
          squares[c] += sums[channels + c] - sums[c] * distance + apart * apart * (before * count / both);
        }
        before = both;
      }
      for (int64_t c = 0; c < channels; ++c) {
        mean[branch * channels + c] = T(average[c]);
        var[branch * channels + c] = T(std::max(squares[c] / std::max(before, 1.0), 0.0));  // an empty batch: 0
      }
    });
  }

 private:
  std::vector<int64_t> counts_;
  std::vector<T> origins_;
};

}  // namespace hne
