// A kernel with bugs that can be planted in it, to prove that the tests of real kernels see them.
//
//   normalise_rows<bug>   a row per block, divided by its sum; dynamic shared memory: a row
//   add_up<bug>           numbers of several blocks, added by the last one to arrive
//   misuse(kind)          meetings of threads that cannot happen
#pragma once

#include "kernels/runtime.h"

constexpr int kThreads = 64;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kFullWarp = 0xFFFFFFFFu;

enum class Bug {
  kNone,
  kMissingBarrier,
  kPastStaticArray,
  kPastDynamicArray,
  kShuffleAsFence,
  kBlocksShareRow,
  kMissingFenceBefore,
  kMissingFenceAfter,
  kMissingBarrierBeforeFence,
};

// The sum over the warp; its first step goes through shared memory, the others do not.
template <Bug kBug>
RT_DEVICE float warp_sum(float value, float* partial) {
  partial[threadIdx.x] = value;
  if (kBug == Bug::kShuffleAsFence) {
    value = __shfl_sync(kFullWarp, value, threadIdx.x % 32);
  } else {
    __syncwarp();
  }
  value += partial[threadIdx.x ^ 1];
  for (int step = 2; step < 32; step *= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
}

template <Bug kBug>
RT_GLOBAL void RT_LAUNCH_BOUNDS(kThreads)
    normalise_rows(const float* rows, float* normalised, int width) {
  RT_DYN_SHARED(float, row);
  RT_SHARED(float, partial, kThreads);
  RT_SHARED(float, warp_sums, kWarps);
  const int first = (kBug == Bug::kBlocksShareRow ? 0 : blockIdx.x) * width;

  float sum = 0;
  for (int i = threadIdx.x; i < width; i += kThreads) sum += row[i] = rows[first + i];
  if (kBug == Bug::kPastDynamicArray && threadIdx.x == 0) row[width] = 0;
  sum = warp_sum<kBug>(sum, partial);
  const int warp = threadIdx.x / 32 + (kBug == Bug::kPastStaticArray);
  if (threadIdx.x % 32 == 0) warp_sums[warp] = sum;
  if (kBug != Bug::kMissingBarrier) __syncthreads();
  sum = 0;
  for (const float part : warp_sums) sum += part;
  for (int i = threadIdx.x; i < width; i += kThreads) normalised[first + i] = row[i] / sum;
}

// `numbers`: kThreads of every block; arrivals: 0.
template <Bug kBug>
RT_GLOBAL void RT_LAUNCH_BOUNDS(kThreads)
    add_up(const float* rows, float* numbers, unsigned* arrivals, float* sum) {
  RT_SHARED(unsigned, before, 1);
  const unsigned mine = blockIdx.x * kThreads + threadIdx.x;
  numbers[mine] = rows[mine];
  if (kBug != Bug::kMissingBarrierBeforeFence) __syncthreads();
  if (threadIdx.x == 0) {
    if (kBug != Bug::kMissingFenceBefore) __threadfence();
    *before = atomicAdd(arrivals, 1u);
    if (kBug != Bug::kMissingFenceAfter) __threadfence();
  }
  __syncthreads();
  if (*before != gridDim.x - 1 || threadIdx.x != 0) return;
  for (unsigned i = 0; i < gridDim.x * kThreads; ++i) *sum += numbers[i];
}

enum class Misuse {
  kExitBeforeBarrier,
  kTwoBarriers,
  kBarrierAgainstShuffle,
  kShuffleAgainstVote,
  kOutsideMask,
  kReadsOutsideMask,
  kShuffleWithExited,
};

// One block of one warp.
RT_GLOBAL void misuse(Misuse kind) {
  const unsigned lane = threadIdx.x;
  if (kind == Misuse::kExitBeforeBarrier && lane != 5) __syncthreads();
  if (kind == Misuse::kTwoBarriers && lane == 0) __syncthreads();
  if (kind == Misuse::kTwoBarriers && lane != 0) __syncthreads();
  if (kind == Misuse::kBarrierAgainstShuffle && lane == 0) __syncthreads();
  if (kind == Misuse::kBarrierAgainstShuffle && lane != 0) __shfl_sync(kFullWarp, lane, 0);
  if (kind == Misuse::kShuffleAgainstVote && lane == 0) __ballot_sync(kFullWarp, 1);
  if (kind == Misuse::kShuffleAgainstVote && lane != 0) __shfl_sync(kFullWarp, lane, 0);
  if (kind == Misuse::kOutsideMask) __syncwarp(0x0000FFFFu);
  if (kind == Misuse::kReadsOutsideMask && lane < 16) __shfl_down_sync(0x0000FFFFu, lane, 1);
  if (kind == Misuse::kShuffleWithExited && lane != 7) __shfl_xor_sync(kFullWarp, lane, 1);
}
