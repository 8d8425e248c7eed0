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

// Rows are the input pixels of one phase (iy % stride, ix % stride): all of them meet the same taps of the kernel. The
// depth is (child, tap, output channel) over the children of a parent.
template <typename T>
struct DenseInputGradient : GemmProblem<T, T, false, true> {
  template <int width>
  using Sums = Pair<width>;

  struct Work : Tile {
    int parent, y, x, height, width;     // the phase, and its size in pixels
    int split;                           // of the parent's pixels
    int first_y, first_x, taps, taps_x;  // the phase's first tap, its number of taps, and those in a row
  };

  InputGradient<T> d;
  Partials partials = {};  // for the gradients of scale and shift

  DenseInputGradient(const InputGradient<T>& d_, ChannelReduction* sums) : d(d_) {
    if (sums != nullptr) partials = sums->allocate(Pair<1>::kPlanes, splits());
  }

  HNE_BOTH int phase_size(int size, int phase) const { return size > phase ? (size - phase - 1) / d.s.stride + 1 : 0; }
  HNE_BOTH int row_tiles() const {  // of the largest phase
    return (d.s.batch * phase_size(d.s.height, 0) * phase_size(d.s.width, 0) + kTileRows - 1) / kTileRows;
  }
  HNE_BOTH int column_tiles() const { return (d.s.in_channels + kTileColumns - 1) / kTileColumns; }
  HNE_BOTH int phases_y() const { return d.s.stride < d.s.height ? d.s.stride : d.s.height; }
  HNE_BOTH int phases_x() const { return d.s.stride < d.s.width ? d.s.stride : d.s.width; }
  int64_t splits() const { return int64_t(row_tiles()) * phases_y() * phases_x(); }
  bool vectors() const { return d.vectors(); }
  int64_t blocks() const { return splits() * column_tiles() * d.s.parents; }

  HNE_DEVICE Work tile(int block) const {
    Work w;
    w.column = block % column_tiles() * kTileColumns;
    block /= column_tiles();
    w.split = block % (row_tiles() * phases_x() * phases_y());
    w.row = block % row_tiles() * kTileRows;
    block /= row_tiles();
    w.x = int(block % phases_x());
    block /= phases_x();
    w.y = int(block % phases_y());
    w.parent = int(block / phases_y());
    w.height = phase_size(d.s.height, w.y), w.width = phase_size(d.s.width, w.x);
    w.rows = int64_t(d.s.batch) * w.height * w.width, w.columns = d.s.in_channels;
    w.first_y = (w.y + d.s.padding) % d.s.stride, w.first_x = (w.x + d.s.padding) % d.s.stride;
    w.taps_x = phase_size(d.s.kernel_size, w.first_x);
    w.taps = phase_size(d.s.kernel_size, w.first_y) * w.taps_x;
    const int children = min(d.s.replicate, d.s.branches - w.parent * d.s.replicate);
    w.begin = 0, w.end = int64_t(children) * w.taps * d.s.out_channels;
    return w;
  }

  // Sample and input coordinates of pixel `row` of the phase.
  HNE_DEVICE void locate(const Work& w, int row, int& sample, int& iy, int& ix) const {
    const int within_row = row % w.width, rest = row / w.width;
    sample = rest / w.height;
    iy = rest % w.height * d.s.stride + w.y, ix = within_row * d.s.stride + w.x;
  }
  // The input pixel, counted over all parents.
  HNE_DEVICE int64_t pixel(const Work& w, int row) const {
    if (d.s.pointwise()) return int64_t(w.parent) * d.s.in_rows() + row;
    int sample, iy, ix;
    locate(w, row, sample, iy, ix);
    return (int64_t(w.parent) * d.s.batch + sample) * d.s.pixels() + iy * d.s.width + ix;
  }
  // Branch, tap and channel of step k of the depth.
  HNE_DEVICE void term(const Work& w, int k, int& branch, int& ky, int& kx, int& channel) const {
    const int at = k / d.s.out_channels, child = at / w.taps, tap = at - child * w.taps;
    channel = k - at * d.s.out_channels;
    branch = w.parent * d.s.replicate + child;
    ky = w.first_y + tap / w.taps_x * d.s.stride, kx = w.first_x + tap % w.taps_x * d.s.stride;
  }

  HNE_BOTH const T* left_base() const { return d.output.grad; }
  HNE_DEVICE const T* left(const Work& w, int64_t row, int64_t k) const {
    if (row >= w.rows) return nullptr;
    int branch, ky, kx, channel;
    term(w, int(k), branch, ky, kx, channel);
    if (d.s.pointwise()) return d.output.grad + (int64_t(branch) * d.s.rows() + row) * d.s.out_channels + channel;
    int sample, iy, ix;
    locate(w, int(row), sample, iy, ix);
    const int dy = iy + d.s.padding - ky, dx = ix + d.s.padding - kx;  // multiples of the stride
    if (dy < 0 || dx < 0 || dy / d.s.stride >= d.s.out_height || dx / d.s.stride >= d.s.out_width) return nullptr;
    const int pixel = sample * d.s.out_pixels() + dy / d.s.stride * d.s.out_width + dx / d.s.stride;
    return d.output.grad + (int64_t(branch) * d.s.rows() + pixel) * d.s.out_channels + channel;
  }
  HNE_BOTH const T* left_companion() const { return d.output.y; }
  HNE_DEVICE bool transforms_left() const { return d.output.present(); }
  template <int width>
  HNE_DEVICE void transform_left(const Work& w, int64_t, int64_t k, float (&values)[width],
                                 const float (&y)[width]) const {
    int branch, ky, kx, channel;
    term(w, int(k), branch, ky, kx, channel);
    d.output.apply(d.output.template at<width>(branch, channel), values, y);
  }

  HNE_BOTH const T* right_base() const { return d.filters; }
  HNE_DEVICE const T* right(const Work& w, int64_t column, int64_t k) const {
    if (column >= w.columns) return nullptr;
    int branch, ky, kx, channel;
    term(w, int(k), branch, ky, kx, channel);
    const int64_t filter = int64_t(branch) * d.s.taps() + ky * d.s.kernel_size + kx;
    return d.filters + (filter * d.s.out_channels + channel) * d.s.in_channels + column;
  }

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
    if (d.normalization.present()) sums.put(partials, {w.parent, w.split, int(w.column)}, scratch, across);
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
    sums.put(this->partials, residual_partials, {w.parent, w.split, int(w.column)}, scratch, across);
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
