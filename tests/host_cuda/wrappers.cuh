// Everything that runtime.h offers, used once, so that g++'s answers can be compared.
#pragma once

#include "kernels/runtime.h"

constexpr int kResults = 22;

// One block of 64 threads. results: kResults per thread; counters: {unsigned sum, unsigned max},
// an int and an unsigned long long, each starting at 0.
RT_GLOBAL void RT_LAUNCH_BOUNDS(64)
    every_wrapper(unsigned long long* results, unsigned* counters, int* signed_counter,
                  unsigned long long* wide_counter, float x) {
  RT_SHARED(unsigned, shared_counter, 1);
  constexpr unsigned kFull = 0xFFFFFFFFu;
  const unsigned thread = threadIdx.x, lane = thread % 32;
  const unsigned half_warp = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  const unsigned long long wide = (1ull << 40) + thread;
  unsigned long long* const mine = results + thread * kResults;
  if (thread == 0) *shared_counter = 0;

  mine[0] = __syncthreads_or(thread == 40);
  mine[1] = __syncthreads_or(thread == 64);
  mine[2] = __ballot_sync(kFull, thread % 3 == 0);
  mine[3] = __ballot_sync(half_warp, thread % 3 == 0);
  mine[4] = __shfl_sync(kFull, static_cast<int>(thread), 5);
  mine[5] = __shfl_up_sync(kFull, thread, 3);
  mine[6] = __shfl_down_sync(kFull, wide, 3);
  mine[7] = __float_as_uint(__shfl_xor_sync(half_warp, x + thread, 9));
  __syncwarp();
  __syncwarp(half_warp);

  atomicAdd(shared_counter, thread);
  atomicAdd(&counters[0], 2u);
  atomicMax(&counters[1], thread);
  atomicAdd(signed_counter, -1);
  atomicAdd(wide_counter, wide);
  __syncthreads();
  mine[8] = *shared_counter;

  mine[9] = __popc(thread);
  mine[10] = __clz(thread);
  mine[11] = __ffs(thread);
  mine[12] = __float_as_uint(__uint_as_float(thread));
  mine[13] = __float_as_uint(__expf(-x));
  mine[14] = __float_as_uint(__logf(x));
  mine[15] = __float_as_uint(fmaxf(x, 2.0f));
  mine[16] = blockDim.x;
  mine[17] = gridDim.x;
  mine[18] = blockIdx.x;
  mine[19] = __float_as_uint(rt::to_float(x));
  mine[20] = __float_as_uint(rt::to_float(static_cast<int8_t>(thread - 32)));
  mine[21] = __float_as_uint(fmaf(1.0f + 0x1p-23f, 1.0f - 0x1p-23f, -1.0f));
}

// Both types from the same bits: i-th value of either becomes a float.
RT_GLOBAL void widen(const rt::half* halves, const rt::bfloat16* brains, float* from_half,
                     float* from_brain) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  from_half[i] = rt::to_float(halves[i]);
  from_brain[i] = rt::to_float(brains[i]);
}

// The other way: each of the floats to either type, and to itself.
RT_GLOBAL void narrow(const float* floats, rt::half* halves, rt::bfloat16* brains, float* same) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  halves[i] = rt::from_float<rt::half>(floats[i]);
  brains[i] = rt::from_float<rt::bfloat16>(floats[i]);
  same[i] = rt::from_float<float>(floats[i]);
}

// One warp. matrices: four of 8 x 8; operands: of each lane a and b of multiply_add; fragments: of
// each lane what load_matrices gives it, then of the transposes; sums: what is added to; pairs: of
// two floats each.
template <typename T>
RT_GLOBAL void RT_LAUNCH_BOUNDS(32)
    tensor_cores(const T* matrices, const unsigned* operands, const float* floats,
                 unsigned* fragments, float* sums, unsigned* pairs) {
  RT_SHARED(T, shared, 4 * 64);
  const unsigned lane = threadIdx.x;
  for (unsigned i = lane; i < 4 * 64; i += 32) shared[i] = matrices[i];
  __syncthreads();
  const rt::Fragment loaded[2] = {rt::load_matrices<false>(shared + 8 * lane),
                                  rt::load_matrices<true>(shared + 8 * lane)};
  for (unsigned i = 0; i < 8; ++i) fragments[8 * lane + i] = loaded[i / 4].registers[i % 4];
  const unsigned* const own = operands + 6 * lane;
  float d[4];
  for (unsigned i = 0; i < 4; ++i) d[i] = sums[4 * lane + i];
  rt::multiply_add<T>(d, {{own[0], own[1], own[2], own[3]}}, own[4], own[5]);
  for (unsigned i = 0; i < 4; ++i) sums[4 * lane + i] = d[i];
  pairs[lane] = rt::pack_pair<T>(floats[2 * lane], floats[2 * lane + 1]);
}
