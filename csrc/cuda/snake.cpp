// CUDA op of snake: checks, device guard, stream, dispatch, launch. The kernel and its contract are
// in kernels/snake.cuh.
#include "kernels/snake.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "floating.h"
#include "snake.h"

namespace chatterbox_fast {

namespace {

at::Tensor snake(const at::Tensor& x, const at::Tensor& alpha, const at::Tensor& inverse,
                 const std::optional<at::Tensor>& residual,
                 const std::optional<at::Tensor>& offset) {
  check_snake(x, alpha, inverse, residual, offset);
  const c10::cuda::CUDAGuard guard(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  at::Tensor y = at::empty_like(x);
  with_floating_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    SnakeArgs<T> args = {};
    args.x = static_cast<const T*>(x.const_data_ptr());
    args.alpha = alpha.const_data_ptr<float>();
    args.inverse = inverse.const_data_ptr<float>();
    args.residual = residual ? static_cast<T*>(residual->mutable_data_ptr()) : nullptr;
    args.offset = offset ? offset->const_data_ptr<float>() : nullptr;
    args.out = static_cast<T*>(y.mutable_data_ptr());
    args.channels = x.size(-1);
    args.rows = args.channels == 0 ? 0 : x.numel() / args.channels;
    C10_CUDA_CHECK(launch_snake(args, stream));
  });
  return y;
}

}  // namespace

}  // namespace chatterbox_fast

TORCH_LIBRARY_IMPL(chatterbox_fast, CUDA, library) {
  library.impl("snake", &chatterbox_fast::snake);
}
