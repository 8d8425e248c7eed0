// The tile registers of AMX: eight matrices of at most 16 rows of 64 bytes. Sanitizers do not see what these
// instructions read and write, and few machines have them: with HNE_EMULATED_TILES ordinary code takes their place.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "simd.h"

namespace hne::HNE_ISA {

// The rows of each tile and their bytes, as ldtilecfg reads them.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t tile_rows, int64_t bytes) {
    rows[tile] = uint8_t(tile_rows), row_bytes[tile] = uint16_t(bytes);
  }
};

// The tiles of this thread while the object lives. `stride` is the distance of rows in memory, in bytes.
class Tiles {
 public:
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

#if !defined(HNE_EMULATED_TILES)
  explicit Tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
  ~Tiles() { asm volatile("tilerelease"); }

  template <int TILE>
  HNE_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
  }
  template <int TILE>
  HNE_INLINE void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
  }
  template <int TILE>
  HNE_INLINE void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
  }
  // sum[m][n] += sum over pairs k of left[m][k] * right[k][n]: tiles of float and of pairs of bfloat16
  template <int SUM, int LEFT, int RIGHT>
  HNE_INLINE void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(LEFT), "i"(RIGHT));
  }
#else
  explicit Tiles(const TileShapes& shapes) : shapes_(shapes) {
    expect(!std::exchange(in_use(), true));
    for (int tile = 0; tile < kTiles; ++tile) {
      expect(shapes.rows[tile] <= kRows && shapes.row_bytes[tile] <= kRowBytes && shapes.row_bytes[tile] % 4 == 0);
      expect((shapes.rows[tile] == 0) == (shapes.row_bytes[tile] == 0));
    }
  }
  ~Tiles() { in_use() = false; }

  template <int TILE>
  void zero() {
    std::memset(memory_[TILE], 0, sizeof memory_[TILE]);
  }
  template <int TILE>
  void load(const void* from, int64_t stride) {
    zero<TILE>();
    for (int64_t m = 0; m < shapes_.rows[TILE]; ++m)
      std::memcpy(memory_[TILE][m], static_cast<const char*>(from) + m * stride, shapes_.row_bytes[TILE]);
  }
  template <int TILE>
  void store(void* to, int64_t stride) {
    for (int64_t m = 0; m < shapes_.rows[TILE]; ++m)
      std::memcpy(static_cast<char*>(to) + m * stride, memory_[TILE][m], shapes_.row_bytes[TILE]);
  }
  // As the processor does, but for subnormal numbers, which it takes as zero: terms of even and of odd numbers have
  // sums of their own, which are then added.
  template <int SUM, int LEFT, int RIGHT>
  void multiply_add() {
    expect(shapes_.rows[SUM] > 0 && shapes_.rows[LEFT] > 0 && shapes_.rows[RIGHT] > 0);
    const int64_t rows = shapes_.rows[SUM], columns = shapes_.row_bytes[SUM] / 4, pairs = shapes_.row_bytes[LEFT] / 4;
    expect(shapes_.rows[LEFT] == rows && shapes_.row_bytes[RIGHT] / 4 == columns && shapes_.rows[RIGHT] == pairs);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t n = 0; n < columns; ++n) {
        float sums[2] = {};
        for (int64_t k = 0; k < 2 * pairs; ++k)
          sums[k % 2] += value(memory_[LEFT][m], k) * value(memory_[RIGHT][k / 2], 2 * n + k % 2);
        float sum;
        std::memcpy(&sum, memory_[SUM][m] + 4 * n, sizeof sum);
        sum += sums[0] + sums[1];
        std::memcpy(memory_[SUM][m] + 4 * n, &sum, sizeof sum);
      }
  }

 private:
  static constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

  // A thread has one set of tiles.
  static bool& in_use() {
    thread_local bool used = false;
    return used;
  }
  // Where the processor would stop the program.
  static void expect(bool holds) {
    if (!holds) std::abort();
  }
  static float value(const char* row, int64_t number) {
    bfloat16 found;
    std::memcpy(&found, row + 2 * number, sizeof found);
    return to_sum(found);
  }

  TileShapes shapes_;
  char memory_[kTiles][kRows][kRowBytes] = {};
#endif
};

}  // namespace hne::HNE_ISA
