// What CPU ops do with tensors of float32, float16 or bfloat16: eight numbers as floats and back,
// and a call for the type.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "vectors.h"

namespace chatterbox_fast {

CBF_INLINE Floats floats_of(const float* from) { return load<Floats>(from); }
CBF_INLINE Floats floats_of(const c10::Half* from) { return floats_of_halves(from); }
CBF_INLINE Floats floats_of(const c10::BFloat16* from) { return floats_of_bfloats(from); }

// Floats back as eight numbers of the type, rounded to nearest.
template <typename T>
CBF_INLINE void narrow(Floats y, T* to) {
  float lanes[kLanes];
  std::memcpy(lanes, &y, sizeof y);
  for (int i = 0; i < kLanes; ++i) to[i] = lanes[i];
}

CBF_INLINE void narrow(Floats y, c10::BFloat16* to) {
  const Words bits = (Words)y, is_nan = (Words)(y != y);
  const Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Shorts shorts = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0u), Shorts);
  std::memcpy(to, &shorts, sizeof shorts);
}

// x, within what T holds of finite numbers: half alone has less than float, about. NaN is kept.
template <typename T>
CBF_INLINE Floats finite(Floats x) {
  return x;
}
template <>
CBF_INLINE Floats finite<c10::Half>(Floats x) {
  constexpr float kLargest = 65504.0f;
  x = x > kLargest ? all(kLargest) : x;
  return x < -kLargest ? all(-kLargest) : x;
}

// run(zero of the type); float where it is no half.
template <typename Run>
void by_type(c10::ScalarType type, const Run& run) {
  if (type == c10::kHalf) return run(c10::Half());
  if (type == c10::kBFloat16) return run(c10::BFloat16());
  run(0.0f);
}

}  // namespace chatterbox_fast
