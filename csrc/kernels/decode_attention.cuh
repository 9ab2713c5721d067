// decode_attention: one new token a row against its KV cache, in one launch.
//
//   q, k rotated; k, v appended at the row's position; softmax(q k' / 8) v over slots 0 .. position
//
// Shapes: qkv (B, 3, H, 64), X = float, half, bfloat16, B at most 64 and H at most 1024; k_cache,
// v_cache (B, H, C, 64), T = one of these, C at most 2^24, apart and aligned to 16 bytes in every
// row and head; position and flags (B,), or (1,) for all rows;
// cos, sin (C, 64) float, null: no rotation; watched (W, 2) int32 rows and heads, and probabilities
// (W, C) float; out (B, H, 64), X; partials (B H, splits, 66) float and arrivals (B H,) unsigned,
// which is 0 before and after. splits in [1, 64].
// Equivalent to: chatterbox_fast/reference.py, decode_attention.
// Arithmetic: float. The rotation rounds as torch's separate kernels do. Products are fused into
// their sums; sums over the lanes of a key, and of a lane's weights, are plain additions. Their
// order follows from the position and splits alone. Slots behind the position are not read. A
// position outside [0, C) appends nothing, sets kAttentionFailedBit, and makes the row's output and
// probabilities 0. Probabilities of a row or head that there is not are left as they are.
//
// Launch: a block for each row, head and split: `splits` is fixed, and how many of them share the
// valid prefix follows from the position, which is in device memory; the others end at once. The
// last block to arrive puts the softmax together. That is chosen over a second kernel, which would
// cost a launch in each of 30 layers, and over a memset of the arrivals, which would cost the same:
// the last block leaves them as it found them.
// A lane loads 16 bytes of keys and of values at a time. Eight lanes share a key of two bytes an
// element (sixteen one of four), and have four (eight) such keys and their values in flight: a
// block 64, which is a split's least share. Expected bound: the prefix's bytes, each of which is
// read once; at 2 rows and below 1000 positions all of it is in flight at once, so that what counts
// is memory's latency, three times: position, table and cache, partials.
#pragma once

#include "common.cuh"
#include "decode_attention.h"
#include "runtime.h"

namespace chatterbox_fast {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = 32 * kAttentionWarps;
constexpr float kAttentionScale = 0.125f;  // 1 / sqrt(64)
constexpr float kLowestFloat = -3.402823466e38f;

// A block's part: slots [first, end) of a row and head.
struct AttentionPart {
  int row, head, pair, split;
  int length;  // of the valid prefix
  int first, end;
  int parts;  // that share the prefix
};

RT_DEVICE AttentionPart attention_part(int heads, int splits, int length) {
  constexpr int kMultiple = 16;
  AttentionPart part;
  part.pair = blockIdx.x / splits;
  part.split = blockIdx.x % splits;
  part.row = part.pair / heads;
  part.head = part.pair % heads;
  part.length = length;
  const int even = (length + splits - 1) / splits;
  const int whole = (even + kMultiple - 1) / kMultiple * kMultiple;
  const int share = whole > kAttentionShare ? whole : kAttentionShare;
  part.parts = (length + share - 1) / share;
  part.first = part.split * share;
  part.end = part.first + share < length ? part.first + share : length;
  return part;
}

// Whether `watched` number w is this row and head.
template <typename X, typename T>
RT_DEVICE bool watches(const DecodeAttentionArgs<X, T>& args, int w, int row, int head) {
  return args.watched[2 * w] == row && args.watched[2 * w + 1] == head;
}

// The first row of probabilities that belongs to this row and head, or null.
template <typename X, typename T>
RT_DEVICE float* attention_watch(const DecodeAttentionArgs<X, T>& args, int row, int head) {
  for (int w = 0; w < args.watched_count; ++w) {
    if (watches(args, w, row, head)) {
      return args.probabilities + static_cast<long long>(w) * args.capacity;
    }
  }
  return nullptr;
}

// Element d of q, k or v (0, 1, 2) of a row and head, rotated.
template <typename X, typename T>
RT_DEVICE float rotated(const DecodeAttentionArgs<X, T>& args, const AttentionPart& part, int which,
                        int d) {
  constexpr int kHalf = kAttentionDim / 2;
  const X* const x = args.qkv + ((3 * part.row + which) * args.heads + part.head) * kAttentionDim;
  if (args.cos == nullptr) return rt::to_float(x[d]);
  const int at = (part.length - 1) * kAttentionDim + d;
  const float other = rt::to_float(x[d < kHalf ? d + kHalf : d - kHalf]);
  return rt::to_float(x[d]) * args.cos[at] + (d < kHalf ? -other : other) * args.sin[at];
}

// Leaves q, rotated and scaled, in `query`; the block that has the last slot appends k and v there.
template <typename X, typename T>
RT_DEVICE void load_query_and_append(const DecodeAttentionArgs<X, T>& args,
                                     const AttentionPart& part, T* keys, T* values, float* query) {
  const int d = threadIdx.x % kAttentionDim;
  if (threadIdx.x < kAttentionDim) {
    query[d] = rotated(args, part, 0, d) * kAttentionScale;
  } else if (part.end == part.length) {
    const X* const v = args.qkv + ((3 * part.row + 2) * args.heads + part.head) * kAttentionDim;
    const long long at = static_cast<long long>(part.length - 1) * kAttentionDim + d;
    keys[at] = rt::from_float<T>(rotated(args, part, 1, d));
    values[at] = rt::from_float<T>(rt::to_float(v[d]));
  }
}

// A lane's softmax: over the keys of its group of lanes, in its elements of the values.
template <int kVector>
struct LaneSoftmax {
  float sums[kVector];
  float highest, total;
};

// Adds kSteps keys; a key without a score has -infinity.
template <int kVector, int kSteps, typename T>
RT_DEVICE void add_keys(const float (&scores)[kSteps], const Pack<T, kVector> (&values)[kSteps],
                        LaneSoftmax<kVector>& lane) {
  const float before = lane.highest;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) lane.highest = fmaxf(lane.highest, scores[i]);
  const float shrink = expf(before - lane.highest);
  lane.total *= shrink;
#pragma unroll
  for (int j = 0; j < kVector; ++j) lane.sums[j] *= shrink;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const float weight = expf(scores[i] - lane.highest);
    lane.total += weight;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      lane.sums[j] = fmaf(weight, rt::to_float(values[i].items[j]), lane.sums[j]);
    }
  }
}

// The softmax of each group of lanes over its keys of [first, end), in `groups`, a partial each.
// `watch`: where scores go, or null.
template <typename T>
RT_DEVICE void attend(const AttentionPart& part, const T* keys, const T* values, const float* query,
                      float* watch, float* groups) {
  constexpr int kVector = kPackBytes / sizeof(T);
  constexpr int kLanes = kAttentionDim / kVector;  // that share a key
  constexpr int kKeys = 32 / kLanes;               // of a warp, at a time
  constexpr int kStride = kAttentionWarps * kKeys;
  constexpr int kSteps = kAttentionShare / kStride;
  const int warp = threadIdx.x / 32, key = threadIdx.x % 32 / kLanes;
  const int element = threadIdx.x % kLanes * kVector;
  float q[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) q[j] = query[element + j];
  LaneSoftmax<kVector> lane = {{}, kLowestFloat, 0.0f};  // not -infinity, which scores may be
#pragma unroll 1
  for (int base = part.first + warp * kKeys; base < part.end; base += kStride * kSteps) {
    Pack<T, kVector> k[kSteps], v[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int slot = base + i * kStride + key;
      k[i] = v[i] = {};
      if (slot < part.end) {
        k[i] = load_pack<kVector>(keys + static_cast<long long>(slot) * kAttentionDim + element);
        v[i] = load_pack<kVector>(values + static_cast<long long>(slot) * kAttentionDim + element);
      }
    }
    float scores[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int slot = base + i * kStride + key;
      float score = 0.0f;
#pragma unroll
      for (int j = 0; j < kVector; ++j) score = fmaf(q[j], rt::to_float(k[i].items[j]), score);
      for (int step = kLanes / 2; step > 0; step /= 2) {
        score += __shfl_xor_sync(kFullWarp, score, step);
      }
      if (watch != nullptr && element == 0 && slot < part.end) watch[slot] = score;
      scores[i] = slot < part.end ? score : __uint_as_float(0xff800000u);
    }
    add_keys(scores, v, lane);
  }
  float* const own = groups + (warp * kKeys + key) * kPartial;
#pragma unroll
  for (int j = 0; j < kVector; ++j) own[element + j] = lane.sums[j];
  if (element == 0) {
    own[kAttentionDim] = lane.highest;
    own[kAttentionDim + 1] = lane.total;
  }
}

// Element d of several softmaxes put together.
struct PutTogether {
  float sum, highest, total;
};

RT_DEVICE PutTogether put_together(const float* partials, int count, int d) {
  PutTogether all = {0.0f, kLowestFloat, 0.0f};
  for (int i = 0; i < count; ++i) {
    all.highest = fmaxf(all.highest, partials[i * kPartial + kAttentionDim]);
  }
  for (int i = 0; i < count; ++i) {
    const float* const one = partials + i * kPartial;
    const float weight = expf(one[kAttentionDim] - all.highest);
    all.total = fmaf(weight, one[kAttentionDim + 1], all.total);
    all.sum = fmaf(weight, one[d], all.sum);
  }
  return all;
}

// Whether this block is the last of `count` to arrive: then it sees what the others wrote.
RT_DEVICE bool arrives_last(unsigned* arrivals, int count, int* is_last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *is_last = atomicAdd(arrivals, 1u) == static_cast<unsigned>(count - 1);
    __threadfence();
    if (*is_last) *arrivals = 0;
  }
  __syncthreads();
  return *is_last != 0;
}

// Sets the probabilities of all that watch this row and head, from the scores in `watch`.
template <typename X, typename T>
RT_DEVICE void finish_watched(const DecodeAttentionArgs<X, T>& args, const AttentionPart& part,
                              const PutTogether& all, const float* watch) {
  for (int slot = threadIdx.x; slot < args.capacity; slot += kAttentionThreads) {
    const float p = slot < part.length ? expf(watch[slot] - all.highest) / all.total : 0.0f;
    for (int w = 0; w < args.watched_count; ++w) {
      if (watches(args, w, part.row, part.head)) {
        args.probabilities[static_cast<long long>(w) * args.capacity + slot] = p;
      }
    }
  }
}

// A row whose position is outside.
template <typename X, typename T>
RT_DEVICE void fail_row(const DecodeAttentionArgs<X, T>& args, const AttentionPart& part) {
  if (part.split != 0) return;
  const int flag = args.positions == 1 ? 0 : part.row;
  if (threadIdx.x == 0 && part.head == 0 && (part.row == 0 || args.positions != 1)) {
    args.flags[flag] |= kAttentionFailedBit;
  }
  if (threadIdx.x < kAttentionDim) {
    args.out[part.pair * kAttentionDim + threadIdx.x] = rt::from_float<X>(0.0f);
  }
  finish_watched(args, part, PutTogether{}, nullptr);  // no slot is valid
}

template <typename X, typename T>
RT_GLOBAL void RT_LAUNCH_BOUNDS(kAttentionThreads)
    decode_attention_kernel(DecodeAttentionArgs<X, T> args) {
  constexpr int kGroups = kAttentionThreads * kPackBytes / (kAttentionDim * sizeof(T));
  RT_SHARED(float, query, kAttentionDim);
  RT_SHARED(float, groups, kGroups* kPartial);
  RT_SHARED(int, is_last, 1);
  const int first_row = blockIdx.x / args.splits / args.heads;
  const long long position = args.position[args.positions == 1 ? 0 : first_row];
  const bool inside = position >= 0 && position < args.capacity;
  const int length = inside ? static_cast<int>(position) + 1 : 0;
  const AttentionPart part = attention_part(args.heads, args.splits, length);
  if (!inside) return fail_row(args, part);
  if (part.first >= part.length) return;
  T* const keys = args.k_cache + part.row * args.k_row_stride + part.head * args.k_head_stride;
  T* const values = args.v_cache + part.row * args.v_row_stride + part.head * args.v_head_stride;
  float* const watch = attention_watch(args, part.row, part.head);
  load_query_and_append(args, part, keys, values, query);
  __syncthreads();
  attend(part, keys, values, query, watch, groups);
  __syncthreads();
  const int d = threadIdx.x % kAttentionDim;
  PutTogether all = put_together(groups, kGroups, d);
  if (part.parts > 1) {
    float* const partials =
        args.partials + static_cast<long long>(part.pair) * args.splits * kPartial;
    float* const own = partials + part.split * kPartial;
    if (threadIdx.x < kAttentionDim) own[d] = all.sum;
    if (threadIdx.x == kAttentionDim) own[kAttentionDim] = all.highest;
    if (threadIdx.x == kAttentionDim + 1) own[kAttentionDim + 1] = all.total;
    if (!arrives_last(args.arrivals + part.pair, part.parts, is_last)) return;
    all = put_together(partials, part.parts, d);
  }
  if (threadIdx.x < kAttentionDim) {
    args.out[part.pair * kAttentionDim + d] = rt::from_float<X>(all.sum / all.total);
  }
  if (watch != nullptr) finish_watched(args, part, all, watch);
}

// Enqueues the op on `stream`; without rows or heads it is a success without a launch.
template <typename X, typename T>
rt::Error launch_decode_attention(const DecodeAttentionArgs<X, T>& args, rt::Stream stream) {
  const int blocks = args.rows * args.heads * args.splits;
  if (blocks == 0) return rt::Error{};
  return rt::launch(&decode_attention_kernel<X, T>, blocks, kAttentionThreads, 0, stream, args);
}

}  // namespace chatterbox_fast
