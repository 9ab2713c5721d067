// CUDA op of padded_attention: checks, device guard, stream, dispatch, launch. The kernel and its
// contract are in kernels/padded_attention.cuh.
#include "kernels/padded_attention.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "floating.h"
#include "padded_attention.h"

namespace chatterbox_fast {

namespace {

static_assert(kPaddedHead == kPaddedDim);

at::Tensor padded_attention(const at::Tensor& qkv, const at::Tensor& lengths, int64_t heads) {
  const PaddedAttentionSizes sizes = check_padded_attention(qkv, lengths, heads);
  const c10::cuda::CUDAGuard guard(qkv.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  at::Tensor out = at::empty({sizes.rows, sizes.positions, heads * kPaddedDim}, qkv.options());
  with_floating_type(qkv.scalar_type(), [&](auto type) {
    using T = decltype(type);
    PaddedAttentionArgs<T> args = {};
    args.qkv = static_cast<const T*>(qkv.const_data_ptr());
    args.lengths = lengths.const_data_ptr<int>();
    args.out = static_cast<T*>(out.mutable_data_ptr());
    args.rows = static_cast<int>(sizes.rows);
    args.positions = static_cast<int>(sizes.positions);
    args.heads = static_cast<int>(heads);
    C10_CUDA_CHECK(launch_padded_attention(args, stream));
  });
  return out;
}

}  // namespace

}  // namespace chatterbox_fast

TORCH_LIBRARY_IMPL(chatterbox_fast, CUDA, library) {
  library.impl("padded_attention", &chatterbox_fast::padded_attention);
}
