#include "helper_threads.h"

#include <algorithm>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace hne {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

// It takes 10 to 50 microseconds to wake a thread; between two calls of a model there are 150. A time slice is 1000 to
// 4000: looks cost the thread that is looked at some time, and are worth it only after a while.
constexpr microseconds kSpin(300);
constexpr microseconds kPatience(150), kLook(20), kMaxLook(500);  // before the first look at a thread, between looks

std::atomic<HelperThreads*> helpers_of_process = nullptr;

#if defined(__unix__) || defined(__APPLE__)
// A forked process has no helpers: its first loop starts some.
[[maybe_unused]] const int forget_in_child = pthread_atfork(nullptr, nullptr, [] {
  helpers_of_process = nullptr;
  HelperThreads::torch_spins_until() = {};
});
#endif

}  // namespace

// Never destroyed: helpers look at it until the process ends.
HelperThreads& HelperThreads::of_process() {
  HelperThreads* threads = helpers_of_process;
  if (threads != nullptr) return *threads;
  HelperThreads* const made = new HelperThreads;
  if (helpers_of_process.compare_exchange_strong(threads, made)) return *made;
  delete made;  // another thread was faster
  return *threads;
}

Clock::time_point& HelperThreads::torch_spins_until() {
  static thread_local Clock::time_point until = {};
  return until;
}

SharedLoop* HelperThreads::take_loop(int64_t helpers) {
  const size_t wanted = std::min(size_t(helpers), kMaxHelpers);
  if (num_helpers_ < wanted) start(wanted);
  for (size_t i = 0; i < kMaxLeaders; ++i) {
    Leader& leader = leaders_[i];
    if (leader.taken || leader.taken.exchange(true)) continue;
    leader.thread.set(SystemThread::current());  // not stored by thread: a fork changes it
    for (size_t known = num_leaders_; known <= i && !num_leaders_.compare_exchange_weak(known, i + 1);) {
    }
    return &leader.loop;
  }
  return nullptr;
}

void HelperThreads::give_back(SharedLoop& loop) {
  for (Leader& leader : leaders_)
    if (&leader.loop == &loop) leader.taken = false;
}

void HelperThreads::start(size_t helpers) {
  const std::lock_guard<std::mutex> guard(starting_);
  for (size_t i = num_helpers_; i < helpers; ++i) {
    Helper* const helper = new Helper;
    try {
      std::thread([this, helper, i] { help(*helper, int64_t(i) + 1); }).detach();
    } catch (const std::system_error&) {  // the process may have no more threads
      delete helper;
      return;
    }
    helpers_[i] = helper;
    num_helpers_ = i + 1;
  }
}

void HelperThreads::call(int64_t helpers) {
  const size_t count = std::min(size_t(helpers), num_helpers_.load());
  for (size_t i = 0; i < count; ++i) {
    Helper& helper = *helpers_[i];
    if (helper.asleep == 0 || helper.asleep.exchange(0) == 0) continue;
    const int core = current_core();  // the system might wake the helper here, where it would wait for this thread
    if (helper.kept_off.exchange(core) != core) helper.thread.get().keep_off(core, SystemThread::current());
    helper.asleep.notify_one();
  }
}

void HelperThreads::wait(const SharedLoop& loop) {
  Clock::duration interval = kLook;
  Clock::time_point look = Clock::now() + kPatience;
  uint32_t fetched = 0;
  while (const uint32_t inside = loop.inside()) {
    SpinWait::pause();
    if (Clock::now() < look) continue;
    for (size_t i = 0; i < num_helpers_; ++i) {
      Helper& helper = *helpers_[i];
      if (helper.inside != &loop || helper.fetched || !helper.thread.waits_for_core()) continue;
      helper.fetched = true, helper.kept_off = -1;
      helper.thread.get().fetch(SystemThread::current());
      ++fetched;
    }
    if (fetched >= inside) loop.sleep(inside);
    interval = std::min<Clock::duration>(interval * 3 / 2, kMaxLook);
    look = Clock::now() + interval;
  }
}

void HelperThreads::help(Helper& self, int64_t number) {
  self.thread.set(SystemThread::current());
  prefer_short_slices();
  LoopNumbers last = {};
  for (;;) {
    Clock::time_point now = Clock::now(), awake_until = now + kSpin, look = now + kPatience;
    while (now < awake_until) {
      const bool worked = work(self, number, last);
      SpinWait::pause();
      now = Clock::now();
      if (worked) {
        if (self.fetched.exchange(false)) break;  // the leader needs this core
        awake_until = now + kSpin, look = now + kPatience;
      } else if (now >= look) {
        if (fetch_leader()) break;
        look = now + kLook;
      }
    }
    sleep(self, last);
  }
}

// Works in all loops that are new; false if there is none.
bool HelperThreads::work(Helper& self, int64_t number, LoopNumbers& last) {
  bool worked = false;
  const size_t count = num_leaders_.load(std::memory_order_relaxed);
  for (size_t i = 0; i < count; ++i) {
    SharedLoop& loop = leaders_[i].loop;
    if (!loop.is_new(last[i])) continue;
    self.inside = &loop;
    if (loop.join(number, last[i])) {
      loop.leave();
      worked = true;
    }
    self.inside = nullptr;
  }
  return worked;
}

// Fetches a leader that waits for a core; false if there is none.
bool HelperThreads::fetch_leader() {
  const size_t count = num_leaders_.load(std::memory_order_relaxed);
  for (size_t i = 0; i < count; ++i) {
    WatchedThread& leader = leaders_[i].thread;
    if (!leaders_[i].taken || !leader.waits_for_core()) continue;
    leader.get().fetch(leader.get());
    return true;
  }
  return false;
}

void HelperThreads::sleep(Helper& self, const LoopNumbers& last) {
  self.asleep = 1;
  const size_t count = num_leaders_;
  for (size_t i = 0; i < count; ++i)
    if (leaders_[i].loop.is_new(last[i])) self.asleep = 0;  // nobody may have called since it was opened
  self.asleep.wait(1);
}

}  // namespace hne
