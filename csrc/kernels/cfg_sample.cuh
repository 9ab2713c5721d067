// cfg_sample: from logits to one drawn token a row, in one launch.
//
//   scores = cond + w (cond - uncond); stop action; [penalty]; / temperature;
//   top-k; min-p; top-p; [penalty, in Turbo's order];  token = argmax(exp(score - top) / q),
//   q~Exp(1)
//
// Shapes: logits (R, V) or (2R, V), T = float, half, bfloat16; seen (R, V) bool; params (R, 6)
// float {cfg_weight, penalty, temperature, min_p, 1 - top_p, top_k}; flags (R,) int32; philox (R,
// 2) int64 {seed, offset}; stop_action (R,) int32 or null; token (R,) int64. V in [1, 65536].
// Equivalent to: chatterbox_fast/reference.py, cfg_sample (the specification).
// Arithmetic: float, not contracted to fused multiply-adds, so that scores round as stock's
// separate kernels round them. top-p sums exp(score - top) in 2^-40 fixed point: exact, in any
// order. Random numbers: torch's own (torch_random.cuh), read from and advanced in device memory.
// Ties: top-k keeps all ids equal to the k-th; top-p removes the higher id first; the draw takes
// the lower.
// A row with a NaN or without a finite score, also after the penalty, sets kCfgSampleFailed, and
// its token is 0. A row with kCfgSampleStopped on entry keeps its flags.
//
// Launch: one block a row, a row's scores in registers (kItems a thread). Without top-k and top-p
// it is two block reductions over 8 V bytes of logits that the head just left in L2, so the bound
// is latency. min-p goes before top-k (both keep what is above a score, so their order is free), as
// few survive it: those are ranked against each other. Only where more are left do top-k and top-p
// look for the part of the row that the cut falls into first.
#pragma once

#include "cfg_sample.h"
#include "common.cuh"
#include "runtime.h"
#include "torch_random.cuh"

namespace chatterbox_fast {

constexpr int kCfgSampleStopped = 1;
constexpr int kCfgSampleFailed = 2;
constexpr int kCfgSampleSuppress = 1;
constexpr int kCfgSampleForce = 2;
constexpr float kCfgSampleRuledOut = 32768.0f;
constexpr int kBins = 256;
constexpr int kMostRanked = 256;  // so many comparisons a thread
constexpr float kWidest = 64.0f;  // what is further below the top shares a bin

// Scores of a large vocabulary do not fit into registers: their loops stay loops, which compile in
// a tenth of the time.
template <int kItems>
constexpr int kUnrolled = kItems <= 32 ? kItems : 1;

struct SamplingRow {
  float cfg_weight, penalty, temperature, min_p, one_minus_top_p, top_k;
};

RT_DEVICE float negative_infinity() { return __uint_as_float(0xff800000u); }

RT_DEVICE bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// Integers in the order of the floats they come from.
RT_DEVICE unsigned ordered(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

RT_DEVICE float from_ordered(unsigned bits) {
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// All scores of a row in one order without ties: by score, and of equal scores the higher id first.
RT_DEVICE unsigned long long rank_key(float score, int id) {
  return static_cast<unsigned long long>(ordered(score)) << 16 | (0xffffu - id);
}

RT_DEVICE unsigned long long greater(unsigned long long a, unsigned long long b) {
  return a > b ? a : b;
}

// The greatest value of the block, in every thread. `scratch`: 32 values of shared memory.
template <int kThreads>
RT_DEVICE unsigned long long block_max(unsigned long long value, unsigned long long* scratch) {
  constexpr int kWarps = kThreads / 32;
  for (int step = 16; step > 0; step /= 2) {
    value = greater(value, __shfl_xor_sync(kFullWarp, value, step));
  }
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x % 32 < kWarps ? scratch[threadIdx.x % 32] : 0;
  for (int step = 16; step > 0; step /= 2) {
    value = greater(value, __shfl_xor_sync(kFullWarp, value, step));
  }
  __syncthreads();  // scratch may be written again
  return value;
}

// Shared memory of one selection. Sum: of ids, which the GPU counts natively, or of 64-bit masses,
// whose adds spin.
template <typename Sum>
struct Selection {
  Sum bins[kBins];
  unsigned long long keys[kMostRanked];  // of the gathered
  Sum weights[kMostRanked];
  Sum total, below;  // the weight of all that take part, and of those below the bin found
  unsigned members, farthest, gathered, bin;
  unsigned long long found;
};

// By warp 0: the first bin whose running sum exceeds `limit`, else the last bin with a weight.
template <typename Sum>
RT_DEVICE void find_bin(Selection<Sum>& shared, Sum limit) {
  constexpr int kPerLane = kBins / 32;
  const int lane = threadIdx.x;
  Sum own = 0;
  for (int i = 0; i < kPerLane; ++i) own += shared.bins[lane * kPerLane + i];
  Sum below = own;
  for (int step = 1; step < 32; step *= 2) {
    const Sum left = __shfl_up_sync(kFullWarp, below, step);
    if (lane >= step) below += left;
  }
  below -= own;
  const unsigned exceeding = __ballot_sync(kFullWarp, below + own > limit);
  const unsigned weighted = __ballot_sync(kFullWarp, own > 0);
  const int owner = exceeding != 0 ? __ffs(exceeding) - 1 : 31 - __clz(weighted);
  if (lane != owner) return;
  int bin = lane * kPerLane;
  Sum last_below = below;
  for (int i = 0; i < kPerLane; ++i) {
    const Sum weight = shared.bins[lane * kPerLane + i];
    if (weight == 0) continue;
    bin = lane * kPerLane + i;
    last_below = below;
    below += weight;
    if (below > limit) break;
  }
  shared.bin = bin;
  shared.below = last_below;
}

// Sums weights by bin, and leaves in `shared` the bin that `limit` falls into. Returns what of
// `limit` falls into that bin. bin_of(k): of this thread's item k, kBins where it takes no part.
template <int kThreads, int kItems, typename Sum, typename Weight, typename Bin>
RT_DEVICE Sum narrow_to_bin(Sum limit, Selection<Sum>& shared, Weight weight, Bin bin_of) {
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) shared.bins[bin] = 0;
  __syncthreads();
#pragma unroll(kUnrolled<kItems>)
  for (int k = 0; k < kItems; ++k) {
    const Sum own = weight(k);
    const int bin = own == 0 ? kBins : bin_of(k);
    if (bin < kBins) atomicAdd(&shared.bins[bin], own);
  }
  __syncthreads();
  if (threadIdx.x < 32) find_bin(shared, limit);
  __syncthreads();
  return limit - (shared.below < limit ? shared.below : limit);
}

// As `select`, a byte of the 6-byte keys at a time, for any number of scores however close.
template <int kThreads, int kItems, typename Sum, typename Weight>
RT_DEVICE unsigned long long radix_select(const float* scores, Sum limit, Selection<Sum>& shared,
                                          Weight weight) {
  unsigned long long prefix = 0;
  for (int shift = 40; shift >= 0; shift -= 8) {
    const auto byte_of = [&](int k) -> int {
      const unsigned long long key = rank_key(scores[k], threadIdx.x + k * kThreads);
      return key >> (shift + 8) == prefix >> (shift + 8) ? key >> shift & 0xff : kBins;
    };
    limit = narrow_to_bin<kThreads, kItems>(limit, shared, weight, byte_of);
    prefix |= static_cast<unsigned long long>(shared.bin) << shift;
  }
  return prefix;
}

// Adds up who takes part: total, members, and the lowest score as `farthest`.
template <int kThreads, int kItems, typename Sum, typename Weight>
RT_DEVICE void take_stock(const float* scores, Selection<Sum>& shared, Weight weight) {
  if (threadIdx.x == 0) {
    shared.total = 0;
    shared.members = shared.farthest = shared.gathered = 0;
  }
  __syncthreads();
  Sum total = 0;
  unsigned members = 0;
  unsigned long long farthest = 0;
#pragma unroll(kUnrolled<kItems>)
  for (int k = 0; k < kItems; ++k) {
    const Sum own = weight(k);
    if (own == 0) continue;
    total += own;
    ++members;
    farthest = greater(farthest, ~ordered(scores[k]));
  }
  for (int step = 16; step > 0; step /= 2) {
    total += __shfl_xor_sync(kFullWarp, total, step);
    members += __shfl_xor_sync(kFullWarp, members, step);
    farthest = greater(farthest, __shfl_xor_sync(kFullWarp, farthest, step));
  }
  if (threadIdx.x % 32 == 0) {
    atomicAdd(&shared.total, total);
    atomicAdd(&shared.members, members);
    atomicMax(&shared.farthest, static_cast<unsigned>(farthest));
  }
  __syncthreads();
}

// Copies the items of `bin` into `shared`, those of all bins for kBins; as many as there is room
// for.
template <int kThreads, int kItems, typename Sum, typename Weight, typename Bin>
RT_DEVICE void gather(const float* scores, int bin, Selection<Sum>& shared, Weight weight,
                      Bin bin_of) {
#pragma unroll(kUnrolled<kItems>)
  for (int k = 0; k < kItems; ++k) {
    const Sum own = weight(k);
    if (own == 0 || (bin < kBins && bin_of(k) != bin)) continue;
    const unsigned slot = atomicAdd(&shared.gathered, 1u);
    if (slot >= kMostRanked) continue;
    shared.keys[slot] = rank_key(scores[k], threadIdx.x + k * kThreads);
    shared.weights[slot] = own;
  }
  __syncthreads();
}

// As `select`, of what was gathered: each thread adds up what is below its own.
template <int kThreads, typename Sum>
RT_DEVICE unsigned long long ranked(Selection<Sum>& shared, Sum limit) {
  const unsigned count = shared.gathered;
  for (unsigned own = threadIdx.x; own < count; own += kThreads) {
    Sum total = 0, below = 0;
    for (unsigned other = 0; other < count; ++other) {
      total += shared.weights[other];
      if (shared.keys[other] < shared.keys[own]) below += shared.weights[other];
    }
    const Sum wanted = limit < total ? limit : total - 1;
    if (below <= wanted && wanted - below < shared.weights[own]) shared.found = shared.keys[own];
  }
  __syncthreads();
  return shared.found;
}

// The first rank key, ascending, at which the running sum of weights exceeds limit(total); the last
// one where it never does; 0 where nothing has a weight. weight(k) is the weight of this thread's
// item k, 0 where it takes no part. `top`: the highest score.
template <int kThreads, int kItems, typename Sum, typename Weight, typename Limit>
RT_DEVICE unsigned long long select(const float* scores, float top, Selection<Sum>& shared,
                                    Weight weight, Limit limit_of) {
  take_stock<kThreads, kItems>(scores, shared, weight);
  if (shared.total == 0) return 0;
  const Sum limit = limit_of(shared.total);
  // Bins of one width, and not of one exponent, so that few threads add to the same one.
  const float lowest = fmaxf(from_ordered(~shared.farthest), top - kWidest);
  const float bins_a_unit = kBins / (top - lowest);  // infinite where all are equal: one bin
  const auto bin_of = [&](int k) -> int {
    return fminf(fmaxf((scores[k] - lowest) * bins_a_unit, 0.0f), kBins - 1.0f);
  };
  int bin = kBins;
  Sum rest = limit;
  if (shared.members > kMostRanked) {
    rest = narrow_to_bin<kThreads, kItems>(limit, shared, weight, bin_of);
    bin = shared.bin;
  }
  gather<kThreads, kItems>(scores, bin, shared, weight, bin_of);
  if (shared.gathered <= kMostRanked) return ranked<kThreads>(shared, rest);
  return radix_select<kThreads, kItems>(scores, limit, shared, weight);
}

RT_DEVICE float penalised(float score, bool seen, float penalty, float inverse_penalty) {
  if (!seen) return score;
  return score < 0.0f ? score * penalty : score * inverse_penalty;
}

template <typename T>
RT_DEVICE float guided_score(const CfgSampleArgs<T>& args, int row, int id, float cfg_weight) {
  const long long v = args.vocabulary;
  const float cond = rt::to_float(args.logits[row * v + id]);
  if (!args.guided) return cond;
  return cond + cfg_weight * (cond - rt::to_float(args.logits[(args.rows + row) * v + id]));
}

template <typename T>
RT_DEVICE float after_stop_action(const CfgSampleArgs<T>& args, int action, int id, float score) {
  const bool stop = id == args.stop_token;
  if (action == kCfgSampleForce) return stop ? kCfgSampleRuledOut : -kCfgSampleRuledOut;
  return action == kCfgSampleSuppress && stop ? -kCfgSampleRuledOut : score;
}

// The weight of a score in top-p: exp(score - top) in units of 2^-40.
RT_OUTLINED unsigned long long mass(float score, float top) {
  return static_cast<unsigned long long>(expf(score - top) * 0x1p40f + 0.5f);
}

// A block's view of its row: the arguments, the parameters, and the shared memory.
template <typename T>
struct SamplingBlock {
  const CfgSampleArgs<T>& args;
  const SamplingRow params;
  const bool* seen;  // the row's
  int row;
  unsigned long long* scratch;  // 32 values
  Selection<unsigned>& counting;
  Selection<unsigned long long>& weighing;
};

// Stock's chain up to the temperature. Returns the highest score; a NaN where the row has one.
template <int kThreads, int kItems, typename T>
RT_DEVICE float load_scores(const SamplingBlock<T>& block, float (&scores)[kItems]) {
  const CfgSampleArgs<T>& args = block.args;
  const int action = args.stop_action == nullptr ? 0 : args.stop_action[block.row];
  const float inverse_penalty =
      1.0f / block.params.penalty;  // so torch divides by a number, on CUDA
  const float inverse_temperature = 1.0f / block.params.temperature;
  unsigned long long highest = 0;
#pragma unroll(kUnrolled<kItems>)
  for (int k = 0; k < kItems; ++k) {
    const int id = threadIdx.x + k * kThreads;
    scores[k] = negative_infinity();
    if (id >= args.vocabulary) continue;
    float score = guided_score(args, block.row, id, block.params.cfg_weight);
    score = after_stop_action(args, action, id, score);
    if (!args.turbo)
      score = penalised(score, block.seen[id], block.params.penalty, inverse_penalty);
    score = score * inverse_temperature + 0.0f;  // -0 becomes 0: equal scores have equal keys
    scores[k] = score;
    // A NaN is above infinity in this order, so it is what the row's maximum shows.
    highest = greater(highest, score == score ? ordered(score) : 0xffffffffu);
  }
  return from_ordered(static_cast<unsigned>(block_max<kThreads>(highest, block.scratch)));
}

template <int kThreads, int kItems, typename T>
RT_DEVICE void keep_top_k(const SamplingBlock<T>& block, float top, float (&scores)[kItems]) {
  const int top_k = static_cast<int>(block.params.top_k);
  if (top_k <= 0 || top_k >= block.args.vocabulary) return;
  const auto one = [&](int k) -> unsigned { return scores[k] != negative_infinity(); };
  const auto others = [=](unsigned total) -> unsigned {
    return total > static_cast<unsigned>(top_k) ? total - top_k : 0;
  };
  const auto kth = select<kThreads, kItems>(scores, top, block.counting, one, others) >> 16;
#pragma unroll(kUnrolled<kItems>)
  for (int k = 0; k < kItems; ++k) {
    if (ordered(scores[k]) < kth) scores[k] = negative_infinity();
  }
}

template <int kItems>
RT_DEVICE void keep_min_p(float top, float min_p, float (&scores)[kItems]) {
  if (min_p <= 0.0f) return;
#pragma unroll(kUnrolled<kItems>)
  for (int k = 0; k < kItems; ++k) {
    if (expf(scores[k] - top) < min_p) scores[k] = negative_infinity();
  }
}

template <int kThreads, int kItems, typename T>
RT_DEVICE void keep_top_p(const SamplingBlock<T>& block, float top, float (&scores)[kItems]) {
  if (block.params.one_minus_top_p <= 0.0f) return;
  const auto weight = [&](int k) { return mass(scores[k], top); };
  const auto cut = [&](unsigned long long whole) {
    return static_cast<unsigned long long>(static_cast<double>(block.params.one_minus_top_p) *
                                           static_cast<double>(whole));
  };
  const auto lowest = select<kThreads, kItems>(scores, top, block.weighing, weight, cut);
#pragma unroll(kUnrolled<kItems>)
  for (int k = 0; k < kItems; ++k) {
    if (rank_key(scores[k], threadIdx.x + k * kThreads) < lowest) scores[k] = negative_infinity();
  }
}

// Turbo's penalty, after everything else. Returns the highest score that is left.
template <int kThreads, int kItems, typename T>
RT_DEVICE float penalise_last(const SamplingBlock<T>& block, float (&scores)[kItems]) {
  const float inverse_penalty = 1.0f / block.params.penalty;
  unsigned long long highest = 0;
#pragma unroll(kUnrolled<kItems>)
  for (int k = 0; k < kItems; ++k) {
    if (scores[k] == negative_infinity()) continue;
    const bool seen = block.seen[threadIdx.x + k * kThreads];
    scores[k] = penalised(scores[k], seen, block.params.penalty, inverse_penalty);
    highest = greater(highest, ordered(scores[k]));
  }
  return from_ordered(static_cast<unsigned>(block_max<kThreads>(highest, block.scratch)));
}

// An id's place in the draw: by exp(score - top) / q, of equals the lower id first. Never 0. Not
// inlined: a copy for each item would take all registers.
RT_OUTLINED unsigned long long draw_key(float below_top, unsigned long long seed,
                                        unsigned long long offset, unsigned id, unsigned threads) {
  const float q = torch_exponential(torch_uniform(seed, offset, id, threads));
  const unsigned ratio = ordered(expf(below_top) / q);
  return static_cast<unsigned long long>(ratio) << 32 | (0xffffffffu - id);
}

// argmax(exp(score - top) / q), the lower id of equals; -1 where no id is left.
template <int kThreads, int kItems, typename T>
RT_DEVICE int draw(const SamplingBlock<T>& block, float top, const float (&scores)[kItems]) {
  const CfgSampleArgs<T>& args = block.args;
  const unsigned long long seed = args.philox[2 * block.row];
  const unsigned long long offset = args.philox[2 * block.row + 1];
  unsigned long long best = 0;
#pragma unroll(kUnrolled<kItems>)
  for (int k = 0; k < kItems; ++k) {
    if (scores[k] == negative_infinity()) continue;
    const unsigned id = threadIdx.x + k * kThreads;
    best = greater(best, draw_key(scores[k] - top, seed, offset, id, args.philox_threads));
  }
  best = block_max<kThreads>(best, block.scratch);
  return best == 0 ? -1 : static_cast<int>(0xffffffffu - static_cast<unsigned>(best));
}

// A row's flags after a draw; token -1: it could not be drawn from.
RT_DEVICE int flags_after(int flags, int token, int stop_token) {
  if (flags & kCfgSampleStopped) return flags;
  if (token < 0) return flags | kCfgSampleFailed;
  return token == stop_token ? flags | kCfgSampleStopped : flags;
}

// What one thread leaves behind for its row; token -1: it could not be drawn from.
template <typename T>
RT_DEVICE void finish_row(const CfgSampleArgs<T>& args, int row, int token) {
  bool* seen = args.seen + static_cast<long long>(row) * args.vocabulary;
  args.token[row] = token < 0 ? 0 : token;
  if (args.forget >= 0) seen[args.forget] = false;
  if (token >= 0) seen[token] = true;
  args.flags[row] = flags_after(args.flags[row], token, args.stop_token);
  args.philox[2 * row + 1] +=
      static_cast<long long>(torch_philox_increment(args.vocabulary, args.philox_threads));
}

template <int kThreads, int kItems, typename T>
RT_GLOBAL void RT_LAUNCH_BOUNDS(kThreads) cfg_sample_kernel(CfgSampleArgs<T> args) {
  RT_SHARED(unsigned long long, scratch, 32);
  RT_SHARED(Selection<unsigned>, counting, 1);
  RT_SHARED(Selection<unsigned long long>, weighing, 1);
  const int row = blockIdx.x;
  const SamplingBlock<T> block = {args,
                                  reinterpret_cast<const SamplingRow*>(args.params)[row],
                                  args.seen + static_cast<long long>(row) * args.vocabulary,
                                  row,
                                  scratch,
                                  *counting,
                                  *weighing};
  float scores[kItems];
  float top = load_scores<kThreads>(block, scores);
  int token = -1;
  if (is_finite(top)) {  // the same in every thread, so all of them meet at the barriers
    keep_min_p(top, block.params.min_p, scores);
    keep_top_k<kThreads>(block, top, scores);
    keep_top_p<kThreads>(block, top, scores);
    if (args.turbo) top = penalise_last<kThreads>(block, scores);
    if (is_finite(top)) token = draw<kThreads>(block, top, scores);
  }
  if (threadIdx.x == 0) finish_row(args, row, token);
}

// Enqueues the op on `stream`; an empty batch is a success without a launch.
template <typename T>
rt::Error launch_cfg_sample(const CfgSampleArgs<T>& args, rt::Stream stream) {
  constexpr int kThreads = 512;  // so that a thread may have 128 registers
  constexpr int kItems = 17;     // stock's vocabularies, 8194 and 6563
  constexpr int kMostItems = 128;
  if (args.rows == 0) return rt::Error{};
  const auto kernel = args.vocabulary <= kItems * kThreads
                          ? &cfg_sample_kernel<kThreads, kItems, T>
                          : &cfg_sample_kernel<kThreads, kMostItems, T>;
  return rt::launch(kernel, args.rows, kThreads, 0, stream, args);
}

}  // namespace chatterbox_fast
