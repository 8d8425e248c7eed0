// A fiber: code with a stack of its own, which runs until it gives way.
#pragma once

#include <cstddef>

namespace hne {

// Functions that no sanitizer changes.
#define HNE_UNCHECKED __attribute__((noinline, no_sanitize("address", "undefined")))

// Where a fiber, or whoever runs it, goes on. The compiler's builtins change stacks in a few instructions: swapcontext
// would call the system, for the mask of signals, and AddressSanitizer would clear its record of both stacks.
struct Place {
  void* words[5];
};

// Goes on at `to`, and returns when somebody goes on at `here`.
void change(Place& here, Place& to);
// Calls `function`, which must not return, on a stack of `size` bytes; returns when somebody goes on at `here`.
void change(Place& here, void (*function)(), char* stack, size_t size);

}  // namespace hne
