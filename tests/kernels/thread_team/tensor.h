// In place of csrc/tensor.h: what thread_team.h needs of PyTorch, so that a program without it can be compiled with the
// thread sanitizer.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

inline uint32_t& num_threads() {
  static thread_local uint32_t threads = 1;
  return threads;
}

inline uint32_t get_num_threads() { return num_threads(); }

template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  std::vector<std::thread> threads;
  for (int64_t i = begin + 1; i < end; ++i) threads.emplace_back([&f, i] { f(i, i + 1); });
  f(begin, begin + 1);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace torch::stable
