// A loop that the threads of a team share. It takes the help that it gets: helpers join it when they come, and the
// leader waits only for those that are in it.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace hne {

// Waits for an event that is near: spins first, then yields the core.
class SpinWait {
 public:
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  void wait() { ++times_ < 1000 ? pause() : std::this_thread::yield(); }

 private:
  int times_ = 0;
};

class alignas(64) SharedLoop {
 public:
  using Work = void (*)(void* context, int64_t thread);

  // Opens the loop to at most `helpers` threads.
  void open(int64_t helpers, Work work, void* context) {
    work_ = work, context_ = context;
    places_.store(uint32_t(helpers), std::memory_order_relaxed);
    state_.store(((state_.load(std::memory_order_relaxed) & ~(kNumber - 1)) + kNumber) | kOpen);
  }

  // No helper joins the loop any more. Whether one is in it.
  bool close() { return (state_.fetch_and(~kOpen) & kInside) != 0; }

  // The number of helpers in the closed loop.
  uint32_t inside() const { return state_.load(std::memory_order_acquire) & kInside; }

  // Sleeps until a helper leaves the closed loop, unless their number is another one already.
  void sleep(uint32_t inside) const {
    const uint32_t state = state_.load(std::memory_order_acquire);
    if ((state & kInside) == inside) state_.wait(state, std::memory_order_acquire);
  }

  // Whether the loop is open and not the one that the helper knows as `last`.
  bool is_new(uint32_t last) const { return is_new(state_.load(), last); }

  // Helper number `thread` works in the loop if it is new, and must leave it then; false if it is not.
  bool join(int64_t thread, uint32_t& last) {
    uint32_t state = state_.load(std::memory_order_relaxed);
    do {
      if (!is_new(state, last)) return false;
    } while (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire, std::memory_order_relaxed));
    last = state / kNumber;
    work_(context_, thread);
    return true;
  }

  void leave() {
    if (((state_.fetch_sub(1) - 1) & (kOpen | kInside)) == 0) state_.notify_one();
  }

 private:
  static constexpr uint32_t kInside = 0x7fff, kOpen = 0x8000, kNumber = 0x10000;

  bool is_new(uint32_t state, uint32_t last) const {
    return (state & kOpen) != 0 && state / kNumber != last &&
           (state & kInside) < places_.load(std::memory_order_relaxed);
  }

  std::atomic<uint32_t> state_{0};  // number of the loop, whether it is open, helpers in it
  std::atomic<uint32_t> places_{0};
  Work work_ = nullptr;
  void* context_ = nullptr;
};

}  // namespace hne
