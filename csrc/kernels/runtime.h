// What a kernel may use of CUDA, in one place: launches, shared memory, types. Kernels include
// this and nothing of CUDA's own, so that g++ compiles the very same source for tests, where
// host_runtime.h (tests/host_cuda) runs it on the CPU, thread by thread.
//
//   RT_GLOBAL, RT_DEVICE, RT_HOST_DEVICE, RT_LAUNCH_BOUNDS(threads)
//   RT_SHARED(T, name, count)   a static shared array
//   RT_DYN_SHARED(T, name)      the launch's dynamic shared memory, as T*
//   rt::bfloat16, rt::half      storage only: rt::to_float, compute in float, rt::from_float<T>,
//                               which rounds to nearest, of ties to even
//   rt::launch(kernel, grid, block, dynamic_shared_bytes, stream, arguments...) -> rt::Error
//
// Tensor cores, where rt::kTensorCores (sm_80 and newer), for T = half or bfloat16; all of a warp:
//   rt::Fragment                four registers of two T each
//   rt::pack_pair<T>(low, high) two floats rounded to a register
//   rt::load_matrices<kTransposed>(row)  four 8 x 8 matrices from shared memory: `row` is row
//                               lane % 8 of matrix lane / 8, 16 bytes, aligned; register i of a
//                               lane is columns 2 (lane % 4) and the next of row lane / 4 of matrix
//                               i, or of its transpose
//   rt::multiply_add<T>(sums, a, b0, b1)  sums (16 x 8) += a (16 x 16) b (16 x 8), in float
//
// By CUDA's own names: threadIdx.x, blockIdx.x, blockDim.x, gridDim.x (one dimension only),
// __syncthreads, __syncthreads_or, __syncwarp, __shfl_sync and its kin, __ballot_sync,
// __threadfence, atomicAdd, atomicMax, and the arithmetic that host_runtime.h lists.
#pragma once

#ifdef __CUDACC__

#include <cstddef>
#include <cstdint>

#include "types.h"

#define RT_GLOBAL __global__
#define RT_DEVICE __device__ __forceinline__
#define RT_OUTLINED static __device__ __noinline__
#define RT_HOST_DEVICE __host__ __device__ __forceinline__
#define RT_LAUNCH_BOUNDS(threads) __launch_bounds__(threads)
#define RT_SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define RT_DYN_SHARED(T, name)                                       \
  extern __shared__ __align__(16) unsigned char rt_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(rt_dynamic_shared)

namespace rt {

RT_DEVICE float to_float(float x) { return x; }
RT_DEVICE float to_float(bfloat16 x) { return __bfloat162float(x); }
RT_DEVICE float to_float(half x) { return __half2float(x); }
RT_DEVICE float to_float(int8_t x) { return x; }

template <typename T>
RT_DEVICE T from_float(float x);
template <>
RT_DEVICE float from_float(float x) {
  return x;
}
template <>
RT_DEVICE bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}
template <>
RT_DEVICE half from_float(float x) {
  return __float2half_rn(x);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kTensorCores = false;
#else
constexpr bool kTensorCores = true;
#endif

struct Fragment {
  unsigned registers[4];
};

template <typename T>
RT_DEVICE unsigned pack_pair(float low, float high);
template <>
RT_DEVICE unsigned pack_pair<bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}
template <>
RT_DEVICE unsigned pack_pair<half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}

#define RT_LDMATRIX(variant)                                                                 \
  asm volatile("ldmatrix.sync.aligned.m8n8.x4" variant ".shared.b16 {%0, %1, %2, %3}, [%4];" \
               : "=r"(to.registers[0]), "=r"(to.registers[1]), "=r"(to.registers[2]),        \
                 "=r"(to.registers[3])                                                       \
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))                   \
               : "memory")

template <bool kTransposed>
RT_DEVICE Fragment load_matrices(const void* row) {
  Fragment to;
  if constexpr (kTransposed) {
    RT_LDMATRIX(".trans");
  } else {
    RT_LDMATRIX("");
  }
  return to;
}

#undef RT_LDMATRIX

#define RT_MMA(type)                                                                        \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                          \
      : "r"(a.registers[0]), "r"(a.registers[1]), "r"(a.registers[2]), "r"(a.registers[3]), \
        "r"(b0), "r"(b1))

template <typename T>
RT_DEVICE void multiply_add(float (&sums)[4], const Fragment& a, unsigned b0, unsigned b1);
template <>
RT_DEVICE void multiply_add<bfloat16>(float (&sums)[4], const Fragment& a, unsigned b0,
                                      unsigned b1) {
  RT_MMA("bf16");
}
template <>
RT_DEVICE void multiply_add<half>(float (&sums)[4], const Fragment& a, unsigned b0, unsigned b1) {
  RT_MMA("f16");
}

#undef RT_MMA

template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), unsigned grid, unsigned block,
             std::size_t dynamic_shared_bytes, Stream stream, const Arguments&... arguments) {
  kernel<<<grid, block, dynamic_shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace rt

#else
#include "host_runtime.h"
#endif
