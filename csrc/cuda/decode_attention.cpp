// CUDA op of decode_attention: checks, device guard, stream, dispatch, launch. The kernel and its
// contract are in kernels/decode_attention.cuh.
#include "decode_attention.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "floating.h"
#include "kernels/decode_attention.h"

namespace chatterbox_fast {

namespace {

static_assert(kAttentionDim == kHeadDim && kMostAttentionSplits == kMostSplits &&
              kAttentionFailedBit == kAttentionFailed);

// All arguments but the scratch memory.
template <typename X, typename T>
DecodeAttentionArgs<X, T> typed_args(const at::Tensor& qkv, const at::Tensor& k_cache,
                                     const at::Tensor& v_cache, const at::Tensor& position,
                                     const at::Tensor& flags, const std::optional<at::Tensor>& cos,
                                     const std::optional<at::Tensor>& sin,
                                     const std::optional<at::Tensor>& watched,
                                     const std::optional<at::Tensor>& probabilities,
                                     const at::Tensor& out) {
  DecodeAttentionArgs<X, T> args = {};
  args.qkv = static_cast<const X*>(qkv.const_data_ptr());
  args.k_cache = static_cast<T*>(k_cache.mutable_data_ptr());
  args.v_cache = static_cast<T*>(v_cache.mutable_data_ptr());
  args.k_row_stride = k_cache.stride(0);
  args.k_head_stride = k_cache.stride(1);
  args.v_row_stride = v_cache.stride(0);
  args.v_head_stride = v_cache.stride(1);
  args.position = reinterpret_cast<const long long*>(position.const_data_ptr<int64_t>());
  args.flags = flags.mutable_data_ptr<int>();
  args.cos = data_or_null<float>(cos);
  args.sin = data_or_null<float>(sin);
  args.watched = data_or_null<int>(watched);
  args.probabilities = probabilities ? probabilities->mutable_data_ptr<float>() : nullptr;
  args.out = static_cast<X*>(out.mutable_data_ptr());
  return args;
}

at::Tensor decode_attention(const at::Tensor& qkv, at::Tensor k_cache, at::Tensor v_cache,
                            const at::Tensor& position, at::Tensor flags,
                            const std::optional<at::Tensor>& cos,
                            const std::optional<at::Tensor>& sin,
                            const std::optional<at::Tensor>& watched,
                            std::optional<at::Tensor> probabilities,
                            std::optional<at::Tensor> arrivals, int64_t splits) {
  const auto sizes = check_decode_attention(qkv, k_cache, v_cache, position, flags, cos, sin,
                                            watched, probabilities, arrivals, splits);
  const c10::cuda::CUDAGuard guard(qkv.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  at::Tensor out = at::empty({sizes.rows, sizes.heads * kHeadDim}, qkv.options());
  const int64_t pairs = sizes.rows * sizes.heads;
  if (pairs == 0) return out;
  if (splits == 0) {
    // Not by torch's CUDAContext.h, which needs the headers of cuBLAS and its like.
    int multiprocessors = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                          qkv.device().index()));
    splits = decode_attention_splits(pairs, sizes.capacity, multiprocessors);
  }
  at::Tensor partials;
  if (splits > 1) {
    partials = at::empty({pairs * splits * kPartial}, qkv.options().dtype(at::kFloat));
    if (!arrivals.has_value()) arrivals = at::zeros({pairs}, flags.options());
  }
  const auto launch = [&](auto qkv_type, auto cache_type) {
    auto args = typed_args<decltype(qkv_type), decltype(cache_type)>(
        qkv, k_cache, v_cache, position, flags, cos, sin, watched, probabilities, out);
    if (splits > 1) {
      args.partials = partials.mutable_data_ptr<float>();
      args.arrivals = reinterpret_cast<unsigned*>(arrivals->mutable_data_ptr<int>());
    }
    args.rows = static_cast<int>(sizes.rows);
    args.heads = static_cast<int>(sizes.heads);
    args.capacity = static_cast<int>(sizes.capacity);
    args.positions = static_cast<int>(sizes.positions);
    args.watched_count = static_cast<int>(sizes.watched);
    args.splits = static_cast<int>(splits);
    C10_CUDA_CHECK(launch_decode_attention(args, stream));
  };
  with_floating_type(qkv.scalar_type(), [&](auto qkv_type) {
    with_floating_type(k_cache.scalar_type(),
                       [&](auto cache_type) { launch(qkv_type, cache_type); });
  });
  return out;
}

}  // namespace

}  // namespace chatterbox_fast

TORCH_LIBRARY_IMPL(chatterbox_fast, CUDA, library) {
  library.impl("decode_attention", &chatterbox_fast::decode_attention);
}
