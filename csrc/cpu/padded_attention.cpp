// CPU op of padded_attention: flash attention in float, whatever qkv's type.
// Contract: chatterbox_fast/reference.py, padded_attention.
//
// First the valid keys and values of each (row, head) are packed as floats, in blocks of kKeys: the
// keys of a block transposed, so that a vector holds one dimension of several of them. Then a task
// takes kQueries queries of a (row, head) through all blocks: scores, the softmax's running maximum
// and sum, the weighted sum of values. Both products are tiles of kTile rows and two vectors whose
// sums stay in registers; a block of keys, then of values, stays in the level-1 cache meanwhile.
// Pads are neither read nor computed. The result does not depend on the number of threads.
#include "padded_attention.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "floating.h"
#include "vectors.h"

namespace chatterbox_fast {

namespace {

constexpr int64_t kDim = kPaddedDim;
constexpr int64_t kKeys = 64;            // of a block
constexpr int kTile = 6;                 // queries of a tile: 12 sums, 2 vectors and a factor
constexpr int64_t kQueries = 8 * kTile;  // of a task
constexpr int64_t kWide = 2 * kLanes;    // keys, or dimensions, of a tile
constexpr float kScale = 0.125f;         // 1 / sqrt(64)

// ---- Packing.

struct Block {
  float keys[kDim][kKeys];    // 0 behind the last one
  float values[kKeys][kDim];  // likewise
};

// `count` keys and values, `stride` elements apart, as a block.
template <typename T>
CBF_INLINE void pack_block(const T* keys, const T* values, int64_t stride, int64_t count,
                           Block& block) {
  if (count < kKeys) std::memset(&block, 0, sizeof block);
  for (int64_t n = 0; n < count; ++n, keys += stride, values += stride) {
    for (int64_t d = 0; d < kDim; d += kLanes) {
      float lanes[kLanes];
      const Floats key = floats_of(keys + d), value = floats_of(values + d);
      std::memcpy(lanes, &key, sizeof key);
      for (int i = 0; i < kLanes; ++i) block.keys[d + i][n] = lanes[i];
      std::memcpy(&block.values[n][d], &value, sizeof value);
    }
  }
}

// ---- A task.

// What a task keeps of its queries.
struct Queries {
  float q[kQueries][kDim];  // scaled
  float scores[kQueries][kKeys];
  float sums[kQueries][kDim];
  float highest[kQueries], totals[kQueries];
};

// to (kTile, 16) = a (kTile, depth) b (depth, 16), or added to it; rows of each lie kDim apart.
template <bool kAdded>
CBF_INLINE void multiply_tile(const float* a, const float* b, int64_t depth, float* to) {
  static_assert(kDim == kKeys);
  Floats sums[kTile][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const auto low = load<Floats>(b + k * kDim), high = load<Floats>(b + k * kDim + kLanes);
#pragma GCC unroll 6
    for (int m = 0; m < kTile; ++m) {
      const float factor = a[m * kDim + k];
      sums[m][0] += factor * low;
      sums[m][1] += factor * high;
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < kTile; ++m) {
    for (int i = 0; i < 2; ++i) {
      float* const own = to + m * kDim + i * kLanes;
      const Floats sum = kAdded ? load<Floats>(own) + sums[m][i] : sums[m][i];
      std::memcpy(own, &sum, sizeof sum);
    }
  }
}

// to (rows, 64) = a (rows, depth) b (depth, 64), or added to it; up to a whole tile of rows.
template <bool kAdded>
CBF_INLINE void multiply(const float* a, const float* b, int64_t rows, int64_t depth, float* to) {
  for (int64_t column = 0; column < kDim; column += kWide) {
    for (int64_t m = 0; m < rows; m += kTile) {
      multiply_tile<kAdded>(a + m * kDim, b + column, depth, to + m * kDim + column);
    }
  }
}

// Makes the scores of a query weights; what it has summed before shrinks where the highest grows.
CBF_INLINE void soften(float* scores, int64_t count, float& highest, float& total, float* sums) {
  Floats row[kKeys / kLanes], top = all(highest);
  const Floats lane = {0, 1, 2, 3, 4, 5, 6, 7};
  for (int64_t i = 0; i < kKeys / kLanes; ++i) {
    const auto some = load<Floats>(scores + i * kLanes);
    row[i] =
        lane + static_cast<float>(i * kLanes) < static_cast<float>(count) ? some : all(-INFINITY);
    top = larger(row[i], top);
  }
  const float before = highest;
  highest = largest(top);
  if (highest > before) {
    const Floats shrink = exponential(all(before - highest));
    total *= shrink[0];
    for (int64_t d = 0; d < kDim; d += kLanes) {
      const Floats smaller = load<Floats>(sums + d) * shrink;
      std::memcpy(sums + d, &smaller, sizeof smaller);
    }
  }
  Floats totals = {};
  for (int64_t i = 0; i < kKeys / kLanes; ++i) {
    const Floats weight = exponential(row[i] - highest);
    totals += weight;
    std::memcpy(scores + i * kLanes, &weight, sizeof weight);
  }
  total += sum(totals);
}

// `count` queries, `stride` elements apart, over `length` keys in blocks.
template <typename T>
CBF_INLINE void attend(const T* from, int64_t stride, int64_t count, const Block* blocks,
                       int64_t length, T* out, int64_t out_stride) {
  Queries own;
  std::memset(&own, 0, sizeof own);
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t d = 0; d < kDim; d += kLanes) {
      const Floats scaled = floats_of(from + m * stride + d) * kScale;
      std::memcpy(&own.q[m][d], &scaled, sizeof scaled);
    }
  }
  std::fill_n(own.highest, kQueries, -FLT_MAX);  // not -infinity, which scores may be
  for (int64_t start = 0; start < length; start += kKeys, ++blocks) {
    const int64_t keys = std::min(kKeys, length - start);
    multiply<false>(own.q[0], blocks->keys[0], count, kDim, own.scores[0]);
    for (int64_t m = 0; m < count; ++m) {
      soften(own.scores[m], keys, own.highest[m], own.totals[m], own.sums[m]);
    }
    multiply<true>(own.scores[0], blocks->values[0], count, keys, own.sums[0]);
  }
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t d = 0; d < kDim; ++d) {
      out[m * out_stride + d] = static_cast<T>(own.sums[m][d] / own.totals[m]);
    }
  }
}

// ---- All of it.

#define CBF_OF_TYPE(T)                                                                       \
  CBF_FOR_EVERY_CPU void pack(const T* keys, const T* values, int64_t stride, int64_t count, \
                              Block& block) {                                                \
    pack_block(keys, values, stride, count, block);                                          \
  }                                                                                          \
  CBF_FUSED_FOR_EVERY_CPU void run(const T* from, int64_t stride, int64_t count,             \
                                   const Block* blocks, int64_t length, T* out,              \
                                   int64_t out_stride) {                                     \
    attend(from, stride, count, blocks, length, out, out_stride);                            \
  }

CBF_OF_TYPE(float)
CBF_OF_TYPE(at::Half)
CBF_OF_TYPE(at::BFloat16)

int64_t in_parts(int64_t all, int64_t size) { return (all + size - 1) / size; }

template <typename T>
struct Attention {
  const T* qkv;  // (R, T, 3, H, 64)
  const int* lengths;
  PaddedAttentionSizes sizes;
  int64_t heads;
  T* out;  // (R, T, H, 64)

  int64_t pairs() const { return sizes.rows * heads; }
  int64_t blocks() const { return in_parts(sizes.positions, kKeys); }  // of a pair
  int64_t stride() const { return 3 * heads * kDim; }
  int64_t length(int64_t pair) const {
    return std::clamp<int64_t>(lengths[pair / heads], 0, sizes.positions);
  }
  // q of a pair at a position; k and v lie heads * kDim and twice as many elements behind.
  const T* at(int64_t pair, int64_t position) const {
    return qkv + (pair / heads * sizes.positions + position) * stride() + pair % heads * kDim;
  }
};

template <typename T>
void pack_all(const Attention<T>& job, Block* packed) {
  at::parallel_for(0, job.pairs() * job.blocks(), 1, [&](int64_t task, int64_t end) {
    for (; task < end; ++task) {
      const int64_t pair = task / job.blocks(), start = task % job.blocks() * kKeys;
      const int64_t count = std::min(kKeys, job.length(pair) - start);
      if (count <= 0) continue;
      const T* const keys = job.at(pair, start) + job.heads * kDim;
      pack(keys, keys + job.heads * kDim, job.stride(), count, packed[task]);
    }
  });
}

template <typename T>
void attend_all(const Attention<T>& job, const Block* packed) {
  const int64_t parts = in_parts(job.sizes.positions, kQueries);
  at::parallel_for(0, job.pairs() * parts, 1, [&](int64_t task, int64_t end) {
    for (; task < end; ++task) {
      const int64_t pair = task / parts, start = task % parts * kQueries;
      const int64_t length = job.length(pair), out_stride = job.heads * kDim;
      const int64_t count = std::clamp<int64_t>(length - start, 0, kQueries);
      const int64_t all = std::min(kQueries, job.sizes.positions - start);
      T* out = job.out + (pair / job.heads * job.sizes.positions + start) * out_stride +
               pair % job.heads * kDim;
      if (count > 0) {
        run(job.at(pair, start), job.stride(), count, packed + pair * job.blocks(), length, out,
            out_stride);
      }
      for (int64_t m = count; m < all; ++m) std::fill_n(out + m * out_stride, kDim, T(0.0f));
    }
  });
}

at::Tensor padded_attention(const at::Tensor& qkv, const at::Tensor& lengths, int64_t heads) {
  const PaddedAttentionSizes sizes = check_padded_attention(qkv, lengths, heads);
  at::Tensor out = at::empty({sizes.rows, sizes.positions, heads * kDim}, qkv.options());
  if (out.numel() == 0) return out;
  by_type(qkv.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Attention<T> job = {qkv.const_data_ptr<T>(), lengths.const_data_ptr<int>(), sizes, heads,
                              out.mutable_data_ptr<T>()};
    const at::Tensor packed =
        at::empty({job.pairs() * job.blocks() * static_cast<int64_t>(sizeof(Block))}, at::kByte);
    auto* const blocks = static_cast<Block*>(packed.mutable_data_ptr());
    pack_all(job, blocks);
    attend_all(job, blocks);
  });
  return out;
}

}  // namespace

}  // namespace chatterbox_fast

TORCH_LIBRARY_IMPL(chatterbox_fast, CPU, library) {
  library.impl("padded_attention", &chatterbox_fast::padded_attention);
}
