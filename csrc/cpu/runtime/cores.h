// Threads and the cores that they run on. Systems other than Linux place threads by themselves: there, nothing happens.
#pragma once

#include <atomic>
#include <cstdint>

namespace hne {

// The core of the calling thread; -1 where it is unknown.
int current_core();

// A thread of this process, as the system knows it.
struct SystemThread {
  int32_t id = 0, clock = 0;

  static SystemThread current();

  // Nanoseconds that the thread has had on a core; -1 where that is unknown.
  int64_t time_on_core() const;

  // Moves the thread, which waits for a core, to the caller's, where it runs as soon as the caller sleeps. Later it may
  // run wherever `like` may; nothing happens if that is not here.
  void fetch(const SystemThread& like) const;

  // Moves the thread to another core than `core`, if it is on that core, and keeps it off. It may run where `like` may.
  void keep_off(int core, const SystemThread& like) const;
};

// Asks the system to let the calling thread run soon after it has been woken, though for short times only.
void prefer_short_slices();

// Cores on which threads of a team run: Linux may wake a thread on the core of its waker although another one is idle.
class ClaimedCores {
 public:
  // Claims the core of the calling thread; false if another thread has claimed it.
  bool claim();

  // Moves the calling thread to a core that no thread has claimed, then restores its affinity: the move is immediate,
  // and later the system may place the thread as before. (It keeps that affinity even if its cpuset grows later.)
  void move_to_free_core() const;

 private:
  static constexpr int kMaxCores = 1024, kBitsPerWord = 64;
  std::atomic<uint64_t> claimed_[kMaxCores / kBitsPerWord] = {};
};

}  // namespace hne
