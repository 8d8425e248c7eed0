// Consecutive bottlenecks on small feature maps in one kernel (inference): a sample's features stay in shared memory
// from the first input to the last output, or to the mean over its pixels.
//
//   L layers, G branches, M pixels of a branch, C channels, E expanded   bytes moved at least        multiply-adds
//   forward                                                              x + weights + out           L G M E (2 C + 9)
//                                                                        (out / pixels for a mean)   (+ G M C^2 for a
//                                                                                                    shortcut)
//   Weights are read once for each block, which has 128 (or 64) pixels: 2 L G C E M / 128 values, from the second
//   cache.
//
// A block has as many samples of one branch as fit into kRows pixels, as the rows of matrices in shared memory:
// `x` [row][C] and `expanded` [row][64]. It computes 64 expanded channels at a time: the first 1x1 convolution from x
// to `expanded`, the depthwise convolution in place, and the second 1x1 convolution into registers, from where the
// output overwrites x. A depthwise convolution has the whole feature map, so that no pixel is computed twice. In 16
// bits it is a product with diagonal matrices on tensor cores, which add zero times other channels: where an expanded
// value of the block is not finite, it is computed in float32 instead.
//
// Weights stream through a ring of three slots of 8 KB, in the order in which all layers read them, two slots ahead.
// The barriers of stage s (copy_wait<1>, then block_sync) order everything:
//  - Each thread waits for its own copies of stage s; the barrier makes those of all threads visible. Exactly one group
//    is committed per stage, empty ones at the end, so that "all but the newest" always means up to stage s.
//  - All warps have then finished the products of stage s - 1, whose slot the copies of stage s + 2 overwrite.
//  - `expanded` is written after the stages of the first product, so after every warp has left the last product that
//    read it; one more barrier separates it from the depthwise convolution. On tensor cores, all warps compute into
//    registers, and store after a further barrier. In float32, a pixel of a channel pair is overwritten in place, and
//    only lanes of one warp read or write these channels: a warp has read row r of a feature map before it overwrites
//    row r - 1 (warp_sync), and row r - 1 is then needed by no lane. The next stage's barrier publishes the result.
//  - `out_biases` is written between the first product's stages and that barrier: the layer before has been left, since
//    its readers have passed a stage, and the readers of this layer come after the barrier.
//  - An output overwrites x after all stages of the first product. The identity is read by the thread that overwrites
//    it. A shortcut's product reads other rows and channels of x: a barrier follows its last stage.
//    The first stage of the next layer, or the barrier before the copy out, publishes x.
// Features come by ordinary loads and asynchronous copies, never by the tensor engine: no proxy fence is needed.
#include "bottleneck_chain.h"

namespace hne {
namespace {

#ifdef __CUDACC__
constexpr int kEnoughBlocks = 264;  // two for each multiprocessor of an H100
#else
constexpr int kEnoughBlocks = 4;  // so that small tests reach every kernel
#endif

// Whether 128 registers are one too few for the kernel with many chunks and 128 columns.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kFewRegisters = true;
#else
constexpr bool kFewRegisters = false;
#endif

// Unsigned divisions: a signed one by a power of two takes three instructions more.
HNE_DEVICE int thread_warp(int thread) { return int(unsigned(thread) / kWarp); }
HNE_DEVICE int thread_lane(int thread) { return int(unsigned(thread) % kWarp); }

// Two values of adjacent channels, as they lie in memory.
template <typename T>
struct ChannelPair {
  using Word = std::conditional_t<sizeof(T) == 2, uint32_t, Vector<T, 2>>;

  HNE_DEVICE static Word word(const T* from) { return *reinterpret_cast<const Word*>(from); }
  HNE_DEVICE static void unpack(float (&values)[2], const Word& word) {
    if constexpr (std::is_same_v<T, bfloat16>) {
      values[0] = __builtin_bit_cast(float, word << 16), values[1] = __builtin_bit_cast(float, word & 0xffff0000u);
    } else {
      const auto pair = __builtin_bit_cast(ChannelPair, word);
      values[0] = float(pair.values[0]), values[1] = float(pair.values[1]);
    }
  }
  HNE_DEVICE static void load(float (&values)[2], const T* from) { unpack(values, word(from)); }

  T values[2];
};

// The weights of all layers in the order in which they are read, a stage at a time. A run is the stages of one product:
// rows of a packed 1x1 filter [panel][depth][16]. With two passes, the second product has half the columns of all rows
// or, with a shortcut, all columns of half the rows, in each of them.
template <typename T, int kColumns, bool kManyChunks>
class WeightStream {
 public:
  HNE_DEVICE WeightStream(const Chain<T>& c, int branch) : c_(c), branch_(branch) { start_run(); }

  // Starts the copies of the next stage into `slot`; zeros after the last one. The caller commits them.
  HNE_DEVICE void copy_next(T* slot) {
    copy16(slot + to_, from_, rows_ > 0);
    copy16(slot + to_ + kStage / 2 + half_ / 2, from_ + half_, rows_ > int(half_ / kPanel));
    from_ += 2 * half_, rows_ -= int(2 * half_ / kPanel);
    if (--stages_ == 0) start_next_run();
  }

 private:
  static constexpr int kStage = Chain<T>::kStage;

  HNE_DEVICE void start_run() {
    constexpr unsigned width = 16 / sizeof(T);
    const ChainLayer<T>& l = c_.layers[layer_];
    const bool expand = kind_ == kExpand, by_rows = c_.passes == 2 && l.has_shortcut();
    const unsigned log_columns = expand ? 6 : kColumns == 256 || by_rows ? 8 : 7, value = threadIdx.x * width;
    const unsigned row = value >> log_columns, column = value & ((1u << log_columns) - 1);
    const int depth = kind_ == kProject ? c_.middle : c_.channels, outputs = expand ? c_.middle : c_.channels;
    const unsigned panels = (unsigned(outputs) + unsigned(kPanel) - 1) / unsigned(kPanel);
    const int first_column = expand ? chunk_ * kChunk : by_rows ? 0 : pass_ * kColumns;
    const unsigned panel = (unsigned(first_column) + column) / unsigned(kPanel);
    const int first = kManyChunks && kind_ == kProject ? chunk_ * kChunk : 0;
    const int rows = kManyChunks && kind_ == kProject ? min(kChunk, depth - first) : depth;
    from_ = l.weights[kind_] + int64_t(branch_) * (panels * depth * int(kPanel)) +
            int((panel * unsigned(depth) + unsigned(first) + row) * unsigned(kPanel) + column % unsigned(kPanel));
    to_ = int((row << log_columns) + row * kColumnPadding + column);
    rows_ = panel < panels ? depth - first - int(row) : 0;
    half_ = unsigned(kStage * kPanel / 2) >> log_columns;
    stages_ = ((rows << log_columns) + kStage - 1) / kStage;
  }

  HNE_DEVICE void start_next_run() {
    const ChainLayer<T>& l = c_.layers[layer_];
    if (kind_ == kExpand)
      kind_ = kProject;
    else if (kManyChunks && kind_ == kProject && (chunk_ + 1) * kChunk < c_.middle)
      ++chunk_, kind_ = kExpand;
    else if (kind_ == kProject && l.has_shortcut())
      kind_ = kShortcut;
    else if (!kManyChunks && pass_ + 1 < c_.passes)
      ++pass_, kind_ = kProject;
    else
      ++layer_, pass_ = chunk_ = 0, kind_ = kExpand;
    if (layer_ < c_.count)
      start_run();
    else
      rows_ = 0;
  }

  const Chain<T>& c_;
  const int branch_;
  int layer_ = 0, pass_ = 0, chunk_ = 0, kind_ = kExpand;  // of the run
  const T* from_;                                          // this thread's part of the next stage
  int to_, rows_, stages_;                                 // its place in a slot; rows and stages left in the run
  unsigned half_;                                          // values of a panel in half a stage
};

// kRows: pixels of the block's samples. kColumns: output channels in a pass over all rows. kManyChunks: whether there
// may be more than 64 expanded channels; the sums of the second product then stay in registers during the first.
template <typename P, int kRows, int kColumns, bool kManyChunks>
__global__ void __launch_bounds__(kThreads, kManyChunks && (kColumns == 256 || kFewRegisters) ? 1 : 2)
    bottleneck_chain(const Chain<typename P::Type> c) {
  using T = typename P::Type;
  using Pair = ChannelPair<T>;
  constexpr int width = P::kVector, pitch = Chain<T>::kExpandedPitch;
  constexpr int kWarpsDown = kRows / 32, kWarpsAcross = kWarps / kWarpsDown;  // a warp has 32 rows of a product
  T* const x = static_cast<T*>(shared_memory());
  T* const expanded = x + kRows * c.x_pitch();
  T* const ring = expanded + kRows * pitch;
  float* const out_biases = reinterpret_cast<float*>(ring + kSlots * Chain<T>::kSlot);  // of the layer
  int branch = int(blockIdx.x);
  const int first_sample = c.groups.split(branch) * c.samples;
  const int samples = min(c.samples, c.batch - first_sample), rows = samples * c.pixels();
  const int x_pitch = c.x_pitch(), first_map = branch * c.batch + first_sample;

  if (threadIdx.x == 0) *reinterpret_cast<Vector<T, width>*>(expanded + kChunk) = {};  // a pixel outside
  WeightStream<T, kColumns, kManyChunks> weights(c, branch);
  wait_for_previous_kernel();
  launch_next_kernel();
  weights.copy_next(ring);
  {
    // All rows and columns of x, zeros where there are no features.
    const T* const from = c.x + (int64_t(branch / c.replicate) * c.batch + first_sample) * c.pixels() * c.channels;
    const int per_row = c.x_vectors.divisor(), down = c.x_vectors.divide(kThreads), across = kThreads - down * per_row;
    int row = int(threadIdx.x), vector = c.x_vectors.split(row);
#pragma unroll 1
    while (row < kRows) {
      const bool valid = row < rows && vector * width < c.channels;
      copy16(x + row * x_pitch + vector * width, valid ? from + row * c.channels + vector * width : c.x, valid);
      row += down, vector += across;
      if (vector >= per_row) vector -= per_row, ++row;
    }
  }
  copy_commit();
  weights.copy_next(ring + Chain<T>::kSlot);
  copy_commit();

  // Whether a lane's pair of channels in 8 columns from `first` on is below `channels`, a multiple of `width`.
  const auto is_present = [](int first, int lane, int channels) {
    return first + (width == 8 ? 0 : sum_column(lane, 0)) < channels;
  };

  // Calls use(weights) for the next stage, while the copies of the two stages after it run.
  int slot = 0;
  const auto stage = [&](const auto& use) {
    copy_wait<1>();
    block_sync();
    weights.copy_next(ring + (slot == 0 ? 2 * Chain<T>::kSlot : slot - Chain<T>::kSlot));
    copy_commit();
    use(ring + slot);
    slot = slot == 2 * Chain<T>::kSlot ? 0 : slot + Chain<T>::kSlot;
  };

  // The first product and the depthwise convolution of the channels from `first` on, into `expanded`.
  const auto expand = [&](const ChainLayer<T>& l, int first) {
    const int thread = recompute(int(threadIdx.x)), warp = thread_warp(thread), lane = thread_lane(thread);
    const int present = min(kChunk, c.middle - first);
    const PairClamp<T> range(l.range);
    const int64_t at = int64_t(branch) * c.middle + recompute(first);
    const auto depthwise_bias = [&](int channel) { return l.depthwise_bias + at + channel; };
    const auto depthwise = [&](int channel) { return l.depthwise + at + int64_t(branch) * 8 * c.middle + channel; };
    // On tensor cores: 16 channels of a warp. Nine diagonal matrices, and the bias of the depthwise convolution.
    const int group = warp % 4 * 16;
    uint32_t words[9][2] = {}, filter_bias[2] = {}, check = 0;
    const auto load_filters = [&] {
      if constexpr (sizeof(T) == 2) {
        const uint32_t mask = diagonal_mask(lane);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int channel = group + 8 * j + lane % 4 * 2;
          if (channel >= present) continue;
          filter_bias[j] = Pair::word(depthwise_bias(channel));
          if (mask == 0) continue;
          const T* from = depthwise(channel);
#pragma unroll
          for (int tap = 0; tap < 9; ++tap, from += c.middle) words[tap][j] = Pair::word(from) & mask;
        }
      }
    };
    {
      constexpr int NT = kChunk / kWarpsAcross / 8;
      const int warp_row = warp / kWarpsAcross * 32, warp_column = warp % kWarpsAcross * 8 * NT;
      const bool works = warp_row < rows && warp_column < present;
      const Rows<T> left{{x + warp_row * x_pitch, x_pitch}};
      typename Pair::Word biases[NT] = {};
      const T* const bias = l.biases[kExpand] + at + warp_column + sum_column(lane, 0);
#pragma unroll
      for (int j = 0; j < NT; ++j)
        if (is_present(warp_column + 8 * j, lane, present)) biases[j] = Pair::word(bias + 8 * j);
      float sums[2][NT][4] = {};
      int k = 0;
#pragma unroll 1
      do {
        stage([&](const T* weight) {
          if (works)
            multiply<P, 2, NT>(sums, Rows<T>{{left.row.tile + k, x_pitch}},
                               Across<T>{weight + warp_column, kChunk + kColumnPadding}, Chain<T>::kExpandRows);
        });
        k += Chain<T>::kExpandRows;
      } while (k < c.channels);
      // Requested here, needed after the values have been stored.
      const int pair = 2 * thread;
      typename Pair::Word out_bias[2] = {};
      if (first == 0 && pair < c.channels) {
        const int64_t from = int64_t(branch) * c.channels + pair;
        out_bias[0] = Pair::word(l.biases[kProject] + from);
        if (l.has_shortcut()) out_bias[1] = Pair::word(l.biases[kShortcut] + from);
      }
      if constexpr (!kManyChunks) load_filters();
      if (warp_row < rows) {
        T* const to = expanded + (warp_row + lane / 4) * pitch + warp_column + sum_column(lane, 0);
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          const bool there = is_present(warp_column + 8 * j, lane, present);  // else zero, whatever x is
          float b[2];
          Pair::unpack(b, biases[j]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float (&sum)[4] = sums[i / 2][j];
            range.store_checked(to + 8 * i * pitch + 8 * j, there ? sum[i % 2 * 2] + b[0] : 0.0f,
                                there ? sum[i % 2 * 2 + 1] + b[1] : 0.0f, check);
          }
        }
      }
      if (first == 0 && pair < kMostChannels) {
        float b[2], more[2];
        Pair::unpack(b, out_bias[0]), Pair::unpack(more, out_bias[1]);
        store(out_biases + pair, {b[0] + more[0], b[1] + more[1]});
      }
    }
    if constexpr (sizeof(T) == 2) {
      if (!block_sync_or(PairClamp<T>::not_finite(check))) {
        if constexpr (kManyChunks) load_filters();  // before, there are too few registers
        // A warp computes tiles of 16 pixels and 16 channels, and stores them when all warps have read theirs.
        constexpr int kTiles = kRows / 32;
        const uint32_t low = pack_pair(l.range.low, l.range.low, T{}),
                       high = pack_pair(l.range.high, l.range.high, T{});
        const int first_row = warp / 4 * 16;
        uint32_t results[kTiles][4];
        if (group < present) {
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            if (first_row + 32 * tile >= rows) break;
            const int row = first_row + 32 * tile + lane % 16, here = row * pitch + group + lane / 16 * 8;
            int rest = row, y = c.maps.split(rest);
            const int column = c.columns.split(y);
            const bool there[3][2] = {{y > 0, column > 0}, {true, true}, {y + 1 < c.height, column + 1 < c.width}};
            float sums[2][4];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              float b[2];
              Pair::unpack(b, filter_bias[j]);
#pragma unroll
              for (int e = 0; e < 4; ++e) sums[j][e] = b[e % 2];
            }
#pragma unroll
            for (int tap = 0; tap < 9; ++tap) {
              const int ky = tap / 3, kx = tap % 3;
              const int source = here + (ky - 1) * c.width * pitch + (kx - 1) * pitch;
              uint32_t values[4];
              load_matrices(values, expanded + (there[ky][0] && there[kx][1] ? source : kChunk));
              multiply_half_fragments(sums[0], values[0], values[1], words[tap][0], T{});
              multiply_half_fragments(sums[1], values[2], values[3], words[tap][1], T{});
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
              results[tile][i] =
                  clamp_pair(pack_pair(sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1], T{}), low, high, T{});
          }
        }
        block_sync();
        if (group >= present) return;
        T* const to = expanded + (first_row + lane / 4) * pitch + group + lane % 4 * 2;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          if (first_row + 32 * tile >= rows) break;
#pragma unroll
          for (int i = 0; i < 4; ++i)
            *reinterpret_cast<uint32_t*>(to + (32 * tile + i % 2 * 8) * pitch + i / 2 * 8) = results[tile][i];
        }
        return;
      }
    } else {
      block_sync();
    }

    // In float32. A lane computes the pixels of one column of a feature map, from top to bottom. `above` and `here` are
    // the sums of rows y - 1 and y; the former is complete when row y has been added.
    const int own = warp * 8 + lane % 4 * 2;  // the channels of this lane
    if (warp * 8 >= present) return;
    float filter[10][2] = {};
    if (own < present) {
      const T* from = depthwise(own);
#pragma unroll
      for (int tap = 0; tap < 9; ++tap, from += c.middle) Pair::load(filter[tap], from);
      Pair::load(filter[9], depthwise_bias(own));
    }
    const int down = c.width * pitch;
    int within = lane / 4;
    const int column = c.columns.split(within);
    const auto add_row = [&](int ky, float (&sum)[2], const float (&v)[3][2]) {
#pragma unroll
      for (int kx = 0; kx < 3; ++kx)
#pragma unroll
        for (int e = 0; e < 2; ++e) sum[e] += v[kx][e] * filter[3 * ky + kx][e];
    };
#pragma unroll 1
    for (int first_of_turn = 0; first_of_turn < samples; first_of_turn += c.turn) {
      const bool works = within < c.turn && first_of_turn + within < samples;
      const bool has_left = works && column > 0, has_right = works && column + 1 < c.width;
      T* pixel = expanded + own + (works ? ((first_of_turn + within) * c.pixels() + column) * pitch : 0);
      const auto load_row = [&](float (&v)[3][2]) {
        using Word = typename Pair::Word;
        const Word left = has_left ? Pair::word(pixel - pitch) : Word{};
        const Word right = has_right ? Pair::word(pixel + pitch) : Word{};
        Pair::unpack(v[0], left), Pair::unpack(v[1], Pair::word(pixel)), Pair::unpack(v[2], right);
      };
      float v[3][2], above[2] = {filter[9][0], filter[9][1]}, here[2] = {filter[9][0], filter[9][1]};
      load_row(v);
      add_row(1, above, v), add_row(0, here, v);
#pragma unroll 4
      for (int y = 1; y < c.height; ++y) {
        pixel += down;
        load_row(v);
        float below[2] = {filter[9][0], filter[9][1]};
        add_row(2, above, v), add_row(1, here, v), add_row(0, below, v);
        warp_sync();
        if (works) range.store(pixel - down, above[0], above[1]);
#pragma unroll
        for (int e = 0; e < 2; ++e) above[e] = here[e], here[e] = below[e];
      }
      if (c.height == 1) warp_sync();
      if (works) range.store(pixel, above[0], above[1]);
    }
  };

  // A layer whose second product has `columns` columns in a pass; a warp has 32 rows of them.
  const auto layer = [&](const ChainLayer<T>& l, auto columns) {
    constexpr int kWide = decltype(columns)::value, kStageRows = Chain<T>::kStage / kWide;
    constexpr bool kByRows = kWide > kColumns;
    constexpr int across = kByRows ? 4 : kWarpsAcross, NT = kWide / across / 8;
    int pass = 0;
#pragma unroll 1
    do {
      const int thread = recompute(int(threadIdx.x)), warp = thread_warp(thread), lane = thread_lane(thread);
      const int warp_row = (kByRows ? pass * 64 : 0) + warp / across * 32;
      const int in_stage = warp % across * 8 * NT, warp_column = (kByRows ? 0 : pass * kWide) + in_stage;
      const bool works = warp_row < rows && warp_column < c.channels;
      float sums[2][NT][4];
      T* const to = x + (warp_row + lane / 4) * x_pitch + warp_column + sum_column(lane, 0);
      // The sums begin with the bias and the identity, zeros in columns beyond the channels.
      const auto begin = [&](auto identity) {
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          float b[2];
          load(b, out_biases + warp_column + 8 * j + sum_column(lane, 0));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float join[2] = {};
            if constexpr (decltype(identity)::value) Pair::load(join, to + 8 * i * x_pitch + 8 * j);
#pragma unroll
            for (int e = 0; e < 2; ++e) sums[i / 2][j][i % 2 * 2 + e] = b[e] + join[e];
          }
        }
      };
      const auto begin_sums = [&] {
        if (works && l.identity) {
          begin(std::true_type{});
        } else {
          begin(std::false_type{});
        }
      };
      const auto add_products = [&](const T* from, int from_pitch, int depth) {
        int k = 0;
#pragma unroll 1
        do {
          stage([&](const T* weight) {
            if (works)
              multiply<P, 2, NT>(sums, Rows<T>{{from + warp_row * from_pitch + k, from_pitch}},
                                 Across<T>{weight + in_stage, kWide + kColumnPadding}, kStageRows);
          });
          k += kStageRows;
        } while (k < depth);
      };
      if constexpr (kManyChunks) {
        int first = 0;
#pragma unroll 1
        do {
          expand(l, first);
          if (first == 0) begin_sums();
          add_products(expanded, pitch, min(kChunk, c.middle - first));
          first += kChunk;
        } while (first < c.middle);
      } else {
        begin_sums();
        add_products(expanded, pitch, c.middle);
      }
      if (l.has_shortcut()) {
        add_products(x, x_pitch, c.channels);
        block_sync();  // x is read by other warps until here
      }
      if (works) {
        const PairClamp<T> range(l.final_range);
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          if (!is_present(warp_column + 8 * j, lane, c.channels)) break;
#pragma unroll
          for (int i = 0; i < 4; ++i)
            range.store(to + 8 * i * x_pitch + 8 * j, sums[i / 2][j][i % 2 * 2], sums[i / 2][j][i % 2 * 2 + 1]);
        }
      }
    } while (kRows == 128 && ++pass < c.passes);
  };

  int number = 0;
#pragma unroll 1
  do {
    const ChainLayer<T>& l = c.layers[number];
    if (!kManyChunks) expand(l, 0);
    if constexpr (kRows == 128) {
      if (c.passes == 2 && l.has_shortcut()) {
        layer(l, std::integral_constant<int, 256>{});
        continue;
      }
    }
    layer(l, std::integral_constant<int, kColumns>{});
  } while (++number < c.count);
  copy_wait<0>();
  block_sync();

  if (c.pool) {
    T* const to = c.out + int64_t(first_map) * c.channels;
    const int pairs = c.out_pairs.divisor();
    int sample = int(threadIdx.x), pair = c.out_pairs.split(sample);
    const int samples_down = c.out_pairs.divide(kThreads), across = kThreads - samples_down * pairs;
    const float share = 1.0f / float(c.pixels());
#pragma unroll 1
    while (sample < samples) {
      const T* from = x + sample * c.pixels() * x_pitch + 2 * pair;
      float total[2] = {};
#pragma unroll 4
      for (int pixel = 0; pixel < c.pixels(); ++pixel, from += x_pitch) {
        float value[2];
        Pair::load(value, from);
        total[0] += value[0], total[1] += value[1];
      }
      store(to + sample * c.channels + 2 * pair, {total[0] * share, total[1] * share});
      sample += samples_down, pair += across;
      if (pair >= pairs) pair -= pairs, ++sample;
    }
    return;
  }
  T* const to = c.out + int64_t(first_map) * c.pixels() * c.channels;
  const int per_row = c.out_vectors.divisor(), down = c.out_vectors.divide(kThreads),
            across = kThreads - down * per_row;
  int row = int(threadIdx.x), vector = c.out_vectors.split(row);
#pragma unroll 1
  while (row < rows) {
    *reinterpret_cast<Vector<T, width>*>(to + row * c.channels + vector * width) =
        *reinterpret_cast<const Vector<T, width>*>(x + row * x_pitch + vector * width);
    row += down, vector += across;
    if (vector >= per_row) vector -= per_row, ++row;
  }
}

template <typename P, int kRows, int kColumns, bool kManyChunks>
void launch(const Device& device, Chain<typename P::Type>& c) {
  c.samples = std::min(c.batch, kRows / c.pixels());
  c.turn = 8 / c.width;
  c.maps = Divisor(c.pixels()), c.columns = Divisor(c.width);
  constexpr int vector = 16 / int(sizeof(typename P::Type));
  c.x_vectors = Divisor(c.depth() / vector), c.out_vectors = Divisor(c.channels / vector);
  c.out_pairs = Divisor(c.channels / 2);
  c.groups = Divisor((c.batch + c.samples - 1) / c.samples);
  c.passes = c.channels > kColumns ? 2 : 1;
  device.launch_early(bottleneck_chain<P, kRows, kColumns, kManyChunks>, int64_t(c.branches) * c.groups.divisor(),
                      kThreads, c.shared_bytes(kRows), c);
}

}  // namespace

template <typename T>
bool run_chain(const Device& device, Chain<T>& c) {
  const auto fits = [&](int rows) { return c.shared_bytes(rows) <= device.shared_limit(); };
  if (!fits(64)) return false;
  // 128 pixels share one copy of the weights, unless that would leave multiprocessors without work.
  const auto fills = [&](int rows) {
    return int64_t(c.branches) * ceil_div(c.batch, rows / c.pixels()) >= kEnoughBlocks;
  };
  const auto run = [&](auto precision) {
    using P = decltype(precision);
    if constexpr (sizeof(T) == 2) {
      if (c.middle <= kChunk && fits(128) && fills(128)) return launch<P, 128, 128, false>(device, c);
      if (c.middle <= kChunk) return launch<P, 64, 256, false>(device, c);
    }
    if (c.channels <= 128)
      launch<P, 64, 128, true>(device, c);
    else
      launch<P, 64, 256, true>(device, c);
  };
  if constexpr (sizeof(T) == 4) {
    if (allow_tf32()) {
      run(Precision<T, true>{});
      return true;
    }
  }
  run(Precision<T>{});
  return true;
}
template bool run_chain(const Device&, Chain<float>&);
template bool run_chain(const Device&, Chain<half>&);
template bool run_chain(const Device&, Chain<bfloat16>&);

}  // namespace hne
