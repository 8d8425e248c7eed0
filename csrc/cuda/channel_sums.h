// Sums over the pixels of every channel, in two levels and always in the same order: a block adds up one split of the
// pixels and writes a partial result, then a small kernel combines the partial results.
//
//   S splits of G branches of C channels   bytes moved at least, beside the values   operations
//   mean and squares                       12 S G C written and read                 6 a value
//   two sums                               8 S G C written and read                  2 a value
#pragma once

#include <tuple>

#include "op.h"

namespace hne {

// Partial results, [plane][branch][split][channel]; null where no sums are wanted.
struct Partials {
  float* values = nullptr;
  int branches = 0, splits = 0, channels = 0;

  HNE_DEVICE void put(int plane, int branch, int split, int channel, float value) const {
    values[((int64_t(plane) * branches + branch) * splits + split) * channels + channel] = value;
  }
};

// The partial result of a block: channels from `channel` on.
struct Place {
  int branch, split, channel;
};

// Adds up the threads with the same channels; afterwards scratch[c] is the sum of channel c. Thread t of a block has
// channels [t % across * width, + width). `scratch` has room for kThreads * width values.
template <int width>
HNE_DEVICE void add_lanes(float* scratch, const float (&values)[width], int across) {
  const int columns = across * width, lanes = kThreads / across;
  const int lane = int(threadIdx.x) / across, column = int(threadIdx.x) % across * width;
  block_sync();  // every thread has read the previous contents of scratch
#pragma unroll
  for (int i = 0; i < width; ++i) scratch[lane * columns + column + i] = values[i];
  block_sync();
  if (int(threadIdx.x) < columns) {
    float sum = 0;
    for (int from = 0; from < lanes; ++from) sum += scratch[from * columns + int(threadIdx.x)];
    scratch[threadIdx.x] = sum;  // no other thread reads this value
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
    const float inverse = fast_reciprocal(count);  // put() corrects the mean of the block
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const float deviation = values[i] - mean[i];
      mean[i] += deviation * inverse;
      squares[i] += deviation * (values[i] - mean[i]);
    }
  }

  // Combines the threads of the block (Chan et al.); together they have added `total` pixels.
  HNE_DEVICE void put(const Partials& partials, const Place& place, float* scratch, int across, int total) const {
    const int column = int(threadIdx.x) % across * width;
    const float inverse = total > 0 ? 1 / float(total) : 0.0f;
    float values[width];
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = mean[i] * count;
    add_lanes(scratch, values, across);
    const float block_mean = scratch[threadIdx.x] * inverse;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const float deviation = mean[i] - scratch[column + i] * inverse;
      values[i] = squares[i] + count * deviation * deviation;
    }
    add_lanes(scratch, values, across);
    const int channel = place.channel + int(threadIdx.x);
    if (int(threadIdx.x) >= across * width || channel >= partials.channels) return;
    partials.put(0, place.branch, place.split, channel, block_mean);
    partials.put(1, place.branch, place.split, channel, scratch[threadIdx.x]);
    partials.put(2, place.branch, place.split, channel, float(total));
  }
};

// Two sums. Planes: first, second.
template <int width>
struct Pair {
  static constexpr int kPlanes = 2;
  float first[width] = {}, second[width] = {};

  HNE_DEVICE void put(const Partials& partials, const Place& place, float* scratch, int across) const {
    const int channel = place.channel + int(threadIdx.x);
    const bool writes = int(threadIdx.x) < across * width && channel < partials.channels;
    add_lanes(scratch, first, across);
    if (writes) partials.put(0, place.branch, place.split, channel, scratch[threadIdx.x]);
    add_lanes(scratch, second, across);
    if (writes) partials.put(1, place.branch, place.split, channel, scratch[threadIdx.x]);
  }
};

inline void check_sizes(int64_t branches, int64_t pixels, int64_t channels) {
  STD_TORCH_CHECK(std::max({branches, pixels, channels}) <= INT32_MAX - 65536,
                  "expected fewer than 2^31 branches, channels, and pixels in a branch");
}

// Splits the rows (pixels) of every branch between blocks. A block has one split of one branch and one group of
// channels: `across` threads side by side have `width` channels each, the other threads have further rows.
template <int width>
struct RowPartition {
  int branches, rows, channels, across, split_rows;

  // The number of splits depends on the shapes alone: the same order of additions on every GPU.
  RowPartition(int64_t branches_, int64_t rows_, int64_t channels_)
      : branches(int(branches_)), rows(int(rows_)), channels(int(channels_)), across(std::max(64 / width, 1)) {
    check_sizes(branches_, rows_, channels_);
    while (across > 1 && across / 2 * width >= channels) across /= 2;
    const int64_t lanes = kThreads / across, single = branches_ * groups() * ceil_div(rows_, lanes);
    split_rows = int(lanes * std::clamp<int64_t>(single / 2048, 1, 16));  // enough blocks for the largest GPU
  }

  HNE_BOTH int groups() const { return (channels / width + across - 1) / across; }
  HNE_BOTH int splits() const { return (rows + split_rows - 1) / split_rows; }
  int64_t blocks() const { return int64_t(branches) * groups() * splits(); }
  static constexpr int64_t kScratch = kThreads * width * int64_t(sizeof(float));  // bytes, for add_lanes

  // The rows and channels of one thread.
  struct Work {
    Place place;
    int channel;           // the thread's first channel
    bool inside;           // whether that channel exists
    int begin, end, step;  // the thread's rows; empty for a channel that does not exist
    int split_begin, split_end;
  };
  HNE_DEVICE Work work() const {
    int at = int(blockIdx.x);
    const int group = at % groups();
    at /= groups();
    Work w;
    w.place = {at / splits(), at % splits(), group * across * width};
    w.channel = w.place.channel + int(threadIdx.x) % across * width;
    w.split_begin = w.place.split * split_rows, w.split_end = min(rows, w.split_begin + split_rows);
    w.step = kThreads / across;
    w.begin = w.split_begin + int(threadIdx.x) / across, w.inside = w.channel < channels;
    w.end = w.inside ? w.split_end : w.begin;
    return w;
  }
};

// --- on the host -------------------------------------------------------------------------------------------

// The partial results of one reduction, in memory on the device of `like`.
struct ChannelReduction {
  Tensor like, memory;
  int64_t branches, channels;
  Partials partials;

  ChannelReduction(const Tensor& like_, int64_t branches_, int64_t channels_)
      : like(like_), branches(branches_), channels(channels_) {}

  Partials allocate(int64_t planes, int64_t splits) {
    memory = torch::stable::new_empty(like, {planes, branches, splits, channels}, ScalarType::Float);
    partials = {mutable_data<float>(memory), int(branches), int(splits), int(channels)};
    return partials;
  }
};

// Mean and biased variance [branches, channels] of `pixels` values each, from Moments; zeros for no pixels.
std::tuple<Tensor, Tensor> combine_moments(const Device& device, const ChannelReduction& reduction, int64_t pixels);
// Gradient [3, branches, channels] of the mean, scale and shift of (x - mean) * scale + shift, from Pair: the gradients
// of scale and shift. `scale` is [branches, channels].
Tensor combine_norm_gradient(const Device& device, const ChannelReduction& reduction, const float* scale);

}  // namespace hne
