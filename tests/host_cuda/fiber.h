// A fiber: a stack of its own and the place where it stopped. ASan is told of every change of
// stack. TSan sees each fiber as a thread, and switching orders nothing: only order_memory does.
#pragma once

#include <cstddef>

namespace rt::host {

struct Fiber {
  void* stack_pointer = nullptr;
  const void* stack = nullptr;
  std::size_t stack_bytes = 0;
  void* asan = nullptr;
  void* tsan = nullptr;
};

// The fiber that calls; only it starts, resumes and ends others.
void adopt_caller(Fiber& scheduler);

// Prepares a fiber that runs `entry`, which first calls entered() and never returns.
void start(Fiber& fiber, char* stack, std::size_t bytes, void (*entry)());
void entered(Fiber& scheduler);

void switch_fiber(Fiber& from, const Fiber& to);

// What the fiber wrote so far is visible to whoever acquires the same object afterwards. Both are
// called by the scheduler, in the name of a fiber that is not running; nothing without TSan.
void tsan_release(const Fiber& scheduler, const Fiber& fiber, void* object);
void tsan_acquire(const Fiber& scheduler, const Fiber& fiber, void* object);
void tsan_end(const Fiber& fiber);
// By the fiber that runs, for itself.
void tsan_release(void* object);
void tsan_acquire(void* object);

}  // namespace rt::host
