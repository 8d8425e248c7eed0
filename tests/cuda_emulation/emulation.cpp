#include <cstdio>
#include <cstdlib>
#include <memory>

#include "cuda/device.h"
#include "fiber.h"

namespace hne {

thread_local Index threadIdx, blockIdx;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024;

[[noreturn]] void stop(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

enum class State { ready, at_barrier, at_warp_instruction, done };

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Fiber {
  Place place;
  std::unique_ptr<char[]> stack;
  State state = State::done;
  WarpInstruction instruction = nullptr;
  void* operands = nullptr;
  std::vector<std::vector<Copy>> groups;  // asynchronous copies; the last group is still open
  bool waited = false;                    // for the previous kernel
  size_t votes = 0;                       // calls of block_sync_or
};

void fiber_main();

struct Block {
  Place scheduler;
  std::vector<Fiber> fibers;  // of this block, and of larger ones before
  int threads = 0;
  std::unique_ptr<unsigned char[]> shared;
  const std::function<void()>* kernel = nullptr;
  Fiber* current = nullptr;
  bool early = false;       // launched before the previous kernel has ended
  std::vector<char> votes;  // result of each block_sync_or

  void run(int thread) {
    current = &fibers[thread];
    threadIdx.x = thread;
    if (current->stack != nullptr) return change(scheduler, current->place);
    current->stack.reset(new char[kStack]);
    change(scheduler, fiber_main, current->stack.get(), kStack);
  }

  void wait(State state) {
    current->state = state;
    change(current->place, scheduler);
  }

  // Runs a warp until each of its lanes is at a barrier or done. `backwards` runs the last lane first: alternating
  // orders expose results that depend on the order of the threads.
  void run_warp(int first, bool backwards) {
    for (;;) {
      int ready = 0, waiting = 0;
      for (int i = 0; i < kWarp; ++i) {
        const int thread = first + (backwards ? kWarp - 1 - i : i);
        if (fibers[thread].state == State::ready) run(thread), ++ready;
      }
      for (int i = 0; i < kWarp; ++i) waiting += fibers[first + i].state == State::at_warp_instruction;
      if (waiting == 0 && ready == 0) return;
      if (waiting == 0) continue;
      void* operands[kWarp];
      for (int i = 0; i < kWarp; ++i) {
        Fiber& fiber = fibers[first + i];
        if (fiber.state != State::at_warp_instruction || fiber.instruction != fibers[first].instruction)
          stop("the lanes of a warp are not at the same instruction");
        operands[i] = fiber.operands;
        fiber.state = State::ready;
      }
      fibers[first].instruction(operands);
    }
  }

  void run_all();
};

thread_local Block* block = nullptr;

// Runs one thread after the other, of each block.
void fiber_main() {
  for (;;) {
    (*block->kernel)();
    for (const auto& group : block->current->groups)
      if (!group.empty()) stop("a thread ended without waiting for its copies");
    if (block->early && !block->current->waited) stop("a thread ended without waiting for the previous kernel");
    block->wait(State::done);
  }
}

void Block::run_all() {
  votes.clear();
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = State::ready;
    fiber.groups.assign(1, {});
    fiber.waited = false;
    fiber.votes = 0;
  }
  for (bool backwards = false;; backwards = !backwards) {
    for (int w = 0; w < threads / kWarp; ++w) run_warp((backwards ? threads / kWarp - 1 - w : w) * kWarp, backwards);
    int done = 0;
    for (int i = 0; i < threads; ++i) done += fibers[i].state == State::done;
    if (done == threads) return;
    if (done > 0) stop("some threads ended, others wait at a barrier");
    for (int i = 0; i < threads; ++i) fibers[i].state = State::ready;
  }
}

template <typename T>
T value_of(uint32_t word, int index) {
  const uint16_t bits = static_cast<uint16_t>(word >> (16 * index));
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Multiply {
  float* sum;
  const uint32_t* a;
  uint32_t b[2];
};

// sum += a b for every lane: rows lane / 4 and lane / 4 + 8 of the result, columns lane % 4 * 2 and the next.
template <int depth>
HNE_UNCHECKED void add_product(const float (&a)[16][depth], const float (&b)[depth][8], void* const (&operands)[32]) {
  for (int row = 0; row < 16; ++row) {
    float sums[8] = {};
    for (int k = 0; k < depth; ++k)
      for (int column = 0; column < 8; ++column) sums[column] += a[row][k] * b[k][column];
    for (int column = 0; column < 8; ++column)
      static_cast<const Multiply*>(operands[row % 8 * 4 + column / 2])->sum[row / 8 * 2 + column % 2] += sums[column];
  }
}

// m16n8k8 in 16 bits: lane (g, t) holds a[row g + 8 i][k = 2t, 2t + 1] and b[k = 2t, 2t + 1][column g].
template <typename T>
void multiply_half_16_bit(void* const (&operands)[32]) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& m = *static_cast<const Multiply*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half_word = 0; half_word < 2; ++half_word) {
      for (int i = 0; i < 2; ++i) a[g + 8 * i][2 * t + half_word] = float(value_of<T>(m.a[i], half_word));
      b[2 * t + half_word][g] = float(value_of<T>(m.b[0], half_word));
    }
  }
  add_product(a, b, operands);
}

// m16n8k16: lane (g, t) holds a[row g + 8 * (i % 2)][k = 2t, 2t + 1 (+ 8 for i > 1)] and b[k = 2t, 2t + 1 (+ 8 for the
// second word)][column g].
template <typename T>
void multiply_16_bit(void* const (&operands)[32]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& m = *static_cast<const Multiply*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i)
      for (int half_word = 0; half_word < 2; ++half_word)
        a[g + 8 * (i % 2)][2 * t + half_word + 8 * (i / 2)] = float(value_of<T>(m.a[i], half_word));
    for (int i = 0; i < 2; ++i)
      for (int half_word = 0; half_word < 2; ++half_word)
        b[2 * t + half_word + 8 * i][g] = float(value_of<T>(m.b[i], half_word));
  }
  add_product(a, b, operands);
}

// m16n8k8: lane (g, t) holds a[row g + 8 * (i % 2)][k = t + 4 * (i / 2)] and b[k = t, t + 4][column g].
void multiply_tf32(void* const (&operands)[32]) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& m = *static_cast<const Multiply*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) std::memcpy(&a[g + 8 * (i % 2)][t + 4 * (i / 2)], &m.a[i], 4);
    for (int i = 0; i < 2; ++i) std::memcpy(&b[t + 4 * i][g], &m.b[i], 4);
  }
  add_product(a, b, operands);
}

struct Load {
  uint32_t* into;
  const void* row;
};

template <bool transposed>
void load_all(void* const (&operands)[32]) {
  uint16_t values[32][8];  // 4 matrices of 8 rows
  for (int lane = 0; lane < kWarp; ++lane) {
    const void* row = static_cast<const Load*>(operands[lane])->row;
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) stop("a row of a matrix is not aligned to 16 bytes");
    std::memcpy(values[lane], row, 16);
  }
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = transposed ? values[8 * i + 2 * t][g] : values[8 * i + g][2 * t];
      const uint32_t high = transposed ? values[8 * i + 2 * t + 1][g] : values[8 * i + g][2 * t + 1];
      static_cast<const Load*>(operands[lane])->into[i] = low | high << 16;
    }
}

struct Shuffle {
  float value;
  int mask;
  float result;
};

}  // namespace

void* shared_memory() { return block->shared.get(); }
void block_sync() { block->wait(State::at_barrier); }
bool block_sync_or(bool value) {
  const size_t vote = block->current->votes++;
  block->votes.resize(std::max(block->votes.size(), vote + 1));
  block->votes[vote] |= value;
  block_sync();
  return block->votes[vote];
}

void run_with_warp(WarpInstruction instruction, void* operands) {
  block->current->instruction = instruction;
  block->current->operands = operands;
  block->wait(State::at_warp_instruction);
}

void warp_sync() {
  run_with_warp([](void* const(&)[32]) {}, nullptr);
}

void wait_for_previous_kernel() { block->current->waited = true; }
void launch_next_kernel() {
  if (block->early && !block->current->waited) stop("the next kernel is launched before the wait for the previous one");
}
void prefetch(const void* p) { static_cast<void>(*static_cast<const volatile char*>(p)); }  // of addresses in range

void copy16(void* shared, const void* from, bool valid) {
  if (block->early && !block->current->waited) stop("a copy starts before the wait for the previous kernel");
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) stop("a copy to shared memory is not aligned to 16 bytes");
  if (valid && reinterpret_cast<uintptr_t>(from) % 16 != 0)
    stop("a copy from device memory is not aligned to 16 bytes");
  std::memset(shared, 0xff, 16);  // NaN: in flight, so a read before copy_wait is an error
  block->current->groups.back().push_back({shared, from, valid});
}
void copy_commit() { block->current->groups.emplace_back(); }
void copy_wait_for(int pending) {
  auto& groups = block->current->groups;
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const Copy& copy : groups.front()) {
      if (copy.valid)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

float shuffle_xor(float value, int mask) {
  Shuffle mine{value, mask, 0};
  run_with_warp(
      [](void* const(&operands)[32]) {
        for (int lane = 0; lane < kWarp; ++lane) {
          auto& shuffle = *static_cast<Shuffle*>(operands[lane]);
          shuffle.result = static_cast<const Shuffle*>(operands[lane ^ shuffle.mask])->value;
        }
      },
      &mine);
  return mine.result;
}

void load_matrices(uint32_t (&m)[4], const void* row) {
  Load mine{m, row};
  run_with_warp(load_all<false>, &mine);
}
void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  Load mine{m, row};
  run_with_warp(load_all<true>, &mine);
}

void multiply_fragments(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, half) {
  Multiply mine{sum, a, {b0, b1}};
  run_with_warp(multiply_16_bit<half>, &mine);
}
void multiply_fragments(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bfloat16) {
  Multiply mine{sum, a, {b0, b1}};
  run_with_warp(multiply_16_bit<bfloat16>, &mine);
}
void multiply_fragments(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float) {
  Multiply mine{sum, a, {b0, b1}};
  run_with_warp(multiply_tf32, &mine);
}
void multiply_half_fragments(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t b, half) {
  const uint32_t a[2] = {a0, a1};
  Multiply mine{sum, a, {b, 0}};
  run_with_warp(multiply_half_16_bit<half>, &mine);
}
void multiply_half_fragments(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t b, bfloat16) {
  const uint32_t a[2] = {a0, a1};
  Multiply mine{sum, a, {b, 0}};
  run_with_warp(multiply_half_16_bit<bfloat16>, &mine);
}

uint32_t round_to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isfinite(value)) bits += 0x1000;  // half a unit in the last place of tf32; ties away from zero
  return std::isnan(value) ? 0x7fffffffu : bits & 0xffffe000u;
}

// HNE_EMULATED_SHARED_MEMORY lets tests emulate a GPU with little shared memory.
int64_t Device::shared_limit() const {
  const char* limit = std::getenv("HNE_EMULATED_SHARED_MEMORY");
  return limit != nullptr ? std::atoll(limit) : kLeastShared;
}

void run_blocks(bool early, int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel) {
  if (threads % kWarp != 0) stop("the threads of a block do not fill its warps");
  if (shared_bytes > kLeastShared) stop("a block asks for more shared memory than the GPU has");
  if (blocks == 0) return;
  static thread_local Block kept;
  block = &kept;
  block->early = early;
  block->threads = threads;
  if (int(block->fibers.size()) < threads) block->fibers.resize(threads);
  block->shared.reset(new unsigned char[shared_bytes]);
  block->kernel = &kernel;
  for (int64_t i = 0; i < blocks; ++i) {
    std::memset(block->shared.get(), 0xff, shared_bytes);
    blockIdx.x = static_cast<unsigned>(i);
    block->run_all();
  }
  block->shared.reset();
}

}  // namespace hne
