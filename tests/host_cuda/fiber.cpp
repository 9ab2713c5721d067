// See fiber.h. Built without -fsanitize=thread, with RT_TSAN in its place: a fiber's switch is no
// access of the kernel's.
#include "fiber.h"

#include <sanitizer/common_interface_defs.h>

#include <algorithm>

#ifdef RT_TSAN
#include <sanitizer/tsan_interface.h>
#endif
#ifndef __x86_64__
#error "the switch between fibers is written for x86-64"
#endif

// Saves the callee's registers and the stack pointer (to *rdi), then resumes another stack (rsi).
// It jumps where others return: such a return is always mispredicted.
extern "C" void rt_switch_stack(void** save, void* resume);
asm(R"(
.text
.globl rt_switch_stack
.type rt_switch_stack, @function
rt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size rt_switch_stack, .-rt_switch_stack
)");

namespace rt::host {

void start(Fiber& fiber, char* stack, std::size_t bytes, void (*entry)()) {
  fiber = Fiber{};
  fiber.stack = stack;
  fiber.stack_bytes = bytes;
  // What rt_switch_stack pops: six registers and the place to go. Above them "no caller", which
  // also gives the entry the alignment that it expects after a call.
  void** const top = reinterpret_cast<void**>(stack + bytes);
  std::fill(top - 8, top, nullptr);
  top[-2] = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top - 8;
#ifdef RT_TSAN
  fiber.tsan = __tsan_create_fiber(0);
#endif
}

void entered([[maybe_unused]] Fiber& scheduler) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);
#endif
}

void switch_fiber(Fiber& from, const Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.asan, to.stack, to.stack_bytes);
#endif
#ifdef RT_TSAN
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  rt_switch_stack(&from.stack_pointer, to.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.asan, nullptr, nullptr);
#endif
}

#ifdef RT_TSAN

namespace {

void call_as(const Fiber& fiber, const Fiber& scheduler, void (*call)(void*), void* object) {
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
  call(object);
  __tsan_switch_to_fiber(scheduler.tsan, __tsan_switch_to_fiber_no_sync);
}

}  // namespace

void adopt_caller(Fiber& scheduler) { scheduler.tsan = __tsan_get_current_fiber(); }

void tsan_release(const Fiber& scheduler, const Fiber& fiber, void* object) {
  call_as(fiber, scheduler, __tsan_release, object);
}

void tsan_acquire(const Fiber& scheduler, const Fiber& fiber, void* object) {
  call_as(fiber, scheduler, __tsan_acquire, object);
}

void tsan_end(const Fiber& fiber) { __tsan_destroy_fiber(fiber.tsan); }

void tsan_release(void* object) { __tsan_release(object); }
void tsan_acquire(void* object) { __tsan_acquire(object); }

#else

void adopt_caller(Fiber&) {}
void tsan_release(const Fiber&, const Fiber&, void*) {}
void tsan_acquire(const Fiber&, const Fiber&, void*) {}
void tsan_end(const Fiber&) {}
void tsan_release(void*) {}
void tsan_acquire(void*) {}

#endif

}  // namespace rt::host
