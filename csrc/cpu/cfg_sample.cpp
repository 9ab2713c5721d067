// CPU op of cfg_sample: one pass over a row for the scores, and work in proportion to what survives
// min-p after that. Contract: chatterbox_fast/reference.py, cfg_sample.
//
// Random numbers, in one of three ways:
// - with philox: torch's CUDA stream (kernels/torch_random.cuh), deterministic, rows in parallel;
// - else torch.multinomial's own stream. Where this torch's exponential_ draws one 53-bit number an
//   element in index order (found out once, by trying), the logarithm is taken only for the ids
//   that can still be drawn;
// - otherwise at::exponential_ fills the noise.
#include "cfg_sample.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <vector>

#include "floating.h"
#include "kernels/torch_random.cuh"

namespace chatterbox_fast {

namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();  // a score that is not drawn
constexpr float kRuledOut = 32768.0f;
constexpr int32_t kStopped = 1, kFailed = 2;
constexpr int32_t kSuppress = 1, kForce = 2;

struct Params {
  float cfg_weight, penalty, temperature, min_p, one_minus_top_p, top_k;
};

struct Rules {
  int64_t vocabulary, stop_token, forget;
  bool turbo;
};

void penalise(std::vector<float>& scores, const bool* seen, float penalty) {
  for (size_t i = 0; i < scores.size(); ++i) {
    if (seen[i]) scores[i] = scores[i] < 0 ? scores[i] * penalty : scores[i] / penalty;
  }
}

void act_on_stop(std::vector<float>& scores, int32_t action, int64_t stop_token) {
  if (action == kForce) std::fill(scores.begin(), scores.end(), -kRuledOut);
  if (action == kSuppress) scores[stop_token] = -kRuledOut;
  if (action == kForce) scores[stop_token] = kRuledOut;
}

// The highest score; NaN where there is a NaN.
float highest(const std::vector<float>& scores) {
  float top = kNever;
  bool has_nan = false;
  for (const float score : scores) {
    has_nan |= std::isnan(score);
    top = score > top ? score : top;
  }
  return has_nan ? std::numeric_limits<float>::quiet_NaN() : top;
}

void keep_top_k(std::vector<float>& scores, int64_t k) {
  if (k <= 0 || k >= static_cast<int64_t>(scores.size())) return;
  std::vector<float> sorted(scores);
  std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<float>());
  const float kth = sorted[k - 1];
  for (float& score : scores) score = score < kth ? kNever : score;
}

void keep_min_p(std::vector<float>& scores, float top, float min_p) {
  if (min_p <= 0.0f) return;
  const float surely_below = std::log(min_p) - 1e-3f;  // spares most ids the exponential
  for (float& score : scores) {
    const float below_top = score - top;
    if (below_top < surely_below || std::exp(below_top) < min_p) score = kNever;
  }
}

struct Candidate {
  float score, mass;
  int32_t id;

  bool operator<(const Candidate& other) const {  // of equals the lower id stays longer
    return score != other.score ? score < other.score : id > other.id;
  }
};

// Walks down from the likeliest: an id goes, and all below it, where it and they have at most
// 1 - top_p of the mass. A heap orders only the ids that stay.
void keep_top_p(std::vector<float>& scores, float top, float one_minus_top_p) {
  if (one_minus_top_p <= 0.0f) return;
  std::vector<Candidate> candidates;
  double total = 0.0, above = 0.0;
  for (size_t i = 0; i < scores.size(); ++i) {
    if (scores[i] == kNever) continue;
    candidates.push_back({scores[i], std::exp(scores[i] - top), static_cast<int32_t>(i)});
    total += candidates.back().mass;
  }
  std::make_heap(candidates.begin(), candidates.end());
  auto rest = candidates.end();
  for (; rest != candidates.begin(); --rest) {
    const bool first = rest == candidates.end();
    if (!first && total - above <= one_minus_top_p * total) break;
    above += candidates.front().mass;
    std::pop_heap(candidates.begin(), rest);
  }
  for (auto gone = candidates.begin(); gone != rest; ++gone) scores[gone->id] = kNever;
}

// Stock's chain from logits to the scores that are drawn from; false where the row cannot be drawn.
template <typename T>
bool prepare(const T* cond, const T* uncond, const bool* seen, int32_t action, const Params& params,
             const Rules& rules, std::vector<float>& scores) {
  for (int64_t i = 0; i < rules.vocabulary; ++i) {
    const float score = static_cast<float>(cond[i]);
    scores[i] = uncond == nullptr
                    ? score
                    : score + params.cfg_weight * (score - static_cast<float>(uncond[i]));
  }
  act_on_stop(scores, action, rules.stop_token);
  if (!rules.turbo) penalise(scores, seen, params.penalty);
  for (float& score : scores) score /= params.temperature;
  const float top = highest(scores);
  if (!std::isfinite(top)) return false;
  keep_top_k(scores, static_cast<int64_t>(params.top_k));
  keep_min_p(scores, top, params.min_p);
  keep_top_p(scores, top, params.one_minus_top_p);
  if (rules.turbo) penalise(scores, seen, params.penalty);
  return std::isfinite(highest(scores));
}

// argmax(p / q): `noise(i, wanted)` is called for every id in order, and is q where it is wanted.
template <typename Noise>
int64_t draw(const std::vector<float>& scores, Noise noise) {
  const float top = highest(scores);
  int64_t token = 0;
  float best = -1.0f;
  for (size_t i = 0; i < scores.size(); ++i) {
    const bool wanted = scores[i] != kNever;
    const float q = noise(static_cast<int64_t>(i), wanted);
    if (!wanted) continue;
    const float ratio = std::exp(scores[i] - top) / q;
    if (ratio > best) {
      best = ratio;
      token = static_cast<int64_t>(i);
    }
  }
  return token;
}

// One number of torch's exponential_ on a CPU, drawn in place: float(-log1p(-u)), u of 53 bits.
float exponential_in_place(at::CPUGeneratorImpl* generator, bool wanted) {
  const uint64_t bits = generator->random64() & ((uint64_t{1} << 53) - 1);
  if (!wanted) return 1.0f;
  return static_cast<float>(-std::log1p(-(static_cast<double>(bits) * 0x1p-53)));
}

// Whether this torch's exponential_ is that stream: same numbers, same state after.
bool is_torchs_stream() {
  constexpr int64_t kCount = 8194;
  auto ours = at::make_generator<at::CPUGeneratorImpl>(uint64_t{20261123});
  auto torchs = at::make_generator<at::CPUGeneratorImpl>(uint64_t{20261123});
  const at::Tensor noise = at::empty({kCount}, at::kFloat).exponential_(1.0, torchs);
  const float* expected = noise.const_data_ptr<float>();
  auto* engine = at::check_generator<at::CPUGeneratorImpl>(ours);
  for (int64_t i = 0; i < kCount; ++i) {
    if (exponential_in_place(engine, true) != expected[i]) return false;
  }
  return engine->random64() == at::check_generator<at::CPUGeneratorImpl>(torchs)->random64();
}

std::atomic<bool>& in_place() {
  static std::atomic<bool> same{is_torchs_stream()};
  return same;
}

struct Arguments {
  at::Tensor logits, seen, params, flags;
  std::optional<at::Tensor> philox, stop_action;
  std::optional<at::Generator> generator;
  Rules rules;
  int64_t rows, philox_threads;
  bool guided;
};

// A row's flags after a draw; one that had stopped before keeps them.
int32_t flags_after(int32_t flags, bool drawable, bool stops) {
  if (flags & kStopped) return flags;
  return flags | (!drawable ? kFailed : stops ? kStopped : 0);
}

// Row r: prepares `scores`, draws with `noise`, writes seen and flags; returns the token.
template <typename T, typename Noise>
int64_t sample_row(const Arguments& a, int64_t r, std::vector<float>& scores, Noise noise) {
  const int64_t vocabulary = a.rules.vocabulary;
  const T* logits = a.logits.const_data_ptr<T>();
  bool* seen = a.seen.mutable_data_ptr<bool>() + r * vocabulary;
  const Params& params = reinterpret_cast<const Params*>(a.params.const_data_ptr<float>())[r];
  const int32_t action = a.stop_action ? a.stop_action->const_data_ptr<int32_t>()[r] : 0;
  const T* uncond = a.guided ? logits + (a.rows + r) * vocabulary : nullptr;
  const bool drawable =
      prepare(logits + r * vocabulary, uncond, seen, action, params, a.rules, scores);
  if (!drawable) std::fill(scores.begin(), scores.end(), kNever);
  const int64_t token = draw(scores, noise);
  int32_t& flags = a.flags.mutable_data_ptr<int32_t>()[r];
  if (a.rules.forget >= 0) seen[a.rules.forget] = false;
  if (drawable) seen[token] = true;
  flags = flags_after(flags, drawable, token == a.rules.stop_token);
  return token;
}

template <typename T>
void sample_with_philox(const Arguments& a, int64_t* tokens) {
  int64_t* state = a.philox->mutable_data_ptr<int64_t>();
  const auto threads = static_cast<uint32_t>(a.philox_threads);
  at::parallel_for(0, a.rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(a.rules.vocabulary);
    for (int64_t r = begin; r < end; ++r) {
      const uint64_t seed = state[2 * r], offset = state[2 * r + 1];
      tokens[r] = sample_row<T>(a, r, scores, [&](int64_t i, bool wanted) {
        if (!wanted) return 1.0f;
        return torch_exponential(torch_uniform(seed, offset, static_cast<uint32_t>(i), threads));
      });
      state[2 * r + 1] += static_cast<int64_t>(torch_philox_increment(scores.size(), threads));
    }
  });
}

template <typename T>
void sample_with_generator(const Arguments& a, int64_t* tokens) {
  std::vector<float> scores(a.rules.vocabulary);
  if (!in_place()) {
    const at::Tensor noise =
        at::empty({a.rows, a.rules.vocabulary}, at::kFloat).exponential_(1.0, a.generator);
    const float* q = noise.const_data_ptr<float>();
    for (int64_t r = 0; r < a.rows; ++r, q += a.rules.vocabulary) {
      tokens[r] = sample_row<T>(a, r, scores, [&](int64_t i, bool) { return q[i]; });
    }
    return;
  }
  auto* engine = at::get_generator_or_default<at::CPUGeneratorImpl>(
      a.generator, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(engine->mutex_);
  for (int64_t r = 0; r < a.rows; ++r) {
    tokens[r] = sample_row<T>(
        a, r, scores, [&](int64_t, bool wanted) { return exponential_in_place(engine, wanted); });
  }
}

at::Tensor cfg_sample(const at::Tensor& logits, at::Tensor seen, const at::Tensor& params,
                      at::Tensor flags, std::optional<at::Tensor> philox,
                      std::optional<at::Tensor> stop_action, std::optional<at::Generator> generator,
                      int64_t stop_token, bool turbo, int64_t forget, int64_t philox_threads) {
  const CfgSampleSizes sizes = check_cfg_sample(logits, seen, params, flags, philox, stop_action,
                                                stop_token, forget, philox_threads);
  const Arguments arguments = {
      logits,     seen,           params,      flags,
      philox,     stop_action,    generator,   {sizes.vocabulary, stop_token, forget, turbo},
      sizes.rows, philox_threads, sizes.guided};
  at::Tensor token = at::empty({sizes.rows}, seen.options().dtype(at::kLong));
  int64_t* tokens = token.mutable_data_ptr<int64_t>();
  by_type(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    philox ? sample_with_philox<T>(arguments, tokens) : sample_with_generator<T>(arguments, tokens);
  });
  return token;
}

}  // namespace

}  // namespace chatterbox_fast

TORCH_LIBRARY_IMPL(chatterbox_fast, CPU, library) {
  library.impl("cfg_sample", &chatterbox_fast::cfg_sample);
}

// Lets a test ask for the way by exponential_, which is right with any torch.
TORCH_LIBRARY(chatterbox_fast_testing, library) {
  using chatterbox_fast::in_place;
  library.def("draws_in_place", [] { return in_place().load(); });
  library.def("draw_in_place", [](bool where_it_can) {
    in_place() = where_it_can && chatterbox_fast::is_torchs_stream();
  });
}
