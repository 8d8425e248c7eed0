// Layers that were prepared once for many calls.
#pragma once

#include <memory>
#include <mutex>
#include <random>
#include <unordered_map>

#include "tensor.h"

namespace hne {

// Prepared layers of this process by handle.
template <typename Layers>
class LayersRegistry {
 public:
  int64_t add(std::shared_ptr<const Layers> layers) {
    const std::lock_guard<std::mutex> guard(mutex_);
    int64_t handle = random_handle();
    while (layers_.count(handle) != 0) handle = random_handle();
    layers_[handle] = std::move(layers);
    return handle;
  }

  std::shared_ptr<const Layers> get(int64_t handle) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = layers_.find(handle);
    STD_TORCH_CHECK(found != layers_.end(), "layers: expected a number of prepare_layers, got ", handle,
                    ", which belongs to another process or to layers that are gone; make them in this process");
    return found->second;
  }

  void remove(int64_t handle) {
    std::shared_ptr<const Layers> removed;  // declared before the guard: frees after the mutex is unlocked
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = layers_.find(handle);
    if (found == layers_.end()) return;
    removed = std::move(found->second);
    layers_.erase(found);
  }

 private:
  // 62 random bits: a handle that another process wrote into a program is none here. Every one is drawn from the
  // system, since a forked process has a copy of all state.
  static int64_t random_handle() {
    std::random_device bits;  // 32 at a time
    return (int64_t(bits() >> 2) << 32 | bits()) + 1;
  }

  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const Layers>> layers_;
};

}  // namespace hne
