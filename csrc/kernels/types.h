// The types in a launcher's signature: CUDA's, or in tests those of the CPU's stand-in. See
// runtime.h.
#pragma once

#if defined(__CUDACC__) || defined(CBF_WITH_CUDA)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace rt {

using bfloat16 = __nv_bfloat16;
using half = __half;
using Stream = cudaStream_t;
using Error = cudaError_t;

}  // namespace rt

#else
#include "host_runtime.h"
#endif
