// Sums over the pixels of every channel, in two levels and always in the same order: the threads of a block that have
// the same channels add up what they found, then a small kernel combines what the blocks have left.
//
//   S shares of G branches of C channels   bytes moved at least, beside what is summed   operations
//   mean and squares                       12 S G C written and read                     6 a value
//   two sums                               8 S G C written and read                      2 a value
#pragma once

#include "op.h"

namespace hne {

// What the blocks leave: [plane][branch][share][channel], a share being the pixels of one block. Null where nobody
// asks.
struct Partials {
  float* values = nullptr;
  int branches = 0, shares = 0, channels = 0;

  HNE_DEVICE void put(int plane, int branch, int share, int channel, float value) const {
    values[((int64_t(plane) * branches + branch) * shares + share) * channels + channel] = value;
  }
};

// Where a block's sums go: channels from `channel` on.
struct Place {
  int branch, share, channel;
};

// Thread t of a block has channels [t % across * width, + width). Adds up the threads with the same channels; the sum
// of channel c is then scratch[c]. `scratch` has room for kThreads * width values.
template <int width>
HNE_DEVICE void add_lanes(float* scratch, const float (&values)[width], int across) {
  const int columns = across * width, lanes = kThreads / across;
  const int lane = int(threadIdx.x) / across, column = int(threadIdx.x) % across * width;
  block_sync();  // what was there has been read
#pragma unroll
  for (int i = 0; i < width; ++i) scratch[lane * columns + column + i] = values[i];
  block_sync();
  if (int(threadIdx.x) < columns) {
    float sum = 0;
    for (int from = 0; from < lanes; ++from) sum += scratch[from * columns + int(threadIdx.x)];
    scratch[threadIdx.x] = sum;  // only this thread has read it
  }
  block_sync();
}

// Mean and sum of squared deviations (Welford), so that a large mean does not cancel. Planes: mean, squares, count.
template <int width>
struct Moments {
  static constexpr int kPlanes = 3;
  float count = 0, mean[width] = {}, squares[width] = {};

  HNE_DEVICE void add(const float (&values)[width]) {
    count += 1;
    const float share = 1 / count;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const float deviation = values[i] - mean[i];
      mean[i] += deviation * share;
      squares[i] += deviation * (values[i] - mean[i]);
    }
  }

  // Chan et al. over the threads of the block, which have seen `total` pixels together.
  HNE_DEVICE void put(const Partials& partials, const Place& place, float* scratch, int across, int total) const {
    const int column = int(threadIdx.x) % across * width;
    const float share = total > 0 ? 1 / float(total) : 0.0f;
    float values[width];
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = mean[i] * count;
    add_lanes(scratch, values, across);
    const float mean_here = scratch[threadIdx.x] * share;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const float deviation = mean[i] - scratch[column + i] * share;
      values[i] = squares[i] + count * deviation * deviation;
    }
    add_lanes(scratch, values, across);
    const int channel = place.channel + int(threadIdx.x);
    if (int(threadIdx.x) >= across * width || channel >= partials.channels) return;
    partials.put(0, place.branch, place.share, channel, mean_here);
    partials.put(1, place.branch, place.share, channel, scratch[threadIdx.x]);
    partials.put(2, place.branch, place.share, channel, float(total));
  }
};

// Two sums. Planes: first, second.
template <int width>
struct Pair {
  static constexpr int kPlanes = 2;
  float first[width] = {}, second[width] = {};

  HNE_DEVICE void put(const Partials& partials, const Place& place, float* scratch, int across) const {
    const int channel = place.channel + int(threadIdx.x);
    const bool mine = int(threadIdx.x) < across * width && channel < partials.channels;
    add_lanes(scratch, first, across);
    if (mine) partials.put(0, place.branch, place.share, channel, scratch[threadIdx.x]);
    add_lanes(scratch, second, across);
    if (mine) partials.put(1, place.branch, place.share, channel, scratch[threadIdx.x]);
  }
};

inline void check_sizes(int64_t branches, int64_t pixels, int64_t channels) {
  STD_TORCH_CHECK(std::max({branches, pixels, channels}) <= INT32_MAX - 65536,
                  "expected fewer than 2^31 branches, channels, and pixels in a branch");
}

// Elementwise work of blocks that keep to the channels of one branch: `across` threads side by side have `width`
// channels each, the others are on further rows.
template <int width>
struct RowPartition {
  int branches, rows, channels, across, share_rows;

  // The number of shares follows from the shapes alone: the same sums on every GPU.
  RowPartition(int64_t branches_, int64_t rows_, int64_t channels_)
      : branches(int(branches_)), rows(int(rows_)), channels(int(channels_)), across(std::max(64 / width, 1)) {
    check_sizes(branches_, rows_, channels_);
    while (across > 1 && across / 2 * width >= channels) across /= 2;
    const int64_t lanes = kThreads / across, single = branches_ * groups() * ceil_div(rows_, lanes);
    share_rows = int(lanes * std::clamp<int64_t>(single / 2048, 1, 16));  // enough blocks for the largest GPU
  }

  HNE_BOTH int groups() const { return (channels / width + across - 1) / across; }
  HNE_BOTH int shares() const { return (rows + share_rows - 1) / share_rows; }
  int64_t blocks() const { return int64_t(branches) * groups() * shares(); }
  static constexpr int64_t kScratch = kThreads * width * int64_t(sizeof(float));  // bytes, for add_lanes

  struct Here {
    Place place;
    int channel;           // the first of this thread's,
    bool inside;           // if there are so many
    int begin, end, step;  // its rows; none beyond the last channel
    int share_begin, share_end;
  };
  HNE_DEVICE Here here() const {
    int at = int(blockIdx.x);
    const int group = at % groups();
    at /= groups();
    Here h;
    h.place = {at / shares(), at % shares(), group * across * width};
    h.channel = h.place.channel + int(threadIdx.x) % across * width;
    h.share_begin = h.place.share * share_rows, h.share_end = min(rows, h.share_begin + share_rows);
    h.step = kThreads / across;
    h.begin = h.share_begin + int(threadIdx.x) / across, h.inside = h.channel < channels;
    h.end = h.inside ? h.share_end : h.begin;
    return h;
  }
};

// --- on the host -------------------------------------------------------------------------------------------

// Two results [branches, channels] in float32 that blocks leave partial results of.
struct OverPixels {
  Tensor like, first, second, memory;
  Partials left;

  OverPixels(const Tensor& like_, int64_t branches, int64_t channels)
      : like(like_),
        first(torch::stable::new_empty(like_, {branches, channels}, ScalarType::Float)),
        second(torch::stable::new_empty(like_, {branches, channels}, ScalarType::Float)) {}

  // Where the blocks leave them.
  Partials partials(int64_t planes, int64_t shares) {
    memory = torch::stable::new_empty(like, {planes, first.size(0), shares, first.size(1)}, ScalarType::Float);
    left = {mutable_data<float>(memory), int(first.size(0)), int(shares), int(first.size(1))};
    return left;
  }
};

inline Tensor no_statistics(const Tensor& like) { return torch::stable::new_empty(like, {0}, ScalarType::Float); }

// Mean and biased variance of `pixels` values each, from Moments; zeros for none.
void combine_moments(const Device& device, const OverPixels& results, int64_t pixels);
// Both sums, from Pair.
void combine_sums(const Device& device, const OverPixels& results);

}  // namespace hne
