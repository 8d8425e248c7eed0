// A matrix product whose operands are gathered from tensors: the core of every dense convolution.
//
// A block computes a tile of 128 x 64 values, or of 128 x 128 where more than 64 columns leave enough tiles for all
// multiprocessors: the left operand is copied and transformed once for every column of tiles. Strips of both operands
// pass through three stages of shared memory with cp.async: two strips are in flight while the tensor cores work on the
// third. A `Problem`, passed by value to the kernel, defines the product. To multiply R rows with C columns over a
// depth of K,
//
//   bytes moved, mostly from the L2 cache              multiply-adds
//   R K ceil(C / W) + C K ceil(R / 128) + R C values   R C K, W columns a tile
//
// A thread copies parts of the same rows and columns in every step. An operand therefore describes a row once a tile
// and a step of the depth once a strip; an address takes a few instructions from both.
//
// Order of accesses: a thread waits for its own copies of a strip and transforms the values that they brought; after
// the barrier all threads read the strip. A companion's values are read by the thread that copied them. The copies that
// are started after that barrier go to the stage that the previous step read, and every thread had finished that step
// when it came to the barrier. cp.async of 16 bytes accesses memory like other loads and stores do, so there is no
// other proxy to fence.
//
// A problem has, with defaults in GemmProblem for those marked with *:
//
//   columns, tile_columns, column_tiles *       columns of the product and of a tile, and tiles side by side
//   vectors()                      whether the rows of operands and result split into aligned vectors of 16 bytes
//   blocks(), tile(block)          the work of a block: a Tile, or a struct derived from it
//   Left(problem, tile), Right(problem, tile)   the operands
//   kCompanion, has_companion() *  whether the left operand can have a companion, and whether it has one
//   finish(tile, row, column, v, sums)     stores `width` finished values, consecutive columns
//   Sums<width> *                          sums of a thread over its finished values, for statistics
//   reduce(tile, sums, scratch, across) *  combines the sums of all threads (channel_sums.h)
//
// An operand has, with defaults in GemmOperand for those marked with *:
//
//   kAcross                 whether consecutive values in memory are rows (of the right operand: columns) of the
//                           product; otherwise they are steps of the depth
//   base()                  any address in the operand, for copies of no bytes
//   companion() *           a second tensor of the same layout, or null
//   Row row(r)              description of row (column) r of the product
//   Depth depth(k)          description of step k of the depth
//   at(row, depth)          address of a value; null stands for zero
//   transforms() *          whether the operand is computed from the loaded values
//   parameters<width>(row, depth, i) *   of that computation, for values from the i-th after (row, depth) on; the same
//                           for all steps with kAcross, else for all rows
//   transform(parameters, v, c) *     computes consecutive values of the operand in place; c are the companion's
//
// Rows and columns beyond the product are neither copied nor stored: they only reach results of their own. The depth is
// padded with zeros.
#pragma once

#include "channel_sums.h"
#include "matrix.h"
#include "shape.h"

namespace hne {

constexpr int kTileRows = 128, kTileColumns = 64, kWideTileColumns = 128, kStages = 3;

struct Tile {
  int row, column;    // its first row and column
  int rows, columns;  // of the whole product
  int begin, end;     // of the depth
};

// Element types of a problem, and the defaults of its members.
template <typename T, typename Out_>
struct GemmProblem {
  using Type = T;
  using Out = Out_;
  template <int width>
  struct Sums {};

  int columns;
  int tile_columns, column_tiles;
  Divider by_column_tiles;

  explicit GemmProblem(int columns_) : columns(columns_) { divide(kTileColumns); }
  void divide(int columns_of_tile) {
    tile_columns = columns_of_tile, column_tiles = int(ceil_div(columns, columns_of_tile));
    by_column_tiles = Divider(column_tiles);
  }

  static constexpr bool kCompanion = false;
  HNE_BOTH bool has_companion() const { return false; }
  template <typename S, typename Work>
  HNE_DEVICE void reduce(const Work&, const S&, float*, int) const {}
};

template <typename T, bool across>
struct GemmOperand {
  using Type = T;
  static constexpr bool kAcross = across;

  HNE_DEVICE const T* companion() const { return nullptr; }
  HNE_DEVICE bool transforms() const { return false; }
  template <int width, typename Row, typename Depth>
  HNE_DEVICE int parameters(const Row&, const Depth&, int) const {
    return 0;
  }
  template <int width>
  HNE_DEVICE void transform(int, float (&)[width], const float (&)[width]) const {}
};

// A strip of one operand in shared memory: `rows` of the product times kDepth. The object has the thread's part of
// every strip. `halves`: it transforms halves of 16 bytes, where registers are short.
template <typename Operand, int rows, bool halves>
struct Strip {
  using T = typename Operand::Type;
  static constexpr bool kAcross = Operand::kAcross;
  static constexpr int kVector = 16 / int(sizeof(T));
  static constexpr int kDepth = 64 / int(sizeof(T));
  static constexpr int kPitch = kAcross ? rows + kColumnPadding : kDepth + kRowPadding<T>;
  static constexpr int kSize = kAcross ? kDepth * kPitch : rows * kPitch;
  static constexpr int kVectors = rows * kDepth / kVector / kThreads;  // of a thread, at most
  static_assert(kVectors * kVector * kThreads == rows * kDepth);
  static constexpr int kCompanionSize = rows * kDepth;

  const Operand& operand;
  int existing;            // rows of the product
  int inner, outer, step;  // the thread's vectors begin at value `inner` of lines outer, outer + step, ...
  int lines;               // lines to fill; a line is a row, or a step of the depth if kAcross
  typename Operand::Row described[kAcross ? 1 : kVectors] = {};

  // `first` is the tile's first row of `count` ones of the product.
  HNE_DEVICE Strip(const Operand& operand_, int first, int count, bool vectors)
      : operand(operand_), existing(min(count - first, rows)) {
    int across = (kAcross ? rows : kDepth) / kVector;  // threads along a line, a power of two
    if constexpr (kAcross) {
      while (across > 1 && across / 2 * kVector >= existing) across /= 2;
    }
    outer = int(threadIdx.x) / across, inner = (int(threadIdx.x) - outer * across) * kVector;
    step = kThreads / across;
    lines = kAcross ? (inner < existing ? kDepth : 0) : existing;
    if (!vectors) return;
    if constexpr (kAcross) {
      if (inner < existing) described[0] = operand.row(first + inner);
    } else {
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        if (outer + i * step < existing) described[i] = operand.row(first + outer + i * step);
    }
  }

  // Calls f(i, line, depth) for the thread's vectors.
  template <typename F>
  HNE_DEVICE void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int line = outer + i * step;
      if (line < lines) f(i, line, kAcross ? line : inner);
    }
  }

  HNE_DEVICE const typename Operand::Row& row(int i) const { return described[kAcross ? 0 : i]; }

  // Vector i of the thread: only the thread itself reads it.
  static HNE_DEVICE int companion_at(int i) { return (i * kThreads + int(threadIdx.x)) * kVector; }

  // Starts copies of 16 bytes, the companion's too. Bit i of the result says whether vector i is not padding.
  HNE_DEVICE unsigned copy(T* strip, T* companion, int end, int k) const {
    unsigned copied = 0;
    const auto to_companion =
        reinterpret_cast<uintptr_t>(operand.companion()) - reinterpret_cast<uintptr_t>(operand.base());
    each([&](int i, int line, int depth) {
      const T* from = k + depth < end ? operand.at(row(i), operand.depth(k + depth)) : nullptr;
      const bool valid = from != nullptr;
      if (valid)
        copied |= 1u << i;
      else
        from = operand.base();
      copy16(strip + line * kPitch + inner, from, valid);
      if (operand.companion() != nullptr)
        copy16(companion + companion_at(i),
               reinterpret_cast<const T*>(reinterpret_cast<uintptr_t>(from) + to_companion), valid);
    });
    return copied;
  }

  // Transforms the vectors that the thread has copied; padding stays zero.
  HNE_DEVICE void transform(T* strip, const T* companion, unsigned copied, int k) const {
    if (copied % (1u << kVectors) == 0) return;
    // Half of the parameters at a time need fewer registers. Eight threads begin with their first halves while eight
    // others begin with the second ones: 16 different pairs of banks.
    constexpr int part = halves ? kPiece<float, kVector> : kVector, parts = kVector / part;
    static_assert(parts <= 2);
    const int begin = parts == 2 ? int(threadIdx.x) / 8 % 2 * part : 0;
    const auto place = operand.depth(k + (kAcross ? outer : inner));
#pragma unroll
    for (int p = 0; p < parts; ++p) {
      const int at = p * part ^ begin;
      const auto parameters = operand.template parameters<part>(described[0], place, at);
      each([&](int i, int line, int) {
        if ((copied >> i & 1) == 0) return;
        T* const values_at = strip + line * kPitch + inner + at;
        float values[part], others[part] = {};
        load<part>(values, values_at);
        if (operand.companion() != nullptr) load<part>(others, companion + companion_at(i) + at);
        operand.transform(parameters, values, others);
        store<part>(values_at, values);
      });
    }
  }

  // Without vectors: the finished operand, value by value. It is there after a barrier.
  HNE_DEVICE void fill(T* strip, int first, int end, int k) const {
    each([&](int, int line, int depth) {
      for (int i = 0; i < kVector; ++i) {
        const int at_row = kAcross ? inner + i : line, at_depth = k + depth + (kAcross ? 0 : i);
        float value[1] = {}, other[1] = {};
        if (at_row < existing && at_depth < end) {
          const auto row = operand.row(first + at_row);
          const auto place = operand.depth(at_depth);
          const T* const from = operand.at(row, place);
          if (from != nullptr) {
            value[0] = float(*from);
            if (operand.companion() != nullptr) other[0] = float(operand.companion()[from - operand.base()]);
            if (operand.transforms()) operand.transform(operand.template parameters<1>(row, place, 0), value, other);
          }
        }
        strip[line * kPitch + inner + i] = T(value[0]);
      }
    });
  }

  static HNE_DEVICE auto rows_from(const T* strip, int first_row) {
    if constexpr (kAcross)
      return Across<T>{strip + first_row, kPitch};
    else
      return Rows<T>{{strip + first_row * kPitch, kPitch}};
  }
};

template <typename Problem, int columns>
struct GemmMemory {
  using T = typename Problem::Type;
  // Both operands across: both may be transformed.
  static constexpr bool kHalves = columns > kTileColumns&& Problem::Left::kAcross&& Problem::Right::kAcross;
  using Left = Strip<typename Problem::Left, kTileRows, kHalves>;
  using Right = Strip<typename Problem::Right, columns, kHalves>;
  static constexpr int kSumPitch = columns + 8;        // pairs of values of a warp lie in different banks
  static constexpr int kSums = kTileRows * kSumPitch;  // values; then scratch for sums over rows
  static constexpr int kScratch = kThreads * (16 / int(sizeof(typename Problem::Out)));

  // Values of a stage: a strip of each operand, and one of the left operand's companion.
  HNE_BOTH static constexpr int stage(bool companion) {
    return Left::kSize + Right::kSize + (companion ? Left::kCompanionSize : 0);
  }
  static int64_t bytes(bool companion) {
    return std::max<int64_t>(kStages * stage(companion) * int64_t(sizeof(T)),
                             (kSums + kScratch) * int64_t(sizeof(float)));
  }
  // Two blocks a multiprocessor.
  static_assert(kStages * stage(Problem::kCompanion) * int(sizeof(T)) <= kLeastShared / 2 - 1024);
  static_assert((kSums + kScratch) * int(sizeof(float)) <= kLeastShared / 2 - 1024);
};

template <typename P, typename Problem, bool vectors, int columns>
__global__ void __launch_bounds__(kThreads, 2) gemm(const Problem problem) {
  using T = typename P::Type;
  using Memory = GemmMemory<Problem, columns>;
  using Left = typename Memory::Left;
  using Right = typename Memory::Right;
  constexpr int MT = 2, NT = columns / 16;  // fragments of a warp's 32 x columns / 2 values
  constexpr int depth = Left::kDepth;
  T* const memory = static_cast<T*>(shared_memory());
  const auto tile = problem.tile(int(blockIdx.x));
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  // The four warps of half the tile, of its rows or its columns, have different schedulers (warp % 4): the other half
  // may not exist.
  const int half = warp / 4, warp_row = (warp ^ 2 * half) % 4 * 32, warp_column = half * columns / 2;
  const bool works = tile.row + warp_row < tile.rows && tile.column + warp_column < tile.columns;

  const typename Problem::Left left_operand(problem, tile);
  const typename Problem::Right right_operand(problem, tile);
  const Left left(left_operand, tile.row, tile.rows, vectors);
  const Right right(right_operand, tile.column, tile.columns, vectors);
  const int stage_size = Memory::stage(problem.has_companion());
  const int begin = tile.begin, end = tile.end;
  const int steps = (end - begin + depth - 1) / depth;
  // Vectors that are not padding, of the last strips: the newest in the lowest bits.
  unsigned left_copied = 0, right_copied = 0;
  const auto fill = [&](int step) {
    if constexpr (vectors) left_copied <<= Left::kVectors, right_copied <<= Right::kVectors;
    if (step >= steps) return;
    T* const strip = memory + step % kStages * stage_size;
    const int k = begin + step * depth;
    if constexpr (vectors) {
      left_copied |= left.copy(strip, strip + Left::kSize + Right::kSize, end, k);
      right_copied |= right.copy(strip + Left::kSize, nullptr, end, k);
    } else {
      left.fill(strip, tile.row, end, k);
      right.fill(strip + Left::kSize, tile.column, end, k);
    }
  };

  wait_for_previous_kernel();
  launch_next_kernel();
  float sums[MT][NT][4] = {};
  for (int stage = 0; stage < kStages - 1; ++stage) {
    fill(stage);
    copy_commit();
  }
  for (int step = 0; step < steps; ++step) {
    T* const strip = memory + step % kStages * stage_size;
    copy_wait<kStages - 2>();
    if constexpr (vectors) {  // before the barrier, a thread sees only its own copies
      const int k = begin + step * depth;
      if (left_operand.transforms())
        left.transform(strip, strip + Left::kSize + Right::kSize, left_copied >> (kStages - 2) * Left::kVectors, k);
      if (right_operand.transforms())
        right.transform(strip + Left::kSize, nullptr, right_copied >> (kStages - 2) * Right::kVectors, k);
    }
    block_sync();
    fill(step + kStages - 1);
    copy_commit();
    if (works)
      multiply<P, MT, NT>(sums, Left::rows_from(strip, warp_row), Right::rows_from(strip + Left::kSize, warp_column),
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
      for (int e = 0; e < 4; e += 2) {
        const float pair[2] = {sums[i][j][e], sums[i][j][e + 1]};  // neighbouring columns
        store<2>(staged + (warp_row + 16 * i + sum_row(lane, e)) * Memory::kSumPitch + warp_column + 8 * j +
                     sum_column(lane, e),
                 pair);
      }
  block_sync();
  constexpr int width = vectors ? 16 / int(sizeof(typename Problem::Out)) : 1;
  constexpr int across = columns / width;
  const int column = int(threadIdx.x) % across * width;
  typename Problem::template Sums<width> row_sums;
  for (int row = int(threadIdx.x) / across; row < kTileRows; row += kThreads / across) {
    if (tile.row + row >= tile.rows || tile.column + column >= tile.columns) break;
    float values[width];
    load<width>(values, staged + row * Memory::kSumPitch + column);
    problem.finish(tile, tile.row + row, tile.column + column, values, row_sums);
  }
  problem.reduce(tile, row_sums, staged + Memory::kSums, across);
}

template <typename P, bool vectors, int columns, typename Problem>
void launch_gemm(const Device& device, const Problem& problem) {
  device.launch_early(gemm<P, Problem, vectors, columns>, problem.blocks(), kThreads,
                      GemmMemory<Problem, columns>::bytes(problem.has_companion()), problem);
}

// Wide tiles need vectors: a copy value by value costs more than the tiles save.
template <typename T, typename Problem>
void run_gemm(const Device& device, Problem problem) {
  const bool vectors = problem.vectors();
  if (vectors && problem.columns > kTileColumns) {
    problem.divide(kWideTileColumns);
    if (problem.blocks() < kManyBlocks) problem.divide(kTileColumns);
  }
  const auto run = [&](auto precision) {
    using P = decltype(precision);
    if (!vectors)
      launch_gemm<P, false, kTileColumns>(device, problem);
    else if (problem.tile_columns == kTileColumns)
      launch_gemm<P, true, kTileColumns>(device, problem);
    else
      launch_gemm<P, true, kWideTileColumns>(device, problem);
  };
  if constexpr (sizeof(T) == 4) {
    if (allow_tf32()) return run(Precision<T, true>{});
  }
  run(Precision<T>{});
}

}  // namespace hne
