#include "winograd.h"

#include <array>
#include <map>
#include <mutex>

namespace hne {
namespace {

constexpr int64_t kFrequencies = 16, kTaps = 9;
constexpr int64_t kMaxDepth = 128;      // input channels of a product: a panel pair of filters fits the first cache
constexpr int64_t kMaxPanels = 8;       // panels of a task
constexpr int64_t kTileMultiple = 14;   // rows of a tile of the matrix product
constexpr int64_t kMinChannels = 32;    // with fewer, the transforms take longer than the products that they save
constexpr int64_t kMinTiles = 8;        // with fewer, a convolution waits for its filters, which are 16/9 as large
constexpr int64_t kTasksPerThread = 4;  // with fewer, their number is a multiple of the number of threads

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
  // The block that begins at channel k0 of a group, and within it the panel of a frequency.
  int64_t block(int64_t group, int64_t k0) const {
    return (group * group_panels * in_channels + k0 * panels_of(group)) * kFrequencies * kPanel;
  }
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

template <typename T>
void transform_branch(const T* packed, const FilterOrder& order, T* out) {
  const int64_t tap_stride = order.in_channels * kPanel;
  for (int64_t panel = 0; panel < order.panels; ++panel) {
    const int64_t group = panel / order.group_panels, panels = order.panels_of(group);
    for (int64_t k = 0; k < order.in_channels; ++k) {
      const int64_t k0 = k / order.depth * order.depth, depth = order.depth_of(k0);
      T* const at = out + order.block(group, k0) + ((panel - group * order.group_panels) * depth + k - k0) * kPanel;
      transform_filters(packed + panel * kTaps * tap_stride + k * kPanel, tap_stride,
                        [&](int64_t frequency) { return at + frequency * panels * depth * kPanel; });
    }
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

}  // namespace

WinogradFilters::WinogradFilters(size_t bytes) : values(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {
  if (values == nullptr) throw std::bad_alloc();
}

WinogradFilters::~WinogradFilters() { std::free(values); }

bool prefers_winograd(const Geometry& g) {
  const int64_t tiles = ceil_div(g.out_height, 2) * ceil_div(g.out_width, 2);
  return g.kernel_size == 3 && g.stride == 1 && g.in_channels >= kMinChannels && g.out_channels >= kMinChannels &&
         g.batch * tiles >= kMinTiles && kFrequencies * tiles < kTaps * g.out_pixels();
}

template <typename T>
WinogradWeights transform_weights(const T* packed, int64_t branches, int64_t in_channels, int64_t out_channels) {
  const FilterOrder order(in_channels, out_channels);
  const int64_t branch_size = order.panels * kTaps * in_channels * kPanel;
  WinogradWeights weights(branches);
  parallel_tasks(branches, [&](int64_t branch) {
    const T* const filters = packed + branch * branch_size;
    const Key key = key_of(filters, in_channels, out_channels);
    {
      const std::lock_guard<std::mutex> guard(registry().mutex);
      weights[branch] = registry().filters[key].lock();
    }
    if (weights[branch] != nullptr) return;
    const auto transformed = std::make_shared<const WinogradFilters>(order.size() * sizeof(T));
    transform_branch(filters, order, static_cast<T*>(transformed->values));
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
  const int64_t columns = ceil_div(g.out_width, 2), rows = ceil_div(g.out_height, 2);
  const int64_t total = g.batch * rows * columns, groups = order.groups();
  // Patches and sums of a chunk of tiles take at most half of the second cache.
  const int64_t tile_bytes = kFrequencies * (order.depth + order.group_panels * kPanel) * int64_t(sizeof(T));
  const int64_t most = std::max<int64_t>(1, second_cache_bytes() / 2 / tile_bytes / kTileMultiple) * kTileMultiple;
  int64_t chunks = ceil_div(total, most);
  const int64_t others = g.branches * groups, threads = num_threads();
  if (others * chunks < kTasksPerThread * threads && total >= threads * kTileMultiple)
    while (others * chunks % threads != 0) ++chunks;
  const int64_t chunk = std::max<int64_t>(1, ceil_div(total, chunks));
  const std::vector<T> zeros(g.in_channels, T(0));
  parallel_tasks(others * chunks, [&](int64_t task) {
    const int64_t branch = task / chunks / groups, group = task / chunks % groups, first = task % chunks * chunk;
    const int64_t count = std::min(chunk, total - first), parent = branch / g.replicate;
    if (count <= 0) return;
    const int64_t panels = order.panels_of(group), channel = group * order.group_panels * kPanel;
    const int64_t channels = std::min(panels * kPanel, g.out_channels - channel);
    const T* const branch_x = x + parent * g.batch * g.pixels() * g.in_channels;
    T* const branch_out = out + branch * g.batch * g.out_pixels() * g.out_channels + channel;
    const T* const branch_add =
        add.features == nullptr
            ? nullptr
            : add.features + branch / add.replicate * g.batch * g.out_pixels() * g.out_channels + channel;
    const T** const pixels = scratch<const T*>(0, kFrequencies * count);
    T** const outputs = scratch<T*>(1, 4 * count);
    const T** const summands = scratch<const T*>(2, 4 * count);
    T* const patches = scratch<T>(3, kFrequencies * count * order.depth);
    T* const sums = scratch<T>(4, kFrequencies * count * channels);
    T** const sum_rows = scratch<T*>(5, kFrequencies * count);
    PixelWalk tile(rows, columns, first);
    for (int64_t m = 0; m < count; ++m, tile.next()) {
      const int64_t y0 = 2 * tile.y - g.padding, x0 = 2 * tile.x - g.padding;
      const T* const sample = branch_x + tile.b * g.pixels() * g.in_channels;
      for (int64_t i = 0; i < kFrequencies; ++i) {
        const int64_t py = y0 + i / 4, px = x0 + i % 4;
        const bool inside = py >= 0 && py < g.height && px >= 0 && px < g.width;
        pixels[kFrequencies * m + i] = inside ? sample + (py * g.width + px) * g.in_channels : zeros.data();
      }
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t oy = 2 * tile.y + i / 2, ox = 2 * tile.x + i % 2;
        const bool inside = oy < g.out_height && ox < g.out_width;
        const int64_t offset = ((tile.b * g.out_height + oy) * g.out_width + ox) * g.out_channels;
        outputs[4 * m + i] = inside ? branch_out + offset : nullptr;
        summands[4 * m + i] = inside && branch_add != nullptr ? branch_add + offset : nullptr;
      }
    }
    for (int64_t i = 0; i < kFrequencies * count; ++i) sum_rows[i] = sums + i * channels;
    const T* filters = static_cast<const T*>(weights[branch]->values) + order.block(group, 0);
    for (int64_t k0 = 0; k0 < g.in_channels; k0 += order.depth) {
      const int64_t depth = order.depth_of(k0), frequency_size = panels * depth * kPanel;
      kernels<T>().winograd_input({pixels, count, depth, patches, count * depth});
      for (int64_t i = 0; i < kFrequencies * count; ++i) pixels[i] += pixels[i] == zeros.data() ? 0 : depth;
      for (int64_t f = 0; f < kFrequencies; ++f, filters += frequency_size) {
        const T* const left = patches + f * count * depth;
        const Tap<T> tap = {&left, filters, depth * kPanel, depth, depth};
        T** const to = sum_rows + f * count;
        const bool last = k0 + depth >= g.in_channels && f + 1 == kFrequencies;
        kernels<T>().gemm({&tap, 1, count, channels, to, nullptr, k0 > 0 ? to : nullptr, Clamp<T>{},
                           Prefetch<T>{filters + frequency_size, last ? 0 : frequency_size}, true});
      }
    }
    kernels<T>().winograd_output({sums, count * channels, count, channels, outputs,
                                  branch_add != nullptr ? summands : nullptr, bias + branch * g.out_channels + channel,
                                  clamp});
  });
}

#define HNE_INSTANTIATE(T)                                                                                           \
  template WinogradWeights transform_weights(const T*, int64_t, int64_t, int64_t);                                   \
  template void convolve_winograd(const Geometry&, const T*, const WinogradWeights&, const T*, Summand<T>, Clamp<T>, \
                                  T*);
HNE_INSTANTIATE(float)
HNE_INSTANTIATE(double)
#undef HNE_INSTANTIATE

}  // namespace hne
