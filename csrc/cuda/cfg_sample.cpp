// CUDA op of cfg_sample: checks, device guard, stream, dispatch, launch. The kernel and its
// contract are in kernels/cfg_sample.cuh.
#include "cfg_sample.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "checks.h"
#include "kernels/cfg_sample.h"

namespace chatterbox_fast {

namespace {

template <typename Stored, typename T>
CfgSampleArgs<T> typed_args(const at::Tensor& logits, const at::Tensor& seen,
                            const at::Tensor& params, const at::Tensor& flags,
                            const at::Tensor& philox, const std::optional<at::Tensor>& stop_action,
                            const at::Tensor& token) {
  CfgSampleArgs<T> args = {};
  args.logits = reinterpret_cast<const T*>(logits.const_data_ptr<Stored>());
  args.seen = seen.mutable_data_ptr<bool>();
  args.params = params.const_data_ptr<float>();
  args.flags = flags.mutable_data_ptr<int>();
  args.philox = reinterpret_cast<long long*>(philox.mutable_data_ptr<int64_t>());
  args.stop_action = stop_action ? stop_action->const_data_ptr<int>() : nullptr;
  args.token = reinterpret_cast<long long*>(token.mutable_data_ptr<int64_t>());
  return args;
}

at::Tensor cfg_sample(const at::Tensor& logits, at::Tensor seen, const at::Tensor& params,
                      at::Tensor flags, std::optional<at::Tensor> philox,
                      std::optional<at::Tensor> stop_action, std::optional<at::Generator> generator,
                      int64_t stop_token, bool turbo, int64_t forget, int64_t philox_threads) {
  const CfgSampleSizes sizes = check_cfg_sample(logits, seen, params, flags, philox, stop_action,
                                                stop_token, forget, philox_threads);
  CBF_CHECK(philox.has_value(), "cfg_sample", "philox", "given on CUDA", "None");
  CBF_CHECK(!generator.has_value(), "cfg_sample", "generator", "None on CUDA (give philox)",
            "a generator");
  const c10::cuda::CUDAGuard guard(logits.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  at::Tensor token = at::empty({sizes.rows}, seen.options().dtype(at::kLong));
  const auto launch = [&](auto args) {
    args.rows = static_cast<int>(sizes.rows);
    args.vocabulary = static_cast<int>(sizes.vocabulary);
    args.stop_token = static_cast<int>(stop_token);
    args.forget = static_cast<int>(forget);
    args.philox_threads = static_cast<int>(philox_threads);
    args.guided = sizes.guided;
    args.turbo = turbo;
    C10_CUDA_CHECK(launch_cfg_sample(args, stream));
  };
  switch (logits.scalar_type()) {
    case at::kHalf:
      launch(
          typed_args<at::Half, rt::half>(logits, seen, params, flags, *philox, stop_action, token));
      break;
    case at::kBFloat16:
      launch(typed_args<at::BFloat16, rt::bfloat16>(logits, seen, params, flags, *philox,
                                                    stop_action, token));
      break;
    default:
      launch(typed_args<float, float>(logits, seen, params, flags, *philox, stop_action, token));
  }
  return token;
}

}  // namespace

}  // namespace chatterbox_fast

TORCH_LIBRARY_IMPL(chatterbox_fast, CUDA, library) {
  library.impl("cfg_sample", &chatterbox_fast::cfg_sample);
}
