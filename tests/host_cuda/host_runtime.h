// The host twin of kernels/runtime.h: a kernel compiled by g++ runs here on the CPU. Every CUDA
// thread of a block is a fiber; host_runtime.cpp decides who runs when and holds the rules:
//
//   * Blocks run one after another; threads run until they meet (a barrier, a warp operation).
//   * The order of blocks, warps and lanes is configurable; a correct kernel gives one result.
//   * Shared memory starts as 0xFF bytes (NaN) in every block, with red zones under ASan.
//   * A meeting that cannot happen ends the launch with an error text, never with a hang.
//   * Under TSan only barriers and __syncwarp order memory; a shuffle or a vote does not. Blocks
//     know nothing of each other but what is handed over: by a fence and then an atomicAdd, to who
//     adds to the same word later and then has a fence too.
//
// Not modelled: weak memory between blocks, timing, occupancy, contraction to FMA. Tensor cores sum
// as GPUs are free to: here by fused multiply-adds in the order of k.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#define RT_GLOBAL inline
#define RT_DEVICE inline
#define RT_OUTLINED static inline
#define RT_HOST_DEVICE inline
#define RT_LAUNCH_BOUNDS(threads)
#define RT_SHARED(T, name, count) \
  static char name##_site;        \
  auto& name = rt::host::shared_array<T[count]>(&name##_site)
#define RT_DYN_SHARED(T, name) T* const name = static_cast<T*>(rt::host::dynamic_shared())

extern "C" {
// 0 ascending, 1 descending, 2 shuffled anew at every step, from `seed`.
void emu_configure(int order, unsigned seed);
// Why the last launch failed; empty after one that did not.
const char* emu_error();
}

namespace rt {

using Stream = void*;
using Error = int;  // 0 or the number of CUDA's error

namespace host {

struct Index {
  unsigned x;
};

// A place in the kernel's source. As a default argument it is the place of the call.
struct Site {
  const char* file;
  int line;
};

// What a thread waits for: the rest of its block, or the lanes of a mask, at the same call.
struct Meeting {
  const char* name;
  Site site;
  bool whole_block;
  bool orders_memory;
  unsigned mask;   // of a warp operation
  uint64_t value;  // what this thread brings
  int source;      // the lane whose value it gets, or kVote
};
constexpr int kVote = -1;

// Waits for the others; returns the value of the source lane or the vote (a bit per lane in a
// warp, any bit of any thread in a block).
uint64_t meet(const Meeting& meeting);

// The block's memory for an array that is declared at `site`.
void* shared_memory(const void* site, std::size_t bytes);
void* dynamic_shared();

template <class Array>
Array& shared_array(const void* site) {
  return *static_cast<Array*>(shared_memory(site, sizeof(Array)));
}

// What hands over from block to block, under TSan.
void fence();
void touch_atomic(void* address);

Error run_grid(unsigned grid, unsigned block, std::size_t dynamic_shared_bytes,
               const std::function<void()>& thread);

inline uint64_t warp_meet(const char* name, Site site, bool orders_memory, unsigned mask,
                          uint64_t value, int source) {
  return meet({name, site, false, orders_memory, mask, value, source});
}

inline uint64_t block_meet(const char* name, Site site, uint64_t value) {
  return meet({name, site, true, true, 0, value, kVote});
}

template <class T>
T shuffle(const char* name, Site site, unsigned mask, T value, int source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_meet(name, site, false, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace host

struct bfloat16 {
  uint16_t bits;
};

struct half {
  uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bfloat16 x) {
  return host::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

inline float to_float(half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7FFFu) << 13;
  const bool finite = (x.bits & 0x7C00u) != 0x7C00u;
  // The exponents' biases differ by 112; the product is exact, for subnormal halves too.
  const uint32_t scaled = host::bit_cast<uint32_t>(host::bit_cast<float>(magnitude) * 0x1p112f);
  return host::bit_cast<float>(sign | (finite ? scaled : magnitude | 0x7F800000u));
}

inline float to_float(int8_t x) { return x; }

namespace host {

// `bits` without its lowest `count` ones, rounded to nearest, of ties to even.
inline uint32_t round_off(uint32_t bits, int count) {
  const uint32_t below_half = (1u << (count - 1)) - 1;
  return (bits + below_half + (bits >> count & 1u)) >> count;
}

}  // namespace host

template <typename T>
T from_float(float x);

template <>
inline float from_float(float x) {
  return x;
}

template <>
inline bfloat16 from_float(float x) {
  const uint32_t bits = host::bit_cast<uint32_t>(x);
  return {static_cast<uint16_t>(x == x ? host::round_off(bits, 16) : 0x7FFFu)};
}

template <>
inline half from_float(float x) {
  const uint32_t bits = host::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {0x7FFFu};
  uint32_t rounded = 0x7C00u;
  if (magnitude < 0x38800000u) {  // below 2^-14 halves are multiples of 2^-24, as floats from 1/2
    rounded = host::bit_cast<uint32_t>(host::bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  } else if (magnitude < 0x47800000u) {  // 2^16; what rounds up to it becomes infinity
    rounded = host::round_off(magnitude - (112u << 23), 13);
  }
  return {static_cast<uint16_t>(sign | rounded)};
}

template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), unsigned grid, unsigned block,
             std::size_t dynamic_shared_bytes, Stream, const Arguments&... arguments) {
  const std::tuple<Parameters...> copies(arguments...);
  return host::run_grid(grid, block, dynamic_shared_bytes, [&] { std::apply(kernel, copies); });
}

}  // namespace rt

// From here on CUDA's own names.
extern rt::host::Index threadIdx, blockIdx, blockDim, gridDim;

#define RT_HERE rt::host::Site site = {__builtin_FILE(), __builtin_LINE()}

inline void __syncthreads(RT_HERE) { rt::host::block_meet("__syncthreads", site, 0); }

inline int __syncthreads_or(int predicate, RT_HERE) {
  return rt::host::block_meet("__syncthreads_or", site, predicate != 0) != 0;
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, RT_HERE) {
  rt::host::warp_meet("__syncwarp", site, true, mask, 0, rt::host::kVote);
}

inline void __threadfence() { rt::host::fence(); }

inline unsigned __ballot_sync(unsigned mask, int predicate, RT_HERE) {
  return static_cast<unsigned>(
      rt::host::warp_meet("__ballot_sync", site, false, mask, predicate != 0, rt::host::kVote));
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, RT_HERE) {
  return rt::host::shuffle("__shfl_sync", site, mask, value, lane & 31);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, RT_HERE) {
  const unsigned lane = threadIdx.x & 31;
  return rt::host::shuffle("__shfl_up_sync", site, mask, value, delta > lane ? lane : lane - delta);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, RT_HERE) {
  const unsigned lane = threadIdx.x & 31;
  const unsigned source = lane + delta > 31 ? lane : lane + delta;
  return rt::host::shuffle("__shfl_down_sync", site, mask, value, source);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, RT_HERE) {
  const int lane = threadIdx.x & 31;
  const int source = (lane ^ lanes) > 31 ? lane : lane ^ lanes;
  return rt::host::shuffle("__shfl_xor_sync", site, mask, value, source);
}

// ---- Tensor cores: what runtime.h says of them, by shuffles.

namespace rt {

constexpr bool kTensorCores = true;

struct Fragment {
  unsigned registers[4];
};

template <typename T>
unsigned pack_pair(float low, float high) {
  return from_float<T>(low).bits | static_cast<unsigned>(from_float<T>(high).bits) << 16;
}

namespace host {

struct alignas(16) MatrixRow {
  uint16_t elements[8];
};

// The two T of a register.
template <typename T>
float low_of(unsigned pair) {
  return to_float(T{static_cast<uint16_t>(pair)});
}
template <typename T>
float high_of(unsigned pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

}  // namespace host

template <bool kTransposed>
Fragment load_matrices(const void* row, RT_HERE) {
  const int outer = (threadIdx.x & 31) / 4, inner = threadIdx.x % 4 * 2;
  const auto element = [&](int matrix, int line, int column) {
    const auto own = reinterpret_cast<uint64_t>(row);
    const uint64_t at = host::shuffle("load_matrices", site, ~0u, own, 8 * matrix + line);
    return static_cast<unsigned>(reinterpret_cast<const host::MatrixRow*>(at)->elements[column]);
  };
  Fragment to;
  for (int i = 0; i < 4; ++i) {
    const unsigned low = kTransposed ? element(i, inner, outer) : element(i, outer, inner);
    const unsigned high = kTransposed ? element(i, inner + 1, outer) : element(i, outer, inner + 1);
    to.registers[i] = low | high << 16;
  }
  return to;
}

template <typename T>
void multiply_add(float (&sums)[4], const Fragment& a, unsigned b0, unsigned b1, RT_HERE) {
  const auto both = [](unsigned low, unsigned high) { return low | uint64_t{high} << 32; };
  const auto from = [&](uint64_t value, int source) {
    return host::shuffle("multiply_add", site, ~0u, value, source);
  };
  const int lane = threadIdx.x & 31, row = lane / 4, column = lane % 4 * 2;
  for (int step = 0; step < 2; ++step) {  // of eight k each
    for (int i = 0; i < 4; ++i) {         // whose lane has k 8 step + 2 i and the next
      const uint64_t rows =
          from(both(a.registers[2 * step], a.registers[2 * step + 1]), 4 * row + i);
      for (int j = 0; j < 2; ++j) {
        const auto b = static_cast<unsigned>(from(step == 0 ? b0 : b1, 4 * (column + j) + i));
        for (int half = 0; half < 2; ++half) {
          const auto pair = static_cast<unsigned>(rows >> 32 * half);
          float& sum = sums[2 * half + j];
          sum = fmaf(host::low_of<T>(pair), host::low_of<T>(b), sum);
          sum = fmaf(host::high_of<T>(pair), host::high_of<T>(b), sum);
        }
      }
    }
  }
}

}  // namespace rt

#undef RT_HERE

// Relaxed, as on the GPU: no two threads race on the word, and only fences order anything else.
inline int atomicAdd(int* address, int value) {
  rt::host::touch_atomic(address);
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  rt::host::touch_atomic(address);
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  rt::host::touch_atomic(address);
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
// Whole because fibers switch at meetings only.
inline unsigned atomicMax(unsigned* address, unsigned value) {
  const unsigned old = __atomic_load_n(address, __ATOMIC_RELAXED);
  __atomic_store_n(address, old < value ? value : old, __ATOMIC_RELAXED);
  return old;
}

inline unsigned __float_as_uint(float x) { return rt::host::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return rt::host::bit_cast<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
// Macros, because glibc has functions of these names, which it declares but does not export.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
