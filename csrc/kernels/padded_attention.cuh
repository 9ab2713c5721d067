// padded_attention: full attention of rows of which a prefix is valid, in one launch.
//
//   out[r][t] = softmax(q[r][t] k[r]' / 8) v[r] over keys 0 .. length - 1, for t < length, else 0
//
// Shapes: qkv (R, T, 3, H, 64) of T = float, half or bfloat16, q, k and v side by side, aligned to
// 16 bytes; lengths (R,) int32 in device memory, taken as 0 below and as T above; out (R, T, H,
// 64). Equivalent to: chatterbox_fast/reference.py, padded_attention. Arithmetic: float, fused
// multiply-adds, an online softmax over tiles of keys in order. The bits depend on nothing but the
// row and head. Pads are not read, whatever they are; a NaN of a valid position reaches the outputs
// that torch's attention gives it to.
//
// Launch: a block of four warps for 64 queries of a row and head; tiles of keys beyond the length
// are skipped, and a block of pads writes its zeros and ends. Nothing is read on the host.
// A thread has 4 queries by 4 keys of the scores, then 4 queries by 8 elements of the values, both
// in registers; eight neighbouring lanes share their queries, and hand each other their weights
// through shared memory. Expected bound: the multiprocessors' multiply-adds, with a 16-byte load
// from shared memory for eight of them (not measured).
#pragma once

#include "common.cuh"
#include "runtime.h"

namespace chatterbox_fast {

constexpr int kPaddedHead = 64;     // elements
constexpr int kPaddedQueries = 64;  // a block
constexpr int kPaddedThreads = 128;
constexpr float kPaddedScale = 0.125f;             // 1 / sqrt(64)
constexpr float kPaddedLowest = -3.402823466e38f;  // not -infinity, which scores may be

template <typename T>
struct PaddedAttentionArgs {
  const T* qkv;
  const int* lengths;
  T* out;
  int rows, positions, heads;
  int tiles;  // blocks a row and head; set by launch_padded_attention
};

// A block's part: queries [first, first + kPaddedQueries) of a row and head.
template <typename T>
struct PaddedPart {
  const T *q, *k, *v;  // of position 0
  T* out;
  long long stride, out_stride;  // elements between positions
  int first, length, positions;
};

template <typename T>
RT_DEVICE PaddedPart<T> padded_part(const PaddedAttentionArgs<T>& args) {
  const int pair = blockIdx.x / args.tiles;
  const int row = pair / args.heads, head = pair % args.heads;
  const long long width = static_cast<long long>(args.heads) * kPaddedHead;
  const long long start = static_cast<long long>(row) * args.positions;
  const int length = args.lengths[row];
  PaddedPart<T> part;
  part.q = args.qkv + start * 3 * width + head * kPaddedHead;
  part.k = part.q + width;
  part.v = part.k + width;
  part.out = args.out + start * width + head * kPaddedHead;
  part.stride = 3 * width;
  part.out_stride = width;
  part.first = blockIdx.x % args.tiles * kPaddedQueries;
  part.length = length < 0 ? 0 : length < args.positions ? length : args.positions;
  part.positions = args.positions;
  return part;
}

// Stores n elements of a query's output, which are 0 where it is a pad; nothing behind the last.
template <int n, typename T>
RT_DEVICE void store_output(const PaddedPart<T>& part, int query, int element, const float* values,
                            float total) {
  if (query >= part.positions) return;
  Pack<T, n> pack;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    pack.items[i] = rt::from_float<T>(query < part.length ? values[i] / total : 0.0f);
  }
  *reinterpret_cast<Pack<T, n>*>(part.out + query * part.out_stride + element) = pack;
}

template <typename T>
RT_DEVICE void store_zeros(const PaddedPart<T>& part) {
  constexpr int kVector = kPackBytes / sizeof(T), kPacks = kPaddedHead / kVector;
  const float zeros[kVector] = {};
  for (int i = threadIdx.x; i < kPaddedQueries * kPacks; i += kPaddedThreads) {
    store_output<kVector>(part, part.first + i / kPacks, i % kPacks * kVector, zeros, 1.0f);
  }
}

// ---- Without tensor cores.

constexpr int kPlainLanes = 8;  // that share their queries
constexpr int kPlainGroups = kPaddedThreads / kPlainLanes;
constexpr int kPlainEach = kPaddedQueries / kPlainGroups;  // queries a thread
constexpr int kPlainKeys = 4 * kPlainLanes;                // a tile
constexpr int kPlainRow = kPaddedHead + 4;  // floats; neighbouring rows start in other banks
constexpr int kPlainWeights = kPlainKeys + 4;

// Rows of a head as floats in shared memory; zeros from row `valid` on.
template <int kRows, typename T>
RT_DEVICE void stage_floats(const T* from, long long stride, int valid, float* to) {
  constexpr int kVector = kPackBytes / sizeof(T), kPacks = kPaddedHead / kVector;
  for (int i = threadIdx.x; i < kRows * kPacks; i += kPaddedThreads) {
    const int row = i / kPacks, element = i % kPacks * kVector;
    Pack<T, kVector> pack = {};
    if (row < valid) pack = load_pack<kVector>(from + row * stride + element);
    Pack<float, kVector> wide;
#pragma unroll
    for (int j = 0; j < kVector; ++j) wide.items[j] = rt::to_float(pack.items[j]);
    *reinterpret_cast<Pack<float, kVector>*>(to + row * kPlainRow + element) = wide;
  }
}

// A thread's softmaxes, each over its own keys but for `highest`, and 8 elements of their values.
struct PlainSoftmax {
  float sums[kPlainEach][8];
  float highest[kPlainEach], total[kPlainEach];
};

// scores[i][j]: of the thread's query i and key lane + 8 j.
RT_DEVICE void plain_scores(const float* queries, const float* keys,
                            float (&scores)[kPlainEach][4]) {
#pragma unroll 4
  for (int d = 0; d < kPaddedHead; d += 4) {
    Pack<float, 4> q[kPlainEach], k[4];
#pragma unroll
    for (int i = 0; i < kPlainEach; ++i) {
      q[i] = load_pack<4>(queries + i * kPlainGroups * kPlainRow + d);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) k[j] = load_pack<4>(keys + j * kPlainLanes * kPlainRow + d);
#pragma unroll
    for (int x = 0; x < 4; ++x) {
#pragma unroll
      for (int i = 0; i < kPlainEach; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          scores[i][j] = fmaf(q[i].items[x], k[j].items[x], scores[i][j]);
        }
      }
    }
  }
}

// Scores of one query to weights; `valid` keys of the tile count.
RT_DEVICE Pack<float, 4> plain_weights(const float (&scores)[4], int valid, float (&sums)[8],
                                       float& highest, float& total) {
  const int lane = threadIdx.x % kPlainLanes;
  Pack<float, 4> weights;
  const float before = highest;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const bool counts = lane + j * kPlainLanes < valid;
    weights.items[j] = counts ? scores[j] * kPaddedScale : __uint_as_float(0xff800000u);
    highest = fmaxf(highest, weights.items[j]);
  }
  for (int step = 1; step < kPlainLanes; step *= 2) {
    highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, step));
  }
  const float shrink = expf(before - highest);
  total *= shrink;
#pragma unroll
  for (int d = 0; d < 8; ++d) sums[d] *= shrink;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    weights.items[j] = expf(weights.items[j] - highest);
    total += weights.items[j];
  }
  return weights;
}

// Adds a tile of values to the sums: elements 4 lane .. and 32 + 4 lane .. of each. `weights`: of
// the thread's first query, by lane, then by the lane's keys.
RT_DEVICE void plain_values(const float* weights, const float* values, PlainSoftmax& own) {
  const float* const column = values + threadIdx.x % kPlainLanes * 4;
#pragma unroll 1
  for (int lane = 0; lane < kPlainLanes; ++lane) {
    Pack<float, 4> w[kPlainEach];
#pragma unroll
    for (int i = 0; i < kPlainEach; ++i) {
      w[i] = load_pack<4>(weights + i * kPlainGroups * kPlainWeights + 4 * lane);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* const value = column + (lane + j * kPlainLanes) * kPlainRow;
      const Pack<float, 4> low = load_pack<4>(value), high = load_pack<4>(value + kPaddedHead / 2);
#pragma unroll
      for (int i = 0; i < kPlainEach; ++i) {
#pragma unroll
        for (int d = 0; d < 4; ++d) {
          own.sums[i][d] = fmaf(w[i].items[j], low.items[d], own.sums[i][d]);
          own.sums[i][4 + d] = fmaf(w[i].items[j], high.items[d], own.sums[i][4 + d]);
        }
      }
    }
  }
}

template <typename T>
RT_DEVICE void attend_plain(const PaddedPart<T>& part) {
  RT_SHARED(float, queries, kPaddedQueries* kPlainRow);
  RT_SHARED(float, keys, kPlainKeys* kPlainRow);
  RT_SHARED(float, values, kPlainKeys* kPlainRow);
  RT_SHARED(float, weights, kPaddedQueries* kPlainWeights);
  const int group = threadIdx.x / kPlainLanes, lane = threadIdx.x % kPlainLanes;
  stage_floats<kPaddedQueries>(part.q + part.first * part.stride, part.stride,
                               part.length - part.first, queries);
  PlainSoftmax own = {};
#pragma unroll
  for (int i = 0; i < kPlainEach; ++i) own.highest[i] = kPaddedLowest;
#pragma unroll 1
  for (int key = 0; key < part.length; key += kPlainKeys) {
    __syncthreads();
    const int valid = part.length - key;
    stage_floats<kPlainKeys>(part.k + key * part.stride, part.stride, valid, keys);
    stage_floats<kPlainKeys>(part.v + key * part.stride, part.stride, valid, values);
    __syncthreads();
    float scores[kPlainEach][4] = {};
    plain_scores(queries + group * kPlainRow, keys + lane * kPlainRow, scores);
#pragma unroll
    for (int i = 0; i < kPlainEach; ++i) {
      float* const to = weights + (group + i * kPlainGroups) * kPlainWeights + 4 * lane;
      *reinterpret_cast<Pack<float, 4>*>(to) =
          plain_weights(scores[i], valid, own.sums[i], own.highest[i], own.total[i]);
    }
    __syncwarp();
    plain_values(weights + group * kPlainWeights, values, own);
  }
#pragma unroll
  for (int i = 0; i < kPlainEach; ++i) {
    float total = own.total[i];
    for (int step = 1; step < kPlainLanes; step *= 2) {
      total += __shfl_xor_sync(kFullWarp, total, step);
    }
    const int query = part.first + group + i * kPlainGroups;
    store_output<4>(part, query, 4 * lane, own.sums[i], total);
    store_output<4>(part, query, kPaddedHead / 2 + 4 * lane, own.sums[i] + 4, total);
  }
}

template <typename T>
RT_GLOBAL void RT_LAUNCH_BOUNDS(kPaddedThreads)
    padded_attention_kernel(PaddedAttentionArgs<T> args) {
  const PaddedPart<T> part = padded_part(args);
  if (part.first >= part.length) return store_zeros(part);
  attend_plain(part);
}

// Enqueues the op on `stream`; without rows or positions it is a success without a launch.
template <typename T>
rt::Error launch_padded_attention(PaddedAttentionArgs<T> args, rt::Stream stream) {
  args.tiles = (args.positions + kPaddedQueries - 1) / kPaddedQueries;
  const long long blocks = static_cast<long long>(args.rows) * args.heads * args.tiles;
  if (blocks == 0) return rt::Error{};
  return rt::launch(&padded_attention_kernel<T>, static_cast<unsigned>(blocks), kPaddedThreads, 0,
                    stream, args);
}

}  // namespace chatterbox_fast
