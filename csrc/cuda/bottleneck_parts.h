// Parts of the fused bottleneck kernels: copies of packed weights, biases of column pairs, clamped stores of pairs, and
// the depthwise convolution on tensor cores.
#pragma once

#include "matrix.h"
#include "op.h"

namespace hne {

// Divides by a number that the host knows, in three instructions: n / d for 0 <= n < 2^31, d > 0.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int d) : divisor_(d) {
    while ((int64_t(1) << shift_) < d) ++shift_;
    multiplier_ = uint32_t((uint64_t(1) << (31 + shift_)) / uint64_t(d) + 1);
  }
  HNE_BOTH int divide(int n) const {
#ifdef __CUDA_ARCH__
    return int(__umulhi(2 * uint32_t(n), multiplier_) >> shift_);
#else
    return int(uint32_t(uint64_t(2 * uint32_t(n)) * multiplier_ >> 32) >> shift_);
#endif
  }
  HNE_BOTH int divisor() const { return divisor_; }
  // Replaces n by n / d and returns n % d.
  HNE_BOTH int split(int& n) const {
    const int quotient = divide(n), remainder = n - quotient * divisor_;
    n = quotient;
    return remainder;
  }

 private:
  int divisor_ = 1, shift_ = 0;
  uint32_t multiplier_ = 0x80000001u;
};

// The place of a thread in its block, for one phase of a kernel. It divides unsigned numbers, since a signed division
// by a power of two takes three instructions more.
struct ThreadPlace {
  int thread = recompute(int(threadIdx.x)), warp = int(unsigned(thread) / kWarp), lane = int(unsigned(thread) % kWarp);
};

// Copies 16 bytes of values from device to shared memory: `valid` values, then zeros. `base` is any valid address.
template <typename T, bool vectors>
HNE_DEVICE void copy_vector(T* to, const T* from, int valid, const T* base) {
  constexpr int width = 16 / int(sizeof(T));
  if constexpr (vectors) {
    copy16(to, valid > 0 ? from : base, valid > 0);
  } else {
#pragma unroll
    for (int i = 0; i < width; ++i) to[i] = i < valid ? from[i] : T(0.0f);
  }
}

// Copies 16 bytes of values from from[offset], or zeros. `from` is a valid address.
template <typename T, bool vectors>
HNE_DEVICE void copy_present(T* to, const T* from, int offset, bool present) {
  if constexpr (vectors)
    copy16(to, from + (present ? offset : 0), present);
  else
    copy_vector<T, false>(to, from + offset, present ? 16 / int(sizeof(T)) : 0, from);
}

// Copies `rows` rows, of which the first `present` exist and the others become zeros, of consecutive panels of a packed
// 1x1 filter [panel][depth][16]. `from` is the first row of the first panel. Threads [first, first + step, ...) of the
// rows of panels [first_panel, + panel_step, ...): few panels are split by rows, many by panels.
template <typename T, bool vectors>
HNE_DEVICE void copy_panel_rows(T* to, int pitch, const T* from, int64_t depth, int rows, int present, int panels,
                                int first_panel, int panel_step, int first, int step) {
  constexpr unsigned width = 16 / sizeof(T), per_row = unsigned(kPanel) / width;
  to += unsigned(first) / per_row * pitch + unsigned(first) % per_row * width;
  const int64_t source_step = panel_step * depth * kPanel;
  const T* source = from + first_panel * depth * kPanel;
  if constexpr (vectors) source = recompute(source);
#pragma unroll 1
  for (int panel = first_panel; panel < panels; panel += panel_step, source += source_step) {
    T* target = to + panel * int(kPanel);
#pragma unroll 1
    for (int i = first; i < rows * int(per_row); i += step, target += step / int(per_row) * pitch)
      copy_present<T, vectors>(target, source, i * int(width), i < present * int(per_row));
  }
}
// All threads of a block share the rows of each panel: for many rows of few panels.
template <typename T, bool vectors>
HNE_DEVICE void copy_long_panels(T* to, int pitch, const T* from, int64_t depth, int rows, int present, int panels) {
  copy_panel_rows<T, vectors>(to, pitch, from, depth, rows, present, panels, 0, 1, ThreadPlace{}.thread, kThreads);
}
// Each warp copies whole panels: for few rows of many panels.
template <typename T, bool vectors>
HNE_DEVICE void copy_short_panels(T* to, int pitch, const T* from, int64_t depth, int rows, int present, int panels) {
  copy_panel_rows<T, vectors>(to, pitch, from, depth, rows, present, panels, int(threadIdx.x) / kWarp, kThreads / kWarp,
                              int(threadIdx.x) % kWarp, kWarp);
}

// Values `column` and `column + 1` of `from`, or zeros from `columns` on. With `vectors`, `columns` is even and the
// address is that of a pair.
template <bool vectors, typename T>
HNE_DEVICE void load_pair(float (&pair)[2], const T* from, int column, int columns) {
  if constexpr (vectors) {
    pair[0] = pair[1] = 0;
    if (column < columns) load<2>(pair, from + column);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) pair[i] = column + i < columns ? float(from[column + i]) : 0.0f;
  }
}

// Rounds pairs of sums, clamps them and stores each with one access.
template <typename T>
class PairClamp {
 public:
  HNE_DEVICE explicit PairClamp(const Clamp<float>& range) {
    if constexpr (sizeof(T) == 2) {
      low_ = pack_pair(range.low, range.low, T{});
      high_ = pack_pair(range.high, range.high, T{});
    } else {
      low_ = range.low;
      high_ = range.high;
    }
  }

  HNE_DEVICE void store(T* to, float first, float second) const {
    if constexpr (sizeof(T) == 2)
      *reinterpret_cast<uint32_t*>(to) = clamp_pair(pack_pair(first, second, T{}), low_, high_, T{});
    else
      *reinterpret_cast<Vector<T, 2>*>(to) = {clamp(first, {low_, high_}), clamp(second, {low_, high_})};
  }
  // Also adds zero times the rounded values to `check`, which becomes NaN if one of them is not finite before the
  // clamp.
  HNE_DEVICE void store_checked(T* to, float first, float second, uint32_t& check) const {
    if constexpr (sizeof(T) == 2) {
      const uint32_t pair = pack_pair(first, second, T{});
      check = add_zero_times_pair(pair, check, T{});
      *reinterpret_cast<uint32_t*>(to) = clamp_pair(pair, low_, high_, T{});
    } else {
      store(to, first, second);
    }
  }
  HNE_DEVICE static bool not_finite(uint32_t check) { return (check & 0x7fff7fffu) != 0; }

 private:
  std::conditional_t<sizeof(T) == 2, uint32_t, float> low_, high_;
};

// A lane's part of the mask of a diagonal 8x8 matrix, the second operand of multiply_half_fragments: row k, column k.
HNE_DEVICE uint32_t diagonal_mask(int lane) {
  const int column = lane / 4, row = lane % 4 * 2;
  return column == row ? 0x0000ffffu : column == row + 1 ? 0xffff0000u : 0u;
}
// A lane's part of the 8x8 unit matrix: a product with it adds values exactly.
template <typename T>
HNE_DEVICE uint32_t unit_matrix(int lane) {
  return pack_pair(1.0f, 1.0f, T{}) & diagonal_mask(lane);
}

// sums[j] += the 3x3 depthwise convolution of 16 pixels and channels 8 j .. 8 j + 7 in 16 bits. The filters of a tap
// are two diagonal 8x8 matrices, so the convolution is nine products of 16x8 with 8x8 matrices for each 8 channels. A
// product adds zero times the values of the 7 neighbouring channels, so all inputs must be finite. `pixel` is the
// address of the lane's values: channel lane / 16 * 8 under the first tap of pixel lane % 16; rows of the feature map
// are `row` values apart, pixels `pitch`. `filters` [tap][filter_pitch] are in shared memory; a tenth row is read, but
// not used.
template <typename T>
HNE_DEVICE void depthwise_product(float (&sums)[2][4], const T* pixel, int row, int pitch, const T* filters,
                                  int filter_pitch, int lane) {
  const uint32_t mask = diagonal_mask(lane);
  const T* const filter = filters + lane / 16 * filter_pitch + lane / 8 % 2 * 8;
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    uint32_t taps[4];  // of two taps
    load_matrices(taps, filter + 2 * i * filter_pitch);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int tap = 2 * i + j;
      if (tap == 9) break;
      uint32_t values[4];
      load_matrices(values, pixel + tap / 3 * row + tap % 3 * pitch);
      multiply_half_fragments(sums[0], values[0], values[1], taps[2 * j] & mask, T{});
      multiply_half_fragments(sums[1], values[2], values[3], taps[2 * j + 1] & mask, T{});
    }
  }
}

}  // namespace hne
