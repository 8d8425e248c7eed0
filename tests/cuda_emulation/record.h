// Recording: launches are reported to a function instead of being executed. tools/cost_launches.py lists the launches
// of a network so, and computes what they cost on a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace hne {

// Called with the address of the kernel, the grid, and the parameters laid out as CUDA does.
using Recorder = void (*)(const void* kernel, int64_t blocks, int threads, int64_t shared_bytes,
                          const unsigned char* parameters, int64_t bytes);
extern Recorder recorder;  // null: launches are executed

template <typename... Parameters>
bool record_launch(const void* kernel, int64_t blocks, int threads, int64_t shared_bytes,
                   const Parameters&... parameters) {
  if (recorder == nullptr) return false;
  if (blocks == 0) return true;
  std::vector<unsigned char> memory;
  const auto append = [&](const auto& parameter) {
    using T = std::decay_t<decltype(parameter)>;
    memory.resize((memory.size() + alignof(T) - 1) / alignof(T) * alignof(T) + sizeof(T));
    std::memcpy(memory.data() + memory.size() - sizeof(T), static_cast<const void*>(&parameter), sizeof(T));
  };
  (append(parameters), ...);
  recorder(kernel, blocks, threads, shared_bytes, memory.data(), static_cast<int64_t>(memory.size()));
  return true;
}

}  // namespace hne
