// A matrix product whose operands are gathered from tensors: the core of every convolution.
//
// A block computes a tile of 128 x 64 values. Strips of both operands go through three stages of shared memory with
// cp.async, two of them on their way while the tensor cores work on the third. What the product means is said by a
// `Problem`, passed by value to the kernel:
//
//   Type, Out                      of the operands and of the result
//   kLeftAcross, kRightAcross      consecutive in memory are the rows of the left operand (the columns of the right
//                                  one), not the depth
//   left_base, right_base          an address in each operand, for copies of nothing
//   blocks(), tile(block)          the work of a block: a Tile, or a struct derived from it
//   left(tile, row, k)             where a value lies; null is zero. The same for right(tile, column, k).
//   finish(tile, row, column, v)   takes finished values: `width` consecutive columns
#pragma once

#include "matrix.h"
#include "op.h"

namespace hne {

constexpr int kTileRows = 128, kTileColumns = 64, kStages = 3;

struct Tile {
  int64_t row, column;    // the first of them
  int64_t rows, columns;  // of the whole product
  int64_t begin, end;     // of the depth
};

// One operand's strip in shared memory: `rows` of the product times kDepth.
template <typename T, int rows, bool across>
struct Strip {
  static constexpr int kVector = 16 / int(sizeof(T));
  static constexpr int kDepth = 64 / int(sizeof(T));
  static constexpr int kPitch = across ? rows + kColumnPadding : kDepth + kRowPadding<T>;
  static constexpr int kSize = across ? kDepth * kPitch : rows * kPitch;

  // source(row, k) points to 16 bytes, or to one value if not `vectors`.
  template <bool vectors, typename Source>
  static HNE_DEVICE void fill(T* strip, const T* base, int64_t depth_end, int64_t k, const Source& source) {
    constexpr int inner = (across ? rows : kDepth) / kVector;
    for (int at = int(threadIdx.x); at < rows * kDepth / kVector; at += kThreads) {
      const int outer_index = at / inner, inner_index = at % inner * kVector;
      const int row = across ? inner_index : outer_index, depth = across ? outer_index : inner_index;
      T* to = strip + outer_index * kPitch + inner_index;
      if constexpr (vectors) {
        const T* from = k + depth < depth_end ? source(row, k + depth) : nullptr;
        copy16(to, from != nullptr ? from : base, from != nullptr);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const int64_t at_depth = k + depth + (across ? 0 : i);
          const T* from = at_depth < depth_end ? source(row + (across ? i : 0), at_depth) : nullptr;
          to[i] = from != nullptr ? *from : T(0.0f);
        }
      }
    }
  }

  static HNE_DEVICE auto operand(const T* strip, int first_row) {
    if constexpr (across)
      return Across<T>{strip + first_row, kPitch};
    else
      return Rows<T>{{strip + first_row * kPitch, kPitch}};
  }
};

template <typename Problem>
struct GemmMemory {
  using T = typename Problem::Type;
  using Left = Strip<T, kTileRows, Problem::kLeftAcross>;
  using Right = Strip<T, kTileColumns, Problem::kRightAcross>;
  static constexpr int kStage = Left::kSize + Right::kSize;
  static constexpr int kSumPitch = kTileColumns + 4;
  static constexpr int kBytes = std::max(kStages * kStage * int(sizeof(T)), kTileRows * kSumPitch * int(sizeof(float)));
};

template <typename P, typename Problem, bool vectors>
__global__ void __launch_bounds__(kThreads, 2) gemm(const Problem problem) {
  using T = typename P::Type;
  using Memory = GemmMemory<Problem>;
  using Left = typename Memory::Left;
  using Right = typename Memory::Right;
  constexpr int MT = 2, NT = 4;  // fragments of a warp's 32 x 32 values
  constexpr int depth = Left::kDepth;
  T* const memory = static_cast<T*>(shared_memory());
  const auto tile = problem.tile(int(blockIdx.x));
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
  const bool works = tile.row + warp_row < tile.rows && tile.column + warp_column < tile.columns;

  const auto fill = [&](int stage, int64_t k) {
    T* strip = memory + stage * Memory::kStage;
    Left::template fill<vectors>(strip, problem.left_base, tile.end, k,
                                 [&](int row, int64_t at) { return problem.left(tile, tile.row + row, at); });
    Right::template fill<vectors>(strip + Left::kSize, problem.right_base, tile.end, k,
                                  [&](int row, int64_t at) { return problem.right(tile, tile.column + row, at); });
  };

  float sums[MT][NT][4] = {};
  const int64_t steps = (tile.end - tile.begin + depth - 1) / depth;
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) fill(stage, tile.begin + stage * depth);
    copy_commit();
  }
  for (int64_t step = 0; step < steps; ++step) {
    copy_wait<kStages - 2>();
    block_sync();
    const int64_t ahead = step + kStages - 1;
    if (ahead < steps) fill(int(ahead % kStages), tile.begin + ahead * depth);
    copy_commit();
    if (works) {
      const T* strip = memory + int(step % kStages) * Memory::kStage;
      multiply<P, MT, NT>(sums, Left::operand(strip, warp_row), Right::operand(strip + Left::kSize, warp_column),
                          depth);
    }
  }
  copy_wait<0>();
  block_sync();

  // Through shared memory, so that whole rows are written.
  float* const staged = static_cast<float*>(shared_memory());
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        staged[(warp_row + 16 * i + sum_row(lane, e)) * Memory::kSumPitch + warp_column + 8 * j + sum_column(lane, e)] =
            sums[i][j][e];
  block_sync();
  constexpr int width = vectors ? 16 / int(sizeof(typename Problem::Out)) : 1;
  constexpr int per_row = kTileColumns / width;
  for (int at = int(threadIdx.x); at < kTileRows * per_row; at += kThreads) {
    const int row = at / per_row, column = at % per_row * width;
    if (tile.row + row >= tile.rows || tile.column + column >= tile.columns) continue;
    float values[width];
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = staged[row * Memory::kSumPitch + column + i];
    problem.finish(tile, tile.row + row, tile.column + column, values);
  }
}

template <typename P, bool vectors, typename Problem>
void run_gemm(const Device& device, const Problem& problem) {
  device.launch(gemm<P, Problem, vectors>, problem.blocks(), kThreads, GemmMemory<Problem>::kBytes, problem);
}

// `vectors`: every run of 16 bytes of an operand or of the result begins at a multiple of 16 bytes.
template <typename T, typename Problem>
void run_gemm(const Device& device, const Problem& problem, bool vectors) {
  const auto run = [&](auto precision) {
    if (vectors)
      run_gemm<decltype(precision), true>(device, problem);
    else
      run_gemm<decltype(precision), false>(device, problem);
  };
  if constexpr (sizeof(T) == 4) {
    if (allow_tf32()) return run(Precision<T, true>{});
  }
  run(Precision<T>{});
}

}  // namespace hne
