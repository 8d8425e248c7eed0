// Products of few rows with the weights of each branch: 1x1 convolutions and linear layers of small batches
// (inference).
//
//   G branches, R rows, depth K, C columns, tiles of t x t   bytes moved, mostly from the L2 cache
//                                                            2 G R K C / t + G R C values
//   multiply-adds                                            G R K C
//
// The tiles of the general matrix product (gemm.h) have 128 x 64 values: too few of them for all multiprocessors, and
// strips of 32 steps of the depth, whose latencies add up. Here, a tile has 16 x 16 or 32 x 32 values, a strip 512
// bytes of each row, and the warps of a block share its depth: the 16x16 sums of each warp are added up at the end, in
// the order of the warps. At depth 256 in 16 bits, all loads of a block are in flight at once.
//
// Launched early (device.h): before the wait, a block brings its weights to the L2 cache.
#pragma once

#include "convolution.h"
#include "matrix.h"

namespace hne {

template <typename T>
struct SmallProduct {
  int branches, replicate, rows, depth, columns;
  Clamp<float> range;
  const T *x, *weight, *bias;  // [branch / replicate][row][depth], as `packed` says, [branch][column] or null
  FilterStrides strides;       // of weights that are not packed
  const T* add;                // [branch / add_replicate][row][column], joins the result before the activation, or null
  int add_replicate;
  T* out;  // [branch][row][column]

  HNE_BOTH int panels() const { return (columns + int(kPanel) - 1) / int(kPanel); }
};

// Tiles of 16 * side rows and columns. Weights are packed, or [branch][column][depth] with strides.
template <typename T, int side_, bool packed>
struct SmallTile {
  static constexpr int kSide = 16 * side_, kVector = 16 / int(sizeof(T)), kDepth = 512 / int(sizeof(T));
  static constexpr int kWarps = kThreads / kWarp, kSplits = kWarps / (side_ * side_), kShare = kDepth / kSplits;
  static constexpr int kLeftPitch = kDepth + kRowPadding<T>, kLeft = kSide * kLeftPitch;
  static constexpr int kRightPitch = packed ? kSide + kColumnPadding : kLeftPitch;
  static constexpr int kRight = (packed ? kDepth : kSide) * kRightPitch;
  static constexpr int kSumPitch = kSide + 4, kSums = kSplits * kSide * kSumPitch;
  static int64_t bytes(int depth) {
    const int64_t stages = depth > kDepth ? 2 : 1;
    return std::max(stages * (kLeft + kRight) * int64_t(sizeof(T)), kSums * int64_t(sizeof(float)));
  }
  static int64_t blocks(const SmallProduct<T>& p) {
    return p.branches * ceil_div(p.rows, kSide) * ceil_div(p.columns, kSide);
  }

  // Steps [begin, end) of rows with contiguous depth, `stride` values apart. There are `rows` of them; others, and
  // steps up to the next multiple of 16, are zero.
  static HNE_DEVICE void fill_rows(T* strip, const T* from, int rows, int64_t stride, int begin, int end) {
    constexpr int across = kDepth / kVector, together = kThreads / across;
    const int k = int(threadIdx.x % across) * kVector, first = int(threadIdx.x / across);
    if (begin + k >= (end + 15) / 16 * 16) return;
    const T* at = from + first * stride + begin + k;
#pragma unroll
    for (int row = first; row < kSide; row += together, at += together * stride) {
      const bool valid = row < rows && begin + k < end;
      copy16(strip + row * kLeftPitch + k, valid ? at : from, valid);
    }
  }
  // Steps [begin, end) of panels of packed weights. There are `panels` of them; others, and steps up to the next
  // multiple of 16, are zero.
  static HNE_DEVICE void fill_panels(T* strip, const T* from, int panels, int depth, int begin, int end) {
    constexpr int across = int(kPanel) / kVector, together = kThreads / across;
    const int column = int(threadIdx.x % across) * kVector, first = int(threadIdx.x / across);
#pragma unroll
    for (int panel = 0; panel < side_; ++panel) {
      const T* at = from + (int64_t(panel) * depth + begin + first) * kPanel + column;
#pragma unroll
      for (int step = first; step < kDepth; step += together, at += together * kPanel) {
        if (begin + step >= (end + 15) / 16 * 16) break;
        const bool valid = panel < panels && begin + step < end;
        copy16(strip + step * kRightPitch + panel * int(kPanel) + column, valid ? at : from, valid);
      }
    }
  }
  static HNE_DEVICE auto right(const T* strip, int column, int k) {
    if constexpr (packed)
      return Across<T>{strip + k * kRightPitch + column, kRightPitch};
    else
      return Rows<T>{{strip + column * kRightPitch + k, kRightPitch}};
  }
};

template <typename P, int side, int width, bool packed>
__global__ void __launch_bounds__(kThreads, 3) small_product(const SmallProduct<typename P::Type> p) {
  using T = typename P::Type;
  using Tile = SmallTile<T, side, packed>;
  constexpr int kSide = Tile::kSide, kDepth = Tile::kDepth;
  const int column_tiles = (p.columns + kSide - 1) / kSide, row_tiles = (p.rows + kSide - 1) / kSide;
  const int outer = int(blockIdx.x) / column_tiles, first_column = (int(blockIdx.x) - outer * column_tiles) * kSide;
  const int branch = outer / row_tiles, first_row = (outer - branch * row_tiles) * kSide;
  const int warp = int(threadIdx.x / kWarp), lane = int(threadIdx.x % kWarp);
  const int split = warp / (side * side), warp_row = warp / side % side * 16, warp_column = warp % side * 16;
  const T* const x = p.x + (int64_t(branch / p.replicate) * p.rows + first_row) * p.depth;
  const T* const weight = packed ? p.weight + (int64_t(branch) * p.panels() * kPanel + first_column) * p.depth
                                 : p.weight + branch * p.strides.branch + first_column * p.strides.out;
  const int weight_rows = min(kSide, (packed ? p.panels() * int(kPanel) : p.columns) - first_column);

  // The weights of a tile are one piece of memory, but for those of a slice of more channels, which are left.
  const int64_t weight_values = packed || p.strides.out == p.depth ? int64_t(weight_rows) * p.depth : 0;
  constexpr int line = 128 / int(sizeof(T));
#pragma unroll 1
  for (int64_t at = int64_t(threadIdx.x) * line; at < weight_values; at += kThreads * line) prefetch(weight + at);
  wait_for_previous_kernel();
  launch_next_kernel();

  T* const memory = static_cast<T*>(shared_memory());
  const auto fill = [&](int step) {
    T* const strip = memory + step % 2 * (Tile::kLeft + Tile::kRight);
    const int begin = step * kDepth, end = min(p.depth, begin + kDepth);
    Tile::fill_rows(strip, x, p.rows - first_row, p.depth, begin, end);
    if constexpr (packed)
      Tile::fill_panels(strip + Tile::kLeft, weight, p.panels() - first_column / int(kPanel), p.depth, begin, end);
    else
      Tile::fill_rows(strip + Tile::kLeft, weight, p.columns - first_column, p.strides.out, begin, end);
  };
  // A thread's values of the result; its bias is on the way during the product.
  constexpr int across = kSide / width, kResults = kSide * across;
  static_assert(kThreads % across == 0, "a thread's results lie in the same columns");
  const int column = int(threadIdx.x % across) * width;
  const bool inside = first_column + column < p.columns;
  float bias[width] = {};
  if (p.bias != nullptr && inside) load<width>(bias, p.bias + int64_t(branch) * p.columns + first_column + column);

  // Strip `step` is loaded while the one before is multiplied.
  float sums[1][2][4] = {};
  const int steps = (p.depth + kDepth - 1) / kDepth;
  for (int step = 0; step <= steps; ++step) {
    if (step < steps) fill(step);
    copy_commit();
    if (step == 0) continue;
    copy_wait<1>();
    block_sync();
    const T* const strip = memory + (step - 1) % 2 * (Tile::kLeft + Tile::kRight);
    const int k = split * Tile::kShare, end = (min(p.depth - (step - 1) * kDepth, kDepth) + 15) / 16 * 16;
    multiply<P, 1, 2>(sums, Rows<T>{{strip + warp_row * Tile::kLeftPitch + k, Tile::kLeftPitch}},
                      Tile::right(strip + Tile::kLeft, warp_column, k), min(end - k, Tile::kShare));
    block_sync();
  }

  float* const staged = static_cast<float*>(shared_memory());
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      staged[(split * kSide + warp_row + sum_row(lane, e)) * Tile::kSumPitch + warp_column + 8 * j +
             sum_column(lane, e)] = sums[0][j][e];
  block_sync();
  if (!inside) return;
#pragma unroll
  for (int at = int(threadIdx.x); at < kResults; at += kThreads) {
    const int row = at / across;
    if (first_row + row >= p.rows) return;
    float values[width] = {};
#pragma unroll
    for (int from = 0; from < Tile::kSplits; ++from)
#pragma unroll
      for (int i = 0; i < width; ++i) values[i] += staged[(from * kSide + row) * Tile::kSumPitch + column + i];
    const int64_t place = int64_t(first_row + row) * p.columns + first_column + column;
    const int64_t plane = int64_t(p.rows) * p.columns;
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] += bias[i];
    if (p.add != nullptr) {
      float add[width];
      load<width>(add, p.add + branch / p.add_replicate * plane + place);
#pragma unroll
      for (int i = 0; i < width; ++i) values[i] += add[i];
    }
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = clamp(values[i], p.range);
    store<width>(p.out + branch * plane + place, values);
  }
}

template <typename P, bool packed>
bool run_small_product(const Device& device, const SmallProduct<typename P::Type>& p) {
  using T = typename P::Type;
  const auto run = [&](auto side, auto width) {
    using Tile = SmallTile<T, decltype(side)::value, packed>;
    device.launch_early(small_product<P, decltype(side)::value, decltype(width)::value, packed>, Tile::blocks(p),
                        kThreads, Tile::bytes(p.depth), p);
  };
  const auto run_side = [&](auto side) {
    if (whole_vectors<T>({p.columns}, {p.bias, p.add, p.out}))
      run(side, std::integral_constant<int, 16 / int(sizeof(T))>{});
    else
      run(side, std::integral_constant<int, 2>{});
  };
  if (p.rows > 16 && SmallTile<T, 2, packed>::blocks(p) >= kManyBlocks)
    run_side(std::integral_constant<int, 2>{});
  else
    run_side(std::integral_constant<int, 1>{});
  return true;
}

// Runs a 1x1 convolution without normalisation by the kernel above, where that is predicted to be faster than the
// general matrix product. `d` has packed weights, or [branch][out][in].
template <typename T, bool packed>
bool run_small_product(const Device& device, const Convolution<T>& d, const T* add = nullptr, int add_replicate = 1) {
  const Shape& s = d.s;
  const auto pairs = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % (2 * sizeof(T)) == 0; };
  if (!s.pointwise() || !whole_vectors<T>({s.in_channels, d.strides.branch, d.strides.out}, {d.x, d.filters}) ||
      s.out_channels % 2 != 0 || !pairs(d.bias) || !pairs(add) || !pairs(d.out))
    return false;
  // Large tiles read less, where there are enough of them; but the general product loads single values if the outputs
  // do not fill vectors.
  const int64_t large = s.branches * ceil_div(s.rows(), 128) * ceil_div(s.out_channels, 64);
  if (s.rows() > 32 && large >= kManyBlocks && d.vectors() && aligned(add)) return false;
  const SmallProduct<T> p{.branches = s.branches,
                          .replicate = s.replicate,
                          .rows = s.rows(),
                          .depth = s.in_channels,
                          .columns = s.out_channels,
                          .range = d.range,
                          .x = d.x,
                          .weight = d.filters,
                          .bias = d.bias,
                          .strides = d.strides,
                          .add = add,
                          .add_replicate = add_replicate,
                          .out = d.out};
  if constexpr (sizeof(T) == 4) {
    if (allow_tf32()) return run_small_product<Precision<T, true>, packed>(device, p);
  }
  return run_small_product<Precision<T>, packed>(device, p);
}

}  // namespace hne
