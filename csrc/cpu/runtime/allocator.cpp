#include "allocator.h"

#include <sys/mman.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <new>

namespace hne {
namespace {

constexpr size_t kSmallest = 64 * 1024;  // below, malloc itself keeps the memory
constexpr size_t kHeader = 64;           // before the tensor's values, which stay aligned

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKept = false;  // AddressSanitizer watches over memory that is given back
#else
constexpr bool kKept = true;
#endif

constexpr size_t kSpare = 64 * 1024 * 1024;  // a small network's maps of all sizes

// Blocks that no tensor uses, for the next ones that do. All memory together, in use or not, is never more than what
// tensors asked for at one time and kSpare, but for what blocks are larger than their tensors: up to a quarter. With
// that much freedom, the blocks that a training step or a call leaves are those that the next one needs.
class Blocks {
 public:
  void* take(size_t bytes) {
    const std::lock_guard<std::mutex> guard(mutex_);
    bytes = rounded(bytes + kHeader);
    Block* block = take_idle(bytes, bytes + bytes / 4);
    if (block == nullptr && !has_room(bytes)) {
      // One that is larger, as long as not too much of those in use is idle itself.
      const size_t wasted = used_bytes_ - asked_bytes_, most = most_used_ / 4;
      if (wasted < most) block = take_idle(bytes, bytes + (most - wasted));
    }
    if (block == nullptr) {
      size_t oldest = 0;
      while (oldest < idle_.size() && !has_room(bytes)) free_block(idle_[oldest++]);
      idle_.erase(idle_.begin(), idle_.begin() + int64_t(oldest));
      block = new_block(bytes);
    }
    used_bytes_ += block->bytes;
    asked_bytes_ += block->asked = bytes;
    most_used_ = std::max(most_used_, asked_bytes_);
    return reinterpret_cast<char*>(block) + kHeader;
  }

  void give_back(void* values) {
    const std::lock_guard<std::mutex> guard(mutex_);
    Block* block = reinterpret_cast<Block*>(static_cast<char*>(values) - kHeader);
    used_bytes_ -= block->bytes;
    asked_bytes_ -= block->asked;
    idle_bytes_ += block->bytes;
    idle_.push_back(block);
  }

  int64_t release() {
    const std::lock_guard<std::mutex> guard(mutex_);
    const size_t released = idle_bytes_;
    for (Block* block : idle_) free_block(block);
    idle_.clear();
    most_used_ = asked_bytes_;
    return int64_t(released);
  }

 private:
  struct Block {
    size_t bytes;  // of the header and what follows
    size_t asked;  // of them, by the tensor that uses it
  };

  bool has_room(size_t bytes) const { return used_bytes_ + idle_bytes_ + bytes <= most_used_ + kSpare; }

  // The smallest idle block of so many bytes, or null. Of several that which was used last: it is still in the cache.
  Block* take_idle(size_t least, size_t most) {
    size_t best = idle_.size();
    for (size_t i = 0; i < idle_.size(); ++i) {
      const size_t size = idle_[i]->bytes;
      if (size >= least && size <= most && (best == idle_.size() || size <= idle_[best]->bytes)) best = i;
    }
    if (best == idle_.size()) return nullptr;
    Block* block = idle_[best];
    idle_.erase(idle_.begin() + int64_t(best));
    idle_bytes_ -= block->bytes;
    return block;
  }

  // Eight sizes for every doubling: a tensor finds the block of one that was nearly as large.
  static size_t rounded(size_t bytes) {
    size_t step = 4096;
    while (step * 16 <= bytes) step *= 2;
    return (bytes + step - 1) / step * step;
  }

  // From the system itself: between its blocks, malloc would keep what is left of others, more and more of it.
  static Block* new_block(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    Block* block = static_cast<Block*>(memory);
    block->bytes = bytes;
    return block;
  }

  void free_block(Block* block) {
    idle_bytes_ -= block->bytes;
    munmap(block, block->bytes);
  }

  std::mutex mutex_;
  std::vector<Block*> idle_;  // by the time they were given back, the oldest first
  size_t used_bytes_ = 0, asked_bytes_ = 0, idle_bytes_ = 0, most_used_ = 0;
};

// Never destroyed: tensors give back their memory until the process ends.
Blocks& blocks() {
  static Blocks* blocks = new Blocks;
  return *blocks;
}

std::atomic<bool> poisoned = false;

}  // namespace

Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  size_t bytes = like.element_size();
  for (const int64_t size : sizes) bytes *= size_t(size);
  if (!kKept || bytes < kSmallest) return torch::stable::new_empty(like, sizes);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  void* values = blocks().take(bytes);
  if (poisoned) std::memset(values, 0xff, bytes);  // a NaN in every floating-point type
  return torch::stable::from_blob(
      values, sizes, strides, like.device(), like.scalar_type(), +[](void* values) { blocks().give_back(values); });
}

void poison_memory(bool value) { poisoned = value; }

int64_t release_memory() { return blocks().release(); }

}  // namespace hne
