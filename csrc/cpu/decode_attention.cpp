// CPU op of decode_attention: reads the valid prefix of the cache once, at the speed of memory.
// Contract: chatterbox_fast/reference.py, decode_attention.
//
// First q and k are rotated and k and v appended, row by row. Then a task takes a slice of the
// prefix of one (row, head) in blocks of keys: scores of eight keys at a time, the softmax's
// running maximum and sum, the weighted sum of values; the lines of the block's values are fetched
// while its keys are read, and those of the next keys with the values. At last the slices of each
// (row, head) are put together. Where a cache's elements come apart in another order than they lie
// in (bfloat16: two to a 32-bit word, taken apart with a shift and a mask), q and the sums are in
// that order too. Sums are float. How many slices there are depends on the shapes and the position,
// not on the number of threads, and so does the result.
#include "decode_attention.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <vector>

#include "checks.h"
#include "floating.h"
#include "vectors.h"

namespace chatterbox_fast {

namespace {

constexpr int kVectors = kHeadDim / kLanes;  // of one key
constexpr int64_t kBlock = 32;               // keys whose scores are taken before their values
constexpr int64_t kTasks = 64;               // for few rows and heads: slices make up this number
constexpr int64_t kShortest = 128;           // keys of a slice
constexpr int64_t kGrain = 256;              // keys a thread has at least
constexpr int64_t kLine = 64;                // bytes that a prefetch brings
constexpr float kScale = 0.125f;             // 1 / sqrt(64)

using Key = Floats[kVectors];

// ---- Types of cache: a row of 64 as floats, and the place there of dimension d.

CBF_INLINE void widen(const float* row, Key& key) {
  for (int i = 0; i < kVectors; ++i) key[i] = load<Floats>(row + i * kLanes);
}

CBF_INLINE void widen(const at::BFloat16* row, Key& key) {
  for (int i = 0; i < kVectors; i += 2) {
    const auto pairs = load<Words>(row + i * kLanes);
    key[i] = (Floats)(pairs << 16);
    key[i + 1] = (Floats)(pairs & 0xffff0000u);
  }
}

CBF_INLINE void widen(const at::Half* row, Key& key) {
  for (int i = 0; i < kVectors; ++i) key[i] = floats_of_halves(row + i * kLanes);
}

template <typename T>
int place(int d) {
  if (!std::is_same_v<T, at::BFloat16>) return d;
  return d / (2 * kLanes) * (2 * kLanes) + d % 2 * kLanes + d % (2 * kLanes) / 2;
}

// ---- One slice of one (row, head).

struct Slice {
  float highest;  // of its scores
  float total;    // of exp(score - highest)
  float sums[kHeadDim];
};

template <typename T>
CBF_INLINE void fetch(const T* row) {
  const auto* bytes = reinterpret_cast<const char*>(row);
  for (size_t i = 0; i < kHeadDim * sizeof(T); i += kLine) __builtin_prefetch(bytes + i);
}

// Scores of `count` keys, at most eight; the other lanes are -infinity.
template <typename T>
CBF_INLINE Floats scores_of(const Key& q, const T* keys, const T* values, int64_t count) {
  Floats sums[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) {
    const int64_t own = std::min(j, count - 1);
    fetch(values + own * kHeadDim);
    Key key;
    widen(keys + own * kHeadDim, key);
    Floats even = q[0] * key[0], odd = q[1] * key[1];
    for (int i = 2; i < kVectors; i += 2) {
      even += q[i] * key[i];
      odd += q[i + 1] * key[i + 1];
    }
    sums[j] = even + odd;
  }
  const Floats scores = sum_of_each(sums), lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return lane < static_cast<float>(count) ? scores : all(-INFINITY);
}

// The keys and values of `count` positions. `kept`: where their scores go, or null.
template <typename T>
CBF_INLINE void attend(const float* query, const T* keys, const T* values, int64_t count,
                       float* kept, Slice& slice) {
  Key q, sums = {};
  widen(query, q);
  float highest = -FLT_MAX;  // not -infinity, which scores may be
  Floats totals = {};
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t end = std::min(kBlock, count - start);
    const T* const own_keys = keys + start * kHeadDim;
    const T* const own_values = values + start * kHeadDim;
    Floats scores[kBlock / kLanes], top = all(highest);
    for (int64_t i = 0; i < end; i += kLanes) {
      const int64_t few = std::min<int64_t>(kLanes, end - i);
      const Floats some = scores_of(q, own_keys + i * kHeadDim, own_values + i * kHeadDim, few);
      scores[i / kLanes] = some;
      top = larger(some, top);
      if (kept != nullptr) std::memcpy(kept + start + i, &some, few * sizeof(float));
    }
    const float before = highest;
    highest = largest(top);
    if (highest > before) {
      const Floats shrink = exponential(all(before - highest));
      totals *= shrink;
      for (Floats& vector : sums) vector *= shrink;
    }
    float weights[kBlock];
    for (int64_t i = 0; i < end; i += kLanes) {
      const Floats some = exponential(scores[i / kLanes] - highest);
      totals += some;
      std::memcpy(weights + i, &some, sizeof some);
    }
    for (int64_t j = 0; j < end; ++j) {
      fetch(own_keys + (kBlock + j) * kHeadDim);
      Key value;
      widen(own_values + j * kHeadDim, value);
      for (int i = 0; i < kVectors; ++i) sums[i] += weights[j] * value[i];
    }
  }
  slice.highest = highest;
  slice.total = sum(totals);
  std::memcpy(slice.sums, sums, sizeof sums);
}

CBF_FOR_EVERY_CPU void compute(const float* query, const float* keys, const float* values,
                               int64_t count, float* kept, Slice& slice) {
  attend(query, keys, values, count, kept, slice);
}

CBF_FOR_EVERY_CPU void compute(const float* query, const at::BFloat16* keys,
                               const at::BFloat16* values, int64_t count, float* kept,
                               Slice& slice) {
  attend(query, keys, values, count, kept, slice);
}

CBF_FOR_EVERY_CPU void compute(const float* query, const at::Half* keys, const at::Half* values,
                               int64_t count, float* kept, Slice& slice) {
  attend(query, keys, values, count, kept, slice);
}

CBF_FOR_EVERY_CPU void normalise(float* scores, int64_t count, float highest, float total) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const size_t bytes = std::min<int64_t>(kLanes, count - i) * sizeof(float);
    Floats some = {};
    std::memcpy(&some, scores + i, bytes);
    some = exponential(some - highest) / total;
    std::memcpy(scores + i, &some, bytes);
  }
}

// ---- All of it.

template <typename T>
struct Cache {
  T* data;
  int64_t row_stride, head_stride;

  explicit Cache(const at::Tensor& tensor)
      : data(tensor.mutable_data_ptr<T>()),
        row_stride(tensor.stride(0)),
        head_stride(tensor.stride(1)) {}

  T* at(int64_t row, int64_t head, int64_t slot = 0) const {
    return data + row * row_stride + head * head_stride + slot * kHeadDim;
  }
};

template <typename T>
struct Attention {
  DecodeAttentionSizes sizes;
  const float* qkv;                     // (B, 3, H, 64)
  Cache<T> k_cache, v_cache;            // (B, H, C, 64)
  const float *cos, *sin;               // (C, 64), or null
  const int* watched;                   // (W, 2)
  float* probabilities;                 // (W, C)
  int64_t lengths[kMostAttentionRows];  // of a row's valid prefix; 0: the position is outside
  int64_t splits;

  int64_t pairs() const { return sizes.rows * sizes.heads; }
  // Positions of a slice of a row.
  int64_t share(int64_t row) const {
    return std::max(kShortest, (lengths[row] + splits - 1) / splits);
  }
};

// The first row of probabilities that belongs to a pair, or null.
template <typename T>
float* watch_of(const Attention<T>& job, int64_t pair) {
  for (int64_t w = 0; w < job.sizes.watched; ++w) {
    const int64_t row = job.watched[2 * w], head = job.watched[2 * w + 1];
    if (row * job.sizes.heads + head == pair) return job.probabilities + w * job.sizes.capacity;
  }
  return nullptr;
}

void rotate(const float* x, const float* cos, const float* sin, float* rotated) {
  constexpr int kHalf = kHeadDim / 2;
  for (int d = 0; d < kHeadDim; ++d) {
    const float across = d < kHalf ? -x[d + kHalf] : x[d - kHalf];
    rotated[d] = cos == nullptr ? x[d] : x[d] * cos[d] + across * sin[d];
  }
}

// Appends k and v of a row and leaves its q, rotated and scaled, in `queries` (B, H, 64).
template <typename T>
void append(const Attention<T>& job, int64_t row, float* queries) {
  if (job.lengths[row] == 0) return;
  const int64_t slot = job.lengths[row] - 1, heads = job.sizes.heads;
  const float* const cos = job.cos == nullptr ? nullptr : job.cos + slot * kHeadDim;
  const float* const sin = job.sin == nullptr ? nullptr : job.sin + slot * kHeadDim;
  for (int64_t head = 0; head < heads; ++head) {
    const float* const q = job.qkv + (row * 3 * heads + head) * kHeadDim;
    const float* const k = q + heads * kHeadDim;
    const float* const v = k + heads * kHeadDim;
    float rotated[kHeadDim];
    rotate(k, cos, sin, rotated);
    T* const k_slot = job.k_cache.at(row, head, slot);
    T* const v_slot = job.v_cache.at(row, head, slot);
    for (int d = 0; d < kHeadDim; ++d) {
      k_slot[d] = static_cast<T>(rotated[d]);
      v_slot[d] = static_cast<T>(v[d]);
    }
    rotate(q, cos, sin, rotated);
    float* const query = queries + (row * heads + head) * kHeadDim;
    for (int d = 0; d < kHeadDim; ++d) query[place<T>(d)] = rotated[d] * kScale;
  }
}

template <typename T>
void compute_slices(const Attention<T>& job, const float* queries, Slice* slices) {
  const int64_t longest = *std::max_element(job.lengths, job.lengths + job.sizes.rows);
  const int64_t keys = std::max<int64_t>(1, longest / job.splits);
  const int64_t grain = (kGrain + keys - 1) / keys;
  at::parallel_for(0, job.pairs() * job.splits, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / job.splits;
      const int64_t row = pair / job.sizes.heads, head = pair % job.sizes.heads;
      const int64_t first = task % job.splits * job.share(row);
      const int64_t count = std::min(job.share(row), job.lengths[row] - first);
      if (count <= 0) continue;
      float* const kept = watch_of(job, pair);
      compute(queries + pair * kHeadDim, job.k_cache.at(row, head, first),
              job.v_cache.at(row, head, first), count, kept == nullptr ? nullptr : kept + first,
              slices[task]);
    }
  });
}

// Puts the slices of a (row, head) together in the first one.
template <typename T>
const Slice& put_together(const Attention<T>& job, int64_t row, Slice* slices) {
  const int64_t count = (job.lengths[row] + job.share(row) - 1) / job.share(row);
  Slice& all = slices[0];
  const float own_highest = all.highest;
  for (int64_t i = 1; i < count; ++i) all.highest = std::max(all.highest, slices[i].highest);
  const float shrink = std::exp(own_highest - all.highest);
  all.total *= shrink;
  for (float& each : all.sums) each *= shrink;
  for (int64_t i = 1; i < count; ++i) {
    const float weight = std::exp(slices[i].highest - all.highest);
    all.total += weight * slices[i].total;
    for (int d = 0; d < kHeadDim; ++d) all.sums[d] += weight * slices[i].sums[d];
  }
  return all;
}

template <typename T>
void finish_pair(const Attention<T>& job, int64_t pair, Slice* slices, float* out) {
  const int64_t row = pair / job.sizes.heads, length = job.lengths[row];
  if (length == 0) {
    std::fill_n(out, kHeadDim, 0.0f);
    return;
  }
  const Slice& all = put_together(job, row, slices);
  for (int d = 0; d < kHeadDim; ++d) out[d] = all.sums[place<T>(d)] / all.total;
  if (float* const scores = watch_of(job, pair)) normalise(scores, length, all.highest, all.total);
}

// Behind the valid prefix there is nothing; who watches the same as another gets the same.
template <typename T>
void finish_watched(const Attention<T>& job) {
  const int64_t capacity = job.sizes.capacity;
  for (int64_t w = 0; w < job.sizes.watched; ++w) {
    const int64_t row = job.watched[2 * w], pair = row * job.sizes.heads + job.watched[2 * w + 1];
    float* const own = job.probabilities + w * capacity;
    const float* const first = watch_of(job, pair);
    if (first != own) std::copy_n(first, job.lengths[row], own);
    std::fill(own + job.lengths[row], own + capacity, 0.0f);
  }
}

template <typename T>
void compute_all(const Attention<T>& job, float* out) {
  std::vector<float> queries(job.pairs() * kHeadDim);
  std::vector<Slice> slices(job.pairs() * job.splits);
  for (int64_t row = 0; row < job.sizes.rows; ++row) append(job, row, queries.data());
  compute_slices(job, queries.data(), slices.data());
  for (int64_t pair = 0; pair < job.pairs(); ++pair) {
    finish_pair(job, pair, slices.data() + pair * job.splits, out + pair * kHeadDim);
  }
  finish_watched(job);
}

// Sets the rows' lengths, and flags where a position is outside.
void read_positions(const at::Tensor& position, const at::Tensor& flags,
                    const DecodeAttentionSizes& sizes, int64_t* lengths) {
  const auto* positions = position.const_data_ptr<int64_t>();
  auto* bits = flags.mutable_data_ptr<int>();
  for (int64_t row = 0; row < sizes.rows; ++row) {
    const int64_t n = sizes.positions == 1 ? 0 : row;
    const bool inside = positions[n] >= 0 && positions[n] < sizes.capacity;
    lengths[row] = inside ? positions[n] + 1 : 0;
    if (!inside) bits[n] |= kAttentionFailed;
  }
}

void check_pairs(const std::optional<at::Tensor>& watched, const DecodeAttentionSizes& sizes) {
  for (int64_t w = 0; w < sizes.watched; ++w) {
    const int* const pair = watched->const_data_ptr<int>() + 2 * w;
    CBF_CHECK(pair[0] >= 0 && pair[0] < sizes.rows && pair[1] >= 0 && pair[1] < sizes.heads,
              "decode_attention", "watched",
              c10::str("of rows in [0, ", sizes.rows, ") and heads in [0, ", sizes.heads, ")"),
              c10::str("(", pair[0], ", ", pair[1], ")"));
  }
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
  check_pairs(watched, sizes);
  const at::Tensor wide = qkv.to(at::kFloat);
  at::Tensor out = at::empty({sizes.rows, sizes.heads * kHeadDim}, wide.options());
  const int64_t pairs = sizes.rows * sizes.heads;
  if (pairs == 0) return out.to(qkv.scalar_type());
  by_type(k_cache.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Attention<T> job = {sizes,
                        wide.const_data_ptr<float>(),
                        Cache<T>(k_cache),
                        Cache<T>(v_cache),
                        data_or_null<float>(cos),
                        data_or_null<float>(sin),
                        data_or_null<int>(watched),
                        probabilities ? probabilities->mutable_data_ptr<float>() : nullptr,
                        {},
                        splits > 0 ? splits : std::max<int64_t>(1, kTasks / pairs)};
    read_positions(position, flags, sizes, job.lengths);
    compute_all(job, out.mutable_data_ptr<float>());
  });
  return out.to(qkv.scalar_type());
}

}  // namespace

}  // namespace chatterbox_fast

TORCH_LIBRARY_IMPL(chatterbox_fast, CPU, library) {
  library.impl("decode_attention", &chatterbox_fast::decode_attention);
}
