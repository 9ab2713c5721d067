// Launches decode_attention's kernel as the CUDA op does. arrays: {rows, heads, capacity,
// positions, watched, splits, dtype of qkv, of the caches, has a rotary table, strides of k_cache's
// rows and heads, of v_cache's}, qkv, k_cache, v_cache, position, flags, cos, sin, watched,
// probabilities, out, partials, arrivals. dtype: 0 float, 1 half, 2 bfloat16.
#include "kernels/decode_attention.cuh"

using chatterbox_fast::DecodeAttentionArgs;

template <typename X, typename T>
int launch(void** arrays, const int64_t* sizes) {
  DecodeAttentionArgs<X, T> args = {};
  args.qkv = static_cast<const X*>(arrays[1]);
  args.k_cache = static_cast<T*>(arrays[2]);
  args.v_cache = static_cast<T*>(arrays[3]);
  args.position = static_cast<const long long*>(arrays[4]);
  args.flags = static_cast<int*>(arrays[5]);
  args.cos = sizes[8] ? static_cast<const float*>(arrays[6]) : nullptr;
  args.sin = sizes[8] ? static_cast<const float*>(arrays[7]) : nullptr;
  args.watched = static_cast<const int*>(arrays[8]);
  args.probabilities = static_cast<float*>(arrays[9]);
  args.out = static_cast<X*>(arrays[10]);
  args.partials = static_cast<float*>(arrays[11]);
  args.arrivals = static_cast<unsigned*>(arrays[12]);
  args.rows = static_cast<int>(sizes[0]);
  args.heads = static_cast<int>(sizes[1]);
  args.capacity = static_cast<int>(sizes[2]);
  args.positions = static_cast<int>(sizes[3]);
  args.watched_count = static_cast<int>(sizes[4]);
  args.splits = static_cast<int>(sizes[5]);
  args.k_row_stride = sizes[9];
  args.k_head_stride = sizes[10];
  args.v_row_stride = sizes[11];
  args.v_head_stride = sizes[12];
  return chatterbox_fast::launch_decode_attention(args, nullptr);
}

template <typename X>
int launch_for(void** arrays, const int64_t* sizes) {
  if (sizes[7] == 1) return launch<X, rt::half>(arrays, sizes);
  if (sizes[7] == 2) return launch<X, rt::bfloat16>(arrays, sizes);
  return launch<X, float>(arrays, sizes);
}

extern "C" int drive(void** arrays) {
  auto* const sizes = static_cast<int64_t*>(arrays[0]);
  if (sizes[0] < 0) {
    const auto multiprocessors = static_cast<int>(sizes[3]);
    sizes[0] = chatterbox_fast::decode_attention_splits(sizes[1], sizes[2], multiprocessors);
    return 0;
  }
  if (sizes[6] == 1) return launch_for<rt::half>(arrays, sizes);
  if (sizes[6] == 2) return launch_for<rt::bfloat16>(arrays, sizes);
  return launch_for<float>(arrays, sizes);
}
