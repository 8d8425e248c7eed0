// A whole bottleneck or inverted residual in one kernel (inference). The expanded feature map exists only in shared
// memory.
//
//   G branches, M output pixels, E expanded channels   bytes moved at least          multiply-adds
//   forward                                            x + weights + out             G M (C_in E s^2 + k^2 E + E C_out)
//                                                      (x about (1 + 2 / 8)^2 times  (+ G M C_in C_out for a shortcut)
//                                                      for the halo of 8x8 tiles)
//
// A block has a tile of at most 8 x 8 output pixels of one sample of one branch. It loads the input pixels under the
// tile and its halo once. Then, for 32 expanded channels at a time, it computes the first 1x1 convolution into shared
// memory, the depthwise convolution from there, and the second 1x1 convolution into registers, which hold all output
// channels of the tile. The weights of the next product are copied while the current product runs.
#include "bottleneck.h"

namespace hne {
namespace {

// Copies 16 bytes of values from device to shared memory: `valid` values, then zeros. `base` is any valid address.
template <typename T, bool vectors>
HNE_DEVICE void copy_vector(T* to, const T* from, int valid, const T* base) {
  constexpr int width = 16 / int(sizeof(T));
  if constexpr (vectors) {
    copy16(to, valid > 0 ? from : base, valid > 0);
  } else {
#pragma unroll
    for (int i = 0; i < width; ++i) to[i] = i < valid ? from[i] : T(0.0f);
  }
}

// Copies rows [first_row, + rows) and columns [first_column, + columns) of a packed 1x1 filter [panel][depth][16].
template <typename T, bool vectors>
HNE_DEVICE void copy_panels(T* to, int pitch, const T* packed, int depth, int channels, int first_row, int rows,
                            int first_column, int columns) {
  constexpr int width = 16 / int(sizeof(T));
  const int per_row = columns / width, present = (channels + int(kPanel) - 1) / int(kPanel) * int(kPanel);
#pragma unroll 1
  for (int at = int(threadIdx.x); at < rows * per_row; at += kThreads) {
    const int row = at / per_row, column = at % per_row * width;
    const int k = first_row + row, n = first_column + column;
    const bool inside = k < depth && n < present;
    const T* from = packed + (int64_t(n / int(kPanel)) * depth + k) * kPanel + n % int(kPanel);
    copy_vector<T, vectors>(to + row * pitch + column, from, inside ? width : 0, packed);
  }
}

// NT: fragments of 8 output channels in each of the 4 warps side by side; at most 32 * NT output channels. Loops over a
// tile are not unrolled, which leaves the registers to the sums.
template <typename P, int NT, bool vectors>
__global__ void __launch_bounds__(kThreads, NT* int(sizeof(typename P::Type)) > 8 ? 1 : 2)
    bottleneck(const Bottleneck<typename P::Type> b) {
  using T = typename P::Type;
  constexpr int width = P::kVector, MT = 2;
  const Shape& s = b.s;
  T* const memory = static_cast<T*>(shared_memory());
  T *const x = memory, *const expanded = memory + b.expanded_at(), *const filtered = memory + b.filtered_at();
  T *const expand = memory + b.expand_at(), *const project = memory + b.project_at();
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;

  int at = int(blockIdx.x);
  const int tile_x = at % b.tiles_x() * b.tile_width;
  at /= b.tiles_x();
  const int tile_y = at % b.tiles_y() * b.tile_height;
  at /= b.tiles_y();
  const int sample = at % s.batch, branch = at / s.batch;
  const int top = tile_y * s.stride - s.padding, left = tile_x * s.stride - s.padding;
  const int halo_width = b.halo_width(), halo = b.halo_height() * halo_width, halo_rows = b.halo_rows();

  const auto inside = [&](int pixel) {
    const int iy = top + pixel / halo_width, ix = left + pixel % halo_width;
    return pixel < halo && iy >= 0 && iy < s.height && ix >= 0 && ix < s.width;
  };
  const T* const from = b.x + (int64_t(branch / s.replicate) * s.batch + sample) * s.pixels() * s.in_channels;
  const int per_pixel = b.depth() / width;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < halo_rows * per_pixel; i += kThreads) {
    const int pixel = i / per_pixel, channel = i % per_pixel * width;
    const bool there = inside(pixel) && channel < s.in_channels;
    const int64_t source = int64_t(top + pixel / halo_width) * s.width + left + pixel % halo_width;
    copy_vector<T, vectors>(x + pixel * b.x_pitch() + channel, there ? from + source * s.in_channels + channel : from,
                            there ? s.in_channels - channel : 0, b.x);
  }
  const int64_t panels_of_middle = Bottleneck<T>::up(b.middle, int(kPanel)),
                panels_of_out = Bottleneck<T>::up(s.out_channels, int(kPanel));
  const T* const expand_weight = b.expand + branch * panels_of_middle * s.in_channels;
  const T* const project_weight = b.project + branch * panels_of_out * b.middle;
  copy_panels<T, vectors>(expand, b.expand_pitch(), expand_weight, s.in_channels, b.middle, 0, b.depth(), 0, kChunk);
  copy_commit();

  const int warp_row = warp / 4 * 32, warp_column = warp % 4 * 8 * NT;
  const bool works = warp_column < s.out_channels;
  const Rows<T> filtered_rows{{filtered + warp_row * b.chunk_pitch(), b.chunk_pitch()}};
  const Across<T> project_columns{project + warp_column, b.project_pitch()};
  float sums[MT][NT][4] = {};

  for (int first = 0; first < b.middle; first += kChunk) {
    const int present = min(kChunk, b.middle - first), chunk = Bottleneck<T>::up(present, 16);
    copy_panels<T, vectors>(project, b.project_pitch(), project_weight, b.middle, s.out_channels, first, chunk, 0,
                            b.columns());
    copy_commit();
    copy_wait<1>();  // for x and the weights of the first product
    block_sync();

    // The first product: a warp computes 16 pixels times 16 channels of the chunk at a time.
    const int tiles = halo_rows / 16 * (chunk / 16);
#pragma unroll 1
    for (int tile = warp; tile < tiles; tile += kThreads / kWarp) {
      const int pixel = tile / (chunk / 16) * 16, channel = tile % (chunk / 16) * 16;
      float part[1][2][4] = {};
      multiply<P, 1, 2>(part, Rows<T>{{x + pixel * b.x_pitch(), b.x_pitch()}},
                        Across<T>{expand + channel, b.expand_pitch()}, b.depth());
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = pixel + sum_row(lane, e), column = channel + 8 * j + sum_column(lane, e);
          float value = 0;  // the depthwise convolution pads with zeros
          if (inside(row) && column < present)
            value = clamp(part[0][j][e] + float(b.expand_bias[int64_t(branch) * b.middle + first + column]), b.range);
          expanded[row * b.chunk_pitch() + column] = T(value);
        }
    }
    block_sync();
    if (first + kChunk < b.middle)
      copy_panels<T, vectors>(expand, b.expand_pitch(), expand_weight, s.in_channels, b.middle, 0, b.depth(),
                              first + kChunk, kChunk);
    copy_commit();

    // The depthwise convolution: a thread computes 16 bytes of channels of a pixel at a time.
#pragma unroll 1
    for (int i = int(threadIdx.x); i < kTilePixels * chunk / width; i += kThreads) {
      const int pixel = i / (chunk / width), channel = i % (chunk / width) * width;
      const int y = pixel / b.tile_width, column = pixel % b.tile_width;
      float values[width] = {};
      if (y < b.tile_height) {
#pragma unroll 1
        for (int ky = 0; ky < s.kernel_size; ++ky)
#pragma unroll 3
          for (int kx = 0; kx < s.kernel_size; ++kx) {
            const int source = (y * s.stride + ky) * halo_width + column * s.stride + kx;
            const T* filter =
                b.depthwise + (int64_t(branch) * s.taps() + ky * s.kernel_size + kx) * b.middle + first + channel;
            float v[width], w[width];
            load<width>(v, expanded + source * b.chunk_pitch() + channel);
            if constexpr (vectors) {
              if (channel >= present) continue;
              load<width>(w, filter);
            } else {
#pragma unroll
              for (int e = 0; e < width; ++e) w[e] = channel + e < present ? float(filter[e]) : 0.0f;
            }
#pragma unroll
            for (int e = 0; e < width; ++e) values[e] += v[e] * w[e];
          }
#pragma unroll
        for (int e = 0; e < width; ++e)
          values[e] = channel + e < present
                          ? clamp(values[e] + float(b.depthwise_bias[int64_t(branch) * b.middle + first + channel + e]),
                                  b.range)
                          : 0.0f;
      }
      store<width>(filtered + pixel * b.chunk_pitch() + channel, values);
    }
    copy_wait<1>();  // for the weights of the second product
    block_sync();
    if (works) multiply<P, MT, NT>(sums, filtered_rows, project_columns, chunk);
    block_sync();  // before the weights are overwritten
  }

  // The shortcut is one more product, of the input pixels at multiples of the stride.
  const int centre = s.padding * halo_width + s.padding;
  const auto input_pixel = [&](int pixel) {  // index in the halo of the input under an output pixel
    const int y = pixel / b.tile_width, column = pixel % b.tile_width;
    return y < b.tile_height ? centre + y * s.stride * halo_width + column * s.stride : 0;
  };
  if (b.shortcut != nullptr) {
    const T* const weight = b.shortcut + branch * panels_of_out * s.in_channels;
    for (int first = 0; first < b.depth(); first += kChunk) {
      const int chunk = min(kChunk, b.depth() - first);
      copy_panels<T, vectors>(project, b.project_pitch(), weight, s.in_channels, s.out_channels, first, chunk, 0,
                              b.columns());
      copy_commit();
      copy_wait<0>();
      block_sync();
      const auto row = [&](int m) { return x + input_pixel(warp_row + m) * b.x_pitch() + first; };
      if (works) multiply<P, MT, NT>(sums, RowsOf<T, decltype(row)>{row}, project_columns, chunk);
      block_sync();
    }
  }
  copy_wait<0>();
  block_sync();

  T* const staged = expand;
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int pixel = warp_row + 16 * i + sum_row(lane, e), channel = warp_column + 8 * j + sum_column(lane, e);
        if (channel >= s.out_channels) continue;
        float value = sums[i][j][e] + float(b.project_bias[int64_t(branch) * s.out_channels + channel]);
        if (b.shortcut != nullptr) value += float(b.shortcut_bias[int64_t(branch) * s.out_channels + channel]);
        if (b.identity) value += float(x[input_pixel(pixel) * b.x_pitch() + channel]);
        staged[pixel * b.project_pitch() + channel] = T(clamp(value, b.final_range));
      }
  block_sync();
  T* const to = b.out + (int64_t(branch) * s.batch + sample) * s.out_pixels() * s.out_channels;
  constexpr int out_width = vectors ? width : 1;
  const int per_out = s.out_channels / out_width;
  for (int i = int(threadIdx.x); i < b.tile_height * b.tile_width * per_out; i += kThreads) {
    const int pixel = i / per_out, channel = i % per_out * out_width;
    const int oy = tile_y + pixel / b.tile_width, ox = tile_x + pixel % b.tile_width;
    if (oy >= s.out_height || ox >= s.out_width) continue;
    *reinterpret_cast<Vector<T, out_width>*>(to + (int64_t(oy) * s.out_width + ox) * s.out_channels + channel) =
        *reinterpret_cast<const Vector<T, out_width>*>(staged + pixel * b.project_pitch() + channel);
  }
}

template <typename P, int NT>
void run_bottleneck(const Device& device, const Bottleneck<typename P::Type>& b, bool vectors) {
  device.launch(vectors ? bottleneck<P, NT, true> : bottleneck<P, NT, false>, b.blocks(), kThreads, b.shared_bytes(),
                b);
}

}  // namespace

// Launches with the largest tile that fits into shared memory; false if none does.
template <typename T>
bool run_fused(const Device& device, Bottleneck<T> b) {
  if (b.s.out_channels > 256) return false;
  bool fits = false;
  for (const auto& [height, width] : {std::pair{8, 8}, {4, 8}, {4, 4}}) {
    b.tile_height = height, b.tile_width = width;
    // In 64 bits, since the halo grows with the stride.
    const int64_t halo =
        (int64_t(height - 1) * b.s.stride + b.s.kernel_size) * (int64_t(width - 1) * b.s.stride + b.s.kernel_size);
    if (halo > 65536 || b.s.in_channels > 65536) continue;
    if ((fits = b.shared_bytes() <= device.shared_limit())) break;
  }
  if (!fits) return false;
  const bool vectors = whole_vectors<T>({b.s.in_channels, b.middle, b.s.out_channels},
                                        {b.x, b.expand, b.depthwise, b.project, b.shortcut, b.out});
  const auto run = [&](auto precision) {
    using P = decltype(precision);
    if (b.s.out_channels <= 64)
      run_bottleneck<P, 2>(device, b, vectors);
    else if (b.s.out_channels <= 128)
      run_bottleneck<P, 4>(device, b, vectors);
    else
      run_bottleneck<P, 8>(device, b, vectors);
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
template bool run_fused(const Device&, Bottleneck<float>);
template bool run_fused(const Device&, Bottleneck<half>);
template bool run_fused(const Device&, Bottleneck<bfloat16>);

}  // namespace hne
