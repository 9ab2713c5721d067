// CUDA op of add_norm: checks, device guard, stream, dispatch, launch. The kernel and its contract
// are in kernels/add_norm.cuh.
#include "kernels/add_norm.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "add_norm.h"
#include "floating.h"

namespace chatterbox_fast {

namespace {

static_assert(kAddNormChannels == kMostAddNormChannels);

at::Tensor add_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                    const std::optional<at::Tensor>& residual,
                    const std::optional<at::Tensor>& offset, const std::optional<at::Tensor>& shift,
                    double eps, bool mish, std::optional<at::ScalarType> dtype) {
  const auto type = check_add_norm(x, weight, bias, residual, offset, shift, dtype);
  const c10::cuda::CUDAGuard guard(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  at::Tensor y = at::empty(x.sizes(), x.options().dtype(type));
  const auto launch = [&](auto x_type, auto y_type) {
    using X = decltype(x_type);
    using Y = decltype(y_type);
    AddNormArgs<X, Y> args = {};
    args.x = static_cast<const X*>(x.const_data_ptr());
    args.weight = weight.const_data_ptr<float>();
    args.bias = bias.const_data_ptr<float>();
    args.residual = residual ? residual->mutable_data_ptr<float>() : nullptr;
    args.offset = offset ? offset->const_data_ptr<float>() : nullptr;
    args.shift = shift ? shift->const_data_ptr<float>() : nullptr;
    args.y = static_cast<Y*>(y.mutable_data_ptr());
    args.times = x.size(1);
    args.rows = x.size(0) * args.times;
    args.x_row_stride = x.stride(0);
    args.x_time_stride = x.stride(1);
    args.channels = static_cast<int>(x.size(2));
    args.eps = static_cast<float>(eps);
    args.mish = mish;
    C10_CUDA_CHECK(launch_add_norm(args, stream));
  };
  with_floating_type(x.scalar_type(), [&](auto x_type) {
    with_floating_type(type, [&](auto y_type) { launch(x_type, y_type); });
  });
  return y;
}

}  // namespace

}  // namespace chatterbox_fast

TORCH_LIBRARY_IMPL(chatterbox_fast, CUDA, library) {
  library.impl("add_norm", &chatterbox_fast::add_norm);
}
