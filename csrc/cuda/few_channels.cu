// Convolution of few input channels by tensor cores (inference).
//
//   G branches, M output pixels each, N input pixels, depth D = C_in k^2   bytes moved at least    multiply-adds
//                                                                          x + weight + out        G M C_out D
//
// Three channels are no whole vector of 16 bytes, so the general matrix product (gemm.h) would load each value of each
// row of the product by itself, nine times for a 3x3 filter. Here, a block computes a tile of 128 to 512 output pixels.
// It loads the input pixels under the tile once, a line of memory at a time, from images in either memory format, and
// keeps them in shared memory. The depth of the product is (filter row, filter column, channel); columns and channels
// lie side by side in the tile's input, so a thread finds its values of the product's left operand by a few fixed
// offsets. A warp gathers the operand of 16 pixels once, and multiplies it with one panel of 16 output channels after
// the other. It turns the results of a panel to 16-byte vectors in shared memory.
//
//   instructions of a warp for 16 pixels of 3 channels, 3x3 filters, 16-bit: 16 loads of the operand, 8 to pack it,
//   4 products for each 16 output channels
//
// float32 is multiplied exactly, also where tf32 is allowed: 27 multiply-adds a value are few.
//
// Launched early (device.h).
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
          const int k = 16 * step + 8 * h + int(threadIdx.x) % 4 * 2 + i, row = k * c.reciprocal >> 16;
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
    const int lane = int(threadIdx.x) % kWarp, eight = lane / 8, within = lane % 8;
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
    const float* right = panel + int(threadIdx.x) % 4 * 2;
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

template <typename T, int steps, bool vectors>
__global__ void __launch_bounds__(kThreads) few_channels(const FewChannels<T> c) {
  constexpr int kPitch = FewChannels<T>::kWeightPitch;
  const Shape& s = c.d.s;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
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
    const T* from = c.d.filters + (int64_t(branch) * c.panels + panel) * depth * kPanel;
    T* const to = weights + panel * c.panel_size();
    constexpr int piece = vectors ? 16 / int(sizeof(T)) : 1, pieces = int(kPanel) / piece;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < c.rows * pieces; i += kThreads) {
      const int k = i / pieces, column = i % pieces * piece;
      if constexpr (vectors)
        copy16(to + k * kPitch + column, k < depth ? from + i * piece : c.d.filters, k < depth);
      else
        to[k * kPitch + column] = k < depth ? from[i] : T(0.0f);
    }
  }
  copy_commit();
#pragma unroll 1
  for (int i = int(threadIdx.x); i < c.panels * int(kPanel); i += kThreads)
    bias[i] = i < s.out_channels ? float(c.d.bias[int64_t(branch) * s.out_channels + i]) : 0.0f;

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
  for (int first_pixel = 16 * warp; first_pixel < kGroup * c.groups; first_pixel += kGroup) {
    const auto input_of = [&](int pixel) {
      const int y = pixel >> c.tile_shift, x = pixel & (c.tile_width() - 1);
      return input + y * s.stride * c.input_pitch() + x * s.stride * s.in_channels;
    };
    left.gather(input_of(first_pixel + lane / 4), input_of(first_pixel + lane / 4 + 8));
    for (int panel = 0; panel < c.panels; ++panel) {
      const int first_channel = panel * int(kPanel);
      PanelSums sums = {};
      left.multiply(sums, weights + panel * c.panel_size());
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = 8 * j + sum_column(lane, 0);
        float added[2];
        load<2>(added, bias + first_channel + column);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float pair[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) pair[i] = clamp(sums[j][2 * h + i] + added[i], c.d.range);
          store<2>(results + sum_row(lane, 2 * h) * FewChannels<T>::kResultPitch + column, pair);
        }
      }
      warp_sync();
#pragma unroll
      for (int i = lane; i < 16 * across; i += kWarp) {
        const int row = i / across, column = i % across * width, pixel = first_pixel + row;
        const int y = out_y + (pixel >> c.tile_shift), x = out_x + (pixel & (c.tile_width() - 1));
        if (y >= s.out_height || x >= s.out_width || first_channel + column >= s.out_channels) continue;
        *reinterpret_cast<Vector<T, width>*>(out + int64_t(y * s.out_width + x) * s.out_channels + first_channel +
                                             column) =
            *reinterpret_cast<const Vector<T, width>*>(results + row * FewChannels<T>::kResultPitch + column);
      }
      warp_sync();
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

}  // namespace

template <typename T>
bool run_few_channels(const Device& device, const Convolution<T>& d, const int64_t (&x_strides)[5]) {
  const Shape& s = d.s;
  if (s.kernel_size > kMostDepth || s.taps() * s.in_channels > kMostDepth || s.stride > kMostDepth) return false;
  FewChannels<T> c{.d = d,
                   .branch_stride = x_strides[0],
                   .sample_stride = x_strides[1],
                   .row_stride = x_strides[2],
                   .plane_stride = x_strides[4],
                   .inner_stride = x_strides[3],
                   .planes = s.in_channels,
                   .run = 0,
                   .groups = 1,
                   .tile_shift = 0,
                   .tiles_x = 0,
                   .tiles_y = 0,
                   .panels = int(ceil_div(s.out_channels, kPanel)),
                   .reciprocal = 0,
                   .rows = 0};
  c.reciprocal = 65536 / c.row_values() + 1;
  c.rows = sizeof(T) == 4 ? c.depth() : c.depth() <= 32 ? 32 : 64;
  choose_tile(c);
  // Where less than a quarter of a tile is filled, and for filters of many outputs, the matrix product is better.
  const int64_t pixels = c.tiles() * c.groups * kGroup;
  if (int64_t(s.out_pixels()) * 4 < pixels || !c.fits(device.shared_limit())) return false;
  const bool contiguous_pixels = x_strides[4] == 1 && x_strides[3] == s.in_channels;
  if (contiguous_pixels) c.planes = 1, c.inner_stride = 1;
  c.run = contiguous_pixels ? c.input_pitch() : c.input_width();
  const bool vectors = whole_vectors<T>({s.out_channels}, {d.filters, d.out});
  const auto run = [&](auto kernel) {
    device.launch_early(kernel, c.blocks(), kThreads, c.shared_bytes(), c);
    return true;
  };
  if constexpr (sizeof(T) == 4) {
    return vectors ? run(few_channels<T, 1, true>) : run(few_channels<T, 1, false>);
  } else {
    if (c.rows == 32) return vectors ? run(few_channels<T, 2, true>) : run(few_channels<T, 2, false>);
    return vectors ? run(few_channels<T, 4, true>) : run(few_channels<T, 4, false>);
  }
}
template bool run_few_channels(const Device&, const Convolution<float>&, const int64_t (&)[5]);
template bool run_few_channels(const Device&, const Convolution<half>&, const int64_t (&)[5]);
template bool run_few_channels(const Device&, const Convolution<bfloat16>&, const int64_t (&)[5]);

}  // namespace hne
