// What torch's operators have in common here.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>
#include <vector>

#include "enqueue.h"

namespace gpu {

// Appends to torch's current stream.
inline void enqueue(const char* name, const std::function<void()>& work) {
  void* const stream = c10::cuda::getCurrentCUDAStream().stream();
  C10_CUDA_CHECK(static_cast<cudaError_t>(gpu_enqueue(stream, name, work)));
}

// A CUDA tensor by its address; one of the CPU by its value at the time of the call.
struct Later {
  void* data;
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;

  at::Tensor get() const {
    return at::from_blob(data, sizes, strides, at::TensorOptions(dtype).device(at::kCPU));
  }
};

// Without autograd, autocast and whoever watches the caller's operators.
struct Alone {
  c10::InferenceMode inference;
  c10::impl::ExcludeDispatchKeyGuard others{
      c10::autocast_dispatch_keyset | c10::DispatchKeySet(c10::DispatchKey::Python) |
      c10::DispatchKeySet(c10::DispatchKey::PythonTLSSnapshot)};
};

at::Tensor& exponential_(at::Tensor& self, double lambda, std::optional<at::Generator> generator);
at::Tensor& uniform_(at::Tensor& self, double from, double until,
                     std::optional<at::Generator> generator);
at::Tensor& normal_(at::Tensor& self, double mean, double deviation,
                    std::optional<at::Generator> generator);

}  // namespace gpu
