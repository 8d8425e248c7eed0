// The threads of this library that help with the loops of inference.
//
// Where the system gives the core of a thread of a team to another thread in the middle of a task, the others would
// wait for a time slice, of milliseconds. Therefore whoever of them waits fetches that thread to its own core, and
// sleeps.
//
// A helper spins for a while after a loop, because the next one is near, and then sleeps until it is called.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>

#include "cores.h"
#include "shared_loop.h"

namespace hne {

// Finds out whether a thread waits for a core.
class WatchedThread {
 public:
  void set(const SystemThread& thread) { thread_ = thread, seen_ = -1; }
  SystemThread get() const { return thread_; }

  // Whether the thread had no time on a core since the last look; false at the first one.
  bool waits_for_core() {
    const int64_t now = get().time_on_core();
    return now >= 0 && seen_.exchange(now) == now;
  }

 private:
  std::atomic<SystemThread> thread_{};
  std::atomic<int64_t> seen_{-1};
};

class HelperThreads {
 public:
  // Those of this process; after a fork, the child has others.
  static HelperThreads& of_process();

  // When PyTorch's threads stop spinning after a loop that the calling thread led; none spin in a forked process.
  static std::chrono::steady_clock::time_point& torch_spins_until();

  // A loop for the calling thread with `helpers` others, which are started if they are not there. Null if there are too
  // many leaders already.
  SharedLoop* take_loop(int64_t helpers);
  void give_back(SharedLoop& loop);

  // Wakes those of the first `helpers` threads that sleep.
  void call(int64_t helpers);

  // Waits until the last helper has left a closed loop.
  void wait(const SharedLoop& loop);

 private:
  static constexpr size_t kMaxLeaders = 64, kMaxHelpers = 1023;
  using LoopNumbers = std::array<uint32_t, kMaxLeaders>;

  struct Leader {
    SharedLoop loop;
    std::atomic<bool> taken{false};
    WatchedThread thread;
  };

  struct alignas(64) Helper {
    std::atomic<uint32_t> asleep{0};
    std::atomic<int> kept_off{-1};  // a core
    std::atomic<const SharedLoop*> inside{nullptr};
    std::atomic<bool> fetched{false};  // to the core of a leader
    WatchedThread thread;
  };

  void start(size_t helpers);
  void help(Helper& self, int64_t number);
  bool work(Helper& self, int64_t number, LoopNumbers& last);
  bool fetch_leader();
  void sleep(Helper& self, const LoopNumbers& last);

  std::array<Leader, kMaxLeaders> leaders_;
  std::atomic<size_t> num_leaders_{0};  // those that there ever were are the first ones
  std::array<std::atomic<Helper*>, kMaxHelpers> helpers_ = {};
  std::atomic<size_t> num_helpers_{0};
  std::mutex starting_;
};

}  // namespace hne
