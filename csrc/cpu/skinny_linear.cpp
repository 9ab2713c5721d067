// CPU op of skinny_linear: reads the weights once, at the speed of memory.
// Contract: chatterbox_fast/reference.py, skinny_linear.
//
// A thread takes a range of outputs, one at a time, or several where x is large: each vector of
// weights that it loads serves two rows of x. Narrow weights are widened on the way:
// - bfloat16 and float16 to float;
// - int8 to 16 bits; x is rounded to 15 bits with one scale for every kRun of a row, whose products
//   are summed as integers. An x is off by half of 1/16383 of the largest of its run at most: less
//   than bfloat16's rounding where it is over 1/64 of that.
// Before, the calling thread normalises x; after, it gates the outputs and adds the residual.
// Sums are float (int8: exact within a run). The result does not depend on the number of threads.
#include "skinny_linear.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace chatterbox_fast {

namespace {

constexpr int64_t kCacheLine = 64;     // bytes
constexpr int64_t kGrain = 1 << 15;    // weights a task has at least
constexpr float kMostSteps = 16383.f;  // of an x rounded for int8: 15 bits with the sign
constexpr int64_t kRun = 256;          // inputs with one scale; 256 * 128 * 16383 < 2^31

// Where two rows of x stay in the level-1 cache, one output at a time: one stream of weights suits
// the CPU's own prefetcher best. Where they do not, several outputs share what is loaded of them;
// but for int8, whose x is half as large.
constexpr int64_t kSmall = 16384;  // bytes of x that stay
constexpr int64_t kAtOnce = 4;     // outputs, else

// How many bytes before they are read weights are fetched into the level-2 cache, and from there
// into the level-1 cache: by measurement.
constexpr int64_t kFar = 8192, kNear = 1024;

// What comes `ahead` bytes after row[k] of one of kOut rows that are read side by side: behind the
// row's end it is the row kOut further on.
template <int kOut, typename W>
CBF_INLINE const W* later(const W* row, int64_t k, int64_t inputs, int64_t ahead) {
  const int64_t then = k + ahead / static_cast<int64_t>(sizeof(W));
  return row + (then < inputs ? then : then + (kOut - 1) * inputs);
}

template <int kOut, typename W>
CBF_INLINE void prefetch(const W* row, int64_t k, int64_t inputs) {
  __builtin_prefetch(later<kOut>(row, k, inputs, kFar), 0, 2);
  __builtin_prefetch(later<kOut>(row, k, inputs, kNear));
}

// A cache line of weights as vectors.
template <typename W>
constexpr int64_t kLine = kCacheLine / sizeof(W);  // weights

template <typename W>
constexpr int kVectors = kLine<W> / kLanes;

CBF_INLINE void widen(const float* line, Floats (&wide)[kVectors<float>]) {
  for (int i = 0; i < kVectors<float>; ++i) wide[i] = load<Floats>(line + i * kLanes);
}

// Pairs come apart with a shift and a mask; of every kPairs of x the even ones come first, too.
constexpr int64_t kPairs = 2 * kLanes;

CBF_INLINE void widen(const at::BFloat16* line, Floats (&wide)[kVectors<at::BFloat16>]) {
  for (int i = 0; i < kVectors<at::BFloat16>; i += 2) {
    const auto pairs = load<Words>(line + i * kLanes);
    wide[i] = (Floats)(pairs << 16);
    wide[i + 1] = (Floats)(pairs & 0xffff0000u);
  }
}

CBF_INLINE void widen(const at::Half* line, Floats (&wide)[kVectors<at::Half>]) {
  for (int i = 0; i < kVectors<at::Half>; ++i) wide[i] = floats_of_halves(line + i * kLanes);
}

// y[m][r] = sum over k of x[m][k] weight[r][k], for kRows rows of x and kOut of weight. One output
// has a sum for each vector of a line, so that additions need not wait for one another.
template <int kRows, int kOut, typename W>
CBF_INLINE void dot(const float* x, const float*, const W* weight, int64_t inputs,
                    float (&y)[kRows][kOut]) {
  constexpr int kSums = kOut == 1 ? kVectors<W> : 1;
  Floats sums[kRows][kOut][kSums] = {};
  const int64_t whole = inputs / kLine<W> * kLine<W>;
  for (int64_t k = 0; k < whole; k += kLine<W>) {
    for (int r = 0; r < kOut; ++r) {
      Floats own[kVectors<W>];
      prefetch<kOut>(weight + r * inputs, k, inputs);
      widen(weight + r * inputs + k, own);
      for (int m = 0; m < kRows; ++m) {
        for (int i = 0; i < kVectors<W>; ++i) {
          sums[m][r][i % kSums] += load<Floats>(x + m * inputs + k + i * kLanes) * own[i];
        }
      }
    }
  }
  // Unrolled, or the sums would have to be in memory.
#pragma GCC unroll 2
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int r = 0; r < kOut; ++r) {
      Floats all = sums[m][r][0];
      for (int i = 1; i < kSums; ++i) all += sums[m][r][i];
      y[m][r] = sum(all);
      for (int64_t k = whole; k < inputs; ++k) {
        y[m][r] += x[m * inputs + k] * static_cast<float>(weight[r * inputs + k]);
      }
    }
  }
}

CBF_INLINE int64_t runs_of(int64_t inputs) { return (inputs + kRun - 1) / kRun; }

template <int kRows>
CBF_INLINE void add_run(const int16_t* x, const float* step, const int8_t* weight, int64_t inputs,
                        int64_t length, float (&y)[kRows][1]) {
  for (int64_t k = 0; k < length; k += kCacheLine) prefetch<1>(weight, k, inputs);
  int32_t sums[kRows] = {};
  for (int64_t k = 0; k < length; ++k) {
    const int16_t w = weight[k];
    for (int m = 0; m < kRows; ++m) sums[m] += int32_t{w} * int32_t{x[m * inputs + k]};
  }
  for (int m = 0; m < kRows; ++m) {
    y[m][0] += step[m * runs_of(inputs)] * static_cast<float>(sums[m]);
  }
}

// The same for int8 weights and an x of whole steps. step: the size of a step in each run of each
// row of x.
template <int kRows, int kOut>
CBF_INLINE void dot(const int16_t* x, const float* step, const int8_t* weight, int64_t inputs,
                    float (&y)[kRows][kOut]) {
  static_assert(kOut == 1);
  for (int m = 0; m < kRows; ++m) y[m][0] = 0.0f;
  int64_t k = 0;
  for (; k + kRun <= inputs; k += kRun, ++step) add_run(x + k, step, weight + k, inputs, kRun, y);
  if (k < inputs) add_run(x + k, step, weight + k, inputs, inputs - k, y);
}

// What a task reads and writes.
template <typename X, typename W>
struct Job {
  const X* x;               // (M, K)
  const W* weight;          // (N, K)
  const float* step;        // (M, runs_of(K)) where x is in steps, else null
  const float* scale;       // (N,), or null: 1
  float* y;                 // (M, N)
  int64_t inputs, outputs;  // K, N
};

template <int kRows, int kOut, typename X, typename W>
CBF_INLINE void few_outputs(const Job<X, W>& job, int64_t row, int64_t output) {
  float y[kRows][kOut];
  const float* step = job.step == nullptr ? nullptr : job.step + row * runs_of(job.inputs);
  dot<kRows, kOut>(job.x + row * job.inputs, step, job.weight + output * job.inputs, job.inputs, y);
  for (int m = 0; m < kRows; ++m) {
    for (int r = 0; r < kOut; ++r) {
      const float scale = job.scale == nullptr ? 1.0f : job.scale[output + r];
      job.y[(row + m) * job.outputs + output + r] = scale * y[m][r];
    }
  }
}

template <int kOut, typename X, typename W>
CBF_INLINE void all_rows(const Job<X, W>& job, int64_t rows, int64_t output) {
  int64_t row = 0;
  for (; row + 2 <= rows; row += 2) few_outputs<2, kOut>(job, row, output);
  if (row < rows) few_outputs<1, kOut>(job, row, output);
}

template <typename X, typename W>
CBF_INLINE void some_outputs(const Job<X, W>& job, int64_t rows, int64_t begin, int64_t end) {
  int64_t output = begin;
  if constexpr (std::is_same_v<X, float>) {
    if (2 * job.inputs * static_cast<int64_t>(sizeof(X)) > kSmall) {
      for (; output + kAtOnce <= end; output += kAtOnce) all_rows<kAtOnce>(job, rows, output);
    }
  }
  for (; output < end; ++output) all_rows<1>(job, rows, output);
}

CBF_FUSED_FOR_EVERY_CPU void compute(const Job<float, float>& job, int64_t rows, int64_t begin,
                                     int64_t end) {
  some_outputs(job, rows, begin, end);
}

CBF_FUSED_FOR_EVERY_CPU void compute(const Job<float, at::BFloat16>& job, int64_t rows,
                                     int64_t begin, int64_t end) {
  some_outputs(job, rows, begin, end);
}

CBF_FUSED_FOR_EVERY_CPU void compute(const Job<float, at::Half>& job, int64_t rows, int64_t begin,
                                     int64_t end) {
  some_outputs(job, rows, begin, end);
}

CBF_FOR_EVERY_CPU void compute(const Job<int16_t, int8_t>& job, int64_t rows, int64_t begin,
                               int64_t end) {
  some_outputs(job, rows, begin, end);
}

// A task is outputs that are taken at once: which these are does not depend on the threads.
template <typename X, typename W>
void compute_in_parallel(const Job<X, W>& job, int64_t rows) {
  const int64_t tasks = (job.outputs + kAtOnce - 1) / kAtOnce;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(kAtOnce * job.inputs, 1));
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    compute(job, rows, kAtOnce * begin, std::min(kAtOnce * end, job.outputs));
  });
}

// A run of x in whole steps. Returns the size of a step: NaN or infinite where the run has such a
// value.
CBF_INLINE float round_to_steps(const float* x, int64_t length, int16_t* steps) {
  // The bits of sizes are ordered as the sizes are, infinity above all and NaN above infinity.
  uint32_t largest_bits = 0;
  for (int64_t k = 0; k < length; ++k) {
    largest_bits = std::max(largest_bits, load<uint32_t>(x + k) & 0x7fffffffu);
  }
  const auto largest = load<float>(&largest_bits);
  if (!std::isfinite(largest)) {
    std::fill_n(steps, length, int16_t{1});
    return largest;
  }
  // Not so small that there are infinitely many.
  const float step = std::max(largest / kMostSteps, std::numeric_limits<float>::min());
  const float steps_per_unit = 1.0f / step;
  for (int64_t k = 0; k < length; ++k) {
    // Half to even by adding and taking away 1.5 * 2^23.
    const float rounded = (x[k] * steps_per_unit + 12582912.0f) - 12582912.0f;
    steps[k] = static_cast<int16_t>(rounded);
  }
  return step;
}

// All of x in whole steps, run by run.
CBF_FOR_EVERY_CPU void round_to_steps(const float* x, int64_t rows, int64_t inputs, int16_t* steps,
                                      float* step) {
  for (int64_t m = 0; m < rows; ++m, x += inputs, steps += inputs) {
    for (int64_t k = 0; k < inputs; k += kRun) {
      *step++ = round_to_steps(x + k, std::min(kRun, inputs - k), steps + k);
    }
  }
}

// x in the order that bfloat16 weights come apart in; what is over stays as it is.
CBF_FOR_EVERY_CPU void take_apart(const float* x, int64_t rows, int64_t inputs, float* apart) {
  for (int64_t m = 0; m < rows; ++m, x += inputs, apart += inputs) {
    int64_t k = 0;
    for (; k < inputs / kLine<at::BFloat16> * kLine<at::BFloat16>; k += kPairs) {
      const auto low = load<Floats>(x + k), high = load<Floats>(x + k + kLanes);
      const Floats even = CBF_SHUFFLE(low, high, 0, 2, 4, 6, 8, 10, 12, 14);
      const Floats odd = CBF_SHUFFLE(low, high, 1, 3, 5, 7, 9, 11, 13, 15);
      std::memcpy(apart + k, &even, sizeof even);
      std::memcpy(apart + k + kLanes, &odd, sizeof odd);
    }
    std::copy(x + k, x + inputs, apart + k);
  }
}

// x, each row over the root of its mean square, times norm.
CBF_FOR_EVERY_CPU void normalise(const float* x, int64_t rows, int64_t inputs, const float* norm,
                                 float eps, float* normed) {
  const int64_t whole = inputs / kLanes * kLanes;
  for (int64_t m = 0; m < rows; ++m, x += inputs, normed += inputs) {
    Floats sums = {};
    for (int64_t k = 0; k < whole; k += kLanes) sums += load<Floats>(x + k) * load<Floats>(x + k);
    float squares = sum(sums);
    for (int64_t k = whole; k < inputs; ++k) squares += x[k] * x[k];
    const float size = 1.0f / std::sqrt(squares / static_cast<float>(inputs) + eps);
    for (int64_t k = 0; k < inputs; ++k) normed[k] = x[k] * size * norm[k];
  }
}

// silu(gate) up, of gate and up side by side.
CBF_FOR_EVERY_CPU void gate(const float* both, int64_t rows, int64_t outputs, float* y) {
  for (int64_t m = 0; m < rows; ++m, both += 2 * outputs, y += outputs) {
    for (int64_t n = 0; n < outputs; n += kLanes) {
      const size_t bytes = std::min<int64_t>(kLanes, outputs - n) * sizeof(float);
      Floats own = {}, up = {};
      std::memcpy(&own, both + n, bytes);
      std::memcpy(&up, both + outputs + n, bytes);
      const Floats small = exponential(own < 0.0f ? own : -own);  // e^-|own|
      own = own * (own < 0.0f ? small : all(1.0f)) / (small + 1.0f) * up;
      std::memcpy(y + n, &own, bytes);
    }
  }
}

CBF_FOR_EVERY_CPU void add(const float* residual, int64_t count, float* y) {
  for (int64_t i = 0; i < count; ++i) y[i] += residual[i];
}

// The products of x (M, K) with all rows of weight.
struct Products {
  const float* x;
  int64_t rows, inputs, outputs;  // outputs: rows of weight
  float* y;

  template <typename W>
  void by(const float* own, const at::Tensor& weight) const {
    const Job<float, W> job = {own,    weight.const_data_ptr<W>(), nullptr, nullptr, y, inputs,
                               outputs};
    compute_in_parallel(job, rows);
  }

  void by_bfloat16(const at::Tensor& weight) const {
    std::vector<float> apart(rows * inputs);
    take_apart(x, rows, inputs, apart.data());
    by<at::BFloat16>(apart.data(), weight);
  }

  void by_int8(const at::Tensor& weight, const at::Tensor& scale) const {
    std::vector<int16_t> steps(rows * inputs);
    std::vector<float> step(rows * runs_of(inputs));
    round_to_steps(x, rows, inputs, steps.data(), step.data());
    const Job<int16_t, int8_t> job = {steps.data(),
                                      weight.const_data_ptr<int8_t>(),
                                      step.data(),
                                      scale.const_data_ptr<float>(),
                                      y,
                                      inputs,
                                      outputs};
    compute_in_parallel(job, rows);
  }

  void compute(const at::Tensor& weight, const std::optional<at::Tensor>& scale) const {
    switch (weight.scalar_type()) {
      case at::kChar:
        return by_int8(weight, *scale);
      case at::kBFloat16:
        return by_bfloat16(weight);
      case at::kHalf:
        return by<at::Half>(x, weight);
      default:
        return by<float>(x, weight);
    }
  }
};

at::Tensor skinny_linear(const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& scale,
                         const std::optional<at::Tensor>& norm,
                         const std::optional<at::Tensor>& residual, double eps, bool gated) {
  const SkinnyLinearSizes sizes = check_skinny_linear(x, weight, scale, norm, residual, gated);
  const at::Tensor wide = x.to(at::kFloat);
  at::Tensor y = at::empty({sizes.rows, sizes.outputs}, wide.options());
  std::vector<float> normed(norm ? sizes.rows * sizes.inputs : 0);
  std::vector<float> both(gated ? 2 * sizes.rows * sizes.outputs : 0);
  float* const out = y.mutable_data_ptr<float>();
  Products products = {wide.const_data_ptr<float>(), sizes.rows, sizes.inputs, weight.size(0),
                       gated ? both.data() : out};
  if (norm) {
    normalise(products.x, sizes.rows, sizes.inputs, norm->const_data_ptr<float>(),
              static_cast<float>(eps), normed.data());
    products.x = normed.data();
  }
  products.compute(weight, scale);
  if (gated) gate(both.data(), sizes.rows, sizes.outputs, out);
  if (residual) add(residual->to(at::kFloat).const_data_ptr<float>(), y.numel(), out);
  return y.to(x.scalar_type());
}

}  // namespace

}  // namespace chatterbox_fast

TORCH_LIBRARY_IMPL(chatterbox_fast, CPU, library) {
  library.impl("skinny_linear", &chatterbox_fast::skinny_linear);
}
