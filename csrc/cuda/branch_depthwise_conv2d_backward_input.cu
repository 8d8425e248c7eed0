// Gradient of a depthwise branch convolution's input; in training also of its normalisation.
//
//   G branches, M output pixels each   bytes moved at least       multiply-adds
//   plain                              grad + weight + x          G M C k^2
//   training                           grad + y + weight + 2 x    the same
#include "convolution.h"
#include "depthwise_tile.h"

namespace hne {
namespace {

// 3x3 filters: the gradient of x is itself a convolution of the output gradient, with the taps in reverse order. With
// stride 2 and odd padding p, input pixels 2b and 2b + 1 are one unit, in each direction: with c = b + (p - 1) / 2,
//   gradient[2b] = grad[c] weight[1],  gradient[2b + 1] = grad[c + 1] weight[0] + grad[c] weight[2].
// So `kWindow` values of the output gradient are under a unit of `stride` input pixels in each direction.
template <int stride>
constexpr int kWindow = stride > 1 ? 2 : 3;
// Tap that leads from value `place` of the window to pixel `pixel` of the unit; negative where none does.
template <int stride>
HNE_DEVICE constexpr int tap_of(int place, int pixel) {
  if (stride == 1) return 2 - place;
  return place == 0 ? 1 + pixel : pixel - 1;
}

// Rows of units of a thread in a tile.
template <int stride>
constexpr int kRows = stride > 1 ? 2 : 4;

template <int width, int stride>
using Tiling = DepthwiseTiling<width, kRows<stride>, kWindow<stride>, 1>;

// A block has a split of a parent's tiles. It copies the output gradients of one child after the other, transformed
// once, and adds up.
template <typename T, int width, int stride>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_backward_input_kernel(const InputGradient<T> d, const Tiling<width, stride> tiling, const int splits,
                                    const Partials partials) {
  constexpr int kAtOnce = 4, taps = 9, window = kWindow<stride>, rows = kRows<stride>;
  const Shape& s = d.s;
  const int at = int(blockIdx.x) / tiling.groups, group = int(blockIdx.x) - at * tiling.groups;
  const int parent = at / splits, split = at - parent * splits;
  const int first_child = parent * s.replicate, last = min(s.branches, first_child + s.replicate);
  const int begin = int(int64_t(tiling.tiles) * split / splits);
  const int end = int(int64_t(tiling.tiles) * (split + 1) / splits);
  const int channels = tiling.block_channels(), first = group * channels;
  const int padding = stride > 1 ? -(s.padding / 2) : 2 - s.padding;
  const auto own = tiling.lane();
  const int channel = first + own.channel;
  const bool works = own.works && channel < s.in_channels;

  float* const filter = static_cast<float*>(shared_memory());     // of one child: [tap][channel of the block]
  const SharedAffine output{filter + taps * channels, channels};  // of that child
  const SharedAffine affine{filter + (taps + 3) * channels, channels};
  float* const tile = affine.vectors + 3 * channels;
  if (d.normalization.present()) affine.fill(d.normalization, parent, first);
  block_sync();
  const float* const under = tile + tiling.under(own);
  const int64_t sample_bytes = int64_t(s.pixels()) * s.in_channels * int(sizeof(T));
  const int64_t parent_begin = int64_t(parent) * s.batch * sample_bytes + int64_t(channel) * int(sizeof(T));
  Pair<width> norm_sums;  // gradients of scale and shift
  int loaded = -1;
  auto o = tiling.origin(begin);
  for (int index = begin; index < end; ++index, tiling.advance(o)) {
    const int sample = o.sample + own.sample;
    const int iy = (o.y + own.band * rows) * stride, ix = (o.x + own.column) * stride;
    const bool inside = works && sample < s.batch;
    const int wanted_rows = inside ? s.height - iy : 0, wanted_columns = s.width - ix;
    float sums[rows * stride * stride][width] = {};  // [row][column]
    for (int branch = first_child; branch < last; ++branch) {
      if (branch != loaded) {  // all have read the previous filter before the last barrier
        const T* const from = d.filters + int64_t(branch) * taps * s.in_channels + channel;
        for (int tap = channel < s.in_channels ? own.at : taps; tap < taps; tap += tiling.lanes) {
          float values[width];
          load<width>(values, from + tap * s.in_channels);
          store<width>(filter + tap * channels + own.channel, values);
        }
        if (d.output.present()) output.fill(d.output, branch, first);
        loaded = branch;
        block_sync();
      }
      const int64_t branch_begin = int64_t(branch) * s.rows() * s.in_channels;
      tiling.template copy<T>(tile, own, o, padding, first, [&](auto& values, const auto& from) {
        from.read(values, d.output.grad + branch_begin);
        if (!d.output.present()) return;
        float y[kAtOnce][width];
        from.read(y, d.output.y + branch_begin);
        const auto of_output = output.template at<width>(own.channel);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) d.output.apply(of_output, values[i], y[i]);
      });
      block_sync();
      if (wanted_rows > 0 && wanted_columns > 0) {
        float w[taps][width];
#pragma unroll
        for (int tap = 0; tap < taps; ++tap) load<width>(w[tap], filter + tap * channels + own.channel);
#pragma unroll
        for (int row = 0; row < rows + window - 1; ++row) {
#pragma unroll
          for (int x = 0; x < window; ++x) {
            float g[width];
            load<width>(g, under + row * tiling.pitch() + x * channels);
#pragma unroll
            for (int r = 0; r < rows; ++r) {
              if (row < r || row >= r + window) continue;
#pragma unroll
              for (int py = 0; py < stride; ++py) {
#pragma unroll
                for (int px = 0; px < stride; ++px) {
                  const int ky = tap_of<stride>(row - r, py), kx = tap_of<stride>(x, px);
                  if (ky < 0 || kx < 0) continue;
#pragma unroll
                  for (int i = 0; i < width; ++i) sums[(r * stride + py) * stride + px][i] += g[i] * w[ky * 3 + kx][i];
                }
              }
            }
          }
        }
      }
      block_sync();
    }
    if (wanted_rows <= 0 || wanted_columns <= 0) continue;
    const int64_t sample_begin = parent_begin + sample * sample_bytes;
#pragma unroll
    for (int p = 0; p < rows * stride * stride; p += kAtOnce) {
      float x[kAtOnce][width];
      const auto wanted = [&](int i) { return i / stride < wanted_rows && i % stride < wanted_columns; };
      const auto place = [&](int i, int bytes) {
        return sample_begin + int64_t((iy + i / stride) * s.width + ix + i % stride) * bytes;
      };
      const int bytes = recompute(s.in_channels * int(sizeof(T)));  // of a pixel
      if (d.normalization.present()) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) load_or_zeros(x[i], bytes_from(d.x, place(p + i, bytes)), wanted(p + i));
        const auto of_input = affine.template at<width>(own.channel);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          if (wanted(p + i)) d.normalization.backward(of_input, x[i], sums[p + i], norm_sums);
      }
      const int again = recompute(bytes);  // fewer registers than the addresses
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (wanted(p + i)) store<width>(bytes_from(d.out, place(p + i, again)), sums[p + i]);
    }
  }
  if (partials.values != nullptr) norm_sums.put(partials, {parent, split, first}, tile, tiling.across);
}

// Other filters and strides: a thread computes the gradient of 16 bytes of channels of one input pixel at a time.
template <typename T, int width>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_backward_input_pixel_kernel(const InputGradient<T> d, const RowPartition<width> partition,
                                          const Partials partials) {
  const Shape& s = d.s;
  const auto work = partition.work();
  const int parent = work.place.branch, channel = work.channel;
  const int last = min(s.branches, (parent + 1) * s.replicate);
  Pair<width> norm_sums;  // gradients of scale and shift
  for (int row = work.begin; row < work.end; row += work.step) {
    const int line = row / s.width, ix = row - line * s.width, sample = line / s.height, iy = line - sample * s.height;
    // In each direction every stride-th tap of the kernel reaches the pixel; a later tap belongs to an earlier output.
    const int first_oy = (iy + s.padding) / s.stride, first_ky = iy + s.padding - first_oy * s.stride;
    const int first_ox = (ix + s.padding) / s.stride, first_kx = ix + s.padding - first_ox * s.stride;
    float sums[width] = {};
    for (int branch = parent * s.replicate; branch < last; ++branch) {
      Affine<width> output = {};
      if (d.output.present()) output = d.output.template at<width>(branch, channel);
      const int64_t sample_begin = (int64_t(branch) * s.batch + sample) * s.out_pixels() * s.in_channels + channel;
      const T* filters = d.filters + int64_t(branch) * s.taps() * s.in_channels + channel;
      for (int ky = first_ky, oy = first_oy; ky < s.kernel_size && oy >= 0; ky += s.stride, --oy) {
        if (oy >= s.out_height) continue;
        for (int kx = first_kx, ox = first_ox; kx < s.kernel_size && ox >= 0; kx += s.stride, --ox) {
          if (ox >= s.out_width) continue;
          const int64_t at = sample_begin + (int64_t(oy) * s.out_width + ox) * s.in_channels;
          float g[width], w[width];
          load<width>(g, d.output.grad + at);
          if (d.output.present()) {
            float y[width];
            load<width>(y, d.output.y + at);
            d.output.apply(output, g, y);
          }
          load<width>(w, filters + (ky * s.kernel_size + kx) * s.in_channels);
#pragma unroll
          for (int i = 0; i < width; ++i) sums[i] += g[i] * w[i];
        }
      }
    }
    const int64_t to = (int64_t(parent) * s.in_rows() + row) * s.in_channels + channel;
    if (d.normalization.present()) {
      float x[width];
      load<width>(x, d.x + to);
      d.normalization.backward(d.normalization.template at<width>(parent, channel), x, sums, norm_sums);
    }
    store<width>(d.out + to, sums);
  }
  if (partials.values != nullptr)
    norm_sums.put(partials, work.place, static_cast<float*>(shared_memory()), partition.across);
}

template <typename T, int width, int stride>
void run_tiles(const Device& device, const InputGradient<T>& d, ChannelReduction* sums) {
  const Shape& s = d.s;
  const Tiling<width, stride> tiling(s.batch, s.out_height, s.out_width, int(ceil_div(s.height, stride)),
                                     int(ceil_div(s.width, stride)), s.in_channels);
  const int64_t blocks = int64_t(s.parents) * tiling.groups;
  // Two blocks for each of 128 multiprocessors. The number depends on the shapes alone: the same order of additions on
  // every GPU.
  const int splits = int(std::clamp<int64_t>(256 / std::max<int64_t>(blocks, 1), 1, std::max(tiling.tiles, 1)));
  const Partials partials = sums != nullptr ? sums->allocate(Pair<width>::kPlanes, splits) : Partials{};
  const int64_t floats = 15 * tiling.block_channels() + std::max<int64_t>(tiling.size(), kThreads * width);
  device.launch(depthwise_backward_input_kernel<T, width, stride>, blocks * splits, kThreads,
                floats * int64_t(sizeof(float)), d, tiling, splits, partials);
}

}  // namespace

template <typename T>
void depthwise_backward_input(const Device& device, const InputGradient<T>& d, ChannelReduction* sums) {
  if (d.s.kernel_size == 3 && (d.s.stride == 1 || (d.s.stride == 2 && d.s.padding % 2 == 1))) {
    if (d.vectors()) return d.s.stride == 1 ? run_tiles<T, 4, 1>(device, d, sums) : run_tiles<T, 4, 2>(device, d, sums);
    return d.s.stride == 1 ? run_tiles<T, 1, 1>(device, d, sums) : run_tiles<T, 1, 2>(device, d, sums);
  }
  dispatch_width<T>(d.vectors(), [&](auto width) {
    constexpr int w = decltype(width)::value;
    const RowPartition<w> partition(d.s.parents, d.s.in_rows(), d.s.in_channels);
    const Partials partials = sums != nullptr ? sums->allocate(Pair<w>::kPlanes, partition.splits()) : Partials{};
    device.launch(depthwise_backward_input_pixel_kernel<T, w>, partition.blocks(), kThreads, RowPartition<w>::kScratch,
                  d, partition, partials);
  });
}
template void depthwise_backward_input(const Device&, const InputGradient<float>&, ChannelReduction*);
template void depthwise_backward_input(const Device&, const InputGradient<half>&, ChannelReduction*);
template void depthwise_backward_input(const Device&, const InputGradient<bfloat16>&, ChannelReduction*);

}  // namespace hne
