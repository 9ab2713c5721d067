// See block_memory.h. ASan sees a red zone around every shared array. Under TSan a block gets
// fresh pages, since memory that two blocks use one after the other would look like a race.
#include "block_memory.h"

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <cstring>
#include <new>

namespace rt::host {
namespace {

constexpr std::size_t kSharedBytes = 48 << 10;  // more needs an opt-in that rt::launch lacks
constexpr std::size_t kRedZone = 128;
constexpr std::size_t kArenaBytes = 64 << 10;  // all of it, in 32 arrays, with their red zones
constexpr std::size_t kStride = BlockMemory::kPage + BlockMemory::kStackBytes;

}  // namespace

char* BlockMemory::stack(unsigned thread) const {
  return memory_ + kArenaBytes + thread * kStride + kPage;
}

void BlockMemory::prepare(unsigned threads, std::size_t dynamic_bytes) {
  const std::size_t bytes = kArenaBytes + threads * kStride;
#ifdef RT_TSAN
  map(bytes);
#else
  if (bytes > mapped_) map(bytes);
#endif
  ASAN_UNPOISON_MEMORY_REGION(memory_, mapped_);  // what stacks of a failed launch left behind
  std::memset(memory_, 0xFF, kArenaBytes);
  ASAN_POISON_MEMORY_REGION(memory_, kArenaBytes);
  count_ = 0;
  used_ = 0;
  next_ = kRedZone;
  exhausted_ = nullptr;
  allocate(nullptr, dynamic_bytes);
}

void* BlockMemory::shared(const void* site, std::size_t bytes) {
  for (unsigned i = 0; i < count_; ++i) {
    if (arrays_[i].site == site) return arrays_[i].data;
  }
  return allocate(site, bytes);
}

void* BlockMemory::allocate(const void* site, std::size_t bytes) {
  if (used_ + bytes > kSharedBytes) exhausted_ = "more than 48 KB of shared memory";
  if (count_ == arrays_.size()) exhausted_ = "more shared arrays than the emulator holds";
  if (exhausted_ != nullptr) return nullptr;
  char* const data = memory_ + next_;
  used_ += bytes;
  next_ += (bytes + kRedZone - 1) / kRedZone * kRedZone + kRedZone;
  ASAN_UNPOISON_MEMORY_REGION(data, bytes);
  arrays_[count_++] = {site, data};
  return data;
}

void BlockMemory::map(std::size_t bytes) {
  if (memory_ != nullptr) munmap(memory_, mapped_);
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  mapped_ = bytes;
  for (unsigned i = 0; kArenaBytes + i * kStride < bytes; ++i) {
    mprotect(stack(i) - kPage, kPage, PROT_NONE);
  }
}

}  // namespace rt::host
