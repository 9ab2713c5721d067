// Memory and copies.

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>

#include "device.h"

using namespace gpu;

std::size_t gpu::total_bytes() {
  static const char* const mebibytes = std::getenv("EMULATED_GPU_MIB");
  return (mebibytes == nullptr ? std::size_t{12} << 10 : std::strtoull(mebibytes, nullptr, 10))
         << 20;
}

namespace {

struct Block {
  std::size_t bytes;
  bool host;
  void* pages;  // which it ends in
  std::size_t mapped;
};

constexpr std::size_t kPage = 4096;
std::map<std::uintptr_t, Block> blocks;
std::size_t used = 0;

const Block* block_at(const void* address) {
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  auto after = blocks.upper_bound(at);
  if (after == blocks.begin()) return nullptr;
  --after;
  if (at >= after->first + std::max<std::size_t>(after->second.bytes, 1)) return nullptr;
  return &after->second;
}

// Ends at a page that nobody may touch; starts as NaN, or -1.
cudaError_t allocate(void** to, std::size_t bytes, bool host) {
  Lock lock(device);
  if (!host && used + bytes > total_bytes()) return fail(cudaErrorMemoryAllocation, "malloc");
  const std::size_t rounded = (bytes + 511) / 512 * 512;
  const std::size_t used_pages = (rounded + kPage - 1) / kPage * kPage;
  const std::size_t mapped = used_pages + kPage;
  void* const pages = mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) return fail(cudaErrorMemoryAllocation, "malloc");
  char* const end = static_cast<char*>(pages) + used_pages;
  mprotect(end, kPage, PROT_NONE);
  char* const start = end - rounded;
  std::memset(start, 0xFF, rounded);
  blocks[reinterpret_cast<std::uintptr_t>(start)] = {bytes, host, pages, mapped};
  if (!host) used += bytes;
  *to = start;
  return cudaSuccess;
}

cudaError_t release(void* address) {
  if (address == nullptr) return cudaSuccess;
  Lock lock(device);
  const auto found = blocks.find(reinterpret_cast<std::uintptr_t>(address));
  if (found == blocks.end()) return fail(cudaErrorInvalidValue, "free");
  drain_all();  // as cudaFree does
  if (!found->second.host) used -= found->second.bytes;
  munmap(found->second.pages, found->second.mapped);
  blocks.erase(found);
  return cudaSuccess;
}

bool on_device(const void* address) {
  const Block* const block = block_at(address);
  return block != nullptr && !block->host;
}

bool pinned(const void* address) {
  const Block* const block = block_at(address);
  return block != nullptr && block->host;
}

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** to, std::size_t bytes) {
  Lock lock(device);
  if (const cudaError_t error = refuse_unsafe("cudaMalloc")) return error;
  return allocate(to, bytes, false);
}

cudaError_t cudaFree(void* address) {
  Lock lock(device);
  if (address == nullptr) return cudaSuccess;
  if (const cudaError_t error = refuse_unsafe("cudaFree")) return error;
  return release(address);
}

cudaError_t cudaHostAlloc(void** to, std::size_t bytes, unsigned) {
  Lock lock(device);
  if (const cudaError_t error = refuse_unsafe("cudaHostAlloc")) return error;
  return allocate(to, bytes, true);
}

cudaError_t cudaFreeHost(void* address) {
  Lock lock(device);
  if (const cudaError_t error = refuse_unsafe("cudaFreeHost")) return error;
  return release(address);
}

cudaError_t cudaMemGetInfo(std::size_t* unused, std::size_t* total) {
  Lock lock(device);
  *unused = total_bytes() - used;
  *total = total_bytes();
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* to, const void* address) {
  Lock lock(device);
  std::memset(to, 0, sizeof *to);
  const Block* const block = block_at(address);
  to->type = block == nullptr ? cudaMemoryTypeUnregistered
             : block->host    ? cudaMemoryTypeHost
                              : cudaMemoryTypeDevice;
  if (block != nullptr) to->devicePointer = const_cast<void*>(address);
  if (block == nullptr || block->host) to->hostPointer = const_cast<void*>(address);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t handle) {
  Lock lock(device);
  Stream* const stream = stream_of(handle);
  const bool staged = !on_device(from) && !pinned(from);
  const bool waits = !on_device(to) && !pinned(to);
  if ((staged || waits) && stream->capturing) return refuse_capture(stream, "cudaMemcpyAsync");
  if (staged) {  // from pageable memory: read before the call returns
    const auto* const bytes_of = static_cast<const char*>(from);
    auto copy = std::make_shared<std::vector<char>>(bytes_of, bytes_of + bytes);
    return push(stream, "memcpy", [=] { std::memcpy(to, copy->data(), bytes); });
  }
  const cudaError_t error = push(stream, "memcpy", [=] { std::memmove(to, from, bytes); });
  if (waits && error == cudaSuccess) drain(stream);
  return error;
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  Lock lock(device);
  if (const cudaError_t unsafe = refuse_unsafe("cudaMemcpy")) return unsafe;
  const cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, nullptr);
  if (error == cudaSuccess) drain(&legacy);
  return error;
}

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t handle) {
  Lock lock(device);
  return push(stream_of(handle), "memset", [=] { std::memset(to, value, bytes); });
}

cudaError_t cudaMemset(void* to, int value, std::size_t bytes) {
  Lock lock(device);
  if (const cudaError_t unsafe = refuse_unsafe("cudaMemset")) return unsafe;
  return cudaMemsetAsync(to, value, bytes, nullptr);
}

}  // extern "C"
