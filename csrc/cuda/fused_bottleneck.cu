// A whole bottleneck or inverted residual in one kernel (inference): the expanded map lives in shared memory alone.
//
//   G branches, M output pixels, E expanded channels   bytes moved at least          multiply-adds
//   forward                                            x + weights + out             G M (C_in E s^2 + k^2 E + E C_out)
//                                                      (x about (1 + 2 / 8)^2 times  (+ G M C_in C_out for a shortcut)
//                                                      for the halo of 8x8 tiles)
//
// A block has a tile of at most 8 x 8 output pixels of one sample of one branch. It loads the input pixels under the
// tile and its halo once. Then, for 32 expanded channels at a time: the first 1x1 convolution into shared memory, the
// depthwise convolution from there, and the second 1x1 convolution into registers, which hold all output channels of
// the tile. The weights of the next product are on their way while the current one runs.
#include "convolution.h"
#include "depthwise.h"

namespace hne {
namespace {

constexpr int kTilePixels = 64, kChunk = 32;  // output pixels of a block, expanded channels at a time

template <typename T>
struct Bottleneck {
  Shape s;  // of the depthwise convolution, between the channels of x and of the output
  const T *x, *expand, *expand_bias, *depthwise, *depthwise_bias, *project, *project_bias, *shortcut, *shortcut_bias;
  T* out;
  int middle, tile_height, tile_width;
  bool identity;
  Clamp<float> range, final_range;

  HNE_BOTH static int up(int a, int b) { return (a + b - 1) / b * b; }
  HNE_BOTH int tiles_y() const { return (s.out_height + tile_height - 1) / tile_height; }
  HNE_BOTH int tiles_x() const { return (s.out_width + tile_width - 1) / tile_width; }
  int64_t blocks() const { return int64_t(s.branches) * s.batch * tiles_y() * tiles_x(); }

  // The input pixels of a tile, its halo included.
  HNE_BOTH int halo_height() const { return (tile_height - 1) * s.stride + s.kernel_size; }
  HNE_BOTH int halo_width() const { return (tile_width - 1) * s.stride + s.kernel_size; }
  HNE_BOTH int halo_rows() const { return up(halo_height() * halo_width(), 16); }

  // Shared memory, in values: x [halo][C_in], expanded [halo][chunk], filtered [64][chunk], weights of the first
  // product [C_in][chunk] and of the second [chunk][C_out]. The output is staged where the weights were.
  HNE_BOTH int depth() const { return up(s.in_channels, 16); }
  HNE_BOTH int columns() const { return up(s.out_channels, 64); }
  HNE_BOTH int x_pitch() const { return depth() + kRowPadding<T>; }
  HNE_BOTH int chunk_pitch() const { return kChunk + kRowPadding<T>; }
  HNE_BOTH int expand_pitch() const { return kChunk + kColumnPadding; }
  HNE_BOTH int project_pitch() const { return columns() + kColumnPadding; }
  HNE_BOTH int expanded_at() const { return halo_rows() * x_pitch(); }
  HNE_BOTH int filtered_at() const { return expanded_at() + halo_rows() * chunk_pitch(); }
  HNE_BOTH int expand_at() const { return filtered_at() + kTilePixels * chunk_pitch(); }
  HNE_BOTH int project_at() const { return expand_at() + depth() * expand_pitch(); }
  HNE_BOTH int64_t shared_bytes() const {
    const int64_t weights = int64_t(depth()) * expand_pitch() + kChunk * project_pitch();
    const int64_t staged = int64_t(kTilePixels) * project_pitch();
    return (int64_t(halo_rows()) * (x_pitch() + chunk_pitch()) + kTilePixels * chunk_pitch() +
            (weights > staged ? weights : staged)) *
           int64_t(sizeof(T));
  }
};

// `count` consecutive values of a row in shared memory from values in device memory, zeros from `valid` of them on.
template <typename T, bool vectors>
HNE_DEVICE void copy_row_part(T* to, const T* from, int valid, const T* base) {
  constexpr int width = 16 / int(sizeof(T));
  if constexpr (vectors) {
    copy16(to, valid > 0 ? from : base, valid > 0);
  } else {
#pragma unroll
    for (int i = 0; i < width; ++i) to[i] = i < valid ? from[i] : T(0.0f);
  }
}

// Rows [first_row, first_row + rows) and columns [first_column, + columns) of a packed 1x1 filter [panel][depth][16].
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
    copy_row_part<T, vectors>(to + row * pitch + column, from, inside ? width : 0, packed);
  }
}

// Loops over parts of a tile are not unrolled: the registers are for the sums.
// NT: fragments of 8 output channels that each of 4 x 2 warps holds; 64 * NT / 2 output channels at most.
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
    copy_row_part<T, vectors>(x + pixel * b.x_pitch() + channel, there ? from + source * s.in_channels + channel : from,
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
    copy_wait<1>();  // x and the weights of the first product
    block_sync();

    // The first product: 16 pixels times 16 channels of the chunk to a warp at a time.
    const int units = halo_rows / 16 * (chunk / 16);
#pragma unroll 1
    for (int unit = warp; unit < units; unit += kThreads / kWarp) {
      const int pixel = unit / (chunk / 16) * 16, channel = unit % (chunk / 16) * 16;
      float part[1][2][4] = {};
      multiply<P, 1, 2>(part, Rows<T>{{x + pixel * b.x_pitch(), b.x_pitch()}},
                        Across<T>{expand + channel, b.expand_pitch()}, b.depth());
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = pixel + sum_row(lane, e), column = channel + 8 * j + sum_column(lane, e);
          float value = 0;  // beyond the map the depthwise convolution reads zeros
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

    // The depthwise convolution: 16 bytes of channels of a pixel to a thread at a time.
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
    copy_wait<1>();  // the weights of the second product
    block_sync();
    if (works) multiply<P, MT, NT>(sums, filtered_rows, project_columns, chunk);
    block_sync();  // before the weights are overwritten
  }

  // The shortcut is one more product, of the input pixels that the stride meets.
  const int centre = s.padding * halo_width + s.padding;
  const auto input_pixel = [&](int pixel) {  // of an output pixel of the tile, in the halo
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

// Picks a tile that shared memory has room for, and launches; false if there is none.
template <typename T>
bool run_fused(const Device& device, Bottleneck<T> b) {
  if (b.s.out_channels > 256) return false;
  bool fits = false;
  for (const auto& [height, width] : {std::pair{8, 8}, {4, 8}, {4, 4}}) {
    b.tile_height = height, b.tile_width = width;
    // In 64 bits: a large stride has a large halo.
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

// The same as three or four kernels, with the expanded map in device memory.
template <typename T>
void run_composed(const Device& device, const Geometry& g, const Bottleneck<T>& b, const Tensor& like) {
  Geometry expand = g, filter = g, project = g, shortcut = g;
  expand.kernel_size = expand.stride = 1, expand.padding = 0;
  expand.out_height = g.height, expand.out_width = g.width, expand.out_channels = b.middle;
  const Tensor expanded = torch::stable::new_empty(like, {g.branches, g.batch, g.height, g.width, b.middle});
  const Tensor filtered = torch::stable::new_empty(like, {g.branches, g.batch, g.out_height, g.out_width, b.middle});
  const Forward<T, true> first{.s = Shape(expand),
                               .left_base = b.x,
                               .right_base = b.expand,
                               .bias = b.expand_bias,
                               .range = b.range,
                               .out = mutable_data<T>(expanded)};
  run_forward(device, first);

  filter.replicate = 1, filter.parents = g.branches, filter.in_channels = filter.out_channels = b.middle;
  run_depthwise(device, Depthwise<T>{.s = Shape(filter),
                                     .x = data<T>(expanded),
                                     .weight = b.depthwise,
                                     .bias = b.depthwise_bias,
                                     .range = b.range,
                                     .out = mutable_data<T>(filtered)});

  shortcut.kernel_size = 1, shortcut.padding = 0;
  Tensor added = filtered;
  if (b.shortcut != nullptr) {
    added = torch::stable::new_empty(like, {g.branches, g.batch, g.out_height, g.out_width, g.out_channels});
    const Forward<T, true> side{.s = Shape(shortcut),
                                .left_base = b.x,
                                .right_base = b.shortcut,
                                .bias = b.shortcut_bias,
                                .out = mutable_data<T>(added)};
    run_forward(device, side);
  }

  project = filter;
  project.kernel_size = project.stride = 1, project.padding = 0, project.out_channels = g.out_channels;
  project.height = g.out_height, project.width = g.out_width;
  const Forward<T, true> last{.s = Shape(project),
                              .left_base = data<T>(filtered),
                              .right_base = b.project,
                              .bias = b.project_bias,
                              .add = b.shortcut != nullptr ? data<T>(added)
                                     : b.identity          ? b.x
                                                           : nullptr,
                              .add_replicate = b.shortcut != nullptr ? 1 : int(g.replicate),
                              .range = b.final_range,
                              .out = b.out};
  run_forward(device, last);
}

Tensor fused_bottleneck(const Tensor& x_in, const Tensor& expand_in, const Tensor& expand_bias_in,
                        const Tensor& depthwise_in, const Tensor& depthwise_bias_in, const Tensor& project_in,
                        const Tensor& project_bias_in, const std::optional<Tensor>& shortcut_in,
                        const std::optional<Tensor>& shortcut_bias_in, int64_t stride, int64_t replicate,
                        const std::string& activation, bool identity, const std::string& final_activation) {
  const auto sizes = x_in.sizes();
  const Geometry g =
      bottleneck_geometry({sizes.begin(), sizes.end()}, expand_in, expand_bias_in, depthwise_in, depthwise_bias_in,
                          project_in, project_bias_in, shortcut_in, shortcut_bias_in, stride, replicate, identity);
  check_kind("x", x_in, x_in);
  const auto prepare = [&](const Tensor& t) {
    check_kind("weights", t, x_in);
    return torch::stable::contiguous(t);
  };
  const auto prepare_optional = [&](const std::optional<Tensor>& t) {
    return t.has_value() ? std::optional<Tensor>(prepare(*t)) : std::nullopt;
  };
  const Shape shape(g);
  Geometry middle = g;
  middle.in_channels = middle.out_channels = depthwise_in.size(3);
  static_cast<void>(Shape(middle));  // fits as well
  const Device device(x_in);
  const Tensor x = prepare(x_in), expand = prepare(expand_in), expand_bias = prepare(expand_bias_in);
  const Tensor depthwise = prepare(depthwise_in), depthwise_bias = prepare(depthwise_bias_in);
  const Tensor project = prepare(project_in), project_bias = prepare(project_bias_in);
  const std::optional<Tensor> shortcut = prepare_optional(shortcut_in),
                              shortcut_bias = prepare_optional(shortcut_bias_in);
  Tensor out = torch::stable::new_empty(x, {g.branches, g.batch, g.out_height, g.out_width, g.out_channels});
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const Bottleneck<T> b{shape,
                          data<T>(x),
                          data<T>(expand),
                          data<T>(expand_bias),
                          data<T>(depthwise),
                          data<T>(depthwise_bias),
                          data<T>(project),
                          data<T>(project_bias),
                          data<T>(shortcut),
                          data<T>(shortcut_bias),
                          mutable_data<T>(out),
                          int(depthwise.size(3)),
                          0,
                          0,
                          identity,
                          Clamp<float>::named(activation),
                          Clamp<float>::named(final_activation)};
    if (!run_fused(device, b)) run_composed(device, g, b, x);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hne, HNE_DISPATCH_KEY, m) { m.impl("fused_bottleneck", TORCH_BOX(&fused_bottleneck)); }

}  // namespace hne
