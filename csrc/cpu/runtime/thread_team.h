// A team of threads for the parallel loops of one op: the calling thread leads, the others help.
//
// Starting threads takes microseconds per loop, as long as one layer of one image. A team therefore starts its threads
// once for all loops of an op; between loops the helpers spin. The threads take over each other's tasks.
//
// The helpers are PyTorch's threads, or this library's (helper_threads.h). PyTorch's spin for milliseconds after a
// loop, and keep others from their cores; they are the right ones between ops of PyTorch, as in training. But PyTorch's
// loops end only when each of their threads has come: where another thread or process uses a core, an op of a
// millisecond takes a time slice more. Inference in one op therefore has helpers that need not come.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "helper_threads.h"
#include "tensor.h"

namespace hne {

class ThreadTeam {
 public:
  enum class Helpers { of_torch, of_library, of_library_awake };  // the last: those that need not be woken

  // Calls body() on this thread, as the leader of a team of torch.get_num_threads() threads that share its
  // parallel_tasks. No team is made if the thread leads one already, or if there is only one thread.
  template <typename F>
  static void lead(const F& body, Helpers helpers = Helpers::of_torch) {
    const int64_t threads = torch::stable::get_num_threads();
    if (current() != nullptr || threads <= 1) return body();
    Clock::time_point& torch_spins_until = HelperThreads::torch_spins_until();
    const bool of_torch = helpers == Helpers::of_torch;
    if (!of_torch && Clock::now() >= torch_spins_until)
      return lead_library(threads, body, helpers == Helpers::of_library);
    lead_torch(threads, body);
    if (of_torch) torch_spins_until = Clock::now() + kTorchSpins;
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
    const int64_t helpers = std::min(tasks, threads_) - 1;
    loop_.open(helpers, [](void* team, int64_t thread) { static_cast<ThreadTeam*>(team)->work(thread); }, this);
    if (wakes_) library_->call(helpers);
    work(0);
    if (loop_.close()) {
      SpinWait spin;
      if (library_ != nullptr)
        library_->wait(loop_);
      else
        while (loop_.inside() > 0) spin.wait();
    }
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kTorchSpins{10};
  static constexpr int kDismissYields = 64;

  struct alignas(64) TaskRange {
    std::atomic<int64_t> next;
    int64_t end;
  };

  ThreadTeam(int64_t threads, SharedLoop& loop, HelperThreads* library, bool wakes)
      : threads_(threads), loop_(loop), library_(library), wakes_(wakes), ranges_(new TaskRange[threads]) {}

  // Makes the team the current one of the calling thread, while body() runs.
  template <typename F>
  void run(const F& body) {
    struct Current {
      explicit Current(ThreadTeam* team) { current() = team; }
      ~Current() { current() = nullptr; }
    } const until_end(this);
    body();
  }

  template <typename F>
  static void lead_library(int64_t threads, const F& body, bool wakes) {
    HelperThreads& helpers = HelperThreads::of_process();
    SharedLoop* const loop = helpers.take_loop(threads - 1);
    if (loop == nullptr) return lead_torch(threads, body);
    struct GiveBack {
      HelperThreads& helpers;
      SharedLoop& loop;
      ~GiveBack() { helpers.give_back(loop); }
    } const at_end{helpers, *loop};
    if (wakes) helpers.call(threads - 1);  // before the first loop: it takes longer than a small layer
    ThreadTeam(threads, *loop, &helpers, wakes).run(body);
  }

  // A woken thread may have to wait on the leader's core, and libgomp's threads spin for milliseconds while they wait
  // for each other. Therefore a helper that finds another thread of its team on its core moves to a free core, and at
  // the end of the op the leader yields its core to helpers that have not arrived, before it waits for them.
  template <typename F>
  static void lead_torch(int64_t threads, const F& body) {
    SharedLoop loop;
    ThreadTeam team(threads, loop, nullptr, false);
    ClaimedCores cores;
    cores.claim();
    std::atomic<int64_t> arrived = 0;  // threads of the team, without the leader's
    std::atomic<bool> dismissed = false;
    ThreadTeam** const leader = &current();  // identifies the leading thread
    bool started = false;                    // parallel_for may call the leader once for each of several threads
    std::exception_ptr failure;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      if (&current() != leader) {  // a helper, which stands for the threads [begin, end) of the team
        if (!cores.claim()) cores.move_to_free_core();
        arrived += end - begin;
        SpinWait spin;
        for (uint32_t last = 0; !dismissed;)
          if (loop.join(begin, last))
            loop.leave(), spin = {};
          else
            spin.wait();
      } else if (!std::exchange(started, true)) {
        try {
          team.run(body);
        } catch (...) {
          failure = std::current_exception();
        }
        dismissed = true;
        const int64_t helpers = threads - (end - begin);
        for (int times = 0; times < kDismissYields && arrived < helpers; ++times) std::this_thread::yield();
      }
    });
    if (failure) std::rethrow_exception(failure);
  }

  // Runs the tasks of thread number `self` first, then the remaining tasks of the others.
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

  const int64_t threads_;
  SharedLoop& loop_;
  HelperThreads* const library_;  // null: helpers are PyTorch's
  const bool wakes_;              // whether loops call helpers that sleep
  std::unique_ptr<TaskRange[]> ranges_;
  std::mutex failure_mutex_;
  std::exception_ptr failure_;
  void (*call_)(const void*, int64_t) = nullptr;
  const void* context_ = nullptr;
};

// The teams of calls that are made again and again, as those of inference, with helpers of this library.
class RepeatedCalls {
 public:
  // Calls body() as the leader of a team. As long as the calls are short, no helper is woken for them.
  template <typename F>
  void lead(const F& body) const {
    using Clock = std::chrono::steady_clock;
    const Clock::time_point start = Clock::now();
    ThreadTeam::lead(body, is_short_ ? ThreadTeam::Helpers::of_library_awake : ThreadTeam::Helpers::of_library);
    is_short_ = Clock::now() - start < kShort;
  }

 private:
  static constexpr std::chrono::microseconds kShort{100};  // twice what it may take to wake a thread

  mutable std::atomic<bool> is_short_ = false;  // whether the last call was
};

// Number of threads that share a parallel loop.
inline int64_t num_threads() {
  if (ThreadTeam::in_task()) return 1;
  const ThreadTeam* team = ThreadTeam::current();
  return team != nullptr ? team->threads() : int64_t(torch::stable::get_num_threads());
}

// Calls f(task) for every task in [0, tasks), on all threads of torch.set_num_threads; within a task, on the calling
// thread. `helpers` are those of a loop outside of a team.
template <typename F>
void parallel_tasks(int64_t tasks, const F& f, ThreadTeam::Helpers helpers = ThreadTeam::Helpers::of_torch) {
  const auto in_turn = [&] {
    for (int64_t task = 0; task < tasks; ++task) f(task);
  };
  if (tasks <= 1 || ThreadTeam::in_task()) return in_turn();
  ThreadTeam::lead(
      [&] {
        ThreadTeam* const team = ThreadTeam::current();
        team != nullptr ? team->run_tasks(tasks, f) : in_turn();  // no team: torch has one thread
      },
      helpers);
}

}  // namespace hne
