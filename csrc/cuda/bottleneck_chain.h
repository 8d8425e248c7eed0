// Arguments of the kernel that computes consecutive bottlenecks (fused_bottleneck_chain_kernel.cu).
#pragma once

#include "bottleneck_parts.h"
#include "shape.h"

namespace hne {

constexpr int kMostLayers = 8, kMostChannels = 256, kSide = 8;  // layers of a launch; sides of a feature map
constexpr int kChunk = 64;                                      // expanded channels at a time: 8 for each warp
constexpr int kWarps = kThreads / kWarp, kSlots = 3;
constexpr int kStagePayload = 8192;  // bytes of weights of a stage: two copies of 16 bytes for each thread

enum Kind : int { kExpand, kProject, kShortcut };  // the 1x1 convolutions of a layer

template <typename T>
struct ChainLayer {
  const T *weights[3], *biases[3], *depthwise, *depthwise_bias;
  Clamp<float> range, final_range;
  bool identity;

  HNE_BOTH bool has_shortcut() const { return weights[kShortcut] != nullptr; }
};

template <typename T>
struct Chain {
  ChainLayer<T> layers[kMostLayers];
  const T* x;
  T* out;
  int count, branches, replicate, batch, height, width, channels, middle;
  int samples, passes;  // samples of a block; parts of a layer's output
  int turn;             // samples whose columns a warp's depthwise convolution computes at a time
  Divisor groups;       // blocks of a branch
  Divisor maps, columns, x_vectors, out_vectors, out_pairs;  // of a feature map, of its row; of a pixel
  bool pool;

  HNE_BOTH static int up(int a, int b) { return (a + b - 1) / b * b; }
  HNE_BOTH int pixels() const { return height * width; }
  HNE_BOTH int depth() const { return up(channels, kChunk); }  // whole stages of weights
  HNE_BOTH int x_pitch() const { return depth() + kRowPadding<T>; }
  static constexpr int kExpandedPitch = kChunk + kRowPadding<T>;
  static constexpr int kStage = kStagePayload / int(sizeof(T)), kExpandRows = kStage / kChunk;  // values; rows of 64
  static constexpr int kSlot = kExpandRows * (kChunk + kColumnPadding);  // the narrowest tile has the most padding
  int64_t shared_bytes(int rows) const {
    return (int64_t(rows) * (x_pitch() + kExpandedPitch) + kSlots * kSlot) * int64_t(sizeof(T)) +
           kMostChannels * int64_t(sizeof(float));
  }
};

// Launches the kernel; false if it has no room in shared memory.
template <typename T>
bool run_chain(const Device& device, Chain<T>& c);

}  // namespace hne
