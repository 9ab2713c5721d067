// What several kernels compute.
#pragma once

#include "common.cuh"
#include "runtime.h"

namespace chatterbox_fast {

// The sum over a warp, in every lane.
RT_DEVICE float sum_of_warp(float sum) {
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  return sum;
}

// x, within what T holds of finite numbers: half alone has less than float, about. NaN is kept.
template <typename T>
RT_DEVICE float finite(float x) {
  return x;
}
template <>
RT_DEVICE float finite<rt::half>(float x) {
  constexpr float kLargest = 65504.0f;
  return x > kLargest ? kLargest : x < -kLargest ? -kLargest : x;
}

// A pack of a number a channel, or zeros where there are none.
template <int kPack>
RT_DEVICE Pack<float, kPack> load_numbers(const float* numbers, long long pack) {
  if (numbers == nullptr) return {};
  return load_pack<kPack>(numbers + pack * kPack);
}

// Whether a pack of n lies where one may.
template <int n, typename T>
bool in_packs(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(Pack<T, n>) == 0;
}

}  // namespace chatterbox_fast
