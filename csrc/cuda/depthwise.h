// Depthwise convolution with bias and activation. Every value of x is read from device memory once and a few times from
// the caches: a thread computes four neighbouring pixels of 16 bytes of channels.
#pragma once

#include "shape.h"

namespace hne {

template <typename T>
struct Depthwise {
  Shape s;
  const T *x, *weight;  // weight [branch][tap][channel]
  const T* bias;        // [branch][channel] or null
  Clamp<float> range;
  T* out;
};

// kernel and stride are 0 where only known at run time.
template <typename T, int width, int kernel, int fixed_stride>
__global__ void __launch_bounds__(kThreads, kernel > 0 ? 2 : 4) depthwise(const Depthwise<T> d) {
  constexpr int run = kernel > 0 ? 4 : 1;  // pixels of a thread
  const Shape& s = d.s;
  const int size = kernel > 0 ? kernel : s.kernel_size, stride = fixed_stride > 0 ? fixed_stride : s.stride;
  const int groups = s.in_channels / width, runs = (s.out_width + run - 1) / run;
  uint32_t at = thread_number();
  const int channel = int(at % groups) * width;
  at /= groups;
  const int first = int(at % runs) * run;
  at /= runs;
  const int oy = int(at % s.out_height);
  at /= s.out_height;
  const int sample = int(at % s.batch), branch = int(at / s.batch);
  if (branch >= s.branches) return;

  float sums[run][width];
#pragma unroll
  for (int j = 0; j < run; ++j)
#pragma unroll
    for (int i = 0; i < width; ++i) sums[j][i] = 0;
  const T* x = d.x + (int64_t(branch / s.replicate) * s.batch + sample) * s.pixels() * s.in_channels + channel;
  const T* weight = d.weight + int64_t(branch) * s.taps() * s.in_channels + channel;
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
    for (int column = 0; column < (run - 1) * stride + size; ++column) {
      const int ix = first * stride + column - s.padding;
      if (ix < 0 || ix >= s.width) continue;
      float values[width];
      load<width>(values, x + (int64_t(iy) * s.width + ix) * s.in_channels);
#pragma unroll
      for (int j = 0; j < run; ++j) {
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
  T* out = d.out + ((int64_t(branch) * s.batch + sample) * s.out_height + oy) * s.out_width * s.in_channels + channel;
#pragma unroll
  for (int j = 0; j < run; ++j) {
    if (first + j >= s.out_width) break;
#pragma unroll
    for (int i = 0; i < width; ++i) sums[j][i] = clamp(sums[j][i] + bias[i], d.range);
    store<width>(out + (first + j) * int64_t(s.in_channels), sums[j]);
  }
}

template <typename T>
void run_depthwise(const Device& device, const Depthwise<T>& d) {
  const Shape& s = d.s;
  dispatch_width<T>(whole_vectors<T>({s.in_channels}, {d.x, d.weight, d.bias, d.out}), [&](auto width) {
    constexpr int w = decltype(width)::value;
    const auto run = [&](auto kernel, int pixels) {
      const int64_t threads =
          int64_t(s.branches) * s.batch * s.out_height * ceil_div(s.out_width, pixels) * (s.in_channels / w);
      device.launch(+kernel, blocks_of_threads(threads), kThreads, 0, d);
    };
    if (s.kernel_size == 3 && s.stride == 1)
      run(depthwise<T, w, 3, 1>, 4);
    else if (s.kernel_size == 3 && s.stride == 2)
      run(depthwise<T, w, 3, 2>, 4);
    else
      run(depthwise<T, w, 0, 0>, 1);
  });
}

}  // namespace hne
