// Depthwise branch convolution; in training it normalises its input as it reads it and sums up statistics of its
// result.
//
//   G branches, M output pixels each   bytes moved at least                           multiply-adds
//   plain                              x + weight + out                               G M C k^2
//   training                           x + weight + y (+ statistics of every split)   the same
#include "convolution.h"
#include "depthwise_tile.h"

namespace hne {
namespace {

// Bias, activation and storage of one output pixel, for the channels from `channel` on.
template <typename T, int width>
HNE_DEVICE void finish(const Convolution<T>& d, const float (&bias)[width], float (&sums)[width], T* to) {
#pragma unroll
  for (int i = 0; i < width; ++i) sums[i] += bias[i];
  if (d.range.low == 0) {  // an activation
#pragma unroll
    for (int i = 0; i < width; ++i) sums[i] = clamp(sums[i], d.range);
  }
  store<width>(to, sums);
}

// Output rows of a thread in a tile. With stride 2 a tile has twice as many pixels in each direction.
template <int stride>
constexpr int kRows = stride > 1 ? 2 : 4;

template <int width, int stride>
using Tiling = DepthwiseTiling<width, kRows<stride>, 3, stride>;

// 3x3 filters: a block has a split of a branch's tiles, and its threads have their filters in registers.
template <typename T, int width, int stride>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_forward_kernel(const Convolution<T> d, const Tiling<width, stride> tiling, const int splits,
                             const Partials partials) {
  constexpr int taps = 9, rows = kRows<stride>;
  const Shape& s = d.s;
  const int at = int(blockIdx.x) / tiling.groups, group = int(blockIdx.x) - at * tiling.groups;
  const int branch = at / splits, split = at - branch * splits, parent = branch / s.replicate;
  const int begin = int(int64_t(tiling.tiles) * split / splits);
  const int end = int(int64_t(tiling.tiles) * (split + 1) / splits);
  const int channels = tiling.block_channels(), first = group * channels;
  const auto own = tiling.lane();
  const int channel = first + own.channel;
  const bool works = own.works && channel < s.in_channels;

  float* const scratch = static_cast<float*>(shared_memory());
  const SharedAffine affine{scratch + kThreads * width, channels};
  float* const tile = affine.vectors + 3 * channels;
  if (d.normalization.present()) affine.fill(d.normalization, parent, first);
  float filter[taps][width] = {}, bias[width] = {};
  if (works) {
    const T* const weight = d.filters + int64_t(branch) * taps * s.in_channels + channel;
#pragma unroll
    for (int tap = 0; tap < taps; ++tap) load<width>(filter[tap], weight + tap * s.in_channels);
    if (d.bias != nullptr) load<width>(bias, d.bias + int64_t(branch) * s.in_channels + channel);
  }
  block_sync();

  const T* const x = d.x + int64_t(parent) * s.in_rows() * s.in_channels;
  T* const out = d.out + int64_t(branch) * s.rows() * s.in_channels + channel;
  const float* const under = tile + tiling.under(own);
  Moments<width> moments;
  int pixels = 0;
  auto o = tiling.origin(begin);
  for (int index = begin; index < end; ++index, tiling.advance(o)) {
    tiling.template copy<T>(tile, own, o, s.padding, first, [&](auto& values, const auto& from) {
      from.read(values, x);
      if (d.normalization.present()) d.normalization.apply(affine.template at<width>(own.channel), values);
    });
    block_sync();
    const int oy = o.y + own.band * rows, ox = o.x + own.column, sample = o.sample + own.sample;
    const int wanted = works && sample < s.batch && ox < s.out_width ? min(rows, s.out_height - oy) : 0;
    pixels += tiling.pixels(o);
    if (wanted > 0) {
      float sums[rows][width] = {};
#pragma unroll
      for (int row = 0; row < (rows - 1) * stride + 3; ++row) {
#pragma unroll
        for (int kx = 0; kx < 3; ++kx) {
          float a[width];
          load<width>(a, under + row * tiling.pitch() + kx * channels);
#pragma unroll
          for (int r = 0; r < rows; ++r) {
            const int ky = row - r * stride;
            if (ky < 0 || ky >= 3) continue;
#pragma unroll
            for (int i = 0; i < width; ++i) sums[r][i] += a[i] * filter[ky * 3 + kx][i];
          }
        }
      }
      T* const to = pixels_from(out, (sample * s.out_height + oy) * s.out_width + ox, s.in_channels);
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        if (r >= wanted) break;
        finish<T, width>(d, bias, sums[r], pixels_from(to, r * s.out_width, s.in_channels));
        if (partials.values != nullptr) moments.add(sums[r]);
      }
    }
    block_sync();
  }
  if (partials.values != nullptr) moments.put(partials, {branch, split, first}, scratch, tiling.across, pixels);
}

// Filters of any size: a thread computes the channels of one output pixel at a time.
template <typename T, int width>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_forward_pixel_kernel(const Convolution<T> d, const RowPartition<width> partition,
                                   const Partials partials) {
  const Shape& s = d.s;
  const auto work = partition.work();
  const int channel = work.channel, branch = work.place.branch;
  const T* weight = d.filters + int64_t(branch) * s.taps() * s.in_channels + channel;
  float* const scratch = static_cast<float*>(shared_memory());
  const SharedAffine affine{scratch + kThreads * width, partition.across * width};
  if (d.normalization.present()) {
    affine.fill(d.normalization, branch / s.replicate, work.place.channel);
    block_sync();
  }
  Moments<width> moments;
  for (int at = work.begin; at < work.end; at += work.step) {
    const int row = at / s.out_width, ox = at - row * s.out_width;
    const int sample = row / s.out_height, oy = row - sample * s.out_height;
    float sums[width] = {}, bias[width] = {};
    const T* x = d.x + (int64_t(branch / s.replicate) * s.batch + sample) * s.pixels() * s.in_channels + channel;
    for (int ky = 0; ky < s.kernel_size; ++ky) {
      const int iy = oy * s.stride + ky - s.padding;
      if (iy < 0 || iy >= s.height) continue;
      for (int kx = 0; kx < s.kernel_size; ++kx) {
        const int ix = ox * s.stride + kx - s.padding;
        if (ix < 0 || ix >= s.width) continue;
        float values[width], filter[width];
        load<width>(values, pixels_from(x, iy * s.width + ix, s.in_channels));
        if (d.normalization.present()) affine.apply(d.normalization.range, channel - work.place.channel, values);
        load<width>(filter, weight + (ky * s.kernel_size + kx) * s.in_channels);
#pragma unroll
        for (int i = 0; i < width; ++i) sums[i] += values[i] * filter[i];
      }
    }
    if (d.bias != nullptr) load<width>(bias, d.bias + int64_t(branch) * s.in_channels + channel);
    finish<T, width>(d, bias, sums, d.out + (int64_t(branch) * s.rows() + at) * s.in_channels + channel);
    if (partials.values != nullptr) moments.add(sums);
  }
  if (partials.values == nullptr) return;
  moments.put(partials, work.place, scratch, partition.across, work.split_end - work.split_begin);
}

template <typename T, int width, int stride>
void run_tiles(const Device& device, const Convolution<T>& d, ChannelReduction* moments) {
  const Shape& s = d.s;
  const Tiling<width, stride> tiling(s);
  const int64_t blocks = int64_t(s.branches) * tiling.groups;
  // Statistics are summed up once a block: two blocks for each of 128 multiprocessors. The number depends on the shapes
  // alone: the same order of additions on every GPU.
  const int splits = int(std::clamp<int64_t>((moments != nullptr ? 256 : 1024) / std::max<int64_t>(blocks, 1), 1,
                                             std::max(tiling.tiles, 1)));
  const Partials partials = moments != nullptr ? moments->allocate(Moments<width>::kPlanes, splits) : Partials{};
  const int64_t floats = kThreads * width + 3 * tiling.block_channels() + int64_t(tiling.size());
  device.launch(depthwise_forward_kernel<T, width, stride>, blocks * splits, kThreads, floats * int64_t(sizeof(float)),
                d, tiling, splits, partials);
}

}  // namespace

template <typename T>
void depthwise_forward(const Device& device, const Convolution<T>& d, ChannelReduction* moments) {
  const Shape& s = d.s;
  if (s.kernel_size == 3 && s.stride <= 2) {
    if (d.vectors())
      return s.stride == 1 ? run_tiles<T, 4, 1>(device, d, moments) : run_tiles<T, 4, 2>(device, d, moments);
    return s.stride == 1 ? run_tiles<T, 1, 1>(device, d, moments) : run_tiles<T, 1, 2>(device, d, moments);
  }
  dispatch_width<T>(d.vectors(), [&](auto width) {
    constexpr int w = decltype(width)::value;
    const RowPartition<w> partition(s.branches, s.rows(), s.in_channels);
    const Partials partials =
        moments != nullptr ? moments->allocate(Moments<w>::kPlanes, partition.splits()) : Partials{};
    device.launch(depthwise_forward_pixel_kernel<T, w>, partition.blocks(), kThreads,
                  RowPartition<w>::kScratch + SharedAffine::bytes(partition.across * w), d, partition, partials);
  });
}
template void depthwise_forward(const Device&, const Convolution<float>&, ChannelReduction*);
template void depthwise_forward(const Device&, const Convolution<half>&, ChannelReduction*);
template void depthwise_forward(const Device&, const Convolution<bfloat16>&, ChannelReduction*);

}  // namespace hne
