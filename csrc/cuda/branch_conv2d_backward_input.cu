// Gradient of a dense branch convolution's input; in training also of its normalisation.
//
//   G branches, M output pixels each   bytes moved at least       multiply-adds
//   plain                              grad + weight + x          G M C_out C_in k^2
//   training                           grad + y + weight + 2 x    the same
//   training, x stored with a residual and read by others, too:
//                                      grad + y + weight + 3 x + grad_x + grad_residual (+ residual)
#include "convolution.h"
#include "gemm.h"

namespace hne {
namespace {

// Sizes of the phases of one direction: of every `stride`-th pixel or tap from the phase's number on.
struct PhaseSizes {
  int least, longer;  // phases below `longer` have one more
  Divider by_least, by_most;

  PhaseSizes(int size, int stride) : least(size / stride), longer(size % stride), by_least(least), by_most(least + 1) {}
  HNE_BOTH int most() const { return least + (longer > 0 ? 1 : 0); }
  HNE_DEVICE int size(int phase) const { return least + (phase < longer ? 1 : 0); }
  HNE_DEVICE const Divider& by_size(int phase) const { return phase < longer ? by_most : by_least; }
};

// Rows are the input pixels of one phase (iy % stride, ix % stride): all of them meet the same taps of the kernel. The
// depth is (child, tap, output channel) over the children of a parent.
template <typename T>
struct DenseInputGradient : GemmProblem<T, T> {
  template <int width>
  using Sums = Pair<width>;

  struct Work : Tile {
    int parent, y, x, height, width;       // the phase, and its size in pixels
    int split;                             // of the parent's pixels
    int first_y, first_x, taps_y, taps_x;  // the phase's first tap, and its numbers of taps
    Divider by_taps_y, by_taps_x;
  };

  InputGradient<T> d;
  Partials partials = {};  // for the gradients of scale and shift
  PhaseSizes heights, widths, taps;
  int row_tiles, phases_y, phases_x;
  Divider by_row_tiles, by_phases_y, by_phases_x, by_channels, by_stride;

  DenseInputGradient(const InputGradient<T>& d_, ChannelReduction* sums)
      : GemmProblem<T, T>(d_.s.in_channels),
        d(d_),
        heights(d_.s.height, d_.s.stride),
        widths(d_.s.width, d_.s.stride),
        taps(d_.s.kernel_size, d_.s.stride),
        row_tiles(int(ceil_div(int64_t(d_.s.batch) * heights.most() * widths.most(), kTileRows))),
        phases_y(std::min(d_.s.stride, d_.s.height)),
        phases_x(std::min(d_.s.stride, d_.s.width)),
        by_row_tiles(row_tiles),
        by_phases_y(phases_y),
        by_phases_x(phases_x),
        by_channels(d_.s.out_channels),
        by_stride(d_.s.stride) {
    if (sums != nullptr) partials = sums->allocate(Pair<1>::kPlanes, splits());
  }

  int64_t splits() const { return int64_t(row_tiles) * phases_y * phases_x; }
  bool vectors() const { return d.vectors(); }
  int64_t blocks() const { return splits() * this->column_tiles * d.s.parents; }

  HNE_DEVICE Work tile(int block) const {
    Work w;
    const int row_block = this->by_column_tiles(block), x_block = by_row_tiles(row_block);
    const int y_block = by_phases_x(x_block);
    w.column = (block - row_block * this->column_tiles) * this->tile_columns;
    w.row = (row_block - x_block * row_tiles) * kTileRows;
    w.x = x_block - y_block * phases_x;
    w.parent = by_phases_y(y_block), w.y = y_block - w.parent * phases_y;
    w.split = row_block - w.parent * row_tiles * phases_x * phases_y;
    w.height = heights.size(w.y), w.width = widths.size(w.x);
    w.rows = d.s.batch * w.height * w.width, w.columns = d.s.in_channels;
    w.first_y = w.y + d.s.padding - by_stride(w.y + d.s.padding) * d.s.stride;
    w.first_x = w.x + d.s.padding - by_stride(w.x + d.s.padding) * d.s.stride;
    w.taps_y = taps.size(w.first_y), w.taps_x = taps.size(w.first_x);
    w.by_taps_y = taps.by_size(w.first_y), w.by_taps_x = taps.by_size(w.first_x);
    const int children = min(d.s.replicate, d.s.branches - w.parent * d.s.replicate);
    w.begin = 0, w.end = children * w.taps_y * w.taps_x * d.s.out_channels;
    return w;
  }

  // Sample and input coordinates of pixel `row` of the phase.
  HNE_DEVICE void locate(const Work& w, int row, int& sample, int& iy, int& ix) const {
    const int rest = widths.by_size(w.x)(row);
    sample = heights.by_size(w.y)(rest);
    iy = (rest - sample * w.height) * d.s.stride + w.y, ix = (row - rest * w.width) * d.s.stride + w.x;
  }
  // The input pixel, counted over all parents.
  HNE_DEVICE int64_t pixel(const Work& w, int row) const {
    if (d.s.pointwise()) return int64_t(w.parent) * d.s.in_rows() + row;
    int sample, iy, ix;
    locate(w, row, sample, iy, ix);
    return (int64_t(w.parent) * d.s.batch + sample) * d.s.pixels() + iy * d.s.width + ix;
  }
  // Branch, tap of the phase and channel of step k of the depth.
  struct Term {
    int branch, tap_y, tap_x, channel;
  };
  HNE_DEVICE Term term(const Work& w, int k) const {
    const int at = by_channels(k), channel = k - at * d.s.out_channels;
    if (d.s.kernel_size == 1) return {w.parent * d.s.replicate + at, 0, 0, channel};
    const int row = w.by_taps_x(at), child = w.by_taps_y(row);
    return {w.parent * d.s.replicate + child, row - child * w.taps_y, at - row * w.taps_x, channel};
  }

  static constexpr bool kCompanion = true;
  HNE_BOTH bool has_companion() const { return d.output.present(); }

  struct Left : GemmOperand<T, false> {
    struct Row {
      const T* grad;  // first channel of the output pixel that meets the phase's first tap, in branch 0
      int oy, ox;     // that pixel, which may not exist
    };
    struct Depth {
      Term term;
      int64_t offset;  // of the term's value from the row's
    };

    const DenseInputGradient& p;
    const Work& w;

    HNE_DEVICE Left(const DenseInputGradient& p_, const Work& w_) : p(p_), w(w_) {}
    HNE_DEVICE const T* base() const { return p.d.output.grad; }
    HNE_DEVICE const T* companion() const { return p.d.output.y; }
    HNE_DEVICE Row row(int64_t r) const {
      const Shape& s = p.d.s;
      if (s.pointwise()) return {p.d.output.grad + r * s.out_channels, 0, 0};
      int sample, iy, ix;
      p.locate(w, int(r), sample, iy, ix);
      const int oy = p.by_stride(iy + s.padding - w.first_y), ox = p.by_stride(ix + s.padding - w.first_x);
      const int64_t pixel = int64_t(sample) * s.out_pixels() + int64_t(oy) * s.out_width + ox;
      return {p.d.output.grad + pixel * s.out_channels, oy, ox};
    }
    HNE_DEVICE Depth depth(int k) const {  // a later tap belongs to an earlier output pixel
      const Term t = p.term(w, k);
      const int64_t pixel = int64_t(t.branch) * p.d.s.rows() - (t.tap_y * p.d.s.out_width + t.tap_x);
      return {t, pixel * p.d.s.out_channels + t.channel};
    }
    HNE_DEVICE const T* at(const Row& row, const Depth& depth) const {
      const Shape& s = p.d.s;
      const bool inside = s.pointwise() || (unsigned(row.oy - depth.term.tap_y) < unsigned(s.out_height) &&
                                            unsigned(row.ox - depth.term.tap_x) < unsigned(s.out_width));
      return inside ? row.grad + depth.offset : nullptr;
    }
    HNE_DEVICE bool transforms() const { return p.d.output.present(); }
    template <int width>
    HNE_DEVICE Affine<width> parameters(const Row&, const Depth& depth, int i) const {
      return p.d.output.template at<width>(depth.term.branch, depth.term.channel + i);
    }
    template <int width>
    HNE_DEVICE void transform(const Affine<width>& affine, float (&values)[width], const float (&y)[width]) const {
      p.d.output.apply(affine, values, y);
    }
  };

  struct Right : GemmOperand<T, true> {
    struct Row {
      const T* filter;  // the column of the first filter
    };
    using Depth = int64_t;  // from there

    const DenseInputGradient& p;
    const Work& w;

    HNE_DEVICE Right(const DenseInputGradient& p_, const Work& w_) : p(p_), w(w_) {}
    HNE_DEVICE const T* base() const { return p.d.filters; }
    HNE_DEVICE Row row(int64_t column) const { return {p.d.filters + column}; }
    HNE_DEVICE Depth depth(int k) const {
      const Shape& s = p.d.s;
      const Term t = p.term(w, k);
      const int ky = w.first_y + t.tap_y * s.stride, kx = w.first_x + t.tap_x * s.stride;
      const int64_t tap = ky * s.kernel_size + kx;
      return t.branch * p.d.strides.branch + (tap * s.out_channels + t.channel) * p.d.strides.out;
    }
    HNE_DEVICE const T* at(const Row& row, Depth depth) const { return row.filter + depth; }
  };

  template <int width>
  HNE_DEVICE void finish(const Work& w, int64_t row, int64_t column, float (&values)[width], Pair<width>& sums) const {
    const int64_t at = pixel(w, int(row)) * d.s.in_channels + column;
    if (d.normalization.present()) {
      float x[width];
      load<width>(x, d.x + at);
      d.normalization.backward(d.normalization.template at<width>(w.parent, int(column)), x, values, sums);
    }
    store<width>(d.out + at, values);
  }

  template <int width>
  HNE_DEVICE void reduce(const Work& w, const Pair<width>& sums, float* scratch, int across) const {
    if (d.normalization.present()) sums.put(partials, {w.parent, w.split, w.column}, scratch, across);
  }
};

// The same where the input is stored and has other readers: their gradient is added to the product.
template <typename T, bool normalized>
struct DenseSumGradient : DenseInputGradient<T> {
  using Work = typename DenseInputGradient<T>::Work;
  template <int width>
  using Sums = SumGradients<width, normalized>;

  const T* grad_z;
  NormalizedSum<T> sum;
  Partials residual_partials = {};

  DenseSumGradient(const InputGradient<T>& d_, const T* grad_z_, const NormalizedSum<T>& sum_, ChannelReduction& sums,
                   ChannelReduction* residual_sums)
      : DenseInputGradient<T>(d_, &sums), grad_z(grad_z_), sum(sum_) {
    if (normalized) residual_partials = residual_sums->allocate(Pair<1>::kPlanes, this->splits());
  }

  bool vectors() const { return this->d.vectors() && aligned(grad_z) && sum.vectors(); }

  template <int width>
  HNE_DEVICE void finish(const Work& w, int64_t row, int64_t column, float (&values)[width], Sums<width>& sums) const {
    const int64_t at = this->pixel(w, int(row)) * this->d.s.in_channels + column;
    float others[width];
    load<width>(others, grad_z + at);
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] += others[i];
    const auto of_x = Slope<width>::at(sum.normalization, w.parent, int(column));
    Slope<width> of_residual;
    if constexpr (normalized) of_residual = Slope<width>::at(sum.residual_normalization, w.parent, int(column));
    sum.backward(of_x, of_residual, at, values, sums);
  }

  template <int width>
  HNE_DEVICE void reduce(const Work& w, const Sums<width>& sums, float* scratch, int across) const {
    sums.put(this->partials, residual_partials, {w.parent, w.split, w.column}, scratch, across);
  }
};

}  // namespace

template <typename T>
void dense_backward_sum(const Device& device, const InputGradient<T>& d, const T* grad_z, const NormalizedSum<T>& sum,
                        ChannelReduction& sums, ChannelReduction* residual_sums) {
  if (residual_sums != nullptr)
    run_gemm<T>(device, DenseSumGradient<T, true>(d, grad_z, sum, sums, residual_sums));
  else
    run_gemm<T>(device, DenseSumGradient<T, false>(d, grad_z, sum, sums, nullptr));
}
#define HNE_INSTANTIATE(T)                                                                                    \
  template void dense_backward_sum(const Device&, const InputGradient<T>&, const T*, const NormalizedSum<T>&, \
                                   ChannelReduction&, ChannelReduction*);
HNE_INSTANTIATE(float)
HNE_INSTANTIATE(half)
HNE_INSTANTIATE(bfloat16)
#undef HNE_INSTANTIATE

template <typename T>
void dense_backward_input(const Device& device, const InputGradient<T>& d, ChannelReduction* sums) {
  run_gemm<T>(device, DenseInputGradient<T>(d, sums));
}
template void dense_backward_input(const Device&, const InputGradient<float>&, ChannelReduction*);
template void dense_backward_input(const Device&, const InputGradient<half>&, ChannelReduction*);
template void dense_backward_input(const Device&, const InputGradient<bfloat16>&, ChannelReduction*);

}  // namespace hne
