// A matrix product whose operands are gathered from tensors: the core of every dense convolution.
//
// A block computes a tile of 128 x 64 values. Strips of both operands pass through three stages of shared memory with
// cp.async: two strips are in flight while the tensor cores work on the third. A `Problem`, passed by value to the
// kernel, defines the product. To multiply R rows with C columns over a depth of K,
//
//   bytes moved, mostly from the L2 cache              multiply-adds
//   R K ceil(C / 64) + C K ceil(R / 128) + R C values  R C K
//
// A problem derives from GemmProblem, which has defaults for the members marked with *:
//
//   vectors()                      whether the rows of operands and result split into aligned vectors of 16 bytes
//   blocks(), tile(block)          the work of a block: a Tile, or a struct derived from it
//   left(tile, row, k)             address of a value of the left operand; null stands for zero
//   left_base()                    any address in the left operand, for copies of no bytes
//   left_companion() *             a second tensor of the same layout, or null
//   transforms_left() *            whether the operand is computed from the loaded values by
//   transform_left(tile, row, k, v, c) *   which changes consecutive values v; c are the companion's
//   right(tile, column, k), right_base(), transforms_right() *, transform_right(tile, column, k, v) *   likewise
//   finish(tile, row, column, v, sums)     stores `width` finished values, consecutive columns
//   Sums<width> *                          sums of a thread over its finished values, for statistics
//   reduce(tile, sums, scratch, across) *  combines the sums of all threads (channel_sums.h)
#pragma once

#include "channel_sums.h"
#include "matrix.h"

namespace hne {

constexpr int kTileRows = 128, kTileColumns = 64, kStages = 3;

struct Tile {
  int64_t row, column;    // its first row and column
  int64_t rows, columns;  // of the whole product
  int64_t begin, end;     // of the depth
};

// Element types and layouts of a problem, and the defaults of its members. An operand lies `across` if consecutive
// values in memory are rows of the left operand (columns of the right one) instead of steps of the depth.
template <typename T, typename Out_, bool left_across, bool right_across>
struct GemmProblem {
  using Type = T;
  using Out = Out_;
  static constexpr bool kLeftAcross = left_across, kRightAcross = right_across;
  template <int width>
  struct Sums {};

  HNE_BOTH const T* left_companion() const { return nullptr; }
  HNE_DEVICE bool transforms_left() const { return false; }
  HNE_DEVICE bool transforms_right() const { return false; }
  template <int width>
  HNE_DEVICE void transform_left(const Tile&, int64_t, int64_t, float (&)[width], const float (&)[width]) const {}
  template <int width>
  HNE_DEVICE void transform_right(const Tile&, int64_t, int64_t, float (&)[width]) const {}
  template <typename S>
  HNE_DEVICE void reduce(const Tile&, const S&, float*, int) const {}
};

// Source of an operand's strips; `row` counts from the first row of the tile.
template <typename T, typename At, typename Transform>
struct Source {
  const T *base, *companion;
  bool transforms;
  At at;                // (row, k): the address, or null
  Transform transform;  // (row, k, values, values of the companion)
};
template <typename T, typename At, typename Transform>
Source(const T*, const T*, bool, At, Transform) -> Source<T, At, Transform>;

// A strip of one operand in shared memory: `rows` of the product times kDepth.
template <typename T, int rows, bool across>
struct Strip {
  static constexpr int kVector = 16 / int(sizeof(T));
  static constexpr int kDepth = 64 / int(sizeof(T));
  static constexpr int kPitch = across ? rows + kColumnPadding : kDepth + kRowPadding<T>;
  static constexpr int kSize = across ? kDepth * kPitch : rows * kPitch;

  // Calls f(row, depth, place in the strip) for the thread's vectors of 16 bytes.
  template <typename F>
  static HNE_DEVICE void each(const F& f) {
    constexpr int inner = (across ? rows : kDepth) / kVector;
    for (int at = int(threadIdx.x); at < rows * kDepth / kVector; at += kThreads) {
      const int outer_index = at / inner, inner_index = at % inner * kVector;
      f(across ? inner_index : outer_index, across ? outer_index : inner_index, outer_index * kPitch + inner_index);
    }
  }

  // With `vectors`, starts copies of 16 bytes, the companion's too; else the finished operand is there after a barrier.
  template <bool vectors, typename From>
  static HNE_DEVICE void fill(T* strip, T* companion, const From& source, int64_t depth_end, int64_t k) {
    each([&](int row, int depth, int place) {
      if constexpr (vectors) {
        const T* from = k + depth < depth_end ? source.at(row, k + depth) : nullptr;
        copy16(strip + place, from != nullptr ? from : source.base, from != nullptr);
        if (source.companion != nullptr)
          copy16(companion + place, from != nullptr ? source.companion + (from - source.base) : source.base,
                 from != nullptr);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const int at_row = row + (across ? i : 0);
          const int64_t at_depth = k + depth + (across ? 0 : i);
          const T* from = at_depth < depth_end ? source.at(at_row, at_depth) : nullptr;
          float value[1] = {}, other[1] = {};
          if (from != nullptr) {
            value[0] = float(*from);
            if (source.companion != nullptr) other[0] = float(source.companion[from - source.base]);
            if (source.transforms) source.transform(at_row, at_depth, value, other);
          }
          strip[place + i] = T(value[0]);
        }
      }
    });
  }

  // Transforms the values that the thread's own copies have brought; padding stays zero.
  template <typename From>
  static HNE_DEVICE void transform(T* strip, const T* companion, const From& source, int64_t depth_end, int64_t k) {
    each([&](int row, int depth, int place) {
      if (k + depth >= depth_end || source.at(row, k + depth) == nullptr) return;
      float values[kVector], others[kVector] = {};
      load<kVector>(values, strip + place);
      if (source.companion != nullptr) load<kVector>(others, companion + place);
      source.transform(row, k + depth, values, others);
      store<kVector>(strip + place, values);
    });
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
  static constexpr int kSumPitch = kTileColumns + 4;
  static constexpr int kSums = kTileRows * kSumPitch;  // values; then scratch for sums over rows
  static constexpr int kScratch = kThreads * (16 / int(sizeof(typename Problem::Out)));

  // Values of a stage: a strip of each operand, and one of the left operand's companion.
  HNE_BOTH static int stage(bool companion) { return (companion ? 2 : 1) * Left::kSize + Right::kSize; }
  static int64_t bytes(bool companion) {
    return std::max<int64_t>(kStages * stage(companion) * int64_t(sizeof(T)),
                             (kSums + kScratch) * int64_t(sizeof(float)));
  }
  static_assert(kStages * (2 * Left::kSize + Right::kSize) * int(sizeof(T)) <= kLeastShared);
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

  const Source left{problem.left_base(), problem.left_companion(), problem.transforms_left(),
                    [&](int row, int64_t k) { return problem.left(tile, tile.row + row, k); },
                    [&](int row, int64_t k, auto& values, const auto& others) {
                      problem.transform_left(tile, tile.row + row, k, values, others);
                    }};
  const Source right{problem.right_base(), static_cast<const T*>(nullptr), problem.transforms_right(),
                     [&](int row, int64_t k) { return problem.right(tile, tile.column + row, k); },
                     [&](int row, int64_t k, auto& values, const auto&) {
                       problem.transform_right(tile, tile.column + row, k, values);
                     }};
  const int stage_size = Memory::stage(left.companion != nullptr);
  const auto fill = [&](int64_t step) {
    T* strip = memory + int(step % kStages) * stage_size;
    const int64_t k = tile.begin + step * depth;
    Left::template fill<vectors>(strip, strip + Left::kSize + Right::kSize, left, tile.end, k);
    Right::template fill<vectors>(strip + Left::kSize, static_cast<T*>(nullptr), right, tile.end, k);
  };

  float sums[MT][NT][4] = {};
  const int64_t steps = (tile.end - tile.begin + depth - 1) / depth;
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) fill(stage);
    copy_commit();
  }
  for (int64_t step = 0; step < steps; ++step) {
    T* const strip = memory + int(step % kStages) * stage_size;
    copy_wait<kStages - 2>();
    if constexpr (vectors) {  // before the barrier, a thread sees only its own copies
      const int64_t k = tile.begin + step * depth;
      if (left.transforms) Left::transform(strip, strip + Left::kSize + Right::kSize, left, tile.end, k);
      if (right.transforms) Right::transform(strip + Left::kSize, static_cast<const T*>(nullptr), right, tile.end, k);
    }
    block_sync();
    if (step + kStages - 1 < steps) fill(step + kStages - 1);
    copy_commit();
    if (works)
      multiply<P, MT, NT>(sums, Left::operand(strip, warp_row), Right::operand(strip + Left::kSize, warp_column),
                          depth);
  }
  copy_wait<0>();
  block_sync();

  // The result goes through shared memory, so that a warp stores whole rows.
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
  constexpr int across = kTileColumns / width;
  const int column = int(threadIdx.x) % across * width;
  typename Problem::template Sums<width> row_sums;
  for (int row = int(threadIdx.x) / across; row < kTileRows; row += kThreads / across) {
    if (tile.row + row >= tile.rows || tile.column + column >= tile.columns) break;
    float values[width];
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = staged[row * Memory::kSumPitch + column + i];
    problem.finish(tile, tile.row + row, tile.column + column, values, row_sums);
  }
  problem.reduce(tile, row_sums, staged + Memory::kSums, across);
}

template <typename P, bool vectors, typename Problem>
void run_gemm(const Device& device, const Problem& problem) {
  device.launch(gemm<P, Problem, vectors>, problem.blocks(), kThreads,
                GemmMemory<Problem>::bytes(problem.left_companion() != nullptr), problem);
}

template <typename T, typename Problem>
void run_gemm(const Device& device, const Problem& problem) {
  const auto run = [&](auto precision) {
    if (problem.vectors())
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
