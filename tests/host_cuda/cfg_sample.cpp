// Launches cfg_sample's kernel as the CUDA op does, or with few threads for ThreadSanitizer.
// arrays: {rows, vocabulary, guided, turbo, stop_token, forget, philox_threads, few_threads, dtype,
//          has_stop_action}, logits, seen, params, flags, philox, stop_action, token.
#include "kernels/cfg_sample.cuh"

using chatterbox_fast::CfgSampleArgs;

template <typename T>
int launch(void** arrays, const int64_t* sizes) {
  CfgSampleArgs<T> args = {};
  args.logits = static_cast<const T*>(arrays[1]);
  args.seen = static_cast<bool*>(arrays[2]);
  args.params = static_cast<const float*>(arrays[3]);
  args.flags = static_cast<int*>(arrays[4]);
  args.philox = static_cast<long long*>(arrays[5]);
  args.stop_action = sizes[9] ? static_cast<const int*>(arrays[6]) : nullptr;
  args.token = static_cast<long long*>(arrays[7]);
  args.rows = static_cast<int>(sizes[0]);
  args.vocabulary = static_cast<int>(sizes[1]);
  args.guided = sizes[2] != 0;
  args.turbo = sizes[3] != 0;
  args.stop_token = static_cast<int>(sizes[4]);
  args.forget = static_cast<int>(sizes[5]);
  args.philox_threads = static_cast<int>(sizes[6]);
  if (!sizes[7]) return chatterbox_fast::launch_cfg_sample(args, nullptr);
  return rt::launch(chatterbox_fast::cfg_sample_kernel<64, 5, T>, args.rows, 64, 0, nullptr, args);
}

extern "C" int drive(void** arrays) {
  const auto* const sizes = static_cast<const int64_t*>(arrays[0]);
  if (sizes[8] == 1) return launch<rt::half>(arrays, sizes);
  if (sizes[8] == 2) return launch<rt::bfloat16>(arrays, sizes);
  return launch<float>(arrays, sizes);
}
