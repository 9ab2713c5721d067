// CUDA op of resample: checks, device guard, stream, dispatch, launch. The kernel and its contract
// are in kernels/resample.cuh.
#include "kernels/resample.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "floating.h"
#include "resample.h"

namespace chatterbox_fast {

namespace {

at::Tensor resample(const at::Tensor& waveform, const at::Tensor& filters,
                    const std::optional<at::Tensor>& first, int64_t stride, int64_t left,
                    int64_t length) {
  const ResampleSizes sizes = check_resample(waveform, filters, first, stride, left, length);
  const c10::cuda::CUDAGuard guard(waveform.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  at::Tensor y = at::empty({sizes.rows, length}, waveform.options());
  with_floating_type(waveform.scalar_type(), [&](auto type) {
    using T = decltype(type);
    ResampleArgs<T> args = {};
    args.waveform = static_cast<const T*>(waveform.const_data_ptr());
    args.filters = filters.const_data_ptr<float>();
    args.first = first.has_value() ? first->const_data_ptr<float>() : nullptr;
    args.out = static_cast<T*>(y.mutable_data_ptr());
    args.samples = sizes.samples;
    args.length = length;
    args.phase_stride = filters.stride(0);
    args.tap_stride = filters.stride(1);
    args.rows = static_cast<int>(sizes.rows);
    args.phases = static_cast<int>(sizes.phases);
    args.taps = static_cast<int>(sizes.taps);
    args.first_count = static_cast<int>(sizes.first);
    args.stride = static_cast<int>(stride);
    args.left = static_cast<int>(left);
    C10_CUDA_CHECK(launch_resample(args, stream));
  });
  return y;
}

}  // namespace

}  // namespace chatterbox_fast

TORCH_LIBRARY_IMPL(chatterbox_fast, CUDA, library) {
  library.impl("resample", &chatterbox_fast::resample);
}
