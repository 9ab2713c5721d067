// padded_attention: full attention of rows of which a prefix is valid, in one launch.
//
//   out[r][t] = softmax(q[r][t] k[r]' / 8) v[r] over keys 0 .. length - 1, for t < length, else 0
//
// Shapes: qkv (R, T, 3, H, 64) of T = float, half or bfloat16, q, k and v side by side, aligned to
// 16 bytes; lengths (R,) int32 in device memory, taken as 0 below and as T above; out (R, T, H, 64)
// of T.
// Equivalent to: chatterbox_fast/reference.py, padded_attention.
// Arithmetic: sums and softmax in float, an online softmax over tiles of keys in order. The bits
// depend on nothing but the row and head. Pads are not read, whatever they are; a NaN of a valid
// position reaches the outputs that torch's attention gives it to.
//   With tensor cores: products of T, exact, summed as the tensor cores do; __expf; weights are
//   rounded to T before they meet the values, and their sum is of those not rounded.
//   Without: fused multiply-adds, expf, weights not rounded.
// Tensor cores serve half and bfloat16 on sm_80 and newer. float is exact: never TF32.
//
// Launch: a block of four warps for 64 queries of a row and head; tiles of keys beyond the length
// are skipped, and a block of pads writes its zeros and ends. Nothing is read on the host.
//   With tensor cores a warp has 16 queries, whose scores never leave its registers: those of the
//   first product are where the second one wants its weights. The next tile of 64 keys is on its
//   way from memory while this one is computed. Expected bound: the tensor cores and, about as
//   much, the loads of tiles from shared memory (not measured).
//   Without, a thread has 4 queries by 4 keys of the scores, then 4 queries by 8 elements of the
//   values; eight neighbouring lanes share their queries, and hand each other their weights through
//   shared memory. Expected bound: the multiply-adds, with a 16-byte load from shared memory for
//   eight of them (not measured).
#pragma once

#include "common.cuh"
#include "padded_attention.h"
#include "runtime.h"

namespace chatterbox_fast {

constexpr int kPaddedQueries = 64;  // a block
constexpr int kPaddedThreads = 128;
constexpr float kPaddedScale = 0.125f;             // 1 / sqrt(64)
constexpr float kPaddedLowest = -3.402823466e38f;  // not -infinity, which scores may be

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
  part.length = length < args.positions ? length : args.positions;  // below 0 none is valid
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

// Scores of one query to weights; `valid` keys of the tile count. What came before is to shrink.
RT_DEVICE Pack<float, 4> plain_weights(const float (&scores)[4], int valid, float& highest,
                                       float& total, float& shrink) {
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
  shrink = expf(before - highest);
  total *= shrink;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    weights.items[j] = expf(weights.items[j] - highest);
    total += weights.items[j];
  }
  return weights;
}

// Adds a tile of values to the sums: elements 4 lane .. and 32 + 4 lane .. of each. `weights`: of
// the thread's first query, by lane, then by the lane's keys. By tiles: one sum over thousands of
// keys would round four times as much.
RT_DEVICE void plain_values(const float* weights, const float* values,
                            const float (&shrink)[kPlainEach], float (&sums)[kPlainEach][8]) {
  float tile[kPlainEach][8] = {};
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
          tile[i][d] = fmaf(w[i].items[j], low.items[d], tile[i][d]);
          tile[i][4 + d] = fmaf(w[i].items[j], high.items[d], tile[i][4 + d]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kPlainEach; ++i) {
#pragma unroll
    for (int d = 0; d < 8; ++d) sums[i][d] = fmaf(sums[i][d], shrink[i], tile[i][d]);
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
    float shrink[kPlainEach];
#pragma unroll
    for (int i = 0; i < kPlainEach; ++i) {
      float* const to = weights + (group + i * kPlainGroups) * kPlainWeights + 4 * lane;
      *reinterpret_cast<Pack<float, 4>*>(to) =
          plain_weights(scores[i], valid, own.highest[i], own.total[i], shrink[i]);
    }
    __syncwarp();
    plain_values(weights + group * kPlainWeights, values, shrink, own.sums);
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

// ---- With tensor cores. Fragments are laid out as runtime.h says.

constexpr int kTensorKeys = 64;              // a tile
constexpr int kTensorRow = kPaddedHead + 8;  // elements; eight neighbouring rows share no banks
constexpr int kTensorPacks = kTensorKeys * kPaddedHead / 8 / kPaddedThreads;  // a thread

// A thread's share of a tile of rows, on its way to shared memory, as words: elements would be
// taken apart and put together again.
struct TileShare {
  Pack<unsigned, 4> packs[kTensorPacks];
};

// Rows of a head; zeros from row `valid` on.
template <typename T>
RT_DEVICE TileShare fetch_tile(const T* from, long long stride, int valid) {
  TileShare share = {};
#pragma unroll
  for (int i = 0; i < kTensorPacks; ++i) {
    const int pack = threadIdx.x + i * kPaddedThreads, row = pack / 8;
    const T* const at = from + row * stride + pack % 8 * 8;
    if (row < valid) share.packs[i] = load_pack<4>(reinterpret_cast<const unsigned*>(at));
  }
  return share;
}

template <typename T>
RT_DEVICE void put_tile(const TileShare& share, T* tile) {
#pragma unroll
  for (int i = 0; i < kTensorPacks; ++i) {
    const int pack = threadIdx.x + i * kPaddedThreads;
    T* const at = tile + pack / 8 * kTensorRow + pack % 8 * 8;
    *reinterpret_cast<Pack<unsigned, 4>*>(at) = share.packs[i];
  }
}

// What this lane hands to load_matrices for 16 rows and columns of a tile: upper left matrix, lower
// left, upper right, lower right.
template <typename T>
RT_DEVICE const T* square(const T* tile, int row, int column) {
  const int lane = threadIdx.x % 32;
  return tile + (row + lane % 16) * kTensorRow + column + lane / 16 * 8;
}

// A lane's softmaxes of queries lane / 4 and 8 more, each `total` over its own keys: element
// 8 j + 2 (lane % 4) of the values is sums[j][0] and sums[j][2].
struct TensorSoftmax {
  float sums[kPaddedHead / 8][4];
  float highest[2], total[2];  // `highest` as scores are: not scaled
};

// scores[j]: of keys 8 j .., not scaled. `queries`: of 16 elements each.
template <typename T>
RT_DEVICE void tensor_scores(const rt::Fragment (&queries)[kPaddedHead / 16], const T* keys,
                             float (&scores)[kTensorKeys / 8][4]) {
  const int lane = threadIdx.x % 32;
  const T* const row = keys + lane % 8 * kTensorRow + lane / 8 * 8;  // four matrices side by side
#pragma unroll
  for (int d = 0; d < kPaddedHead; d += 32) {
#pragma unroll
    for (int j = 0; j < kTensorKeys / 8; ++j) {
      const rt::Fragment k = rt::load_matrices<false>(row + 8 * j * kTensorRow + d);
      rt::multiply_add<T>(scores[j], queries[d / 16], k.registers[0], k.registers[1]);
      rt::multiply_add<T>(scores[j], queries[d / 16 + 1], k.registers[2], k.registers[3]);
    }
  }
}

// Scores to weights, in place; `valid` keys of the tile count.
RT_DEVICE void tensor_weights(float (&scores)[kTensorKeys / 8][4], int valid, TensorSoftmax& own) {
  const int lane = threadIdx.x % 32;
  if (valid < kTensorKeys) {
#pragma unroll
    for (int i = 0; i < kTensorKeys / 2; ++i) {
      const int key = i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (key >= valid) scores[i / 4][i % 4] = __uint_as_float(0xff800000u);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float before = own.highest[half];
    float highest = before;
#pragma unroll
    for (int j = 0; j < kTensorKeys / 8; ++j) {
      highest = fmaxf(highest, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
    }
    highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, 2));
    const float off = -highest * kPaddedScale;
    const float shrink = __expf(fmaf(before, kPaddedScale, off));
    own.highest[half] = highest;
    own.total[half] *= shrink;
#pragma unroll
    for (int j = 0; j < kTensorKeys / 8; ++j) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        own.sums[j][i] *= shrink;
        scores[j][i] = __expf(fmaf(scores[j][i], kPaddedScale, off));
        own.total[half] += scores[j][i];
      }
    }
  }
}

template <typename T>
RT_DEVICE void tensor_values(const float (&weights)[kTensorKeys / 8][4], const T* values,
                             TensorSoftmax& own) {
#pragma unroll
  for (int key = 0; key < kTensorKeys; key += 16) {
    const float(&left)[4] = weights[key / 8], (&right)[4] = weights[key / 8 + 1];
    const rt::Fragment w = {rt::pack_pair<T>(left[0], left[1]), rt::pack_pair<T>(left[2], left[3]),
                            rt::pack_pair<T>(right[0], right[1]),
                            rt::pack_pair<T>(right[2], right[3])};
#pragma unroll
    for (int d = 0; d < kPaddedHead; d += 16) {
      const rt::Fragment v = rt::load_matrices<true>(square(values, key, d));
      rt::multiply_add<T>(own.sums[d / 8], w, v.registers[0], v.registers[1]);
      rt::multiply_add<T>(own.sums[d / 8 + 1], w, v.registers[2], v.registers[3]);
    }
  }
}

template <typename T>
RT_DEVICE void store_tensor(const PaddedPart<T>& part, const TensorSoftmax& own) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = own.total[half];
    total += __shfl_xor_sync(kFullWarp, total, 1);
    total += __shfl_xor_sync(kFullWarp, total, 2);
    const int query = part.first + 16 * warp + 8 * half + lane / 4;
#pragma unroll
    for (int j = 0; j < kPaddedHead / 8; ++j) {
      store_output<2>(part, query, 8 * j + lane % 4 * 2, own.sums[j] + 2 * half, total);
    }
  }
}

template <typename T>
RT_DEVICE void attend_tensor(const PaddedPart<T>& part) {
  RT_SHARED(T, keys, kTensorKeys * kTensorRow);
  RT_SHARED(T, values, kTensorKeys * kTensorRow);
  TileShare k = fetch_tile(part.k, part.stride, part.length);
  TileShare v = fetch_tile(part.v, part.stride, part.length);
  put_tile(fetch_tile(part.q + part.first * part.stride, part.stride, part.length - part.first),
           keys);
  __syncthreads();
  rt::Fragment queries[kPaddedHead / 16];
#pragma unroll
  for (int i = 0; i < kPaddedHead / 16; ++i) {
    queries[i] = rt::load_matrices<false>(square(keys, threadIdx.x / 32 * 16, 16 * i));
  }
  TensorSoftmax own = {{}, {kPaddedLowest, kPaddedLowest}, {}};
#pragma unroll 1
  for (int key = 0; key < part.length; key += kTensorKeys) {
    __syncthreads();
    put_tile(k, keys);
    put_tile(v, values);
    __syncthreads();
    const int valid = part.length - key, next = key + kTensorKeys;
    k = fetch_tile(part.k + next * part.stride, part.stride, part.length - next);
    v = fetch_tile(part.v + next * part.stride, part.stride, part.length - next);
    float scores[kTensorKeys / 8][4] = {};
    tensor_scores(queries, keys, scores);
    tensor_weights(scores, valid, own);
    tensor_values(scores, values, own);
  }
  store_tensor(part, own);
}

template <typename T, bool kTensor>
RT_GLOBAL void RT_LAUNCH_BOUNDS(kPaddedThreads)
    padded_attention_kernel(PaddedAttentionArgs<T> args) {
  const PaddedPart<T> part = padded_part(args);
  if (part.first >= part.length) return store_zeros(part);
  if constexpr (kTensor && rt::kTensorCores) {
    attend_tensor(part);
  } else {
    attend_plain(part);
  }
}

// Enqueues the op on `stream`; without rows or positions it is a success without a launch.
// kTensor: with tensor cores, where there are any.
template <typename T, bool kTensor>
rt::Error launch_padded_attention(PaddedAttentionArgs<T> args, rt::Stream stream) {
  args.tiles = (args.positions + kPaddedQueries - 1) / kPaddedQueries;
  const long long blocks = static_cast<long long>(args.rows) * args.heads * args.tiles;
  if (blocks == 0) return rt::Error{};
  return rt::launch(&padded_attention_kernel<T, kTensor>, static_cast<unsigned>(blocks),
                    kPaddedThreads, 0, stream, args);
}

}  // namespace chatterbox_fast
