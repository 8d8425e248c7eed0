// Tiles of a depthwise convolution in shared memory. A block copies the pixels under a tile of output pixels there, in
// float32 and transformed once, and its threads then slide down the columns of the tile.
//
// With `rows` output rows a thread, kernel k and stride s, a value of the tile is read from shared memory about
// k (1 + (k - 1) / (s rows)) / s times instead of k^2 / s^2 times from the caches. Tiles overlap by k - s rows and
// columns; the second reader finds them in the cache.
//
// Order of accesses: a thread writes its part of the tile, all meet at a barrier, all read, and all meet at a second
// barrier before the next tile is written. Only plain loads and stores are used, so the barriers suffice.
#pragma once

#include "normalization.h"
#include "shape.h"

namespace hne {

// Address of a value `pixels` pixels later in a feature map, by one multiply-add.
template <typename T>
HNE_DEVICE T* pixels_from(T* at, int pixels, int channels) {
  using Byte = std::conditional_t<std::is_const_v<T>, const unsigned char, unsigned char>;
  const int bytes = channels * int(sizeof(T));
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(at) + int64_t(pixels) * bytes);
}

// Address `bytes` later in a feature map.
template <typename T>
HNE_DEVICE T* bytes_from(T* at, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const unsigned char, unsigned char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(at) + bytes);
}

// Zeros unless `wanted`. Only the load of whole words is conditional, not the conversion of each value.
template <int width, typename T>
HNE_DEVICE void load_or_zeros(float (&values)[width], const T* from, bool wanted) {
  static_assert(kPiece<T, width> == width);
  using Word = std::conditional_t<sizeof(T) * width % 4 == 0, uint32_t, uint16_t>;
  using Words = Vector<Word, sizeof(T) * width / sizeof(Word)>;
  Words words = {};
  if (wanted) words = *reinterpret_cast<const Words*>(from);
  if constexpr (std::is_same_v<T, bfloat16> && width % 2 == 0) {
#pragma unroll
    for (int i = 0; i < width; i += 2) {
      values[i] = __builtin_bit_cast(float, words.values[i / 2] << 16);
      values[i + 1] = __builtin_bit_cast(float, words.values[i / 2] & 0xffff0000u);
    }
  } else {
    const auto v = __builtin_bit_cast(Vector<T, width>, words);
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = float(v.values[i]);
  }
}

// How the output pixels of a branch are divided. A thread has `width` channels of `rows` output pixels, one below
// another; a block has `across` threads side by side in the channels, then `columns`, `bands` (of `rows` pixels) and
// `samples`. Threads beyond their product only help to copy.
template <int width, int rows, int kernel, int stride>
struct DepthwiseTiling {
  static constexpr int kAtOnce = 4;  // loads of a thread in flight
  int batch, height, map_width, out_height, out_width, channels;
  int across, groups, columns, bands, samples;
  int tiles_x, tiles_y, tiles;           // of a row, of a column, of the branch
  int tile_height, tile_width;           // pixels under a tile of one sample
  int lanes, lanes_rows, lanes_columns;  // `lanes` = kThreads / across pixels are copied at a time: rows and the rest

  DepthwiseTiling(int batch_, int height_, int width_, int out_height_, int out_width_, int channels_)
      : batch(batch_),
        height(height_),
        map_width(width_),
        out_height(out_height_),
        out_width(out_width_),
        channels(channels_) {
    // 64 channels, fewer where more than an eighth of the threads would have none.
    const int vectors = int(ceil_div(channels, width)), least = width > 1 ? 4 : 16;
    const auto padded = [&](int a) { return ceil_div(vectors, a) * a; };
    across = 64 / width;
    while (across > 1 && (across / 2 >= vectors || (across > least && padded(across) * 8 > vectors * 9))) across /= 2;
    groups = int(ceil_div(vectors, across));
    lanes = kThreads / across;
    const auto up = [](int a, int b) { return int(ceil_div(a, std::max(b, 1))); };
    tiles_x = up(out_width, lanes), columns = up(out_width, tiles_x);
    const int most_bands = std::max(lanes / std::max(columns, 1), 1);
    tiles_y = up(out_height, rows * most_bands), bands = up(up(out_height, tiles_y), rows);
    samples = std::max(std::min(lanes / std::max(columns * bands, 1), batch), 1);
    tiles = tiles_x * tiles_y * up(batch, samples);
    tile_height = (bands * rows - 1) * stride + kernel, tile_width = (columns - 1) * stride + kernel;
    lanes_rows = lanes / tile_width, lanes_columns = lanes % tile_width;
  }
  explicit DepthwiseTiling(const Shape& s)
      : DepthwiseTiling(s.batch, s.height, s.width, s.out_height, s.out_width, s.in_channels) {}

  // Values of a tile.
  HNE_BOTH int size() const { return samples * tile_height * tile_width * across * width; }
  HNE_BOTH int block_channels() const { return across * width; }
  HNE_BOTH int pitch() const { return tile_width * across * width; }  // of its rows

  // The place of a thread in every tile of its block.
  struct Lane {
    int at, channel, column, band, sample;  // `at` is from 0 to `lanes` - 1, `channel` relative to those of the block
    bool works;
    int copy_row, copy_column;  // the first pixel that it copies
  };
  HNE_DEVICE Lane lane() const {
    Lane l;
    l.at = int(threadIdx.x) / across, l.channel = (int(threadIdx.x) - l.at * across) * width;
    const int above = l.at / columns;
    l.column = l.at - above * columns, l.sample = above / bands, l.band = above - l.sample * bands;
    l.works = l.sample < samples;
    l.copy_row = l.at / tile_width, l.copy_column = l.at - l.copy_row * tile_width;
    return l;
  }
  // Place in the tile of the value under the first tap of a thread's first output pixel.
  HNE_DEVICE int under(const Lane& l) const {
    const int row = l.sample * tile_height + l.band * rows * stride;
    return (row * tile_width + l.column * stride) * across * width + l.channel;
  }

  // First output pixel and sample of a tile.
  struct Origin {
    int sample, y, x;
  };
  HNE_DEVICE Origin origin(int tile) const {
    const int row = tile / tiles_x, first = row / tiles_y;
    return {first * samples, (row - first * tiles_y) * bands * rows, (tile - row * tiles_x) * columns};
  }
  HNE_DEVICE void advance(Origin& o) const {  // to the next tile
    o.x += columns;
    if (o.x < out_width) return;
    o.x = 0, o.y += bands * rows;
    if (o.y < out_height) return;
    o.y = 0, o.sample += samples;
  }
  // Output pixels of a tile.
  HNE_DEVICE int pixels(const Origin& o) const {
    return min(samples, batch - o.sample) * min(bands * rows, out_height - o.y) * min(columns, out_width - o.x);
  }

  // kAtOnce pixels of a sample that a thread copies.
  struct Pixels {
    int64_t at[kAtOnce];   // of the thread's first channel, in bytes from the branch's first value
    bool inside[kAtOnce];  // whether an output pixel reads it

    template <typename T>
    HNE_DEVICE void read(float (&values)[kAtOnce][width], const T* branch) const {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) load_or_zeros(values[i], bytes_from(branch, at[i]), inside[i]);
    }
  };

  // Copies the pixels under a tile of values of type T. Calls read(values, pixels) for kAtOnce of them at a time, and
  // replaces those that no output pixel reads by zeros. `first` is the block's first channel.
  template <typename T, typename Read>
  HNE_DEVICE void copy(float* tile, const Lane& l, const Origin& o, int padding, int first, const Read& read) const {
    if (first + l.channel >= channels) return;  // no thread reads them
    const int top = o.y * stride - padding, left = o.x * stride - padding;
    // A NaN beyond the pixels under the last output pixel stays unread.
    const unsigned right = unsigned(min(map_width, (out_width - 1) * stride + kernel - padding));
    const int step = lanes * across * width, tile_size = tile_height * tile_width * across * width;
    const int end_column = left + tile_width;
    const int height_there = min(height, (out_height - 1) * stride + kernel - padding);
    for (int sample = 0; sample < samples; ++sample) {
      const unsigned bottom = o.sample + sample < batch ? unsigned(height_there) : 0;
      int place = sample * tile_size + l.at * across * width + l.channel;
      const int end = (sample + 1) * tile_size;
      int row = top + l.copy_row, column = left + l.copy_column;
      Pixels pixels;
      const int pixel = min(o.sample + sample, batch - 1) * height * map_width;
      const int64_t sample_at =
          int64_t(pixel) * recompute(channels * int(sizeof(T))) + (first + l.channel) * int(sizeof(T));
      for (; place < end; place += kAtOnce * step) {
        float values[kAtOnce][width];
        const int bytes = recompute(channels * int(sizeof(T)));  // here: an address is one multiply-add of 32 bits
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          pixels.inside[i] = unsigned(row) < bottom && unsigned(column) < right;
          pixels.at[i] = sample_at + int64_t(row * map_width + column) * bytes;
          row += lanes_rows, column += lanes_columns;
          const bool wraps = column >= end_column;
          row += wraps ? 1 : 0, column -= wraps ? tile_width : 0;
        }
        read(values, pixels);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
          for (int j = 0; j < width; ++j) values[i][j] = pixels.inside[i] ? values[i][j] : 0.0f;
          if (place + i * step < end) store<width>(tile + place + i * step, values[i]);
        }
      }
    }
  }
};

}  // namespace hne
