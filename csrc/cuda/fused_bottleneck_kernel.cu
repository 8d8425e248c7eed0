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
#include "bottleneck_phases.h"

namespace hne {
namespace {

// Blocks that a multiprocessor's registers shall hold, for 32 * NT output channels.
template <typename T, int NT>
constexpr int kResident = sizeof(T) == 2 ? (NT == 2   ? 4
                                            : NT == 4 ? 3
                                                      : 2)
                                         : (NT == 2 ? 2 : 1);

// NT: fragments of 8 output channels in each of the 4 warps side by side; at most 32 * NT output channels.
template <typename P, int NT, bool vectors>
__global__ void __launch_bounds__(kThreads, vectors || NT != 4 ? kResident<typename P::Type, NT> : 2)
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

  wait_for_previous_kernel();
  launch_next_kernel();
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
      device.launch_early(vectors ? bottleneck<P, NT, true> : bottleneck<P, NT, false>, plan.blocks, kThreads,
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
