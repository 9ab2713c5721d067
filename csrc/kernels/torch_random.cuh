// torch's own CUDA random numbers, element by element and without state.
//
// torch_uniform(seed, offset, i, threads): what torch.rand and exponential_ draw for element i of a
// tensor, with a generator at (seed, offset) and a launch of `threads` threads (torch:
// calc_execution_policy in DistributionTemplates.h). Thread i % threads is the Philox subsequence;
// i / threads counts through the lanes x, y, z, w of a block, then through blocks. The uniform is
// curand's: bits * 2^-32 + 2^-33, in (0, 1].
//
// torch_exponential(uniform): torch's transform to Exp(1), -log, with values next to 1 clamped so
// that it is not 0. On the device the logarithm is the approximate __logf, as in torch.
#pragma once

#include <cmath>

#include "common.cuh"

namespace chatterbox_fast {

CBF_HOST_DEVICE float torch_uniform(uint64_t seed, uint64_t offset, uint32_t element,
                                    uint32_t threads) {
  const uint32_t round = element / threads;
  const uint64_t block = offset / 4 + round / 4;
  const Uint2 key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  const Uint4 counter = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                         element % threads, 0};
  const Uint4 bits = philox4x32_10(key, counter);
  const uint32_t lane = round % 4;
  const uint32_t word = lane == 0 ? bits.x : lane == 1 ? bits.y : lane == 2 ? bits.z : bits.w;
  return static_cast<float>(word) * 0x1p-32f + 0x1p-33f;
}

CBF_HOST_DEVICE float torch_exponential(float uniform) {
  constexpr float kHalfEpsilon = 0x1p-24f;
  if (uniform >= 1.0f - kHalfEpsilon) return kHalfEpsilon;
#ifdef __CUDA_ARCH__
  return -__logf(uniform);
#else
  return -std::log(uniform);
#endif
}

// By how much drawing `count` numbers advances a CUDA generator's offset.
CBF_HOST_DEVICE uint64_t torch_philox_increment(uint64_t count, uint64_t threads) {
  return ((count - 1) / (4 * threads) + 1) * 4;
}

}  // namespace chatterbox_fast
