// torch's random numbers on a GPU: cuRAND's own Philox, compiled for the host, laid out over
// threads as torch lays it (ATen/native/cuda/DistributionTemplates.h). Logarithms are the host's.
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>

#define QUALIFIERS static inline
#include <cuda_runtime.h>
#include <curand_kernel.h>

#include "operators.h"

namespace gpu {

namespace {

constexpr int kThreads = 256, kUnroll = 4;

template <class Transform>
at::Tensor& draw(at::Tensor& self, std::optional<at::Generator> generator, const char* name,
                 Transform transform) {
  if (self.numel() == 0) return self;
  TORCH_CHECK(self.scalar_type() != at::kDouble, "the emulated GPU draws no doubles");
  auto* const source = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      generator, at::cuda::detail::getDefaultCUDAGenerator());
  const auto count = static_cast<uint64_t>(self.numel());
  const cudaDeviceProp& properties = *at::cuda::getCurrentDeviceProperties();
  const uint64_t grid = std::min<uint64_t>(
      properties.multiProcessorCount * (properties.maxThreadsPerMultiProcessor / kThreads),
      (count + kThreads - 1) / kThreads);
  const uint64_t steps = (count - 1) / (kThreads * grid * kUnroll) + 1;
  at::PhiloxCudaState state;
  {
    const std::lock_guard<std::mutex> lock(source->mutex_);
    state = source->philox_cuda_state(steps * 4);
  }
  // In the order in which they lie; where there are gaps (a slice), in that of the indices.
  const bool dense = self.is_non_overlapping_and_dense();
  const Later target{self.data_ptr(),
                     dense ? std::vector<int64_t>{self.numel()} : self.sizes().vec(),
                     dense ? std::vector<int64_t>{1} : self.strides().vec(), self.scalar_type()};
  const auto work = [=] {
    const Alone alone;
    const uint64_t seed = state.captured_ ? *state.seed_.ptr : state.seed_.val;
    const uint64_t offset =
        state.captured_ ? *state.offset_.ptr + state.offset_intragraph_ : state.offset_.val;
    at::Tensor to = target.get(), drawn = at::empty({static_cast<int64_t>(count)}, at::kFloat);
    float* const out = drawn.data_ptr<float>();
    const uint64_t stride = kThreads * grid;
    for (uint64_t thread = 0; thread < stride; ++thread) {
      curandStatePhilox4_32_10_t philox;
      curand_init(seed, thread, offset, &philox);
      for (uint64_t base = thread; base < count; base += stride * kUnroll) {
        float values[4];
        transform(philox, values);
        for (uint64_t i = 0; i < kUnroll; ++i) {
          if (base + i * stride < count) out[base + i * stride] = values[i];
        }
      }
    }
    to.copy_(drawn.view(to.sizes()));
  };
  enqueue(name, work);
  return self;
}

using Philox = curandStatePhilox4_32_10_t;

}  // namespace

at::Tensor& exponential_(at::Tensor& self, double lambda, std::optional<at::Generator> generator) {
  return draw(self, std::move(generator), "exponential_", [=](Philox& philox, float(&to)[4]) {
    const float4 four = curand_uniform4(&philox);
    const float u[] = {four.x, four.y, four.z, four.w};
    constexpr float kEpsilon = std::numeric_limits<float>::epsilon();
    for (int i = 0; i < 4; ++i) {
      const float log = u[i] >= 1.0f - kEpsilon / 2 ? -kEpsilon / 2 : std::log(u[i]);
      to[i] = static_cast<float>(-1.0 / lambda) * log;
    }
  });
}

at::Tensor& uniform_(at::Tensor& self, double from, double until,
                     std::optional<at::Generator> generator) {
  const auto low = static_cast<float>(from), range = static_cast<float>(until - from);
  return draw(self, std::move(generator), "uniform_", [=](Philox& philox, float(&to)[4]) {
    const float4 four = curand_uniform4(&philox);
    const float u[] = {four.x, four.y, four.z, four.w};
    for (int i = 0; i < 4; ++i) {
      const float value = u[i] * range + low;
      to[i] = value == static_cast<float>(until) ? low : value;
    }
  });
}

at::Tensor& normal_(at::Tensor& self, double mean, double deviation,
                    std::optional<at::Generator> generator) {
  return draw(self, std::move(generator), "normal_", [=](Philox& philox, float(&to)[4]) {
    const float4 four = curand_normal4(&philox);
    const float values[] = {four.x, four.y, four.z, four.w};
    for (int i = 0; i < 4; ++i) {
      to[i] = values[i] * static_cast<float>(deviation) + static_cast<float>(mean);
    }
  });
}

}  // namespace gpu
