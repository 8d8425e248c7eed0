// Rows of the feature maps of a bottleneck in the cache (inference), in float as in int8.
#pragma once

#include <utility>

#include "geometry.h"
#include "op.h"

namespace hne {

// A bottleneck computes bands of output rows. The expanded feature map (the output of the first 1x1 convolution) is
// stored with the padding of the depthwise convolution, in rows of [padded width][middle]; row 0 is the first padded
// one. Its values are those of sums: float for bfloat16, which depthwise convolutions do not multiply.
template <typename T>
class BottleneckRows {
 public:
  const Geometry& geometry() const { return g_; }
  // Values of one feature map: of the input, the output and the expanded one.
  int64_t in_size() const { return g_.pixels() * g_.in_channels; }
  int64_t out_size() const { return g_.out_pixels() * g_.out_channels; }
  int64_t expanded_size() const { return padded_height() * row_size(); }

  // Whether the output may overwrite the input: a band reads each value before it is written, and no later band does.
  bool in_place() const { return in_place_; }

  bool fits_one_band(int64_t rows) const { return rows <= band_; }

 protected:
  BottleneckRows(const Geometry& g, int64_t middle, bool identity) : g_(g), middle_(middle), in_place_(identity) {}

  // Padded rows that `rows` output rows read.
  int64_t rows_read(int64_t rows) const { return (rows - 1) * g_.stride + g_.kernel_size; }
  int64_t padded_height() const { return rows_read(g_.out_height); }
  int64_t row_size() const { return (g_.width + 2 * g_.padding) * middle_; }  // values of a padded row

  // The padded rows of rows [first, last) of x: with the first and the last row come the rows around the feature map.
  std::pair<int64_t, int64_t> padded_rows(int64_t first, int64_t last) const {
    const auto padded = [&](int64_t row) { return std::min(row + g_.padding, padded_height()); };
    return {first > 0 ? padded(first) : 0, last < g_.height ? padded(last) : padded_height()};
  }

  // Writes the padding of padded rows [first, last), of which row r lies at row(r), and lists the addresses of their
  // pixels in `pixels`. Returns the number of pixels.
  template <typename Row>
  int64_t pad_rows(int64_t first, int64_t last, Sum<T> padding, const Row& row, Sum<T>** pixels) const {
    int64_t count = 0;
    for (int64_t r = first; r < last; ++r) {
      Sum<T>* const begin = row(r);
      if (r < g_.padding || r - g_.padding >= g_.height) {
        std::fill(begin, begin + row_size(), padding);
        continue;
      }
      std::fill(begin, begin + g_.padding * middle_, padding);
      std::fill(begin + (g_.padding + g_.width) * middle_, begin + row_size(), padding);
      for (int64_t ix = 0; ix < g_.width; ++ix) pixels[count++] = begin + (g_.padding + ix) * middle_;
    }
    return count;
  }

  // The pixels of x that padded rows from `first` on begin with.
  const T* first_pixel(const T* x, int64_t first) const {
    return x + std::max<int64_t>(first - g_.padding, 0) * g_.width * g_.in_channels;
  }

  // The addresses of `pixels` output pixels, from row `begin` on.
  T** out_rows(T* out, int64_t begin, int64_t pixels) const {
    T** const rows = scratch<T*>(2, pixels);
    for (int64_t m = 0; m < pixels; ++m) rows[m] = out + (begin * g_.out_width + m) * g_.out_channels;
    return rows;
  }

  // The pixels of x that the shortcut reads for `pixels` output pixels from row `begin` on, one after the other.
  const T* shortcut_pixels(const T* x, int64_t begin, int64_t pixels) const {
    const int64_t channels = g_.in_channels;
    if (g_.stride == 1) return x + begin * g_.width * channels;
    T* const strided = scratch<T>(7, pixels * channels);
    for (int64_t m = 0; m < pixels; ++m) {
      const int64_t iy = (begin + m / g_.out_width) * g_.stride, ix = m % g_.out_width * g_.stride;
      std::copy_n(x + (iy * g_.width + ix) * channels, channels, strided + m * channels);
    }
    return strided;
  }

  Geometry g_;
  int64_t middle_;    // channels of the expanded features
  int64_t band_ = 1;  // output rows of a band

 private:
  bool in_place_;
};

}  // namespace hne
