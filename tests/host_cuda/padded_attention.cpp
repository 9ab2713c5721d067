// Launches padded_attention's kernel as the CUDA op does. arrays: {rows, positions, heads, dtype,
// without tensor cores}, qkv, lengths, out. dtype: 0 float, 1 half, 2 bfloat16.
#include "kernels/padded_attention.cuh"

template <typename T>
int launch(void** arrays, const int64_t* sizes) {
  chatterbox_fast::PaddedAttentionArgs<T> args = {};
  args.qkv = static_cast<const T*>(arrays[1]);
  args.lengths = static_cast<const int*>(arrays[2]);
  args.out = static_cast<T*>(arrays[3]);
  args.rows = static_cast<int>(sizes[0]);
  args.positions = static_cast<int>(sizes[1]);
  args.heads = static_cast<int>(sizes[2]);
  if (sizes[4] != 0) return chatterbox_fast::launch_padded_attention<T, false>(args, nullptr);
  return chatterbox_fast::launch_padded_attention(args, nullptr);
}

extern "C" int drive(void** arrays) {
  const auto* const sizes = static_cast<const int64_t*>(arrays[0]);
  if (sizes[3] == 1) return launch<rt::half>(arrays, sizes);
  if (sizes[3] == 2) return launch<rt::bfloat16>(arrays, sizes);
  return launch<float>(arrays, sizes);
}
