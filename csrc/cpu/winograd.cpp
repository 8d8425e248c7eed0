#include "winograd.h"

#include <array>
#include <map>
#include <mutex>

namespace hne {
namespace {

constexpr int64_t kFrequencies = 16, kTaps = 9;
constexpr int64_t kMaxDepth = 128;     // input channels of a product: a panel pair of filters fits the first cache
constexpr int64_t kMaxPanels = 8;      // panels of a task
constexpr int64_t kTileMultiple = 14;  // rows of a tile of the matrix product
constexpr int64_t kSumBlockRows = 64, kSumBlockColumns = 128;  // channels of the sums of a weight's gradient in a task
constexpr int64_t kMinChannels = 32;       // with fewer, the transforms take longer than the products that they save
constexpr int64_t kPackedDepth = 16;       // input channels packed at once, within the first cache
constexpr int64_t kMinTiles = 8;           // with fewer, a convolution waits for its filters, which are 16/9 as large
constexpr int64_t kMinTrainingTiles = 64;  // with fewer, transforming the filters takes too long
constexpr int64_t kTasksPerThread = 4;     // with fewer, their number is a multiple of the number of threads

// Parts of `count` of nearly equal size, a multiple of `multiple`, and at most `most`.
int64_t part_size(int64_t count, int64_t most, int64_t multiple) {
  return ceil_div(ceil_div(count, ceil_div(count, most)), multiple) * multiple;
}

// The order of the filters of a branch: groups of panels, then blocks of input channels, frequencies, panels, input
// channels. A task reads one group from front to back.
struct FilterOrder {
  int64_t in_channels, panels, depth, group_panels;
  FilterOrder(int64_t in_channels, int64_t out_channels)
      : in_channels(in_channels),
        panels(ceil_div(out_channels, kPanel)),
        depth(part_size(in_channels, kMaxDepth, 1)),
        group_panels(part_size(panels, kMaxPanels, 2)) {}

  int64_t groups() const { return ceil_div(panels, group_panels); }
  int64_t panels_of(int64_t group) const { return std::min(group_panels, panels - group * group_panels); }
  int64_t size() const { return panels * in_channels * kFrequencies * kPanel; }
  // Where a group begins in the filters of a branch, and in a group the block that begins at channel k0.
  int64_t group(int64_t group) const { return group * group_panels * in_channels * kFrequencies * kPanel; }
  int64_t block(int64_t group, int64_t k0) const { return k0 * panels_of(group) * kFrequencies * kPanel; }
  int64_t depth_of(int64_t k0) const { return std::min(depth, in_channels - k0); }
};

// G g G' of kPanel filters g, from [3][3][in_channels][kPanel] to out(frequency), for one input channel.
template <typename T, typename F>
void transform_filters(const T* g, int64_t tap_stride, const F& out) {
  T rows[4][3][kPanel];  // G g
  for (int64_t x = 0; x < 3; ++x)
    for (int64_t n = 0; n < kPanel; ++n) {
      const T g0 = g[x * tap_stride + n], g1 = g[(3 + x) * tap_stride + n], g2 = g[(6 + x) * tap_stride + n];
      rows[0][x][n] = g0, rows[3][x][n] = g2;
      rows[1][x][n] = (g0 + g1 + g2) / 2, rows[2][x][n] = (g0 - g1 + g2) / 2;
    }
  for (int64_t y = 0; y < 4; ++y) {
    T* const out0 = out(4 * y);
    T* const out1 = out(4 * y + 1);
    T* const out2 = out(4 * y + 2);
    T* const out3 = out(4 * y + 3);
    for (int64_t n = 0; n < kPanel; ++n) {
      const T r0 = rows[y][0][n], r1 = rows[y][1][n], r2 = rows[y][2][n];
      out0[n] = r0, out1[n] = (r0 + r1 + r2) / 2, out2[n] = (r0 - r1 + r2) / 2, out3[n] = r2;
    }
  }
}

// Transforms the input channels [first, first + count) of one panel of a branch, [3][3][count][kPanel] with taps
// tap_stride apart, to `out`, where its group begins. `mirrored` filters read the kernel backwards, which exchanges the
// first and the last frequency of each axis.
template <typename T>
void transform_panel(const T* packed, int64_t tap_stride, const FilterOrder& order, int64_t panel, int64_t first,
                     int64_t count, bool mirrored, T* out) {
  const int64_t group = panel / order.group_panels, panels = order.panels_of(group);
  const auto axis = [&](int64_t f) { return mirrored && f % 3 == 0 ? 3 - f : f; };
  for (int64_t k = first; k < first + count; ++k, packed += kPanel) {
    const int64_t k0 = k / order.depth * order.depth, depth = order.depth_of(k0);
    T* const at = out + order.block(group, k0) + ((panel - group * order.group_panels) * depth + k - k0) * kPanel;
    transform_filters(packed, tap_stride, [&](int64_t frequency) {
      return at + (axis(frequency / 4) * 4 + axis(frequency % 4)) * panels * depth * kPanel;
    });
  }
}

// Four hashes of 64 bits, and the sizes: filters with equal keys are equal.
using Key = std::array<uint64_t, 7>;

template <typename T>
Key key_of(const T* packed, int64_t in_channels, int64_t out_channels) {
  Key key = {1, 2, 3, 4, uint64_t(in_channels), uint64_t(out_channels), sizeof(T)};
  const int64_t words = ceil_div(out_channels, kPanel) * kTaps * in_channels * kPanel * int64_t(sizeof(T)) / 8;
  for (int64_t i = 0; i < words; ++i) {
    uint64_t word, &hash = key[i % 4];
    std::memcpy(&word, reinterpret_cast<const char*>(packed) + 8 * i, 8);
    hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 29;
  }
  return key;
}

struct FiltersRegistry {
  std::mutex mutex;
  std::map<Key, std::weak_ptr<const WinogradFilters>> filters;
};

// Never destroyed: threads may use it until the process ends.
FiltersRegistry& registry() {
  static FiltersRegistry* registry = new FiltersRegistry;
  return *registry;
}

// Pointers to the 4x4 input pixels of tiles [first, first + count) of a feature map, over batch, rows and columns.
template <typename T>
void gather_patches(const Geometry& g, const T* x, const T* zeros, int64_t first, int64_t count, const T** pixels) {
  PixelWalk tile(ceil_div(g.out_height, 2), ceil_div(g.out_width, 2), first);
  for (int64_t m = 0; m < count; ++m, tile.next()) {
    const int64_t y0 = 2 * tile.y - g.padding, x0 = 2 * tile.x - g.padding;
    const T* const sample = x + tile.b * g.pixels() * g.in_channels;
    for (int64_t i = 0; i < kFrequencies; ++i) {
      const int64_t py = y0 + i / 4, px = x0 + i % 4;
      const bool inside = py >= 0 && py < g.height && px >= 0 && px < g.width;
      pixels[kFrequencies * m + i] = inside ? sample + (py * g.width + px) * g.in_channels : zeros;
    }
  }
}

// Pointers to the 2x2 output pixels of these tiles; `outside` beyond the feature map.
template <typename T>
void gather_tiles(const Geometry& g, T* out, T* outside, int64_t first, int64_t count, T** pixels) {
  PixelWalk tile(ceil_div(g.out_height, 2), ceil_div(g.out_width, 2), first);
  for (int64_t m = 0; m < count; ++m, tile.next())
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t y = 2 * tile.y + i / 2, x = 2 * tile.x + i % 2;
      const bool inside = y < g.out_height && x < g.out_width;
      pixels[4 * m + i] = inside ? out + ((tile.b * g.out_height + y) * g.out_width + x) * g.out_channels : outside;
    }
}

int64_t tiles_of(const Geometry& g) { return g.batch * ceil_div(g.out_height, 2) * ceil_div(g.out_width, 2); }

// Tiles whose patches and sums, of `channels` together, take at most half of the second cache.
template <typename T>
int64_t most_tiles(int64_t channels) {
  const int64_t bytes = kFrequencies * channels * int64_t(sizeof(T));
  return std::max<int64_t>(1, second_cache_bytes() / 2 / bytes / kTileMultiple) * kTileMultiple;
}

// out = clamp(sum of conv(x, filters) over sources + bias + add). Output branch b reads source b / g.replicate or, with
// several `sources` each, those from b * sources on, of which there are g.parents. filters(i, group, s) gives a group
// of the filters of output branch i or, with several sources, of source i, the s-th of its branch; `each_chunk`: they
// cost nothing, so that a task needs only one chunk of tiles.
template <typename T, typename F>
void convolve_tiles(const Geometry& g, int64_t sources, const T* x, const F& filters, bool each_chunk, const T* bias,
                    Summand<T> add, Clamp<T> clamp, T* out) {
  const FilterOrder order(g.in_channels, g.out_channels);
  const int64_t total = tiles_of(g), groups = order.groups();
  int64_t chunks = ceil_div(total, most_tiles<T>(order.depth + order.group_panels * kPanel));
  const int64_t others = g.branches * groups, threads = num_threads();
  if (others * chunks < kTasksPerThread * threads && total >= threads * kTileMultiple)
    while (others * chunks % threads != 0) ++chunks;
  const int64_t chunk = std::max<int64_t>(1, ceil_div(total, std::max<int64_t>(chunks, 1)));
  const std::vector<T> zeros(std::max(g.in_channels, g.out_channels), T(0));
  const int64_t least = ceil_div(kTasksPerThread * threads, std::max<int64_t>(others, 1));
  const int64_t parts = each_chunk ? chunks : std::min(chunks, least);
  parallel_tasks(others * parts, [&](int64_t task) {
    const int64_t branch = task / parts / groups, group = task / parts % groups, part = task % parts;
    const int64_t panels = order.panels_of(group), channel = group * order.group_panels * kPanel;
    const int64_t channels = std::min(panels * kPanel, g.out_channels - channel);
    const int64_t in_size = g.batch * g.pixels() * g.in_channels, out_size = g.batch * g.out_pixels() * g.out_channels;
    const T** const pixels = scratch<const T*>(0, kFrequencies * chunk);
    T** const outputs = scratch<T*>(1, 4 * chunk);
    const T** const summands = add.features != nullptr ? scratch<const T*>(2, 4 * chunk) : nullptr;
    T* const patches = scratch<T>(3, kFrequencies * chunk * order.depth);
    T* const sums = scratch<T>(4, kFrequencies * chunk * channels);
    T** const sum_rows = scratch<T*>(5, kFrequencies * chunk);
    for (int64_t i = 0; i < kFrequencies * chunk; ++i) sum_rows[i] = sums + i * channels;
    const int64_t first_source = branch * sources / g.replicate;
    const int64_t num_sources = std::min(sources, g.parents - first_source);
    const T** const blocks = scratch<const T*>(10, sources);
    for (int64_t s = 0; s < num_sources; ++s) blocks[s] = filters(sources > 1 ? first_source + s : branch, group, s);
    for (int64_t i = chunks * part / parts; i < chunks * (part + 1) / parts; ++i) {
      const int64_t first = i * chunk, count = std::min(chunk, total - first);
      if (count <= 0) return;
      for (int64_t s = 0; s < num_sources; ++s) {
        gather_patches(g, x + (first_source + s) * in_size, zeros.data(), first, count, pixels);
        const T* block = blocks[s];
        for (int64_t k0 = 0; k0 < g.in_channels; k0 += order.depth) {
          const int64_t depth = order.depth_of(k0), frequency_size = panels * depth * kPanel;
          const bool accumulate = s > 0 || k0 > 0, last_block = k0 + depth >= g.in_channels;
          kernels<T>().winograd_input({pixels, count, depth, patches, count * depth});
          for (int64_t p = 0; p < kFrequencies * count; ++p) pixels[p] += pixels[p] == zeros.data() ? 0 : depth;
          for (int64_t f = 0; f < kFrequencies; ++f, block += frequency_size) {
            const T* const left = patches + f * count * depth;
            const Tap<T> tap = {&left, block, depth * kPanel, depth, depth};
            T** const to = sum_rows + f * count;
            const int64_t next = last_block && f + 1 == kFrequencies ? 0 : frequency_size;
            PrefetchQueue<T> ahead;
            ahead.add(block + frequency_size, next);
            kernels<T>().gemm(
                {&tap, 1, count, channels, to, nullptr, accumulate ? to : nullptr, Clamp<T>{}, &ahead, true});
          }
        }
      }
      gather_tiles<T>(g, out + branch * out_size + channel, nullptr, first, count, outputs);
      if (summands != nullptr)
        gather_tiles<const T>(g, add.features + branch / add.replicate * out_size + channel, nullptr, first, count,
                              summands);
      kernels<T>().winograd_output({sums, count * channels, count, channels, outputs, summands,
                                    bias != nullptr ? bias + branch * g.out_channels + channel : zeros.data(), clamp});
    }
  });
}

// The same with the weight [branch][out_channels][in_channels][3][3] of the convolution `forward`, which each task
// transforms for itself; `backward`: transposed and mirrored, for the gradient of the input.
template <typename T>
void convolve_tiles(const Geometry& g, const Geometry& forward, const Tensor& weight, bool backward, const T* x,
                    const T* bias, T* out) {
  const FilterOrder order(g.in_channels, g.out_channels);
  const int64_t row = weight.stride(1), sources = backward ? forward.replicate : 1;
  const int64_t stride_n = backward ? kTaps : row, stride_k = backward ? row : kTaps;
  const auto filters = [&](int64_t branch, int64_t group, int64_t s) -> const T* {
    T* const out = scratch<T>(11, sources * order.group(1)) + s * order.group(1);
    const int64_t first = group * order.group_panels;
    T packed[kTaps * kPackedDepth * kPanel];
    for (int64_t panel = first; panel < first + order.panels_of(group); ++panel) {
      const int64_t channel = panel * kPanel;
      const T* const from = data<T>(weight) + branch * weight.stride(0) + channel * stride_n;
      for (int64_t k = 0; k < g.in_channels; k += kPackedDepth) {
        const int64_t count = std::min(kPackedDepth, g.in_channels - k);
        pack(from + k * stride_k, std::min(kPanel, g.out_channels - channel), count, kTaps, stride_n, stride_k, 0,
             packed);
        transform_panel(packed, count * kPanel, order, panel, k, count, backward, out);
      }
    }
    return out;
  };
  convolve_tiles<T>(g, sources, x, filters, false, bias, Summand<T>{}, Clamp<T>{}, out);
}

void report_rows(int64_t branches, int64_t rows, const RowsWritten& written) {
  if (!written) return;
  const int64_t blocks = ceil_div(rows, kBlockRows);
  parallel_tasks(branches * blocks, [&](int64_t task) {
    const int64_t first = task % blocks * kBlockRows;
    written(task / blocks, first, std::min(kBlockRows, rows - first));
  });
}

}  // namespace

WinogradFilters::WinogradFilters(size_t bytes) : values(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {
  if (values == nullptr) throw std::bad_alloc();
}

WinogradFilters::~WinogradFilters() { std::free(values); }

bool prefers_winograd(const Geometry& g, bool transformed) {
  const int64_t tiles = tiles_of(g);
  return g.kernel_size == 3 && g.stride == 1 && g.padding <= 2 && g.in_channels >= kMinChannels &&
         g.out_channels >= kMinChannels && tiles >= (transformed ? kMinTiles : kMinTrainingTiles) &&
         kFrequencies * tiles < kTaps * g.batch * g.out_pixels();
}

template <typename T>
WinogradWeights transform_packed(const T* packed, int64_t branches, int64_t in_channels, int64_t out_channels) {
  const FilterOrder order(in_channels, out_channels);
  const int64_t panel_size = kTaps * in_channels * kPanel;
  WinogradWeights weights(branches);
  parallel_tasks(branches, [&](int64_t branch) {
    const T* const filters = packed + branch * order.panels * panel_size;
    const Key key = key_of(filters, in_channels, out_channels);
    {
      const std::lock_guard<std::mutex> guard(registry().mutex);
      const auto found = registry().filters.find(key);
      if (found != registry().filters.end()) weights[branch] = found->second.lock();
    }
    if (weights[branch] != nullptr) return;
    const auto transformed = std::make_shared<const WinogradFilters>(order.size() * sizeof(T));
    for (int64_t panel = 0; panel < order.panels; ++panel)
      transform_panel(filters + panel * panel_size, in_channels * kPanel, order, panel, 0, in_channels, false,
                      static_cast<T*>(transformed->values) + order.group(panel / order.group_panels));
    const std::lock_guard<std::mutex> guard(registry().mutex);
    registry().filters[key] = transformed;
    weights[branch] = transformed;
  });
  // Filters that nobody uses any more.
  const std::lock_guard<std::mutex> guard(registry().mutex);
  for (auto entry = registry().filters.begin(); entry != registry().filters.end();)
    entry = entry->second.expired() ? registry().filters.erase(entry) : std::next(entry);
  return weights;
}

template <typename T>
void convolve_winograd(const Geometry& g, const T* x, const WinogradWeights& weights, const T* bias, Summand<T> add,
                       Clamp<T> clamp, T* out) {
  const FilterOrder order(g.in_channels, g.out_channels);
  const auto filters = [&](int64_t branch, int64_t group, int64_t) -> const T* {
    return static_cast<const T*>(weights[branch]->values) + order.group(group);
  };
  convolve_tiles<T>(g, 1, x, filters, true, bias, add, clamp, out);
}

template <typename T>
void convolve_winograd(const Geometry& g, const T* x, const Tensor& weight, const T* bias, T* out,
                       const RowsWritten& written) {
  convolve_tiles<T>(g, g, weight, false, x, bias, out);
  report_rows(g.branches, g.batch * g.out_pixels(), written);
}

// A convolution of the output's gradient, over the children of each parent, with the padding that restores the size.
template <typename T>
void convolve_winograd_input(const Geometry& g, const T* grad, const Tensor& weight, T* out,
                             const RowsWritten& written) {
  Geometry back = g;
  back.parents = g.branches, back.branches = g.parents, back.replicate = 1, back.padding = 2 - g.padding;
  back.height = g.out_height, back.width = g.out_width, back.in_channels = g.out_channels;
  back.out_height = g.height, back.out_width = g.width, back.out_channels = g.in_channels;
  convolve_tiles<T>(back, g, weight, true, grad, nullptr, out);
  report_rows(g.parents, g.batch * g.pixels(), written);
}

// G' (sum over tiles of (A d A') * (B' x B)) G: an outer product at every frequency. A task sums a block of output by
// input channels, over a part of the tiles.
template <typename T>
void convolve_winograd_weight(const Geometry& g, const T* grad, const T* x, const Tensor& out) {
  const int64_t rows = part_size(g.out_channels, kSumBlockRows, 1),
                columns = part_size(g.in_channels, kSumBlockColumns, 1);
  const int64_t row_blocks = ceil_div(g.out_channels, rows), column_blocks = ceil_div(g.in_channels, columns);
  const int64_t blocks = g.branches * row_blocks * column_blocks, total = tiles_of(g), size = rows * columns;
  const int64_t chunk = most_tiles<T>(rows + columns), chunks = ceil_div(total, chunk), threads = num_threads();
  const int64_t parts =
      std::clamp<int64_t>(ceil_div(2 * threads, std::max<int64_t>(blocks, 1)), 1, std::max<int64_t>(chunks, 1));
  // With one part, a task has its sums in its cache; else they are added in order.
  const Tensor sums = empty(out, {parts == 1 ? 0 : blocks * parts * kFrequencies * size});
  const std::vector<T> zeros(std::max(g.in_channels, g.out_channels), T(0));
  struct Block {
    int64_t branch, row, column, num_rows, num_columns;
  };
  const auto block_at = [&](int64_t block) -> Block {
    const int64_t row = block / column_blocks % row_blocks * rows, column = block % column_blocks * columns;
    return {block / column_blocks / row_blocks, row, column, std::min(rows, g.out_channels - row),
            std::min(columns, g.in_channels - column)};
  };
  const auto finish = [&](const Block& b, const T* sum) {
    for (int64_t r = 0; r < b.num_rows; ++r) {
      const int64_t at = ((b.branch * g.out_channels + b.row + r) * g.in_channels + b.column) * kTaps;
      kernels<T>().winograd_filter_gradient(
          {sum + r * b.num_columns, b.num_rows * b.num_columns, b.num_columns, mutable_data<T>(out) + at});
    }
  };
  parallel_tasks(blocks * parts, [&](int64_t task) {
    const int64_t part = task % parts;
    const Block b = block_at(task / parts);
    T* const sum = parts == 1 ? scratch<T>(5, kFrequencies * size) : mutable_data<T>(sums) + task * kFrequencies * size;
    std::fill(sum, sum + kFrequencies * size, T(0));
    const T** const pixels = scratch<const T*>(0, kFrequencies * chunk);
    const T** const left = scratch<const T*>(1, chunk);
    const T** const right = scratch<const T*>(2, chunk);
    T* const patches = scratch<T>(3, kFrequencies * chunk * columns);
    T* const tiles = scratch<T>(4, kFrequencies * chunk * rows);
    const T* const branch_x = x + b.branch / g.replicate * g.batch * g.pixels() * g.in_channels + b.column;
    const T* const branch_grad = grad + b.branch * g.batch * g.out_pixels() * g.out_channels + b.row;
    for (int64_t i = chunks * part / parts; i < chunks * (part + 1) / parts; ++i) {
      const int64_t first = i * chunk, count = std::min(chunk, total - first);
      gather_patches(g, branch_x, zeros.data(), first, count, pixels);
      kernels<T>().winograd_input({pixels, count, b.num_columns, patches, count * b.num_columns});
      gather_tiles<const T>(g, branch_grad, zeros.data(), first, count, pixels);
      kernels<T>().winograd_output_gradient({pixels, count, b.num_rows, tiles, count * b.num_rows});
      for (int64_t f = 0; f < kFrequencies; ++f) {
        for (int64_t m = 0; m < count; ++m) left[m] = tiles + (f * count + m) * b.num_rows;
        for (int64_t m = 0; m < count; ++m) right[m] = patches + (f * count + m) * b.num_columns;
        kernels<T>().outer({left, right, count, b.num_rows, b.num_columns, sum + f * b.num_rows * b.num_columns});
      }
    }
    if (parts == 1) finish(b, sum);
  });
  if (parts == 1) return;
  parallel_tasks(blocks, [&](int64_t block) {
    const Block b = block_at(block);
    T* const sum = mutable_data<T>(sums) + block * parts * kFrequencies * size;
    for (int64_t part = 1; part < parts; ++part)
      kernels<T>().add_scaled(sum, sum + part * kFrequencies * size, T(1), kFrequencies * b.num_rows * b.num_columns);
    finish(b, sum);
  });
}

#define HNE_INSTANTIATE(T)                                                                                           \
  template WinogradWeights transform_packed(const T*, int64_t, int64_t, int64_t);                                    \
  template void convolve_winograd(const Geometry&, const T*, const WinogradWeights&, const T*, Summand<T>, Clamp<T>, \
                                  T*);                                                                               \
  template void convolve_winograd(const Geometry&, const T*, const Tensor&, const T*, T*, const RowsWritten&);       \
  template void convolve_winograd_input(const Geometry&, const T*, const Tensor&, T*, const RowsWritten&);           \
  template void convolve_winograd_weight(const Geometry&, const T*, const T*, const Tensor&);
HNE_INSTANTIATE(float)
HNE_INSTANTIATE(double)
#undef HNE_INSTANTIATE

}  // namespace hne
