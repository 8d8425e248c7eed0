// Depthwise branch convolution; in training it normalises its input as it reads it and sums up statistics of its
// result. A thread computes runs of neighbouring pixels of 16 bytes of channels, so that a value of x is read from
// device memory once and a few times from the caches.
//
//   G branches, M output pixels each   bytes moved at least                           multiply-adds
//   plain                              x + weight + out                               G M C k^2
//   training                           x + weight + y (+ statistics of every split)   the same
#include "convolution.h"

namespace hne {
namespace {

// Runs of neighbouring output pixels within a row of the feature map.
template <int length>
struct Runs {
  int per_row;

  HNE_BOTH explicit Runs(const Shape& s) : per_row((s.out_width + length - 1) / length) {}
  HNE_BOTH int64_t count(const Shape& s) const { return int64_t(s.batch) * s.out_height * per_row; }
  // Number of the branch's pixels before a run.
  HNE_DEVICE int pixels_before(const Shape& s, int run) const {
    return run / per_row * s.out_width + min(run % per_row * length, s.out_width);
  }
};

// Longer runs would reread less of x, but their sums and a row of the filter would not fit into the registers.
template <int kernel>
constexpr int run_length = kernel > 0 ? 2 : 1;

// `kernel` and `fixed_stride` are 0 where the sizes are known only at run time.
template <typename T, int width, int kernel, int fixed_stride>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_forward_kernel(const Convolution<T> d, const RowPartition<width> partition, const Partials partials) {
  constexpr int length = run_length<kernel>;
  const Shape& s = d.s;
  const int size = kernel > 0 ? kernel : s.kernel_size, stride = fixed_stride > 0 ? fixed_stride : s.stride;
  const Runs<length> runs(s);
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
    const int row = at / runs.per_row, first = (at - row * runs.per_row) * length;
    const int sample = row / s.out_height, oy = row - sample * s.out_height;
    float sums[length][width];
#pragma unroll
    for (int j = 0; j < length; ++j)
#pragma unroll
      for (int i = 0; i < width; ++i) sums[j][i] = 0;
    const T* x = d.x + (int64_t(branch / s.replicate) * s.batch + sample) * s.pixels() * s.in_channels + channel;
#pragma unroll
    for (int ky = 0; ky < size; ++ky) {
      const int iy = oy * stride + ky - s.padding;
      if (iy < 0 || iy >= s.height) continue;
      float filter[kernel > 0 ? kernel : 1][width];
      if constexpr (kernel > 0) {
#pragma unroll
        for (int kx = 0; kx < kernel; ++kx) load<width>(filter[kx], weight + (ky * kernel + kx) * s.in_channels);
      }
#pragma unroll
      for (int column = 0; column < (length - 1) * stride + size; ++column) {
        const int ix = first * stride + column - s.padding;
        if (ix < 0 || ix >= s.width) continue;
        float values[width];
        load<width>(values, x + (int64_t(iy) * s.width + ix) * s.in_channels);
        if (d.normalization.present()) affine.apply(d.normalization.range, channel - work.place.channel, values);
#pragma unroll
        for (int j = 0; j < length; ++j) {
          const int kx = column - j * stride;
          if (kx < 0 || kx >= size) continue;
          if constexpr (kernel == 0) load<width>(filter[0], weight + (ky * size + kx) * s.in_channels);
#pragma unroll
          for (int i = 0; i < width; ++i) sums[j][i] += values[i] * filter[kernel > 0 ? kx : 0][i];
        }
      }
    }

    float bias[width] = {};
    if (d.bias != nullptr) load<width>(bias, d.bias + int64_t(branch) * s.in_channels + channel);
    T* out = d.out + (int64_t(branch) * s.rows() + int64_t(row) * s.out_width) * s.in_channels + channel;
#pragma unroll
    for (int j = 0; j < length; ++j) {
      if (first + j >= s.out_width) break;
#pragma unroll
      for (int i = 0; i < width; ++i) sums[j][i] = clamp(sums[j][i] + bias[i], d.range);
      store<width>(out + (first + j) * int64_t(s.in_channels), sums[j]);
      if (partials.values != nullptr) moments.add(sums[j]);
    }
  }
  if (partials.values == nullptr) return;
  moments.put(partials, work.place, scratch, partition.across,
              runs.pixels_before(s, work.split_end) - runs.pixels_before(s, work.split_begin));
}

}  // namespace

template <typename T>
void depthwise_forward(const Device& device, const Convolution<T>& d, ChannelReduction* moments) {
  const Shape& s = d.s;
  dispatch_width<T>(d.vectors(), [&](auto width) {
    constexpr int w = decltype(width)::value;
    const auto run = [&](auto kernel, int64_t runs) {
      const RowPartition<w> partition(s.branches, runs, s.in_channels);
      const Partials partials =
          moments != nullptr ? moments->allocate(Moments<w>::kPlanes, partition.splits()) : Partials{};
      device.launch(+kernel, partition.blocks(), kThreads,
                    RowPartition<w>::kScratch + SharedAffine::bytes(partition.across * w), d, partition, partials);
    };
    if (s.kernel_size == 3 && s.stride == 1)
      run(depthwise_forward_kernel<T, w, 3, 1>, Runs<run_length<3>>(s).count(s));
    else if (s.kernel_size == 3 && s.stride == 2)
      run(depthwise_forward_kernel<T, w, 3, 2>, Runs<run_length<3>>(s).count(s));
    else
      run(depthwise_forward_kernel<T, w, 0, 0>, Runs<run_length<0>>(s).count(s));
  });
}
template void depthwise_forward(const Device&, const Convolution<float>&, ChannelReduction*);
template void depthwise_forward(const Device&, const Convolution<half>&, ChannelReduction*);
template void depthwise_forward(const Device&, const Convolution<bfloat16>&, ChannelReduction*);

}  // namespace hne
