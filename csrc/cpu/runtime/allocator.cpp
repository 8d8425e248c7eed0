#include "allocator.h"

#include <sys/mman.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <new>

namespace hne {
namespace {

constexpr size_t kMinBytes = 64 * 1024;      // malloc reuses smaller blocks by itself
constexpr size_t kHeader = 64;               // bytes before the tensor's values: keeps them aligned
constexpr size_t kSpare = 64 * 1024 * 1024;  // bytes: the feature maps of a small network

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kReuse = false;  // AddressSanitizer detects the use of freed memory, but not of reused memory
#else
constexpr bool kReuse = true;
#endif

// Free list: total <= peak request + kSpare, plus at most 25 % slack. The total counts buffers in use and idle ones;
// the peak request is the largest sum of tensor sizes at one time; slack is the excess of buffers over their tensors.
// With this allowance, the buffers of one training step or inference call serve the next one.
class BufferPool {
 public:
  void* allocate(size_t bytes) {
    const std::lock_guard<std::mutex> guard(mutex_);
    bytes = rounded(bytes + kHeader);
    Buffer* buffer = take_idle(bytes, bytes + bytes / 4);
    if (buffer == nullptr && !has_room(bytes)) {
      // Accept a larger buffer while the total slack stays below 25 % of the peak.
      const size_t slack = used_bytes_ - requested_bytes_, max_slack = peak_requested_ / 4;
      if (slack < max_slack) buffer = take_idle(bytes, bytes + (max_slack - slack));
    }
    if (buffer == nullptr) {
      size_t oldest = 0;
      while (oldest < idle_.size() && !has_room(bytes)) unmap(idle_[oldest++]);
      idle_.erase(idle_.begin(), idle_.begin() + int64_t(oldest));
      buffer = new_buffer(bytes);
    }
    used_bytes_ += buffer->bytes;
    requested_bytes_ += buffer->requested = bytes;
    peak_requested_ = std::max(peak_requested_, requested_bytes_);
    return reinterpret_cast<char*>(buffer) + kHeader;
  }

  void free(void* values) {
    const std::lock_guard<std::mutex> guard(mutex_);
    Buffer* buffer = reinterpret_cast<Buffer*>(static_cast<char*>(values) - kHeader);
    used_bytes_ -= buffer->bytes;
    requested_bytes_ -= buffer->requested;
    idle_bytes_ += buffer->bytes;
    idle_.push_back(buffer);
  }

  // Returns idle buffers to the system and starts a new peak; the number of bytes.
  int64_t release_idle() {
    const std::lock_guard<std::mutex> guard(mutex_);
    const size_t released = idle_bytes_;
    for (Buffer* buffer : idle_) unmap(buffer);
    idle_.clear();
    peak_requested_ = requested_bytes_;
    return int64_t(released);
  }

 private:
  struct Buffer {      // lies in the header
    size_t bytes;      // with the header
    size_t requested;  // by the tensor that uses the buffer
  };

  bool has_room(size_t bytes) const { return used_bytes_ + idle_bytes_ + bytes <= peak_requested_ + kSpare; }

  // The smallest idle buffer of `least` to `most` bytes, or null. Of equal sizes, the one freed last is still in the
  // cache.
  Buffer* take_idle(size_t least, size_t most) {
    size_t best = idle_.size();
    for (size_t i = 0; i < idle_.size(); ++i) {
      const size_t size = idle_[i]->bytes;
      if (size >= least && size <= most && (best == idle_.size() || size <= idle_[best]->bytes)) best = i;
    }
    if (best == idle_.size()) return nullptr;
    Buffer* buffer = idle_[best];
    idle_.erase(idle_.begin() + int64_t(best));
    idle_bytes_ -= buffer->bytes;
    return buffer;
  }

  // Rounds up to one of eight sizes per doubling, so that tensors of nearly equal size can use the same buffer.
  static size_t rounded(size_t bytes) {
    size_t step = 4096;
    while (step * 16 <= bytes) step *= 2;
    return (bytes + step - 1) / step * step;
  }

  // Uses mmap: malloc would fragment its heap more and more.
  static Buffer* new_buffer(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    Buffer* buffer = static_cast<Buffer*>(memory);
    buffer->bytes = bytes;
    return buffer;
  }

  void unmap(Buffer* buffer) {
    idle_bytes_ -= buffer->bytes;
    munmap(buffer, buffer->bytes);
  }

  std::mutex mutex_;
  std::vector<Buffer*> idle_;  // in the order in which they were freed
  size_t used_bytes_ = 0, requested_bytes_ = 0, idle_bytes_ = 0, peak_requested_ = 0;
};

// Never destroyed: tensors free their buffers until the process ends.
BufferPool& pool() {
  static BufferPool* pool = new BufferPool;
  return *pool;
}

std::atomic<bool> poisoned = false;

}  // namespace

Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, std::optional<ScalarType> type_in) {
  const ScalarType type = type_in.value_or(like.scalar_type());
  size_t bytes = !type_in.has_value()           ? like.element_size()
                 : type == ScalarType::BFloat16 ? 2
                 : type == ScalarType::Float    ? 4
                                                : 8;
  for (const int64_t size : sizes) bytes *= size_t(size);
  if (!kReuse || bytes < kMinBytes) return torch::stable::new_empty(like, sizes, type);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  void* values = pool().allocate(bytes);
  if (poisoned) std::memset(values, 0xff, bytes);  // NaN in every floating-point type
  return torch::stable::from_blob(
      values, sizes, strides, like.device(), type, +[](void* values) { pool().free(values); });
}

void poison_memory(bool value) { poisoned = value; }

int64_t release_memory() { return pool().release_idle(); }

}  // namespace hne
