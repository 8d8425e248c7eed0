// A whole bottleneck or inverted residual in one kernel (inference). The expanded feature map exists only in shared
// memory.
//
//   G branches, M output pixels, E expanded channels   bytes moved at least          multiply-adds
//   forward                                            x + weights + out             G M (C_in E s^2 + k^2 E + E C_out)
//                                                      (x about (1 + 2 / 8)^2 times  (+ G M C_in C_out for a shortcut)
//                                                      for the halo of 8x8 tiles,
//                                                      from the L2 cache)
//
// A block has a tile of at most 8 x 8 output pixels of one sample of one branch. It loads the input pixels under the
// tile and its halo once; a feature map that fits a tile is loaded without a halo. A shortcut convolution is computed
// first, 32 input channels at a time. Then, for at most 32 expanded channels at a time, the block computes the first
// 1x1 convolution into shared memory, the depthwise convolution from there, and the second 1x1 convolution into
// registers, which hold all output channels of the tile.
//
// Depthwise convolutions of 3x3 taps in 16 bits run on tensor cores, with filters as diagonal matrices. So does the
// addition of an identity, with the unit matrix. Both add zero times the values of neighbouring channels, which is
// exact unless such a value is infinite or NaN. The first product therefore checks its results before the clamp (an
// infinite input makes them so); where one is not finite, the block computes both additions channel by channel.
//
// Order of memory accesses. A thread's asynchronous copies are visible to the block after the thread has waited for
// their group and the block has passed a barrier; every copy below has both between it and its first reader. A buffer
// is filled again only after a barrier that follows its last reader:
//   expand    read in the first product, refilled after the barrier behind it
//   filters   read in the depthwise convolution, refilled with `project` in the next round: the barriers before and
//             after the second product lie between
//   project   read in the second product; the barrier at the end of a round lies before its refill
//   shortcut  two buffers in turn; a buffer is refilled after the barrier of the next round, which all threads reach
//             after the product that reads it; a last barrier precedes the chunk's buffers in the same memory
//   x         read only, until a warp replaces the residual of its own pixels and channels, which no other warp reads
//             after the last first product
// Generic stores and loads of shared memory are ordered by the barriers alone: no proxy other than the generic one
// takes part, as cp.async belongs to it.
#include "bottleneck.h"

namespace hne {
namespace {

constexpr int kWarps = kThreads / kWarp;

// The tile of a block: its first output pixel, its sample and its branch.
struct BlockTile {
  int x, y, sample, branch;
  template <typename T>
  HNE_DEVICE BlockTile(const BottleneckPlan<T>& p, int block) {
    x = p.tiles_x.split(block) << p.tile_shift;
    y = p.tiles_y.split(block) * p.tile_height;
    sample = p.samples.split(block);
    branch = block;
  }
};

// Loads the region of input pixels; those outside of the feature map become zeros. A warp loads whole rows.
template <typename T, bool vectors>
HNE_DEVICE void load_region(T* x, const Bottleneck<T>& b, const BottleneckPlan<T>& p, const T* from, int top,
                            int left) {
  constexpr int width = 16 / int(sizeof(T));
  const ThreadPlace place;
  const int per_row = p.region_width * p.x_vectors.divisor(), channels = b.s.in_channels;
  if constexpr (vectors) from = recompute(from);
#pragma unroll 1
  for (int y = place.warp; y < p.region_height; y += kWarps) {
    const bool row_inside = unsigned(top + y) < unsigned(b.s.height);
    const int row = row_inside ? ((top + y) * b.s.width + left) * channels : 0;
    T* const to = x + y * p.region_width * p.x_pitch;
#pragma unroll 1
    for (int i = place.lane; i < per_row; i += kWarp) {
      int pixel = i;
      const int channel = p.x_vectors.split(pixel) * width;
      const bool there = row_inside && unsigned(left + pixel) < unsigned(b.s.width) && channel < channels;
      const T* const source = from + (there ? row + pixel * channels + channel : 0);
      if constexpr (vectors)
        copy16(to + pixel * p.x_pitch + channel, source, there);
      else
        copy_vector<T, false>(to + pixel * p.x_pitch + channel, source, there ? channels - channel : 0, from);
    }
  }
}

// Copies the depthwise filters [tap][channel] of a chunk; channels from `present` on become zeros.
template <typename T, bool vectors>
HNE_DEVICE void copy_filters(T* to, const T* from, int middle, int taps, int present, int columns) {
  constexpr int width = 16 / int(sizeof(T));
  const int shift = (columns == 32 ? 5 : 4) - (width == 8 ? 3 : 2);
#pragma unroll 1
  for (int i = ThreadPlace{}.thread; i < taps << shift; i += kThreads) {
    const int tap = i >> shift, channel = (i - (tap << shift)) * width;
    copy_vector<T, vectors>(to + tap * kChunk + channel, from + int64_t(tap) * middle + channel, present - channel,
                            from);
  }
}

// sums += a b over `depth`. In 16 bits in steps of `kStep`: longer unrolled loops take more registers.
template <typename P, int kStep, int MT, int NT, typename A, typename T = typename P::Type>
HNE_DEVICE void multiply_in_steps(float (&sums)[MT][NT][4], const A& rows, const T* b, int pitch, int depth,
                                  int thread) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll 1
    for (int k = 0; k < depth; k += kStep) {
      const auto row = [&](int m) { return rows(m) + k; };
      multiply<P, MT, NT>(sums, RowsOf<T, decltype(row)>{row}, Across<T>{b + k * pitch, pitch}, kStep, thread);
    }
  } else {
    multiply<P, MT, NT>(sums, RowsOf<T, A>{rows}, Across<T>{b, pitch}, depth, thread);
  }
}

// The first product: a warp computes 16 pixels times 16 channels of the chunk at a time. Returns whether the results of
// this thread, before the clamp, are all finite, if T has 16 bits.
template <typename P, bool vectors, typename T = typename P::Type>
HNE_DEVICE bool expand_chunk(T* expanded, const T* x, const T* weights, const int* places, const T* bias, int present,
                             int columns, const BottleneckPlan<T>& p, const PairClamp<T>& range) {
  const auto [thread, warp, lane] = ThreadPlace{};
  const int shift = columns == 32 ? 1 : 0, channel = (warp & shift) * 16, own = channel + lane % 4 * 2;
  float biases[2][2];
#pragma unroll
  for (int j = 0; j < 2; ++j) load_pair<vectors>(biases[j], bias, own + 8 * j, present);
  uint32_t check = 0;
#pragma unroll 1
  for (int row = (warp >> shift) * 16; row < p.x_rows; row += (kWarps >> shift) * 16) {
    float sums[1][2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[0][j][e] = biases[j][e % 2];
    const Pitched<T> rows{x + row * p.x_pitch, p.x_pitch};
    if (p.depth % 32 == 0)
      multiply_in_steps<P, 32>(sums, rows, weights + channel, p.expand_pitch, p.depth, thread);
    else
      multiply_in_steps<P, 16>(sums, rows, weights + channel, p.expand_pitch, p.depth, thread);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int place = places[row + lane / 4 + 8 * h];
      if (place < 0) continue;  // the depthwise convolution pads with zeros, which are there
#pragma unroll
      for (int j = 0; j < 2; ++j)
        range.store_checked(expanded + place + own + 8 * j, sums[0][j][2 * h], sums[0][j][2 * h + 1], check);
    }
  }
  return !PairClamp<T>::not_finite(check);
}

// Pixel `pixel` of a tile, for which the nearest one that may exist stands in.
template <typename T>
struct TilePixel {
  int y, x;
  HNE_DEVICE TilePixel(int pixel, const BottleneckPlan<T>& p)
      : y(min(pixel >> p.tile_shift, p.last_y)), x(min(pixel & ((1 << p.tile_shift) - 1), p.last_x)) {}
  // Row of the region under it.
  HNE_DEVICE int input_row(const BottleneckPlan<T>& p, int stride) const {
    return (y * stride + p.margin) * p.region_width + x * stride + p.margin;
  }
};

// The depthwise convolution of 3x3 taps in 16 bits: a warp computes 16 pixels times 16 channels. The 8 warps cover a
// tile of 64 pixels and a chunk of 32 channels.
template <typename T, bool vectors>
HNE_DEVICE void filter_on_tensor_cores(T* filtered, const T* expanded, const T* filters, const T* bias, int present,
                                       int columns, int stride, const BottleneckPlan<T>& p, const PairClamp<T>& range) {
  static_assert(kWarps * 16 * 16 >= kTilePixels * kChunk);
  const auto [thread, warp, lane] = ThreadPlace{};
  const int shift = columns == 32 ? 1 : 0, channel = (warp & shift) * 16, own = channel + lane % 4 * 2;
  const int first = (warp >> shift) * 16;
  if (first >= kTilePixels || first >> p.tile_shift > p.last_y) return;
  float sums[2][4];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float pair[2];
    load_pair<vectors>(pair, bias, own + 8 * j, present);
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[j][e] = pair[e % 2];
  }
  const TilePixel<T> pixel(first + lane % 16, p);
  depthwise_product(sums,
                    expanded + (pixel.y * p.halo_width + pixel.x) * stride * kChunkPitch<T> + channel + lane / 16 * 8,
                    p.halo_width * kChunkPitch<T>, kChunkPitch<T>, filters + channel, kChunk, lane);
  T* const to = filtered + (first + lane / 4) * kChunkPitch<T> + own;
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int j = 0; j < 2; ++j) range.store(to + 8 * h * kChunkPitch<T> + 8 * j, sums[j][2 * h], sums[j][2 * h + 1]);
}

// Any depthwise convolution: a thread computes 16 bytes of channels of a pixel at a time.
template <typename T, bool vectors>
HNE_DEVICE void filter_by_channels(T* filtered, const T* expanded, const T* filters, const T* bias, int present,
                                   int columns, int stride, int kernel_size, const BottleneckPlan<T>& p,
                                   const Clamp<float>& range) {
  constexpr int width = 16 / int(sizeof(T));
  const int shift = (columns == 32 ? 5 : 4) - (width == 8 ? 3 : 2);  // vectors of a pixel: 1 << shift
  const int thread = ThreadPlace{}.thread, channel = (thread & ((1 << shift) - 1)) * width;
  const int pixels = (p.last_y + 1) << p.tile_shift;
  float biases[width];
#pragma unroll
  for (int e = 0; e < width; e += 2) {
    float pair[2];
    load_pair<vectors>(pair, bias, channel + e, present);
    biases[e] = pair[0], biases[e + 1] = pair[1];
  }
#pragma unroll 1
  for (int pixel = thread >> shift; pixel < pixels; pixel += kThreads >> shift) {
    const TilePixel<T> place(pixel, p);
    const T* const source = expanded + (place.y * p.halo_width + place.x) * stride * kChunkPitch<T> + channel;
    float sums[width];
#pragma unroll
    for (int e = 0; e < width; ++e) sums[e] = biases[e];
    const auto add_tap = [&](const T* from, const T* filter) {
      float v[width], w[width];
      load<width>(v, from);
      load<width>(w, filter);
#pragma unroll
      for (int e = 0; e < width; ++e) sums[e] += v[e] * w[e];
    };
    if (sizeof(T) == 4 && kernel_size == 3) {
#pragma unroll
      for (int tap = 0; tap < 9; ++tap)
        add_tap(source + (tap / 3 * p.halo_width + tap % 3) * kChunkPitch<T>, filters + tap * kChunk + channel);
    } else {
#pragma unroll 1
      for (int ky = 0; ky < kernel_size; ++ky)
#pragma unroll 1
        for (int kx = 0; kx < kernel_size; ++kx)
          add_tap(source + (ky * p.halo_width + kx) * kChunkPitch<T>,
                  filters + (ky * kernel_size + kx) * kChunk + channel);
    }
#pragma unroll
    for (int e = 0; e < width; ++e)  // infinity times the zeros that stand for absent channels is NaN
      sums[e] = channel + e < present ? clamp(sums[e], range) : 0.0f;
    store<width>(filtered + pixel * kChunkPitch<T> + channel, sums);
  }
}

// A warp's part of the output: 32 pixels times 8 NT channels.
template <int NT>
struct OutputPart {
  ThreadPlace place;
  int row = place.warp / 4 * 32, column = place.warp % 4 * 8 * NT;
  template <typename T>
  HNE_DEVICE bool exists(const BottleneckPlan<T>& p, int channels) const {
    return column < channels && row >> p.tile_shift <= p.last_y;
  }
};

// sums += the residual in 16 bits, by a product with the unit matrix; all values must be finite.
template <typename T, int MT, int NT>
HNE_DEVICE void add_residual_product(float (&sums)[MT][NT][4], const T* x, const BottleneckPlan<T>& p,
                                     const OutputPart<NT>& part) {
  const int lane = part.place.lane;
  const uint32_t unit = unit_matrix<T>(lane);
#pragma unroll
  for (int i = 0; i < MT; ++i) {
    const T* const row =
        x + TilePixel<T>(part.row + 16 * i + lane % 16, p).input_row(p, 1) * p.x_pitch + part.column + lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < NT; j += 2) {
      uint32_t v[4];
      load_matrices(v, row + 8 * j);
      multiply_half_fragments(sums[i][j], v[0], v[1], unit, T{});
      multiply_half_fragments(sums[i][j + 1], v[2], v[3], unit, T{});
    }
  }
}
// sums += the residual.
template <typename T, int MT, int NT>
HNE_DEVICE void add_residual(float (&sums)[MT][NT][4], const T* x, const BottleneckPlan<T>& p,
                             const OutputPart<NT>& part) {
  const int lane = part.place.lane;
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const T* const row = x + TilePixel<T>(part.row + 16 * i + 8 * h + lane / 4, p).input_row(p, 1) * p.x_pitch +
                           part.column + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        float residual[2];
        load<2>(residual, row + 8 * j);
        sums[i][j][2 * h] += residual[0], sums[i][j][2 * h + 1] += residual[1];
      }
    }
}

// Blocks that a multiprocessor's registers shall hold, for 32 * NT output channels.
template <typename T, int NT>
constexpr int kResident = sizeof(T) == 2 ? (NT == 2   ? 4
                                            : NT == 4 ? 3
                                                      : 2)
                                         : (NT == 2 ? 2 : 1);

// NT: fragments of 8 output channels in each of the 4 warps side by side; at most 32 * NT output channels.
template <typename P, int NT, bool vectors>
__global__ void __launch_bounds__(kThreads, kResident<typename P::Type, NT>)
    bottleneck(const Bottleneck<typename P::Type> b, const BottleneckPlan<typename P::Type> p) {
  using T = typename P::Type;
  constexpr int width = P::kVector, MT = 2;
  const Shape& s = b.s;
  T* const memory = static_cast<T*>(shared_memory());
  T *const x = memory, *const expanded = memory + p.expanded_at, *const filtered = memory + p.filtered_at;
  T *const expand = memory + p.expand_at, *const project = memory + p.project_at,
           *const filters = memory + p.filters_at;
  int* const places = reinterpret_cast<int*>(memory + p.places_at);

  const auto [tile_x, tile_y, sample, branch] = BlockTile(p, int(blockIdx.x));
  const int top = tile_y * s.stride - p.margin, left = tile_x * s.stride - p.margin;
  const int panels_of_out = (s.out_channels + int(kPanel) - 1) / int(kPanel);

  // Channels of a chunk: those that exist, and in a multiple of 16.
  const auto present = [&](int first) { return min(p.chunk, b.middle - first); };
  const auto columns = [&](int first) { return present(first) > 16 ? 32 : 16; };
  const auto copy_expand = [&](int first) {
    copy_long_panels<T, vectors>(expand, p.expand_pitch,
                                 b.expand + recompute(branch) * p.expand_stride + int64_t(first) * s.in_channels,
                                 s.in_channels, p.depth, s.in_channels, columns(first) / int(kPanel));
  };
  const auto copy_project = [&](int first) {
    copy_short_panels<T, vectors>(project, p.project_pitch,
                                  b.project + recompute(branch) * p.project_stride + first * kPanel, b.middle,
                                  columns(first), present(first), panels_of_out);
    copy_filters<T, vectors>(filters, b.depthwise + int64_t(recompute(branch)) * s.taps() * b.middle + first, b.middle,
                             s.taps(), present(first), columns(first));
  };
  const auto shortcut_buffer = [&](int first) {
    return memory + p.shortcut_at + (first & kShortcutRows) * p.project_pitch;
  };
  const auto copy_shortcut = [&](int first) {
    copy_short_panels<T, vectors>(
        shortcut_buffer(first), p.project_pitch, b.shortcut + recompute(branch) * p.shortcut_stride + first * kPanel,
        s.in_channels, min(kShortcutRows, p.depth - first), min(kShortcutRows, s.in_channels - first), panels_of_out);
  };

  load_region<T, vectors>(
      x, b, p, b.x + int64_t(p.children.divide(branch) * s.batch + sample) * (s.pixels() * s.in_channels), top, left);
  if (b.shortcut != nullptr)
    copy_shortcut(0);
  else
    copy_expand(0);
  copy_commit();

#pragma unroll 1
  for (int row = ThreadPlace{}.thread; row < p.x_rows; row += kThreads) {
    int y = row;
    const int column = p.region_columns.split(y);
    const bool there =
        y < p.region_height && unsigned(top + y) < unsigned(s.height) && unsigned(left + column) < unsigned(s.width);
    places[row] = there ? ((y + p.halo_offset) * p.halo_width + column + p.halo_offset) * kChunkPitch<T> : -1;
  }
  float sums[MT][NT][4];
  {
    const OutputPart<NT> part;
    const int channel = part.column + part.place.lane % 4 * 2;
    const auto add_bias = [&](const T* bias, bool first) {
      bias += int64_t(branch) * s.out_channels;
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        float pair[2];
        load_pair<vectors>(pair, bias, channel + 8 * j, s.out_channels);
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[i][j][e] = first ? pair[e % 2] : sums[i][j][e] + pair[e % 2];
      }
    };
    add_bias(b.project_bias, true);
    if (b.shortcut != nullptr) add_bias(b.shortcut_bias, false);
  }

  if (b.shortcut != nullptr) {
    copy_expand(0);
    const OutputPart<NT> part;
    const bool exists = part.exists(p, s.out_channels);
    const auto input_row = [&](int m) { return x + TilePixel<T>(part.row + m, p).input_row(p, s.stride) * p.x_pitch; };
#pragma unroll 1
    for (int first = 0; first < p.depth; first += kShortcutRows) {
      copy_wait<0>();
      block_sync();
      if (first + kShortcutRows < p.depth) copy_shortcut(first + kShortcutRows);
      copy_commit();
      const auto row = [&](int m) { return input_row(m) + first; };
      if (exists)
        multiply_in_steps<P, 16>(sums, row, shortcut_buffer(first) + part.column, p.project_pitch,
                                 min(kShortcutRows, p.depth - first), part.place.thread);
    }
    block_sync();
  }
#pragma unroll 1
  for (int i = ThreadPlace{}.thread * width; i < p.halo_pixels * kChunkPitch<T>; i += kThreads * width)
    *reinterpret_cast<Vector<uint32_t, 4>*>(expanded + i) = {};

  bool finite = sizeof(T) == 2 && b.middle > 0;  // whether additions of zero times a value are exact
#pragma unroll 1
  for (int first = 0; first < b.middle; first += p.chunk) {
    copy_project(first);
    copy_commit();
    copy_wait<1>();  // for x and the weights of the first product
    block_sync();
    const PairClamp<T> range(b.range);
    const bool all_finite = expand_chunk<P, vectors>(expanded, x, expand, places,
                                                     b.expand_bias + int64_t(recompute(branch)) * b.middle + first,
                                                     present(first), columns(first), p, range);
    copy_wait<0>();  // for the filters and the weights of the second product
    if constexpr (sizeof(T) == 2)
      finite = !block_sync_or(!(finite && all_finite));
    else
      block_sync();
    if (first + p.chunk < b.middle) copy_expand(first + p.chunk);
    copy_commit();
    const T* const bias = b.depthwise_bias + int64_t(recompute(branch)) * b.middle + first;
    if (finite && s.kernel_size == 3) {
      if constexpr (sizeof(T) == 2)
        filter_on_tensor_cores<T, vectors>(filtered, expanded, filters, bias, present(first), columns(first), s.stride,
                                           p, range);
    } else {
      filter_by_channels<T, vectors>(filtered, expanded, filters, bias, present(first), columns(first), s.stride,
                                     s.kernel_size, p, b.range);
    }
    block_sync();
    const OutputPart<NT> part;
    if (part.exists(p, s.out_channels))
      multiply_in_steps<P, 16>(sums, Pitched<T>{filtered + part.row * kChunkPitch<T>, kChunkPitch<T>},
                               project + part.column, p.project_pitch, columns(first), part.place.thread);
    block_sync();  // before the weights are overwritten, and the memory by the output
  }
  copy_wait<0>();

  // The output is staged in rows of 16 bytes: in place of the residual, or at the beginning of the memory.
  const OutputPart<NT> part;
  if (part.exists(p, s.out_channels)) {
    if (b.identity) {
      if (finite) {
        if constexpr (sizeof(T) == 2) add_residual_product(sums, x, p, part);
      } else {
        add_residual(sums, x, p, part);
      }
      warp_sync();  // before a lane replaces the values that others have read
    }
    // From one fragment to the next it is 8 pixels, which are whole rows of the tile.
    const int lane = part.place.lane, y = part.row >> p.tile_shift, rows = 8 >> p.tile_shift;
    const int column = lane / 4 & ((1 << p.tile_shift) - 1), first_y = y + (lane / 4 >> p.tile_shift);
    T* const to =
        memory + part.column + lane % 4 * 2 +
        (b.identity ? (first_y + p.margin) * p.region_width + column + p.margin : part.row + lane / 4) * p.staged_pitch;
    const PairClamp<T> range(b.final_range);
    if (column <= p.last_x) {
#pragma unroll
      for (int i = 0; i < 2 * MT; ++i)
        if (first_y + i * rows <= p.last_y)
#pragma unroll
          for (int j = 0; j < NT; ++j)
            range.store(to + i * p.staged_step + 8 * j, sums[i / 2][j][i % 2 * 2], sums[i / 2][j][i % 2 * 2 + 1]);
    }
  }
  block_sync();

  // A warp writes whole rows of the tile.
  constexpr int out_width = vectors ? width : 1;
  const ThreadPlace place;
  const BlockTile tile(p, recompute(int(blockIdx.x)));
  T* const out = b.out + int64_t(tile.branch * s.batch + tile.sample) * (s.out_pixels() * s.out_channels);
  const int out_values = min(1 << p.tile_shift, s.out_width - tile.x) * s.out_channels;
#pragma unroll 1
  for (int y = place.warp; y < min(p.tile_height, s.out_height - tile.y); y += kWarps) {
    T* const to = out + ((tile.y + y) * s.out_width + tile.x) * s.out_channels;
    const T* const staged =
        memory + (b.identity ? (y + p.margin) * p.region_width + p.margin : y << p.tile_shift) * p.staged_pitch;
#pragma unroll 1
    for (int i = place.lane * out_width; i < out_values; i += kWarp * out_width)
      *reinterpret_cast<Vector<T, out_width>*>(to + i) = *reinterpret_cast<const Vector<T, out_width>*>(
          staged + i + p.out_channels.divide(i) * (p.staged_pitch - s.out_channels));
  }
}

// Tries the largest tiles first: 8 x 8, with as many blocks on a multiprocessor as its registers hold if the shared
// memory allows that, at least with two; then whatever fits. Returns whether any does.
template <typename T>
bool choose_plan(BottleneckPlan<T>& plan, const Bottleneck<T>& b, int64_t limit) {
  constexpr int64_t kReserved = 1024;  // bytes of shared memory that each block takes for the system
  const int chunk = b.middle <= 16 ? 16 : kChunk;
  for (const int64_t blocks : {2, 1}) {
    const int64_t most = (limit + kReserved) / blocks - kReserved;
    for (const auto& [height, shift] : {std::pair{8, 3}, {4, 3}, {4, 2}}) {
      if (blocks == 2 && height < 8) break;
      for (int channels = chunk; channels >= 16; channels -= 16)
        if (plan.make(b, height, shift, channels) && plan.shared_bytes <= most) return true;
    }
  }
  return false;
}

}  // namespace

template <typename T>
bool run_fused(const Device& device, const Bottleneck<T>& b) {
  if (b.s.out_channels > 256) return false;
  const bool vectors = whole_vectors<T>({b.s.in_channels, b.middle, b.s.out_channels},
                                        {b.x, b.expand, b.expand_bias, b.depthwise, b.depthwise_bias, b.project,
                                         b.project_bias, b.shortcut, b.shortcut_bias, b.out});
  BottleneckPlan<T> plan;
  if (!choose_plan(plan, b, device.shared_limit())) return false;
  const auto run = [&](auto precision) {
    using P = decltype(precision);
    const auto launch = [&](auto tiles) {
      constexpr int NT = decltype(tiles)::value;
      device.launch(vectors ? bottleneck<P, NT, true> : bottleneck<P, NT, false>, plan.blocks, kThreads,
                    plan.shared_bytes, b, plan);
    };
    if (b.s.out_channels <= 64)
      launch(std::integral_constant<int, 2>{});
    else if (b.s.out_channels <= 128)
      launch(std::integral_constant<int, 4>{});
    else
      launch(std::integral_constant<int, 8>{});
  };
  if constexpr (sizeof(T) == 4) {
    if (allow_tf32()) {
      run(Precision<T, true>{});
      return true;
    }
  }
  run(Precision<T>{});
  return true;
}
template bool run_fused(const Device&, const Bottleneck<float>&);
template bool run_fused(const Device&, const Bottleneck<half>&);
template bool run_fused(const Device&, const Bottleneck<bfloat16>&);

}  // namespace hne
