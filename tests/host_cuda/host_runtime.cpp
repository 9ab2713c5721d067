// Runs a grid on the CPU: the threads of a block are fibers that switch where they meet.
//
// A block advances warp by warp: the ready lanes run, each up to its next meeting or its end, then
// the meetings that are complete release their lanes. In ascending and descending order one warp
// goes all the way to the barrier before the next one starts, so that of two conflicting accesses
// without a barrier between them each comes first in one of the orders; shuffled order mixes.
//
// Built without -fsanitize=thread, with RT_TSAN in its place: the emulator's own data would be
// reported. Nothing is allocated inside a fiber for the same reason.
#include "host_runtime.h"

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "block_memory.h"
#include "fiber.h"

rt::host::Index threadIdx, blockIdx, blockDim, gridDim;

namespace rt::host {
namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr Error kInvalidConfiguration = 9;
constexpr Error kLaunchFailure = 719;

enum Order { kAscending, kDescending, kShuffled };
enum class State { kReady, kWaiting, kExited };

struct Thread {
  Fiber fiber;
  State state = State::kExited;
  unsigned index = 0;
  Meeting meeting{};
  uint64_t result = 0;
  bool fenced = false;    // since it started
  void* added = nullptr;  // the word of its last atomicAdd
};

Order order = kAscending;
std::mt19937 random_bits;
std::string error;

// The launch in progress.
const std::function<void()>* kernel;
std::size_t dynamic_bytes;
BlockMemory memory;
Fiber scheduler;
Thread* current;
std::vector<Thread> threads;  // whole warps: the last ones may never have started
std::vector<Thread*> group;   // of the meeting looked at
char blocks_ended;            // for TSan: the end of a launch comes after all of its threads

// ---- Fibers.

[[noreturn]] void fiber_main() {
  entered(scheduler);
  (*kernel)();
  current->state = State::kExited;
  switch_fiber(current->fiber, scheduler);
  __builtin_unreachable();
}

void start(Thread& thread) {
  thread.state = State::kReady;
  thread.fenced = false;
  thread.added = nullptr;
  start(thread.fiber, memory.stack(thread.index), BlockMemory::kStackBytes, fiber_main);
}

void check_memory() {
  if (memory.exhausted() != nullptr) throw std::runtime_error(memory.exhausted());
}

void resume(Thread& thread) {
  current = &thread;
  threadIdx.x = thread.index;
  switch_fiber(scheduler, thread.fiber);
  check_memory();
}

// ---- Meetings.

bool same_call(const Meeting& a, const Meeting& b) {
  const auto equal = [](const char* x, const char* y) { return x == y || !std::strcmp(x, y); };
  return a.mask == b.mask && a.site.line == b.site.line && equal(a.name, b.name) &&
         equal(a.site.file, b.site.file);
}

std::string describe(const Thread& thread) {
  const Meeting& m = thread.meeting;
  char mask[32] = "";
  if (!m.whole_block) std::snprintf(mask, sizeof mask, " (mask 0x%08x)", m.mask);
  return std::string(m.name) + mask + " at " + m.site.file + ":" + std::to_string(m.site.line);
}

std::string name(const Thread& thread) {
  return "thread " + std::to_string(thread.index) + " of block " + std::to_string(blockIdx.x);
}

[[noreturn]] void fail(const Thread& thread, const std::string& why) {
  throw std::runtime_error(describe(thread) + ": " + name(thread) + " " + why);
}

[[noreturn]] void fail_missing(const Thread& thread, const Thread& missing) {
  const bool exited = missing.state == State::kExited;
  fail(thread, "waits for thread " + std::to_string(missing.index) +
                   (exited ? ", which has exited" : ", which is at " + describe(missing)));
}

// Fills `group` with the threads that `first` waits for; returns one that is not there, or null.
const Thread* gather(const Thread& first) {
  const bool whole = first.meeting.whole_block;
  const unsigned begin = whole ? 0 : first.index / kWarp * kWarp;
  const unsigned end = whole ? blockDim.x : begin + kWarp;
  group.clear();
  for (unsigned i = begin; i < end; ++i) {
    if (!whole && !(first.meeting.mask >> (i - begin) & 1)) continue;
    Thread& thread = threads[i];
    const bool there = thread.state == State::kWaiting;
    if (!there || !same_call(thread.meeting, first.meeting)) return &thread;
    group.push_back(&thread);
  }
  return nullptr;
}

// What the group wrote so far is visible to all of it from here on. TSan needs an object for that:
// the far end of the first thread's stack, which is fresh in every block, so that no order between
// blocks comes of it.
void order_memory_of_group() {
  void* const object = const_cast<void*>(group.front()->fiber.stack);
  for (const Thread* thread : group) tsan_release(scheduler, thread->fiber, object);
  for (const Thread* thread : group) tsan_acquire(scheduler, thread->fiber, object);
}

void release_group() {
  const Meeting& meeting = group.front()->meeting;
  uint64_t vote = 0;
  for (const Thread* thread : group) {
    vote |= thread->meeting.value << (meeting.whole_block ? 0 : thread->index % kWarp);
  }
  for (Thread* thread : group) {
    const int source = thread->meeting.source;
    thread->result =
        source == kVote ? vote : threads[thread->index / kWarp * kWarp + source].meeting.value;
    thread->state = State::kReady;
  }
  if (meeting.orders_memory) order_memory_of_group();
}

bool waits_in_warp(const Thread& thread) {
  return thread.state == State::kWaiting && !thread.meeting.whole_block;
}

void check_lanes(const Thread& thread) {
  const Meeting& m = thread.meeting;
  if (!(m.mask >> thread.index % kWarp & 1)) fail(thread, "is not in the mask");
  if (m.source != kVote && !(m.mask >> m.source & 1)) {
    fail(thread, "reads lane " + std::to_string(m.source) + ", which is not in the mask");
  }
}

// ---- Order.

std::vector<unsigned> arranged(unsigned count) {
  std::vector<unsigned> indices(count);
  std::iota(indices.begin(), indices.end(), 0u);
  if (order == kDescending) std::reverse(indices.begin(), indices.end());
  if (order == kShuffled) std::shuffle(indices.begin(), indices.end(), random_bits);
  return indices;
}

// Runs the ready lanes of a warp once; false where all of them then are at a barrier or at the end.
bool step_warp(unsigned warp) {
  Thread* const lanes = &threads[warp * kWarp];
  for (const unsigned lane : arranged(kWarp)) {
    if (lanes[lane].state != State::kReady) continue;
    resume(lanes[lane]);
    if (waits_in_warp(lanes[lane])) check_lanes(lanes[lane]);
  }
  bool released = false;
  const Thread* stuck = nullptr;
  for (Thread* lane = lanes; lane < lanes + kWarp; ++lane) {
    if (!waits_in_warp(*lane)) continue;
    if (gather(*lane) == nullptr) {
      release_group();
      released = true;
    } else if (stuck == nullptr) {
      stuck = lane;
    }
  }
  if (!released && stuck != nullptr) fail_missing(*stuck, *gather(*stuck));
  return released;
}

void run_warps_to_barrier() {
  std::vector<unsigned> active = arranged(threads.size() / kWarp);
  std::reverse(active.begin(), active.end());  // the next one is at the back
  while (!active.empty()) {
    if (!step_warp(active.back())) {
      active.pop_back();
    } else if (order == kShuffled) {
      std::swap(active.back(), active[random_bits() % active.size()]);
    }
  }
}

// False where all threads have ended.
bool release_barrier() {
  const auto waiting = std::find_if(threads.begin(), threads.end(), [](const Thread& thread) {
    return thread.state == State::kWaiting;
  });
  if (waiting == threads.end()) return false;
  if (const Thread* const missing = gather(*waiting)) fail_missing(*waiting, *missing);
  release_group();
  return true;
}

void run_block(unsigned block) {
  memory.prepare(threads.size(), dynamic_bytes);
  check_memory();
  blockIdx.x = block;
  for (unsigned i = 0; i < blockDim.x; ++i) start(threads[i]);
  do {
    run_warps_to_barrier();
  } while (release_barrier());
  for (unsigned i = 0; i < blockDim.x; ++i) {
    tsan_release(scheduler, threads[i].fiber, &blocks_ended);
    tsan_end(threads[i].fiber);
  }
}

void run_blocks(unsigned grid, unsigned block) {
  gridDim.x = grid;
  blockDim.x = block;
  threads.assign((block + kWarp - 1) / kWarp * kWarp, Thread{});
  for (unsigned i = 0; i < threads.size(); ++i) threads[i].index = i;
  adopt_caller(scheduler);
  for (const unsigned index : arranged(grid)) run_block(index);
  // Not before: blocks know nothing of each other.
  tsan_acquire(scheduler, scheduler, &blocks_ended);
}

}  // namespace

uint64_t meet(const Meeting& meeting) {
  current->meeting = meeting;
  current->state = State::kWaiting;
  switch_fiber(current->fiber, scheduler);
  return current->result;
}

void fence() {
  if (current->added != nullptr) tsan_acquire(current->added);
  current->fenced = true;
}

void touch_atomic(void* address) {
  if (current->fenced) tsan_release(address);
  current->added = address;
}

void* shared_memory(const void* site, std::size_t bytes) {
  void* const data = memory.shared(site, bytes);
  if (data == nullptr) switch_fiber(current->fiber, scheduler);  // which ends the launch
  return data;
}

void* dynamic_shared() { return memory.dynamic_shared(); }

Error run_grid(unsigned grid, unsigned block, std::size_t dynamic_shared_bytes,
               const std::function<void()>& thread) {
  error.clear();
  if (grid == 0 || block == 0 || block > kMaxThreads) {
    error = "a grid of " + std::to_string(grid) + " blocks of " + std::to_string(block);
    return kInvalidConfiguration;
  }
  kernel = &thread;
  dynamic_bytes = dynamic_shared_bytes;
  try {
    run_blocks(grid, block);
  } catch (const std::exception& failure) {
    error = failure.what();
    return kLaunchFailure;
  }
  return 0;
}

}  // namespace rt::host

void emu_configure(int order, unsigned seed) {
  rt::host::order = static_cast<rt::host::Order>(order);
  rt::host::random_bits.seed(seed);
}

const char* emu_error() { return rt::host::error.c_str(); }
