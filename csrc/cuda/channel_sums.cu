// The second level of the sums over pixels: S shares of G branches of C channels.
//
//             bytes moved at least    operations
//   moments   20 S G C (L2)           8 S G C
//   sums       8 S G C (L2)           2 S G C
#include "channel_sums.h"

namespace hne {
namespace {

constexpr int kAcross = 32, kLanes = kThreads / kAcross;  // channels of a block, and threads for each

// A thread's channel and its shares, every kLanes-th.
struct Mine {
  int branch, channel, lane;
  bool inside;

  HNE_DEVICE explicit Mine(const Partials& p) {
    const int groups = (p.channels + kAcross - 1) / kAcross;
    branch = int(blockIdx.x) / groups;
    channel = int(blockIdx.x) % groups * kAcross + int(threadIdx.x) % kAcross;
    lane = int(threadIdx.x) / kAcross;
    inside = channel < p.channels;
  }

  // The sum over all shares of term(those of each plane), for every thread of the channel.
  template <int planes, typename Term>
  HNE_DEVICE double sum(const Partials& p, const Term& term) const {
    double* const scratch = static_cast<double*>(shared_memory());  // [kLanes][kAcross]
    double total = 0;
    for (int share = lane; inside && share < p.shares; share += kLanes) {
      float values[planes];
#pragma unroll
      for (int plane = 0; plane < planes; ++plane)
        values[plane] = p.values[((int64_t(plane) * p.branches + branch) * p.shares + share) * p.channels + channel];
      total += term(values);
    }
    block_sync();  // what was there has been read
    scratch[threadIdx.x] = total;
    block_sync();
    total = 0;
    for (int from = 0; from < kLanes; ++from) total += scratch[from * kAcross + int(threadIdx.x) % kAcross];
    return total;
  }
};

int64_t blocks(const Partials& p) { return int64_t(p.branches) * ceil_div(p.channels, kAcross); }
constexpr int64_t kScratch = kThreads * int64_t(sizeof(double));

// Of all pixels: the squares around the shares' means, and those of the shares' means around the mean (Chan et al.).
__global__ void __launch_bounds__(kThreads)
    moments(const Partials p, const double share_of_one, float* mean, float* var) {
  const Mine mine(p);
  const double centre = share_of_one * mine.sum<3>(p, [](const float (&v)[3]) { return double(v[0]) * double(v[2]); });
  const double squares = mine.sum<3>(p, [&](const float (&v)[3]) {
    const double deviation = v[0] - centre;
    return v[1] + v[2] * deviation * deviation;
  });
  if (!mine.inside || mine.lane != 0) return;
  mean[int64_t(mine.branch) * p.channels + mine.channel] = float(centre);
  var[int64_t(mine.branch) * p.channels + mine.channel] = float(squares * share_of_one);
}

__global__ void __launch_bounds__(kThreads) sums(const Partials p, float* first, float* second) {
  const Mine mine(p);
  const double a = mine.sum<2>(p, [](const float (&v)[2]) { return double(v[0]); });
  const double b = mine.sum<2>(p, [](const float (&v)[2]) { return double(v[1]); });
  if (!mine.inside || mine.lane != 0) return;
  first[int64_t(mine.branch) * p.channels + mine.channel] = float(a);
  second[int64_t(mine.branch) * p.channels + mine.channel] = float(b);
}

}  // namespace

void combine_moments(const Device& device, const OverPixels& results, int64_t pixels) {
  device.launch(moments, blocks(results.left), kThreads, kScratch, results.left, pixels > 0 ? 1 / double(pixels) : 0.0,
                mutable_data<float>(results.first), mutable_data<float>(results.second));
}

void combine_sums(const Device& device, const OverPixels& results) {
  device.launch(sums, blocks(results.left), kThreads, kScratch, results.left, mutable_data<float>(results.first),
                mutable_data<float>(results.second));
}

}  // namespace hne
