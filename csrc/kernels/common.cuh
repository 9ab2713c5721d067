// Pieces that more than one kernel needs. Torch-free: compiles with nvcc and with g++.
//
// philox4x32_10: the counter-based generator behind torch's CUDA random numbers
// (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).
//   block(key, counter) -> 4 x uint32, a pure function: no state, no order, any thread.
//   Equal to curand's Philox_4x32_10 with key = seed (low word first) and
//   counter = {offset low, offset high, subsequence low, subsequence high}.
//
// Pack<T, n>: n neighbours in memory, n a power of two; load_pack reads them 16 bytes at a time.
// The address must be a multiple of alignof(Pack<T, n>), at most kPackBytes.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define CBF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CBF_HOST_DEVICE inline
#endif

namespace chatterbox_fast {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kPackBytes = 16;  // what one load instruction reads at most

template <typename T, int n>
struct alignas(n * sizeof(T) < kPackBytes ? n * sizeof(T) : kPackBytes) Pack {
  T items[n];
};

template <int n, typename T>
CBF_HOST_DEVICE Pack<T, n> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, n>*>(from);
}

struct Uint4 {
  uint32_t x, y, z, w;
};

struct Uint2 {
  uint32_t x, y;
};

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;  // golden ratio
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;  // sqrt(3) - 1
constexpr int kPhiloxRounds = 10;

CBF_HOST_DEVICE Uint4 philox4x32_10(Uint2 key, Uint4 counter) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxMultiplier0) * counter.x;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxMultiplier1) * counter.z;
    counter = {static_cast<uint32_t>(p1 >> 32) ^ counter.y ^ key.x, static_cast<uint32_t>(p1),
               static_cast<uint32_t>(p0 >> 32) ^ counter.w ^ key.y, static_cast<uint32_t>(p0)};
    key.x += kPhiloxWeyl0;
    key.y += kPhiloxWeyl1;
  }
  return counter;
}

}  // namespace chatterbox_fast
