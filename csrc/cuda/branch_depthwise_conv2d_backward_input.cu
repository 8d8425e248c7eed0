// Gradient of a depthwise branch convolution's input; in training also of its normalisation.
//
//   G branches, M output pixels each   bytes moved at least       multiply-adds
//   plain                              grad + weight + x          G M C k^2
//   training                           grad + y + weight + 2 x    the same
#include "convolution.h"

namespace hne {
namespace {

// A thread computes the gradient of 16 bytes of channels of one input pixel at a time.
template <typename T, int width>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_backward_input_kernel(const InputGradient<T> d, const RowPartition<width> partition,
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

}  // namespace

template <typename T>
void depthwise_backward_input(const Device& device, const InputGradient<T>& d, ChannelReduction* sums) {
  dispatch_width<T>(d.vectors(), [&](auto width) {
    constexpr int w = decltype(width)::value;
    const RowPartition<w> partition(d.s.parents, d.s.in_rows(), d.s.in_channels);
    const Partials partials = sums != nullptr ? sums->allocate(Pair<w>::kPlanes, partition.splits()) : Partials{};
    device.launch(depthwise_backward_input_kernel<T, w>, partition.blocks(), kThreads, RowPartition<w>::kScratch, d,
                  partition, partials);
  });
}
template void depthwise_backward_input(const Device&, const InputGradient<float>&, ChannelReduction*);
template void depthwise_backward_input(const Device&, const InputGradient<half>&, ChannelReduction*);
template void depthwise_backward_input(const Device&, const InputGradient<bfloat16>&, ChannelReduction*);

}  // namespace hne
