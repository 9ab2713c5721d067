// What a warp computes together.
#pragma once

#include "common.cuh"
#include "runtime.h"

namespace chatterbox_fast {

// The sum over a warp, in every lane.
RT_DEVICE float sum_of_warp(float sum) {
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  return sum;
}

}  // namespace chatterbox_fast
