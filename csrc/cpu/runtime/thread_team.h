// A team of threads for the parallel loops of one op: the calling thread leads, the others help.
//
// Starting threads takes microseconds per loop, as long as one layer of one image. A team therefore starts its threads
// once for all loops of an op; between loops the helpers spin. A loop does not wait for helpers that arrive late: the
// other threads take over their tasks.
//
// Linux may wake a thread on the core of its waker although another core is idle, and libgomp's threads spin for
// milliseconds while they wait for each other. The woken thread would then run only after its waker's time slice, and
// an op of microseconds would take 4 or 8 ms. Therefore a helper that finds another thread of its team on its core
// moves to a free core, and at the end of the op the leader yields its core to helpers that have not arrived, before it
// waits for them. (A thread that has moved once keeps its affinity of that time, even if its cpuset grows later.)
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#ifdef __linux__
#include <sched.h>
#endif

#include "tensor.h"

namespace hne {

class ThreadTeam {
 public:
  // Calls body() on this thread, as the leader of a team of torch.get_num_threads() threads that share its
  // parallel_tasks. No team is made if the thread leads one already, or if there is only one thread.
  template <typename F>
  static void lead(const F& body) {
    const int64_t threads = torch::stable::get_num_threads();
    if (current() != nullptr || threads <= 1) return body();
    ThreadTeam team(threads);
    team.claim_core();
    std::exception_ptr failure;
    bool started = false;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      if (&current() != team.leader_) return team.help(begin, end);
      if (started) return;  // parallel_for may call the leader once for each of several threads
      started = true;
      current() = &team;
      try {
        body();
      } catch (...) {
        failure = std::current_exception();
      }
      current() = nullptr;
      team.dismiss(threads - (end - begin));
    });
    if (failure) std::rethrow_exception(failure);
  }

  // The team that the calling thread leads, or null.
  static ThreadTeam*& current() {
    static thread_local ThreadTeam* team = nullptr;
    return team;
  }

  int64_t threads() const { return threads_; }

  // Whether the calling thread computes a task: loops within a task are its own.
  static bool& in_task() {
    static thread_local bool in_task = false;
    return in_task;
  }

  // Calls f(task) for every task in [0, tasks) on all threads of the team. Only the leader calls it, outside of tasks.
  template <typename F>
  void run_tasks(int64_t tasks, const F& f) {
    for (int64_t i = 0; i < threads_; ++i) {  // consecutive tasks per thread: they often read the same weights
      ranges_[i].next.store(tasks * i / threads_, std::memory_order_relaxed);
      ranges_[i].end = tasks * (i + 1) / threads_;
    }
    context_ = &f;
    call_ = [](const void* context, int64_t task) { (*static_cast<const F*>(context))(task); };
    const int64_t loop = loop_.load(std::memory_order_relaxed) + 1;
    loop_.store(loop);
    work(0);
    loop_.store(loop + 1);  // closed: no helper starts on this loop any more
    SpinWait spin;
    while (active_helpers_.load() > 0) spin.wait();
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  static constexpr int kDismissYields = 64, kMaxCores = 1024, kBitsPerWord = 64;
  static constexpr int64_t kDismissed = -2;

  struct alignas(64) TaskRange {
    std::atomic<int64_t> next;
    int64_t end;
  };

  // Waits for an event that is near: spins first, then yields the core.
  class SpinWait {
   public:
    void wait() {
      if (++times_ < 1000) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
      } else {
        std::this_thread::yield();
      }
    }

   private:
    int times_ = 0;
  };

  explicit ThreadTeam(int64_t threads) : threads_(threads), leader_(&current()), ranges_(new TaskRange[threads]) {}

  // Works on the leader's loops until dismissed. The calling thread stands for the threads [begin, end) of the team.
  void help(int64_t begin, int64_t end) {
    if (!claim_core()) move_to_free_core();
    arrived_.fetch_add(end - begin);
    SpinWait spin;
    for (int64_t last = 0;;) {
      const int64_t loop = loop_.load();
      if (loop == kDismissed) return;
      if (loop % 2 == 0 || loop == last) {
        spin.wait();
        continue;
      }
      active_helpers_.fetch_add(1);
      if (loop_.load() == loop) work(begin);
      active_helpers_.fetch_sub(1);
      last = loop, spin = {};
    }
  }

  // Runs the tasks of thread `self` first, then the remaining tasks of the others.
  void work(int64_t self) {
    in_task() = true;
    for (int64_t i = 0; i < threads_; ++i) {
      TaskRange& range = ranges_[(self + i) % threads_];
      while (range.next.load(std::memory_order_relaxed) < range.end) {
        const int64_t task = range.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= range.end) break;
        try {
          call_(context_, task);
        } catch (...) {
          const std::lock_guard<std::mutex> guard(failure_mutex_);
          if (!failure_) failure_ = std::current_exception();
        }
      }
    }
    in_task() = false;
  }

  // Ends the helpers' work. A helper that has not arrived may be waiting for this core: yield it.
  void dismiss(int64_t helpers) {
    loop_.store(kDismissed);
    for (int times = 0; times < kDismissYields && arrived_.load() < helpers; ++times) std::this_thread::yield();
  }

  // Claims the core of the calling thread; false if another thread of the team has claimed it.
  bool claim_core() {
#ifdef __linux__
    const int core = sched_getcpu();
    if (core < 0 || core >= kMaxCores) return true;
    const uint64_t bit = uint64_t(1) << (core % kBitsPerWord);
    return (claimed_cores_[core / kBitsPerWord].fetch_or(bit) & bit) == 0;
#else
    return true;
#endif
  }

  // Moves the calling thread to a core that no thread of the team has claimed, then restores its affinity: the move is
  // immediate, and later the scheduler may place the thread as before.
  void move_to_free_core() {
#ifdef __linux__
    cpu_set_t allowed, free;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;  // the machine has more cores than a cpu_set_t
    free = allowed;
    for (int other = 0; other < kMaxCores; ++other)
      if (claimed_cores_[other / kBitsPerWord].load() >> (other % kBitsPerWord) & 1) CPU_CLR(other, &free);
    if (CPU_COUNT(&free) == 0) return;
    if (sched_setaffinity(0, sizeof free, &free) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
#endif
  }

  const int64_t threads_;
  ThreadTeam** const leader_;  // address of the leading thread's current(): identifies that thread
  std::unique_ptr<TaskRange[]> ranges_;
  std::mutex failure_mutex_;
  std::exception_ptr failure_;
  alignas(64) std::atomic<int64_t> loop_{0};  // number of the loop: odd while it is open; or kDismissed
  void (*call_)(const void*, int64_t) = nullptr;
  const void* context_ = nullptr;
  alignas(64) std::atomic<int64_t> active_helpers_{0};  // helpers that are in the current loop
  std::atomic<int64_t> arrived_{0};                     // threads of the team that have arrived, without the leader's
  std::atomic<uint64_t> claimed_cores_[kMaxCores / kBitsPerWord] = {};
};

// Number of threads that share a parallel loop.
inline int64_t num_threads() {
  if (ThreadTeam::in_task()) return 1;
  const ThreadTeam* team = ThreadTeam::current();
  return team != nullptr ? team->threads() : int64_t(torch::stable::get_num_threads());
}

// Calls f(task) for every task in [0, tasks), on all threads of torch.set_num_threads; within a task, on the calling
// thread.
template <typename F>
void parallel_tasks(int64_t tasks, const F& f) {
  const auto in_turn = [&] {
    for (int64_t task = 0; task < tasks; ++task) f(task);
  };
  if (tasks <= 1 || ThreadTeam::in_task()) return in_turn();
  ThreadTeam::lead([&] {
    ThreadTeam* const team = ThreadTeam::current();
    team != nullptr ? team->run_tasks(tasks, f) : in_turn();  // no team: torch has one thread
  });
}

}  // namespace hne
