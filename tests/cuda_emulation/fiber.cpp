// In a file of its own: where the compiler sees what a function does with the registers, it takes the other registers
// to be kept, and another fiber has used them.
#include "fiber.h"

#include <ucontext.h>

namespace hne {

namespace {

[[noreturn]] HNE_UNCHECKED void jump(Place& to) { __builtin_longjmp(to.words, 1); }

[[noreturn]] HNE_UNCHECKED void call(void (*function)(), char* stack, size_t size) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size;
  context.uc_link = nullptr;
  makecontext(&context, function, 0);
  setcontext(&context);
  __builtin_unreachable();
}

}  // namespace

HNE_UNCHECKED void change(Place& here, Place& to) {
  if (__builtin_setjmp(here.words) == 0) jump(to);
}

HNE_UNCHECKED void change(Place& here, void (*function)(), char* stack, size_t size) {
  if (__builtin_setjmp(here.words) == 0) call(function, stack, size);
}

}  // namespace hne
