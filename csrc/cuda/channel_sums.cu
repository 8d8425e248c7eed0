// The second level of the sums over pixels: S splits of G branches of C channels.
//
//             bytes moved at least    operations
//   moments   20 S G C (L2)           8 S G C
//   gradient   8 S G C (L2)           2 S G C
#include "channel_sums.h"

namespace hne {
namespace {

// Channels of a block, in whole sectors of 32 bytes, and threads for each: many, since a thread waits for its values.
constexpr int kAcross = 8, kLanes = kThreads / kAcross;

// The channel of a thread; the threads of a channel take its splits in turn.
struct ChannelLane {
  int branch, channel, lane;
  bool inside;

  HNE_DEVICE explicit ChannelLane(const Partials& p) {
    const int groups = (p.channels + kAcross - 1) / kAcross;
    branch = int(blockIdx.x) / groups;
    channel = int(blockIdx.x) % groups * kAcross + int(threadIdx.x) % kAcross;
    lane = int(threadIdx.x) / kAcross;
    inside = channel < p.channels;
  }

  // The sum over all splits of term(values), `values` being one of every plane; all threads of the channel get it.
  template <int planes, typename Term>
  HNE_DEVICE double sum(const Partials& p, const Term& term) const {
    double* const scratch = static_cast<double*>(shared_memory());  // [kLanes][kAcross]
    double total = 0;
#pragma unroll 8  // so that a thread waits once for the values of eight splits
    for (int split = lane; inside && split < p.splits; split += kLanes) {
      float values[planes];
#pragma unroll
      for (int plane = 0; plane < planes; ++plane)
        values[plane] = p.values[((int64_t(plane) * p.branches + branch) * p.splits + split) * p.channels + channel];
      total += term(values);
    }
    block_sync();  // every thread has read the previous contents of scratch
    scratch[threadIdx.x] = total;
    block_sync();
    total = 0;
    for (int from = 0; from < kLanes; ++from) total += scratch[from * kAcross + int(threadIdx.x) % kAcross];
    return total;
  }
};

int64_t blocks(const Partials& p) { return int64_t(p.branches) * ceil_div(p.channels, kAcross); }
constexpr int64_t kScratch = kThreads * int64_t(sizeof(double));

// Chan et al.: the squares over all pixels are the splits' own squares plus the deviations of the splits' means.
__global__ void __launch_bounds__(kThreads)
    moments(const Partials p, const double inverse_pixels, float* mean, float* var) {
  wait_for_previous_kernel();
  launch_next_kernel();
  const ChannelLane own(p);
  const double centre = inverse_pixels * own.sum<3>(p, [](const float (&v)[3]) { return double(v[0]) * double(v[2]); });
  const double squares = own.sum<3>(p, [&](const float (&v)[3]) {
    const double deviation = v[0] - centre;
    return v[1] + v[2] * deviation * deviation;
  });
  if (!own.inside || own.lane != 0) return;
  mean[int64_t(own.branch) * p.channels + own.channel] = float(centre);
  var[int64_t(own.branch) * p.channels + own.channel] = float(squares * inverse_pixels);
}

// The rows of the gradient are those of mean, scale and shift.
__global__ void __launch_bounds__(kThreads) norm_gradient(const Partials p, const float* scale, float* gradient) {
  wait_for_previous_kernel();
  launch_next_kernel();
  const ChannelLane own(p);
  const double a = own.sum<2>(p, [](const float (&v)[2]) { return double(v[0]); });
  const double b = own.sum<2>(p, [](const float (&v)[2]) { return double(v[1]); });
  if (!own.inside || own.lane != 0) return;
  const int64_t at = int64_t(own.branch) * p.channels + own.channel, row = int64_t(p.branches) * p.channels;
  const float grad_shift = float(b);
  gradient[at] = -scale[at] * grad_shift, gradient[row + at] = float(a), gradient[2 * row + at] = grad_shift;
}

}  // namespace

std::tuple<Tensor, Tensor> combine_moments(const Device& device, const ChannelReduction& reduction, int64_t pixels) {
  const std::vector<int64_t> shape = {reduction.branches, reduction.channels};
  const Tensor mean = torch::stable::new_empty(reduction.like, shape, ScalarType::Float);
  const Tensor var = torch::stable::new_empty(reduction.like, shape, ScalarType::Float);
  device.launch_early(moments, blocks(reduction.partials), kThreads, kScratch, reduction.partials,
                      pixels > 0 ? 1 / double(pixels) : 0.0, mutable_data<float>(mean), mutable_data<float>(var));
  return {mean, var};
}

Tensor combine_norm_gradient(const Device& device, const ChannelReduction& reduction, const float* scale) {
  const Tensor gradient =
      torch::stable::new_empty(reduction.like, {3, reduction.branches, reduction.channels}, ScalarType::Float);
  device.launch_early(norm_gradient, blocks(reduction.partials), kThreads, kScratch, reduction.partials, scale,
                      mutable_data<float>(gradient));
  return gradient;
}

}  // namespace hne
