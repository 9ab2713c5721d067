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
// By CUDA's own names: threadIdx.x, blockIdx.x, blockDim.x, gridDim.x (one dimension only),
// __syncthreads, __syncthreads_or, __syncwarp, __shfl_sync and its kin, __ballot_sync,
// __threadfence, atomicAdd, atomicMax, and the arithmetic that host_runtime.h lists.
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

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

using bfloat16 = __nv_bfloat16;
using half = __half;
using Stream = cudaStream_t;
using Error = cudaError_t;

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
