// Convolution of few input channels by tensor cores; in training it sums up statistics of its result.
//
//   G branches, M output pixels each, depth D = C_in k^2   bytes moved at least                      multiply-adds
//   inference                                              x + weight + out                          G M C_out D
//   training                                               x + weight + out (+ statistics of each    the same
//                                                          tile of 128 to 512 pixels)
//
// Three channels are no whole vector of 16 bytes, so the general matrix product (gemm.h) would load each value of each
// row of the product by itself, nine times for a 3x3 filter. Here, a block computes a tile of 128 to 512 output pixels.
// It loads the input pixels under the tile once, a line of memory at a time, from images in either memory format, and
// keeps them in shared memory. The depth of the product is (filter row, filter column, channel); columns and channels
// lie side by side in the tile's input, so a thread finds its values of the product's left operand by a few fixed
// offsets. A warp has 16 pixels at a time, and one panel of 16 output channels after the other. It turns the results to
// 16-byte vectors in shared memory.
//
//   instructions of a warp for 16 pixels of 3 channels, 3x3 filters, 16-bit: 16 loads of the operand, 8 to pack it,
//   4 products for each 16 output channels
//
// float32 is multiplied exactly, also where tf32 is allowed: 27 multiply-adds a value are few.
//
// Launched early (device.h).
#include <cstring>

#include "few_channels.h"
#include "matrix.h"

namespace hne {
namespace {

constexpr int kWarps = kThreads / kWarp, kGroup = 16 * kWarps;  // output pixels that a block computes at a time
constexpr int kMostDepth = 64;

template <typename T>
struct FewChannels {
  Convolution<T> d;
  int64_t branch_stride, sample_stride, row_stride, plane_stride, inner_stride;  // of x
  // A row of x is loaded as `planes` runs of memory: one with all channels of the pixels, where these are contiguous,
  // else one for each channel.
  int planes, run;
  int groups;      // the tile has kGroup * groups pixels
  int tile_shift;  // and is 2^tile_shift pixels wide
  int tiles_x, tiles_y, panels;
  int reciprocal;  // of the values in a row of the filter, times 2^16: for divisions of numbers below kMostDepth
  int rows;        // of a panel of weights; beyond the depth they are zero
  int channel_reciprocal = 0;  // of the input channels, as above
  Partials partials = {};      // for the statistics of the result

  HNE_BOTH int depth() const { return d.s.taps() * d.s.in_channels; }
  HNE_BOTH int row_values() const { return d.s.kernel_size * d.s.in_channels; }  // of the filter
  HNE_BOTH int tile_width() const { return 1 << tile_shift; }
  HNE_BOTH int tile_height() const { return kGroup * groups >> tile_shift; }
  int64_t tiles() const { return int64_t(tiles_x) * tiles_y; }
  int64_t blocks() const { return d.s.branches * d.s.batch * tiles(); }

  // The input under a tile.
  HNE_BOTH int input_height() const { return (tile_height() - 1) * d.s.stride + d.s.kernel_size; }
  HNE_BOTH int input_width() const { return (tile_width() - 1) * d.s.stride + d.s.kernel_size; }
  HNE_BOTH int input_pitch() const { return input_width() * d.s.in_channels; }

  // Shared memory, in values: weights [panel][depth][16], results [warp][16][16], bias [panel][16] in float32,
  // x [row][column][channel].
  static constexpr int kWeightPitch = int(kPanel) + kColumnPadding, kResultPitch = int(kPanel) + 16 / int(sizeof(T));
  static constexpr int kResults = 16 * kResultPitch;
  HNE_BOTH int panel_size() const { return rows * kWeightPitch; }
  HNE_BOTH int results_at() const { return panels * panel_size(); }
  HNE_BOTH int bias_at() const { return results_at() + kWarps * kResults; }
  HNE_BOTH int input_at() const { return bias_at() + panels * int(kPanel) * int(sizeof(float) / sizeof(T)); }
  bool fits(int64_t bytes) const {
    return (int64_t(panels) * (panel_size() + 2 * kPanel) + kWarps * kResults +
            int64_t(input_height()) * input_pitch()) *
               int64_t(sizeof(T)) <=
           bytes;
  }
  int64_t shared_bytes() const { return (input_at() + input_height() * input_pitch()) * int64_t(sizeof(T)); }
};

// Sums of 16 pixels and the 16 channels of a panel, in the layout of tensor cores (matrix.h).
using PanelSums = float[2][4];

// The left operand of a warp: 16 pixels, rows g and g + 8 for lane (g, t).
template <typename T, int steps>
struct Gathered {
  uint32_t offsets[steps][2][2];  // in the input of a pixel
  uint32_t masks[steps][2];       // of the pairs of values: bits beyond the depth are zero
  uint32_t fragments[steps][4];

  HNE_DEVICE explicit Gathered(const FewChannels<T>& c) {
#pragma unroll
    for (int step = 0; step < steps; ++step)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        masks[step][h] = 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int k = 16 * step + 8 * h + int(threadIdx.x % 4) * 2 + i, row = k * c.reciprocal >> 16;
          const bool inside = k < c.depth();
          offsets[step][h][i] = inside ? row * (c.input_pitch() - c.row_values()) + k : 0;
          masks[step][h] |= inside ? 0xffffu << (16 * i) : 0u;
          keep(offsets[step][h][i]);
        }
        keep(masks[step][h]);
      }
  }
  HNE_DEVICE void gather(const T* first, const T* second) {
#pragma unroll
    for (int step = 0; step < steps; ++step)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t low = offsets[step][h][0], high = offsets[step][h][1];
        const Vector<T, 2> pairs[2] = {{first[low], first[high]}, {second[low], second[high]}};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          std::memcpy(&fragments[step][2 * h + i], &pairs[i], 4);
          fragments[step][2 * h + i] &= masks[step][h];
        }
      }
  }
  HNE_DEVICE void multiply(PanelSums& sums, const T* panel) const {
    const int lane = int(threadIdx.x % kWarp), eight = lane / 8, within = lane % 8;
#pragma unroll
    for (int step = 0; step < steps; ++step) {
      uint32_t right[4];
      load_matrices_transposed(
          right, panel + (16 * step + within + eight % 2 * 8) * FewChannels<T>::kWeightPitch + eight / 2 * 8);
#pragma unroll
      for (int j = 0; j < 2; ++j) multiply_fragments(sums[j], fragments[step], right[2 * j], right[2 * j + 1], T{});
    }
  }
};

// Exact products: the operand stays in shared memory.
template <int steps>
struct Gathered<float, steps> {
  const float *first, *second;
  int rows, row_values, pitch;

  HNE_DEVICE explicit Gathered(const FewChannels<float>& c)
      : rows(c.d.s.kernel_size), row_values(c.row_values()), pitch(c.input_pitch()) {}
  HNE_DEVICE void gather(const float* first_, const float* second_) { first = first_, second = second_; }
  HNE_DEVICE void multiply(PanelSums& sums, const float* panel) const {
    const float* right = panel + int(threadIdx.x % 4) * 2;
    for (int row = 0; row < rows; ++row)
      for (int i = 0; i < row_values; ++i, right += FewChannels<float>::kWeightPitch) {
        const float left[2] = {first[row * pitch + i], second[row * pitch + i]};
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[j][e] += left[e / 2] * right[8 * j + e % 2];
      }
  }
};

// Adds the mean and the squared deviations of `count` more values (Chan et al.).
HNE_DEVICE void combine(float& count, float& mean, float& squares, float other_count, float other_mean,
                        float other_squares) {
  const float total = count + other_count, part = total > 0 ? other_count / total : 0.0f, distance = other_mean - mean;
  mean += distance * part;
  squares += other_squares + distance * distance * part * count;
  count = total;
}

// Writes the statistics of a panel from those of every lane, which has columns 8 j + 2 t + i of the panel in place
// 2 j + i. `scratch` has room for 33 values of each warp.
HNE_DEVICE void put(const Moments<4>& lanes, const Partials& partials, const Place& place, float* scratch) {
  const int warp = int(threadIdx.x / kWarp), lane = int(threadIdx.x % kWarp);
  float count = lanes.count, mean[4], squares[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) mean[i] = lanes.mean[i], squares[i] = lanes.squares[i];
#pragma unroll
  for (int mask = 4; mask < kWarp; mask *= 2) {  // lanes with the same columns
    const float other_count = shuffle_xor(count, mask), before = count;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float other_mean = shuffle_xor(mean[i], mask), other_squares = shuffle_xor(squares[i], mask);
      count = before;
      combine(count, mean[i], squares[i], other_count, other_mean, other_squares);
    }
  }
  block_sync();  // every warp has finished with the memory of scratch
  if (lane < 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float* const to = scratch + warp * 33 + 2 * (i / 2 * 8 + sum_column(lane, i));
      to[0] = mean[i], to[1] = squares[i];
    }
    scratch[warp * 33 + 32] = count;
  }
  block_sync();
  const int channel = place.channel + int(threadIdx.x);
  if (int(threadIdx.x) < int(kPanel) && channel < partials.channels) {
    float all = 0, all_mean = 0, all_squares = 0;
    for (int from = 0; from < kWarps; ++from) {
      const float* const of = scratch + from * 33;
      combine(all, all_mean, all_squares, of[32], of[2 * int(threadIdx.x)], of[2 * int(threadIdx.x) + 1]);
    }
    partials.put(0, place.branch, place.split, channel, all_mean);
    partials.put(1, place.branch, place.split, channel, all_squares);
    partials.put(2, place.branch, place.split, channel, all);
  }
  block_sync();
}

// Packed weights are for inference; others are [branch][tap][out][in].
template <typename T, int steps, bool vectors, bool packed>
__global__ void __launch_bounds__(kThreads, packed ? 3 : 2) few_channels(const FewChannels<T> c) {
  constexpr int kPitch = FewChannels<T>::kWeightPitch;
  const Shape& s = c.d.s;
  const int warp = int(threadIdx.x / kWarp), lane = int(threadIdx.x % kWarp);
  const int row_of_tiles = int(blockIdx.x) / c.tiles_x, tile_x = int(blockIdx.x) - row_of_tiles * c.tiles_x;
  const int at = row_of_tiles / c.tiles_y, tile_y = row_of_tiles - at * c.tiles_y;
  const int branch = at / s.batch, sample = at - branch * s.batch;
  const int out_y = tile_y * c.tile_height(), out_x = tile_x << c.tile_shift;
  const int in_y = out_y * s.stride - s.padding, in_x = out_x * s.stride - s.padding;
  const int depth = c.depth();
  T* const weights = static_cast<T*>(shared_memory());
  T* const results = weights + c.results_at() + warp * FewChannels<T>::kResults;
  float* const bias = reinterpret_cast<float*>(weights + c.bias_at());
  T* const input = weights + c.input_at();
  wait_for_previous_kernel();
  launch_next_kernel();

  for (int panel = 0; panel < c.panels; ++panel) {
    T* const to = weights + panel * c.panel_size();
    constexpr int piece = packed && vectors ? 16 / int(sizeof(T)) : 1, pieces = int(kPanel) / piece;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < c.rows * pieces; i += kThreads) {
      const int k = i / pieces, column = i % pieces * piece;
      if constexpr (packed) {
        const T* const from = c.d.filters + (int64_t(branch) * c.panels + panel) * depth * kPanel;
        if constexpr (vectors)
          copy16(to + k * kPitch + column, k < depth ? from + i * piece : c.d.filters, k < depth);
        else
          to[k * kPitch + column] = k < depth ? from[i] : T(0.0f);
      } else {
        const int tap = k * c.channel_reciprocal >> 16, in_channel = k - tap * s.in_channels;
        const int out_channel = panel * int(kPanel) + column;
        const int64_t filter = branch * c.d.strides.branch + (tap * s.out_channels + out_channel) * c.d.strides.out;
        const bool inside = k < depth && out_channel < s.out_channels;
        to[k * kPitch + column] = inside ? c.d.filters[filter + in_channel] : T(0.0f);
      }
    }
  }
  copy_commit();
#pragma unroll 1
  for (int i = int(threadIdx.x); i < c.panels * int(kPanel); i += kThreads)
    bias[i] = c.d.bias != nullptr && i < s.out_channels ? float(c.d.bias[int64_t(branch) * s.out_channels + i]) : 0.0f;

  const int run_scale = c.planes == 1 ? s.in_channels : 1;  // values of a pixel in a run
  const int first = in_x * run_scale, limit = s.width * run_scale;
  const T* const sample_at = c.d.x + int64_t(branch / s.replicate) * c.branch_stride + sample * c.sample_stride;
  for (int y = warp, plane = 0;; y += kWarps) {
    while (y >= c.input_height() && plane < c.planes) y -= c.input_height(), ++plane;
    if (plane >= c.planes) break;
    const bool row_inside = in_y + y >= 0 && in_y + y < s.height;
    const T* const from = sample_at + (in_y + y) * c.row_stride + plane * c.plane_stride;
    T* const to = input + y * c.input_pitch() + plane;
#pragma unroll 4
    for (int i = lane; i < c.run; i += kWarp) {
      const bool inside = row_inside && first + i >= 0 && first + i < limit;
      to[i * c.planes] = inside ? from[(first + i) * c.inner_stride] : T(0.0f);
    }
  }
  copy_wait<0>();
  block_sync();

  Gathered<T, steps> left(c);
  T* const out = c.d.out + (int64_t(branch) * s.batch + sample) * s.out_pixels() * s.out_channels;
  constexpr int width = vectors ? 16 / int(sizeof(T)) : 1, across = int(kPanel) / width;
  for (int panel = 0; panel < c.panels; ++panel) {
    const int first_channel = panel * int(kPanel);
    Moments<4> moments;
    for (int first_pixel = 16 * warp; first_pixel < kGroup * c.groups; first_pixel += kGroup) {
      const auto y_of = [&](int pixel) { return pixel >> c.tile_shift; };
      const auto x_of = [&](int pixel) { return pixel & (c.tile_width() - 1); };
      const auto inside = [&](int pixel) {
        return out_y + y_of(pixel) < s.out_height && out_x + x_of(pixel) < s.out_width;
      };
      const auto input_of = [&](int pixel) {
        return input + y_of(pixel) * s.stride * c.input_pitch() + x_of(pixel) * s.stride * s.in_channels;
      };
      left.gather(input_of(first_pixel + lane / 4), input_of(first_pixel + lane / 4 + 8));
      PanelSums sums = {};
      left.multiply(sums, weights + panel * c.panel_size());
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = 8 * j + sum_column(lane, 0);
        float added[2];
        load<2>(added, bias + first_channel + column);
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[j][e] = clamp(sums[j][e] + added[e % 2], c.d.range);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float pair[2] = {sums[j][2 * h], sums[j][2 * h + 1]};
          store<2>(results + sum_row(lane, 2 * h) * FewChannels<T>::kResultPitch + column, pair);
        }
      }
      if constexpr (!packed) {
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (inside(first_pixel + sum_row(lane, 2 * h)))
            moments.add({sums[0][2 * h], sums[0][2 * h + 1], sums[1][2 * h], sums[1][2 * h + 1]});
      }
      warp_sync();
#pragma unroll 2
      for (int i = lane; i < 16 * across; i += kWarp) {
        const int row = i / across, column = i % across * width, pixel = first_pixel + row;
        if (!inside(pixel) || first_channel + column >= s.out_channels) continue;
        const int64_t at_pixel = (out_y + y_of(pixel)) * s.out_width + out_x + x_of(pixel);
        *reinterpret_cast<Vector<T, width>*>(out + at_pixel * s.out_channels + first_channel + column) =
            *reinterpret_cast<const Vector<T, width>*>(results + row * FewChannels<T>::kResultPitch + column);
      }
      warp_sync();
    }
    if constexpr (!packed) {
      if (c.partials.values != nullptr) {
        const int split = int(blockIdx.x) - branch * s.batch * c.tiles_x * c.tiles_y;
        put(moments, c.partials, {branch, split, first_channel}, reinterpret_cast<float*>(weights + c.results_at()));
      }
    }
  }
}

// Large tiles need fewer instructions for a pixel, where there are enough of them and they fit the output as well. Of
// the shapes that cover it by the fewest tiles, the widest reads the longest lines.
template <typename T>
void choose_tile(FewChannels<T>& c) {
  const auto fewest = [&](int groups) {
    const auto tiles = [&](int shift) {
      c.groups = groups, c.tile_shift = shift;
      c.tiles_x = int(ceil_div(c.d.s.out_width, c.tile_width()));
      c.tiles_y = int(ceil_div(c.d.s.out_height, c.tile_height()));
      return c.tiles();
    };
    int best = 5;
    for (const int shift : {4, 3})
      if (tiles(shift) < tiles(best)) best = shift;
    return tiles(best);
  };
  const int64_t smallest = fewest(1);
  for (const int groups : {4, 2})
    if (fewest(groups) * groups <= smallest && c.blocks() >= kManyBlocks) return;
  fewest(1);
}

template <typename T, bool packed>
bool run(const Device& device, const Convolution<T>& d, const std::array<int64_t, 5>& strides,
         ChannelReduction* moments) {
  const Shape& s = d.s;
  if (s.kernel_size > kMostDepth || s.taps() * s.in_channels > kMostDepth || s.stride > kMostDepth) return false;
  FewChannels<T> c{.d = d,
                   .branch_stride = strides[0],
                   .sample_stride = strides[1],
                   .row_stride = strides[2],
                   .plane_stride = strides[4],
                   .inner_stride = strides[3],
                   .planes = s.in_channels,
                   .run = 0,
                   .groups = 1,
                   .tile_shift = 0,
                   .tiles_x = 0,
                   .tiles_y = 0,
                   .panels = int(ceil_div(s.out_channels, kPanel)),
                   .reciprocal = 0,
                   .rows = 0,
                   .channel_reciprocal = 65536 / s.in_channels + 1};
  c.reciprocal = 65536 / c.row_values() + 1;
  c.rows = sizeof(T) == 4 ? c.depth() : c.depth() <= 32 ? 32 : 64;
  choose_tile(c);
  // Where less than a quarter of a tile is filled, and for filters of many outputs, the matrix product is better.
  const int64_t pixels = c.tiles() * c.groups * kGroup;
  if (int64_t(s.out_pixels()) * 4 < pixels || !c.fits(device.shared_limit())) return false;
  const bool contiguous_pixels = strides[4] == 1 && strides[3] == s.in_channels;
  if (contiguous_pixels) c.planes = 1, c.inner_stride = 1;
  c.run = contiguous_pixels ? c.input_pitch() : c.input_width();
  if (moments != nullptr) c.partials = moments->allocate(Moments<1>::kPlanes, s.batch * c.tiles());
  const auto launch = [&](auto kernel) {
    device.launch_early(kernel, c.blocks(), kThreads, c.shared_bytes(), c);
    return true;
  };
  const auto launch_steps = [&](auto vectors) {
    constexpr bool v = decltype(vectors)::value;
    if constexpr (sizeof(T) == 4)
      return launch(few_channels<T, 1, v, packed>);
    else
      return c.rows == 32 ? launch(few_channels<T, 2, v, packed>) : launch(few_channels<T, 4, v, packed>);
  };
  const bool vectors = whole_vectors<T>({s.out_channels}, {packed ? d.filters : nullptr, d.out});
  return vectors ? launch_steps(std::true_type{}) : launch_steps(std::false_type{});
}

}  // namespace

template <typename T>
bool run_few_channels(const Device& device, const Convolution<T>& d, const std::array<int64_t, 5>& x_strides) {
  return run<T, true>(device, d, x_strides, nullptr);
}
template bool run_few_channels(const Device&, const Convolution<float>&, const std::array<int64_t, 5>&);
template bool run_few_channels(const Device&, const Convolution<half>&, const std::array<int64_t, 5>&);
template bool run_few_channels(const Device&, const Convolution<bfloat16>&, const std::array<int64_t, 5>&);

template <typename T>
bool run_few_channels(const Device& device, const Convolution<T>& d, ChannelReduction* moments) {
  const Shape& s = d.s;
  if (d.normalization.present() || whole_vectors<T>({s.in_channels}, {d.x})) return false;
  const int64_t pixel = s.in_channels, row = pixel * s.width, sample = row * s.height;
  return run<T, false>(device, d, {sample * s.batch, sample, row, pixel, 1}, moments);
}
template bool run_few_channels(const Device&, const Convolution<float>&, ChannelReduction*);
template bool run_few_channels(const Device&, const Convolution<half>&, ChannelReduction*);
template bool run_few_channels(const Device&, const Convolution<bfloat16>&, ChannelReduction*);

}  // namespace hne
