// The memory of the block that runs: its shared arrays, then a guard page and a stack per thread.
#pragma once

#include <array>
#include <cstddef>

namespace rt::host {

class BlockMemory {
 public:
  static constexpr std::size_t kPage = 4096;
  static constexpr std::size_t kStackBytes = (64 << 10) - kPage;

  // For a new block: shared memory is all 0xFF (NaN), nothing of the block before is left.
  void prepare(unsigned threads, std::size_t dynamic_bytes);

  char* stack(unsigned thread) const;

  // The array declared at `site`, made on first use; null where shared memory is exhausted.
  void* shared(const void* site, std::size_t bytes);
  void* dynamic_shared() const { return arrays_[0].data; }

  // Why an array could not be made, or null.
  const char* exhausted() const { return exhausted_; }

 private:
  struct Array {
    const void* site;
    char* data;
  };

  void map(std::size_t bytes);
  void* allocate(const void* site, std::size_t bytes);

  char* memory_ = nullptr;
  std::size_t mapped_ = 0;
  std::array<Array, 32> arrays_{};  // a vector would allocate inside a fiber
  unsigned count_ = 0;
  std::size_t used_ = 0, next_ = 0;
  const char* exhausted_ = nullptr;
};

}  // namespace rt::host
