// Vectors of floats that every CPU has in some width, and a function compiled for several of them.
//
//   CBF_FOR_EVERY_CPU   before a function: one source, a clone for each instruction set; the loader
//                       takes the best one there is
//   CBF_FUSED_FOR_EVERY_CPU  the same, and a product is added without being rounded where the CPU
//                       can: for sums whose last bit nothing depends on
//   CBF_INLINE          before what such a function calls, which must be compiled into the clone
//   Floats, Words       8 lanes; all arithmetic is lane by lane
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define CBF_FUSED optimize("fp-contract=fast")
#if defined(__AVX2__) && defined(__FMA__)  // built for such a CPU alone
#define CBF_FOR_EVERY_CPU
#define CBF_FUSED_FOR_EVERY_CPU __attribute__((CBF_FUSED))
#elif __GNUC__ >= 12 && defined(__k8__)  // x86-64: what another -march has, this clone would lack
#define CBF_CLONES target_clones("arch=x86-64-v3", "default")  // v3 has AVX2 and FMA
#define CBF_FOR_EVERY_CPU __attribute__((CBF_CLONES))
#define CBF_FUSED_FOR_EVERY_CPU __attribute__((CBF_CLONES, CBF_FUSED))
#else
#define CBF_FOR_EVERY_CPU __attribute__((target_clones("avx2", "default")))
#define CBF_FUSED_FOR_EVERY_CPU __attribute__((target_clones("fma", "default"), CBF_FUSED))
#endif
#else
#define CBF_FOR_EVERY_CPU
#define CBF_FUSED_FOR_EVERY_CPU
#endif
#define CBF_INLINE __attribute__((always_inline)) inline
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored \
    "-Wpsabi"  // of passing vectors by value, which inlining does away with
#endif

// Lanes of two vectors by number: those of the second come after those of the first.
#ifdef __clang__
#define CBF_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define CBF_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ::chatterbox_fast::Words{__VA_ARGS__})
#endif

namespace chatterbox_fast {

constexpr int kLanes = 8;
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Shorts = uint16_t __attribute__((vector_size(2 * kLanes)));

template <typename Vector>
CBF_INLINE Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

CBF_INLINE Floats floats_of_bfloats(const void* from) {
  return (Floats)(__builtin_convertvector(load<Shorts>(from), Words) << 16);
}

// Of float16: the exponent is moved. Subnormal ones are whole numbers of a small step, which no
// arithmetic on subnormal floats is needed for; infinities and NaN keep an exponent of ones.
CBF_INLINE Floats floats_of_halves(const void* from) {
  const Words bits = __builtin_convertvector(load<Shorts>(from), Words);
  const Words size = (bits & 0x7fffu) << 13, is_small = (Words)(size < 0x00800000u);
  const Words special = (Words)(size >= 0x0f800000u) & 0x7f800000u;
  const Words small = (Words)((Floats)((bits & 0x7fffu) | 0x3f000000u) - 0.5f);
  const Words normal = (size + 0x38000000u) | special;
  return (Floats)((small & is_small) | (normal & ~is_small) | (bits & 0x8000u) << 16);
}

CBF_INLINE float sum(Floats vector) {
  float lanes[kLanes];
  std::memcpy(lanes, &vector, sizeof lanes);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// Lane j is the sum of the lanes of vector j.
CBF_INLINE Floats sum_of_each(const Floats (&v)[kLanes]) {
  Floats pairs[4], fours[2];
  for (int i = 0; i < 4; ++i) {
    const Floats a = v[2 * i], b = v[2 * i + 1];
    pairs[i] =
        CBF_SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + CBF_SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    const Floats a = pairs[2 * i], b = pairs[2 * i + 1];
    fours[i] =
        CBF_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + CBF_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return CBF_SHUFFLE(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         CBF_SHUFFLE(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// b where one of them is NaN.
CBF_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

CBF_INLINE float largest(Floats vector) {
  float lanes[kLanes];
  std::memcpy(lanes, &vector, sizeof lanes);
  return *std::max_element(lanes, lanes + kLanes);
}

CBF_INLINE Floats all(float x) { return Floats{} + x; }

// exp(x) for x <= 88, to about one unit in the last place; 0 below the least normal number. Cephes'
// polynomial over half a binary octave.
CBF_INLINE Floats exponential(Floats x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: added and taken away, it rounds
  const Floats shifted = x * 1.44269504f + kRound;
  const Floats octaves = shifted - kRound;
  const Floats rest = (x - octaves * 0.693359375f) + octaves * 2.12194440e-4f;
  Floats y = all(1.9875691500e-4f);
  for (const float c :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    y = y * rest + c;
  }
  y = y * (rest * rest) + rest + 1.0f;
  const Words power = ((Words)shifted - 0x4b400000u + 127u) << 23;
  const Words normal = ~(Words)(x < -87.3365f);  // NaN is kept
  return (Floats)((Words)(y * (Floats)power) & normal);
}

}  // namespace chatterbox_fast
