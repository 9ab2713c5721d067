// The arguments and the launcher of decode_attention.cuh, as a host's compiler may see them. For
// what they mean see there.
#pragma once

#include "types.h"

namespace chatterbox_fast {

constexpr int kAttentionDim = 64;
constexpr int kAttentionShare = 64;  // slots a split has at least
constexpr int kMostAttentionSplits = 64;
constexpr int kAttentionFailedBit = 2;
// A softmax over some of the slots: {sums of exp(score - highest) value, highest, total}.
constexpr int kPartial = kAttentionDim + 2;

template <typename X, typename T>
struct DecodeAttentionArgs {
  const X* qkv;
  T* k_cache;
  T* v_cache;
  long long k_row_stride, k_head_stride, v_row_stride, v_head_stride;
  const long long* position;
  int* flags;
  const float* cos;  // null: no rotation
  const float* sin;
  const int* watched;
  float* probabilities;
  X* out;
  float* partials;     // not used with one split
  unsigned* arrivals;  // not used with one split
  int rows, heads, capacity, positions, watched_count, splits;
};

// Splits that fill `multiprocessors` four times over, of no less than a share of the capacity.
inline int decode_attention_splits(long long pairs, long long capacity, int multiprocessors) {
  const long long wanted = (4 * multiprocessors + pairs - 1) / pairs;
  const long long most = (capacity + kAttentionShare - 1) / kAttentionShare;
  const long long fewer = wanted < most ? wanted : most;
  return static_cast<int>(fewer < kMostAttentionSplits ? fewer : kMostAttentionSplits);
}

// Compiled for every dtype by decode_attention.cu.
template <typename X, typename T>
rt::Error launch_decode_attention(const DecodeAttentionArgs<X, T>& args, rt::Stream stream);

}  // namespace chatterbox_fast
