// Threads that work together: one leads, the others help it with its parallel loops.
//
// To start threads costs microseconds in every loop, as many as a layer of one image takes. So they are started once
// for all the loops of an op, and wait for the next one by spinning. A loop does not wait for threads that come late:
// the others do their share.
//
// Linux may wake a thread on the core of the one that woke it, though another core has nothing to do, and libgomp's
// threads spin for milliseconds where they wait for each other: the second one would get that core only when the time
// slice of the first one ends, and an op of microseconds takes 4 ms or 8. So a helper that finds another thread of its
// team on its core goes elsewhere, and the leader lets those that have not come have its core, before it waits. (A
// thread that has once been moved keeps the cores that it was allowed then, even if its cpuset grows.)
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

class Team {
 public:
  // Call lead(), with the threads of torch.set_num_threads to share its parallel_tasks.
  template <typename F>
  static void gather(const F& lead) {
    const int64_t threads = torch::stable::get_num_threads();
    if (led() != nullptr || threads <= 1) return lead();
    Team team(threads);
    team.take_core();
    std::exception_ptr failure;
    bool ready = true;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      if (&led() != team.leader_) return team.help(begin, end);
      if (!ready) return;  // it is given several of the threads' parts one after the other
      ready = false;
      led() = &team;
      try {
        lead();
      } catch (...) {
        failure = std::current_exception();
      }
      led() = nullptr;
      team.dismiss(threads - (end - begin));
    });
    if (failure) std::rethrow_exception(failure);
  }

  // The team that the calling thread leads, or null.
  static Team*& led() {
    static thread_local Team* team = nullptr;
    return team;
  }

  int64_t threads() const { return threads_; }

  // f(task) for every task: by the leader.
  template <typename F>
  void share(int64_t tasks, const F& f) {
    if (tasks == 1 || working_) {
      for (int64_t task = 0; task < tasks; ++task) f(task);
      return;
    }
    for (int64_t i = 0; i < threads_; ++i) {  // neighbours to one thread: they may read the same weights
      shares_[i].next.store(tasks * i / threads_, std::memory_order_relaxed);
      shares_[i].end = tasks * (i + 1) / threads_;
    }
    context_ = &f;
    call_ = [](const void* context, int64_t task) { (*static_cast<const F*>(context))(task); };
    working_ = true;
    const int64_t loop = loop_.load(std::memory_order_relaxed) + 1;
    loop_.store(loop);
    work(0);
    loop_.store(loop + 1);  // nobody begins with it any more
    SpinWait patience;
    while (inside_.load() > 0) patience.wait();
    working_ = false;
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  static constexpr int kYields = 64, kCores = 1024, kBits = 64;

  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };

  // Waits for what is about to happen; for longer, without keeping others from the core.
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

  explicit Team(int64_t threads) : threads_(threads), leader_(&led()), shares_(new Share[threads]) {}

  // By the thread that stands for some of all threads.
  void help(int64_t begin, int64_t end) {
    if (!take_core()) leave_core();
    present_.fetch_add(end - begin);
    SpinWait patience;
    for (int64_t seen = 0;;) {
      const int64_t loop = loop_.load();
      if (loop == kOver) return;
      if (loop % 2 == 0 || loop == seen) {
        patience.wait();
        continue;
      }
      inside_.fetch_add(1);
      if (loop_.load() == loop) work(begin);
      inside_.fetch_sub(1);
      seen = loop, patience = {};
    }
  }

  void work(int64_t self) {
    for (int64_t i = 0; i < threads_; ++i) {
      Share& share = shares_[(self + i) % threads_];  // its own first, then what is left of the others'
      while (share.next.load(std::memory_order_relaxed) < share.end) {
        const int64_t task = share.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= share.end) break;
        try {
          call_(context_, task);
        } catch (...) {
          const std::lock_guard<std::mutex> guard(failing_);
          if (!failure_) failure_ = std::current_exception();
        }
      }
    }
  }

  // The end: a thread that has not come by now may be waiting for this core.
  void dismiss(int64_t others) {
    loop_.store(kOver);
    for (int times = 0; times < kYields && present_.load() < others; ++times) std::this_thread::yield();
  }

  // Whether no other thread of the team has taken the core that this one is on.
  bool take_core() {
#ifdef __linux__
    const int core = sched_getcpu();
    if (core < 0 || core >= kCores) return true;
    const uint64_t bit = uint64_t(1) << (core % kBits);
    return (taken_[core / kBits].fetch_or(bit) & bit) == 0;
#else
    return true;
#endif
  }

  // For one that none has taken. It goes at once, and may go on from there to wherever it was allowed to be.
  void leave_core() {
#ifdef __linux__
    cpu_set_t allowed, free;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;  // more cores than a set holds
    free = allowed;
    for (int other = 0; other < kCores; ++other)
      if (taken_[other / kBits].load() >> (other % kBits) & 1) CPU_CLR(other, &free);
    if (CPU_COUNT(&free) == 0) return;
    if (sched_setaffinity(0, sizeof free, &free) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
#endif
  }

  static constexpr int64_t kOver = -2;

  const int64_t threads_;
  Team** const leader_;  // tells the leading thread from others
  std::unique_ptr<Share[]> shares_;
  bool working_ = false;
  std::mutex failing_;
  std::exception_ptr failure_;
  alignas(64) std::atomic<int64_t> loop_{0};  // number of the loop: odd while it is open
  void (*call_)(const void*, int64_t) = nullptr;
  const void* context_ = nullptr;
  alignas(64) std::atomic<int64_t> inside_{0};  // threads that help with it
  std::atomic<int64_t> present_{0};             // of all threads but the leader, those that have come
  std::atomic<uint64_t> taken_[kCores / kBits] = {};
};

// Threads that share a loop.
inline int64_t num_threads() {
  const Team* team = Team::led();
  return team != nullptr ? team->threads() : int64_t(torch::stable::get_num_threads());
}

// f(task) for every task, by all threads of torch.set_num_threads.
template <typename F>
void parallel_tasks(int64_t tasks, const F& f) {
  if (tasks <= 0) return;
  if (tasks == 1) return f(0);
  Team::gather([&] {
    if (Team* team = Team::led()) return team->share(tasks, f);
    for (int64_t task = 0; task < tasks; ++task) f(task);  // there is one thread
  });
}

}  // namespace hne
