// CUDA op of istft: checks, device guard, stream, dispatch, launch. The kernel and its contract are
// in kernels/istft.cuh.
#include "istft.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "floating.h"
#include "kernels/istft.h"

namespace chatterbox_fast {

namespace {

at::Tensor istft(const at::Tensor& spectrum, const at::Tensor& window, double limit) {
  const IstftSizes sizes = check_istft(spectrum, window, limit);
  const c10::cuda::CUDAGuard guard(spectrum.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  at::Tensor y = at::empty({sizes.rows, sizes.length()}, window.options());
  with_floating_type(spectrum.scalar_type(), [&](auto type) {
    using T = decltype(type);
    IstftArgs<T> args = {};
    args.spectrum = static_cast<const T*>(spectrum.const_data_ptr());
    args.window = window.const_data_ptr<float>();
    args.out = y.mutable_data_ptr<float>();
    args.frames = sizes.frames;
    args.rows = static_cast<int>(sizes.rows);
    args.limit = static_cast<float>(limit);
    C10_CUDA_CHECK(launch_istft(args, stream));
  });
  return y;
}

}  // namespace

}  // namespace chatterbox_fast

TORCH_LIBRARY_IMPL(chatterbox_fast, CUDA, library) {
  library.impl("istft", &chatterbox_fast::istft);
}
