// CUDA op of skinny_linear: checks, device guard, stream, dispatch, launch. The kernel and its
// contract are in kernels/skinny_linear.cuh.
#include "kernels/skinny_linear.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "floating.h"
#include "skinny_linear.h"

namespace chatterbox_fast {

namespace {

static_assert(kMostSkinnyRows == kSkinnyRows, "the kernel takes as many rows as the op lets in");

at::Tensor skinny_linear(const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& scale,
                         const std::optional<at::Tensor>& norm,
                         const std::optional<at::Tensor>& residual, double eps, bool gated) {
  const SkinnyLinearSizes sizes = check_skinny_linear(x, weight, scale, norm, residual, gated);
  const c10::cuda::CUDAGuard guard(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  at::Tensor y = at::empty({sizes.rows, sizes.outputs}, x.options());
  const auto launch = [&](auto x_type, auto weight_type) {
    using X = decltype(x_type);
    using W = decltype(weight_type);
    SkinnyLinearArgs<X, W> args = {};
    args.x = static_cast<const X*>(x.const_data_ptr());
    args.weight = static_cast<const W*>(weight.const_data_ptr());
    args.scale = scale ? scale->const_data_ptr<float>() : nullptr;
    args.norm = norm ? norm->const_data_ptr<float>() : nullptr;
    args.residual = residual ? static_cast<const X*>(residual->const_data_ptr()) : nullptr;
    args.y = static_cast<X*>(y.mutable_data_ptr());
    args.inputs = sizes.inputs;
    args.outputs = sizes.outputs;
    args.eps = static_cast<float>(eps);
    args.rows = static_cast<int>(sizes.rows);
    args.gated = gated;
    C10_CUDA_CHECK(launch_skinny_linear(args, stream));
  };
  with_floating_type(x.scalar_type(), [&](auto x_type) {
    if (weight.scalar_type() == at::kChar) return launch(x_type, int8_t());
    with_floating_type(weight.scalar_type(),
                       [&](auto weight_type) { launch(x_type, weight_type); });
  });
  return y;
}

}  // namespace

}  // namespace chatterbox_fast

TORCH_LIBRARY_IMPL(chatterbox_fast, CUDA, library) {
  library.impl("skinny_linear", &chatterbox_fast::skinny_linear);
}
