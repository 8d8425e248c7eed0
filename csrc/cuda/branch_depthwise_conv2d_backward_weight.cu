// Gradient of a depthwise branch convolution's weight.
//
//   G branches, M output pixels each   bytes moved at least                            multiply-adds
//   plain                              grad + x + weight (+ partial sums, twice)       G M C k^2
//   training                           grad + y + x + weight (+ partial sums, twice)   the same
#include "convolution.h"
#include "depthwise_tile.h"

namespace hne {
namespace {

// Channels of a thread: a thread keeps the sums of nine taps for each.
template <bool vectors>
constexpr int kWidth = vectors ? 4 : 1;
// Output rows of a thread in a tile. With stride 2 a tile has twice as many pixels in each direction; in float32 the
// values of four rows would not fit into the registers.
template <typename T, int stride>
constexpr int kRows = stride > 1 || sizeof(T) > 2 ? 2 : 4;

template <typename T, int width, int stride>
using Tiling = DepthwiseTiling<width, kRows<T, stride>, 3, stride>;

// 3x3 filters: partial[split][branch][tap][channel], sums over one split of a branch's tiles. x is normalised once a
// tile; grad and y are read by the only thread that needs them.
template <typename T, int width, int stride>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_backward_weight_kernel(const WeightGradient<T> d, const Tiling<T, width, stride> tiling, float* partial,
                                     const int splits) {
  constexpr int taps = 9, rows = kRows<T, stride>;
  const Shape& s = d.s;
  const int at = int(blockIdx.x) / tiling.groups, group = int(blockIdx.x) - at * tiling.groups;
  const int split = at / s.branches, branch = at - split * s.branches, parent = branch / s.replicate;
  const int begin = int(int64_t(tiling.tiles) * split / splits);
  const int end = int(int64_t(tiling.tiles) * (split + 1) / splits);
  const int channels = tiling.block_channels(), first = group * channels;
  const auto own = tiling.lane();
  const bool works = own.works && first + own.channel < s.in_channels;

  float* const memory = static_cast<float*>(shared_memory());
  const SharedAffine affine{memory, channels}, output{memory + 3 * channels, channels};
  float* const tile = memory + 6 * channels;
  if (d.normalization.present()) affine.fill(d.normalization, parent, first);
  if (d.output.present()) output.fill(d.output, branch, first);
  block_sync();

  const T* const x = d.x + int64_t(parent) * s.in_rows() * s.in_channels;
  const int64_t out_begin = int64_t(branch) * s.rows() * s.in_channels;
  const float* const under = tile + tiling.under(own);
  float sums[taps][width] = {};
  auto o = tiling.origin(begin);
  for (int index = begin; index < end; ++index, tiling.advance(o)) {
    tiling.template copy<T>(tile, own, o, s.padding, first, [&](auto& values, const auto& from) {
      from.read(values, x);
      if (!d.normalization.present()) return;
      d.normalization.apply(affine.template at<width>(own.channel), values);
    });
    const int oy = o.y + own.band * rows, ox = o.x + own.column, sample = o.sample + own.sample;
    const int wanted = works && sample < s.batch && ox < s.out_width ? min(rows, s.out_height - oy) : 0;
    const int pixel = (sample * s.out_height + oy) * s.out_width + ox;
    const auto place = [&](int row, int bytes) {
      return int64_t(pixel + row * s.out_width) * bytes + (first + own.channel) * int(sizeof(T));
    };
    const int bytes = recompute(s.in_channels * int(sizeof(T)));  // of a pixel
    float g[rows][width];
#pragma unroll
    for (int r = 0; r < rows; ++r)
      if (r < wanted) load<width>(g[r], bytes_from(d.output.grad + out_begin, place(r, bytes)));
    if (d.output.present()) {
      const int again = recompute(bytes);  // fewer registers than the addresses
      float y[rows][width];
#pragma unroll
      for (int r = 0; r < rows; ++r)
        if (r < wanted) load<width>(y[r], bytes_from(d.output.y + out_begin, place(r, again)));
      const auto of_output = output.template at<width>(own.channel);
#pragma unroll
      for (int r = 0; r < rows; ++r)
        if (r < wanted) d.output.apply(of_output, g[r], y[r]);
    }
    block_sync();
    if (wanted > 0) {
#pragma unroll
      for (int row = 0; row < (rows - 1) * stride + 3; ++row) {
#pragma unroll
        for (int kx = 0; kx < 3; ++kx) {
          float a[width];
          load<width>(a, under + row * tiling.pitch() + kx * channels);
#pragma unroll
          for (int r = 0; r < rows; ++r) {
            const int ky = row - r * stride;
            if (ky < 0 || ky >= 3 || r >= wanted) continue;
#pragma unroll
            for (int i = 0; i < width; ++i) sums[ky * 3 + kx][i] += a[i] * g[r][i];
          }
        }
      }
    }
    block_sync();
  }

  // The sums of all threads with the same channels, in order.
#pragma unroll
  for (int tap = 0; tap < taps; ++tap)
    store<width>(tile + (int(threadIdx.x) / tiling.across * taps + tap) * channels + own.channel, sums[tap]);
  block_sync();
  const int first_tap = int(threadIdx.x) / channels, channel = int(threadIdx.x) - first_tap * channels;
  if (first + channel >= s.in_channels) return;
  for (int tap = first_tap; tap < taps; tap += kThreads / channels) {
    float sum = 0;
    for (int lane = 0; lane < tiling.lanes; ++lane) sum += tile[(lane * taps + tap) * channels + channel];
    partial[((int64_t(split) * s.branches + branch) * taps + tap) * s.in_channels + first + channel] = sum;
  }
}

// Filters of any size: a block has one tap, and reads x once more for each.
template <typename T, int width>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_backward_weight_tap_kernel(const WeightGradient<T> d, const int across, float* partial,
                                         const int splits) {
  const Shape& s = d.s;
  const int lanes = kThreads / across, groups = (s.in_channels / width + across - 1) / across;
  int at = int(blockIdx.x);
  const int first = at % groups * across * width, channel = first + int(threadIdx.x) % across * width;
  at /= groups;
  const int tap = at % s.taps(), ky = tap / s.kernel_size, kx = tap - ky * s.kernel_size;
  at /= s.taps();
  const int branch = at % s.branches, split = at / s.branches, parent = branch / s.replicate;
  const int begin = int(int64_t(s.rows()) * split / splits), end = int(int64_t(s.rows()) * (split + 1) / splits);
  float sums[width] = {};
  if (channel < s.in_channels) {
    const int64_t branch_begin = int64_t(branch) * s.rows() * s.in_channels + channel;
    const T* from = d.x + int64_t(parent) * s.in_rows() * s.in_channels + channel;
    Affine<width> output = {}, affine = {};
    if (d.output.present()) output = d.output.template at<width>(branch, channel);
    if (d.normalization.present()) affine = d.normalization.template at<width>(parent, channel);
    for (int row = begin + int(threadIdx.x) / across; row < end; row += lanes) {
      const int64_t pixel = s.source(row, ky, kx);
      if (pixel < 0) continue;
      float g[width], y[width], a[width];
      load<width>(g, d.output.grad + branch_begin + int64_t(row) * s.in_channels);
      if (d.output.present()) {
        load<width>(y, d.output.y + branch_begin + int64_t(row) * s.in_channels);
        d.output.apply(output, g, y);
      }
      load<width>(a, from + pixel * s.in_channels);
      if (d.normalization.present()) d.normalization.apply(affine, a);
#pragma unroll
      for (int i = 0; i < width; ++i) sums[i] += g[i] * a[i];
    }
  }
  float* const scratch = static_cast<float*>(shared_memory());
  add_lanes(scratch, sums, across);
  if (int(threadIdx.x) < across * width && first + int(threadIdx.x) < s.in_channels)
    partial[((int64_t(split) * s.branches + branch) * s.taps() + tap) * s.in_channels + first + int(threadIdx.x)] =
        scratch[threadIdx.x];
}

// Enough blocks for a large GPU, each with enough work. The number depends on the shapes alone: the same order of
// additions on every GPU.
int64_t splits_of(int64_t blocks, int64_t wanted, int64_t units) {
  return std::clamp<int64_t>(wanted / std::max<int64_t>(blocks, 1), 1, std::max<int64_t>(units, 1));
}

}  // namespace

template <typename T>
Tensor depthwise_backward_weight(const Device& device, const WeightGradient<T>& d, const Tensor& x) {
  const Shape& s = d.s;
  const bool vectors = whole_vectors<T>({s.in_channels}, {d.output.grad, d.output.y, d.x});
  Tensor partial;
  const auto allocate = [&](int64_t splits) {
    partial = torch::stable::new_empty(x, {splits, s.branches, s.taps(), s.in_channels}, ScalarType::Float);
    return mutable_data<float>(partial);
  };
  const auto run = [&](auto all_vectors, auto stride) {
    constexpr int width = kWidth<decltype(all_vectors)::value>, fixed_stride = decltype(stride)::value;
    const Tiling<T, width, fixed_stride> tiling(s);
    const int64_t blocks = int64_t(s.branches) * tiling.groups;
    const int64_t splits = splits_of(blocks, 256, tiling.tiles);  // two blocks for each of 128 multiprocessors
    const int64_t floats = 6 * tiling.block_channels() + std::max<int64_t>(tiling.size(), kThreads * 9 * width);
    device.launch(depthwise_backward_weight_kernel<T, width, fixed_stride>, blocks * splits, kThreads,
                  floats * int64_t(sizeof(float)), d, tiling, allocate(splits), int(splits));
  };
  const auto by_stride = [&](auto all_vectors) {
    if (s.stride == 1)
      run(all_vectors, std::integral_constant<int, 1>{});
    else
      run(all_vectors, std::integral_constant<int, 2>{});
  };
  if (s.kernel_size == 3 && s.stride <= 2) {
    if (vectors)
      by_stride(std::true_type{});
    else
      by_stride(std::false_type{});
    return partial;
  }
  dispatch_width<T>(vectors && d.output.vectors() && d.normalization.vectors(), [&](auto width) {
    constexpr int w = decltype(width)::value;
    const int across = RowPartition<w>(s.branches, s.rows(), s.in_channels).across;
    const int64_t blocks = s.branches * ceil_div(s.in_channels, across * w) * s.taps();
    const int64_t splits = splits_of(blocks, 1024, ceil_div(s.rows(), 256));
    device.launch(depthwise_backward_weight_tap_kernel<T, w>, blocks * splits, kThreads, RowPartition<w>::kScratch, d,
                  across, allocate(splits), int(splits));
  });
  return partial;
}
template Tensor depthwise_backward_weight(const Device&, const WeightGradient<float>&, const Tensor&);
template Tensor depthwise_backward_weight(const Device&, const WeightGradient<half>&, const Tensor&);
template Tensor depthwise_backward_weight(const Device&, const WeightGradient<bfloat16>&, const Tensor&);

}  // namespace hne
