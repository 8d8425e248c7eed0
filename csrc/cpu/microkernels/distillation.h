// The hierarchical distillation loss (equations 9 and 12) of one sample and the gradient of its logits, in one pass
// while the logits are in the first cache.
#pragma once

#include <cmath>

#include "simd.h"

namespace hne::HNE_ISA {

template <typename T>
void add_scaled(T* out, const T* x, Sum<T> scale, int64_t count) {
  for_lanes<T>(count, [&](auto width, int64_t c) {
    constexpr int W = decltype(width)::value;
    store<W>(out + c, load<W>(out + c) + load<W>(x + c) * scale);
  });
}

template <typename T>
void store_scaled(T* out, const T* x, T scale, int64_t count) {
  for_lanes<T>(count, [&](auto width, int64_t c) {
    constexpr int W = decltype(width)::value;
    store<W>(out + c, load<W>(x + c) * scale);
  });
}

// exp(x) = 2^n e^r for x <= 0, with r in [-ln 2 / 2, ln 2 / 2]; relative error below 2e-7.
template <int W>
HNE_INLINE Vec<float, W> exp_nonpositive(Vec<float, W> x) {
  const Vec<float, W> lowest = splat<W>(-87.0f), zero = {};
  const Vec<float, W> v = x < lowest ? lowest : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec<float, W> shifted = v * 1.44269504089f + magic;
  const Vec<float, W> n = shifted - magic;
  const Vec<float, W> r = (v - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec<float, W> e = splat<W>(1.9875691500e-4f);
  e = e * r + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  e = e * r * r + r + 1.0f;
  Vec<int32_t, W> power;
  __builtin_memcpy(&power, &shifted, sizeof power);
  power = (power - 0x4B400000 + 127) << 23;  // subtracts the bits of magic, which leaves n
  Vec<float, W> scale;
  __builtin_memcpy(&scale, &power, sizeof scale);
  return x < lowest ? zero : e * scale;
}

template <int W>
HNE_INLINE Vec<double, W> exp_nonpositive(Vec<double, W> x) {
  double values[W];
  store<W>(values, x);
  for (int i = 0; i < W; ++i) values[i] = std::exp(values[i]);
  return load<W>(values);
}

// One sum in double per lane.
template <typename T>
struct LaneSums {
  double sums[kLanes<T>] = {};

  template <int W>
  HNE_INLINE void add(Vec<T, W> v) {
    T values[W];
    store<W>(values, v);
    for (int i = 0; i < W; ++i) sums[i] += double(values[i]);
  }
  double total() const {
    double total = 0;
    for (const double sum : sums) total += sum;
    return total;
  }
};

template <typename T>
T maximum(const T* x, int64_t count) {
  T lanes[kLanes<T>];
  for (T& value : lanes) value = -std::numeric_limits<T>::infinity();
  for_lanes<T>(count, [&](auto width, int64_t c) {
    constexpr int W = decltype(width)::value;
    const Vec<T, W> v = load<W>(x + c), m = load<W>(lanes);
    store<W>(lanes, v > m ? v : m);
  });
  T peak = lanes[0];
  for (const T value : lanes) peak = value > peak ? value : peak;
  return peak;
}

// out = softmax(x * scale), peak = max(x * scale); returns log(sum of exp(x * scale - peak)).
template <typename T>
double softmax(T* out, const T* x, T scale, int64_t count, T& peak) {
  peak = maximum(x, count) * scale;
  LaneSums<T> sums;
  for_lanes<T>(count, [&](auto width, int64_t c) {
    constexpr int W = decltype(width)::value;
    const Vec<T, W> e = exp_nonpositive<W>(load<W>(x + c) * scale - peak);
    store<W>(out + c, e);
    sums.template add<W>(e);
  });
  const double total = sums.total();
  store_scaled(out, out, T(1 / total), count);
  return std::log(total);
}

// Returns (1 - alpha) * (sum over members of their cross-entropy, eq. 9) + alpha * temperature^2 * (sum over students
// of their cross-entropy with the teacher's soft labels, eq. 12); writes the gradient of this, divided by d.batch, to
// d.grad.
template <typename T>
double distill_sample(const DistillSample<T>& d) {
  const int64_t classes = d.classes;
  T* const sum = d.scratch;
  T* const teacher = d.scratch + classes;
  T* const students = d.scratch + 2 * classes;
  for (int64_t c = 0; c < classes; ++c) sum[c] = 0;

  double independent_loss = 0, distillation_loss = 0;
  T peak;
  for (int64_t n = 0, p = 0; n < d.models; ++n) {
    const T* logits = d.logits + n * d.stride;
    T* grad = d.grad + n * d.stride;
    add_scaled(sum, logits, T(1), classes);
    if (p < d.num_students && d.students[p] == n + 1) {
      store_scaled(students + p * classes, sum, T(1) / T(n + 1), classes);
      ++p;
    }
    // Cross-entropy as log(sum) + (peak - logit): avoids the difference of large numbers.
    const double log_sum = softmax(grad, logits, T(1), classes, peak);
    independent_loss += log_sum + (double(peak) - logits[d.target]);
    grad[d.target] -= T(1);
    store_scaled(grad, grad, T((1 - d.alpha) / d.batch), classes);
  }
  if (d.num_students > 0) {
    const T inverse_temperature = T(1 / d.temperature);
    store_scaled(sum, sum, T(1) / T(d.models), classes);
    softmax(teacher, sum, inverse_temperature, classes, peak);
    T* const probability = sum;  // reuses the memory of the mean
    // Student p passes its gradient to all its members: from the largest student down, the gradients add up.
    for (int64_t p = d.num_students - 1; p >= 0; --p) {
      T* student = students + p * classes;
      const double log_sum = softmax(probability, student, inverse_temperature, classes, peak);
      LaneSums<T> cross;
      const T scale = T(d.alpha * d.temperature / (d.batch * double(d.students[p])));
      for_lanes<T>(classes, [&](auto width, int64_t c) {
        constexpr int W = decltype(width)::value;
        const Vec<T, W> label = load<W>(teacher + c);
        cross.template add<W>(label * (peak - load<W>(student + c) * inverse_temperature));
        store<W>(student + c, (load<W>(probability + c) - label) * scale);
      });
      distillation_loss += log_sum + cross.total();
      if (p + 1 < d.num_students) add_scaled(student, student + classes, T(1), classes);
      const int64_t first = p > 0 ? d.students[p - 1] : 0;
      for (int64_t n = first; n < d.students[p]; ++n) add_scaled(d.grad + n * d.stride, student, T(1), classes);
    }
  }
  return (1 - d.alpha) * independent_loss + d.alpha * d.temperature * d.temperature * distillation_loss;
}

}  // namespace hne::HNE_ISA
