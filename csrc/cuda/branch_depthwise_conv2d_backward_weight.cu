// Gradient of a depthwise branch convolution's weight.
//
//   G branches, M output pixels each   bytes moved at least                            multiply-adds
//   plain                              grad + x + weight (+ partial sums, twice)       G M C k^2
//   training                           grad + y + x + weight (+ partial sums, twice)   the same
#include "convolution.h"

namespace hne {
namespace {

constexpr int kLanes = kThreads / 32;

// Sums over one split of the output pixels: partial[split][branch][tap][channel]. A block has 32 channels and kLanes
// pixels at a time. With `taps` 9 a thread keeps the sums of all taps of a 3x3 filter, else a block has one tap.
template <typename T, int taps>
__global__ void __launch_bounds__(kThreads, taps > 1 ? 2 : 4)
    depthwise_backward_weight_kernel(const WeightGradient<T> d, float* partial, const int splits) {
  const Shape& s = d.s;
  const int lane = int(threadIdx.x) % 32, row_lane = int(threadIdx.x) / 32;
  const int groups = (s.in_channels + 31) / 32, tap_groups = s.taps() / taps;
  int at = int(blockIdx.x);
  const int channel = at % groups * 32 + lane;
  at /= groups;
  const int first_tap = at % tap_groups * taps;
  at /= tap_groups;
  const int branch = at % s.branches, split = at / s.branches;
  const int rows = s.rows(), begin = int(int64_t(rows) * split / splits),
            end = int(int64_t(rows) * (split + 1) / splits);
  float sums[taps] = {};
  if (channel < s.in_channels) {
    const int64_t branch_begin = int64_t(branch) * rows * s.in_channels + channel;
    const int parent = branch / s.replicate;
    const T* from = d.x + int64_t(parent) * s.in_rows() * s.in_channels + channel;
    Affine<1> output = {};
    if (d.output.present()) output = d.output.template at<1>(branch, channel);
    Affine<1> affine = {};
    if (d.normalization.present()) affine = d.normalization.template at<1>(parent, channel);
    for (int row = begin + row_lane; row < end; row += kLanes) {
      float g[1], y[1];
      load<1>(g, d.output.grad + branch_begin + int64_t(row) * s.in_channels);
      if (d.output.present()) {
        load<1>(y, d.output.y + branch_begin + int64_t(row) * s.in_channels);
        d.output.apply(output, g, y);
      }
#pragma unroll
      for (int tap = 0; tap < taps; ++tap) {
        const int64_t pixel = taps == 9 ? s.source(row, tap / 3, tap % 3) : s.source(row, first_tap + tap);
        if (pixel < 0) continue;
        float a[1];
        load<1>(a, from + pixel * s.in_channels);
        if (d.normalization.present()) d.normalization.apply(affine, a);
        sums[tap] += g[0] * a[0];
      }
    }
  }
  float* const all = static_cast<float*>(shared_memory());  // [kLanes][taps][32]
#pragma unroll
  for (int tap = 0; tap < taps; ++tap) all[(row_lane * taps + tap) * 32 + lane] = sums[tap];
  block_sync();
  for (int tap = row_lane; tap < taps; tap += kLanes) {
    float sum = 0;
    for (int other = 0; other < kLanes; ++other) sum += all[(other * taps + tap) * 32 + lane];
    if (channel < s.in_channels)
      partial[((int64_t(split) * s.branches + branch) * s.taps() + first_tap + tap) * s.in_channels + channel] = sum;
  }
}

}  // namespace

template <typename T>
Tensor depthwise_backward_weight(const Device& device, const WeightGradient<T>& d, const Tensor& x) {
  const Shape& s = d.s;
  const int64_t taps = s.taps() == 9 ? 9 : 1;  // of a block
  const int64_t blocks = s.branches * ceil_div(s.in_channels, 32) * (s.taps() / taps);
  // Enough blocks for a large GPU, each with enough pixels to be worth its partial sums. The number depends on the
  // shapes alone: the same order of additions on every GPU.
  const int64_t splits =
      std::clamp<int64_t>(1024 / std::max<int64_t>(blocks, 1), 1, std::max<int64_t>(ceil_div(s.rows(), 256), 1));
  Tensor partial = torch::stable::new_empty(x, {splits, s.branches, s.taps(), s.in_channels}, ScalarType::Float);
  device.launch(taps == 9 ? depthwise_backward_weight_kernel<T, 9> : depthwise_backward_weight_kernel<T, 1>,
                blocks * splits, kThreads, taps * kThreads * int64_t(sizeof(float)), d, mutable_data<float>(partial),
                int(splits));
  return partial;
}
template Tensor depthwise_backward_weight(const Device&, const WeightGradient<float>&, const Tensor&);
template Tensor depthwise_backward_weight(const Device&, const WeightGradient<half>&, const Tensor&);
template Tensor depthwise_backward_weight(const Device&, const WeightGradient<bfloat16>&, const Tensor&);

}  // namespace hne
