// CPU op of skinny_linear: reads the weights once, at the speed of memory. Contract:
// chatterbox_fast/reference.py, skinny_linear.
//
// A thread takes a range of outputs, two at a time, so that each vector of x that it loads serves
// two weights and each vector of weights serves all rows of x. x is first copied into the order in
// which the weights come apart:
// - float: as it is. Other types of weight without a path of their own are widened row by row;
// - bfloat16: two to a 32-bit word, taken apart with a shift and a mask into even and odd ones;
// - int8: x is rounded to 15 bits with one scale a row, and products are summed as integers, in
//   runs short enough for 32 bits; the error is below that of rounding x to bfloat16. With AVX2,
//   two neighbours share a 16-bit lane and come apart with shifts, as bfloat16 does.
// Sums are float (int8: exact within a run). The result does not depend on the number of threads.
#include "skinny_linear.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "vectors.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define CBF_HAS_AVX2_SOURCE 1
#include <immintrin.h>
#else
#define CBF_HAS_AVX2_SOURCE 0
#endif

namespace chatterbox_fast {

namespace {

constexpr int kAtOnce = 2;             // outputs
constexpr int64_t kAhead = 16384;      // bytes that are fetched before they are read
constexpr int64_t kCacheLine = 64;     // bytes
constexpr int64_t kGrain = 1 << 15;    // weights a task has at least
constexpr float kMostSteps = 16383.f;  // of an x rounded for int8: 15 bits with the sign
constexpr int64_t kRun = 1024;         // 1024 * 127 * 16383 < 2^31

template <typename T>
CBF_INLINE void prefetch(const T* weight) {
  __builtin_prefetch(reinterpret_cast<const char*>(weight) + kAhead);
}

// y[m][r] = sum over k of x[m][k] weight[r][k], for kRows rows of x and kOut of weight.
template <int kRows, int kOut>
CBF_INLINE void dot(const float* x, const float* weight, int64_t inputs, float (&y)[kRows][kOut]) {
  Floats sums[kRows][kOut] = {};
  const int64_t whole = inputs / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
    Floats w[kOut];
    for (int r = 0; r < kOut; ++r) {
      prefetch(weight + r * inputs + k);
      w[r] = load<Floats>(weight + r * inputs + k);
    }
    for (int m = 0; m < kRows; ++m) {
      const auto own = load<Floats>(x + m * inputs + k);
      for (int r = 0; r < kOut; ++r) sums[m][r] += own * w[r];
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int r = 0; r < kOut; ++r) {
      y[m][r] = sum(sums[m][r]);
      for (int64_t k = whole; k < inputs; ++k)
        y[m][r] += x[m * inputs + k] * weight[r * inputs + k];
    }
  }
}

// The same for bfloat16 weights. Of every 16 values of x the even ones come first.
template <int kRows, int kOut>
CBF_INLINE void dot(const float* x, const at::BFloat16* weight, int64_t inputs,
                    float (&y)[kRows][kOut]) {
  Floats sums[kRows][kOut] = {};
  const int64_t whole = inputs / (2 * kLanes) * (2 * kLanes);
  for (int64_t k = 0; k < whole; k += 2 * kLanes) {
    Floats even[kOut], odd[kOut];
    for (int r = 0; r < kOut; ++r) {
      prefetch(weight + r * inputs + k);
      const auto pairs = load<Words>(weight + r * inputs + k);
      even[r] = (Floats)(pairs << 16);
      odd[r] = (Floats)(pairs & 0xffff0000u);
    }
    for (int m = 0; m < kRows; ++m) {
      const auto own_even = load<Floats>(x + m * inputs + k);
      const auto own_odd = load<Floats>(x + m * inputs + k + kLanes);
      for (int r = 0; r < kOut; ++r) sums[m][r] += own_even * even[r] + own_odd * odd[r];
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int r = 0; r < kOut; ++r) {
      y[m][r] = sum(sums[m][r]);
      for (int64_t k = whole; k < inputs; ++k) {
        y[m][r] += x[m * inputs + k] * static_cast<float>(weight[r * inputs + k]);
      }
    }
  }
}

// The same for int8 weights and an x of whole steps.
template <int kRows, int kOut>
CBF_INLINE void dot(const int16_t* x, const int8_t* weight, int64_t inputs,
                    float (&y)[kRows][kOut]) {
  for (int m = 0; m < kRows; ++m) {
    for (int r = 0; r < kOut; ++r) y[m][r] = 0.0f;
  }
  for (int64_t start = 0; start < inputs; start += kRun) {
    const int64_t end = std::min(inputs, start + kRun);
    int32_t sums[kRows][kOut] = {};
    for (int64_t k = start; k < end; k += kCacheLine) {
      for (int r = 0; r < kOut; ++r) prefetch(weight + r * inputs + k);
    }
    for (int64_t k = start; k < end; ++k) {
      for (int r = 0; r < kOut; ++r) {
        const int16_t w = weight[r * inputs + k];
        for (int m = 0; m < kRows; ++m) sums[m][r] += int32_t{w} * int32_t{x[m * inputs + k]};
      }
    }
    for (int m = 0; m < kRows; ++m) {
      for (int r = 0; r < kOut; ++r) y[m][r] += static_cast<float>(sums[m][r]);
    }
  }
}

// An x of whole steps, of every 32 the even ones first.
struct PairedStep {
  int16_t value;
};

#if CBF_HAS_AVX2_SOURCE
#define CBF_AVX2 __attribute__((target("avx2")))

constexpr int64_t kBytesAtOnce = 32;

CBF_AVX2 inline int32_t sum_of_lanes(__m256i lanes) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

// sums += the products of 32 inputs. Neighbouring weights share a lane; shifts take them apart.
template <int kRows, int kOut>
CBF_AVX2 inline void add_products(const PairedStep* x, const int8_t* weight, int64_t inputs,
                                  __m256i (&sums)[kRows][kOut]) {
  __m256i even[kOut], odd[kOut];
  for (int r = 0; r < kOut; ++r) {
    prefetch(weight + r * inputs);
    const auto pairs = load<__m256i>(weight + r * inputs);
    even[r] = _mm256_srai_epi16(_mm256_slli_epi16(pairs, 8), 8);
    odd[r] = _mm256_srai_epi16(pairs, 8);
  }
  for (int m = 0; m < kRows; ++m) {
    const auto own_even = load<__m256i>(x + m * inputs);
    const auto own_odd = load<__m256i>(x + m * inputs + kBytesAtOnce / 2);
    for (int r = 0; r < kOut; ++r) {
      sums[m][r] = _mm256_add_epi32(sums[m][r], _mm256_madd_epi16(own_even, even[r]));
      sums[m][r] = _mm256_add_epi32(sums[m][r], _mm256_madd_epi16(own_odd, odd[r]));
    }
  }
}

template <int kRows, int kOut>
CBF_AVX2 __attribute__((noinline)) void dot(const PairedStep* x, const int8_t* weight,
                                            int64_t inputs, float (&y)[kRows][kOut]) {
  for (int i = 0; i < kRows * kOut; ++i) y[i / kOut][i % kOut] = 0.0f;
  const int64_t whole = inputs / kBytesAtOnce * kBytesAtOnce;
  for (int64_t start = 0; start < whole; start += kRun) {
    const int64_t end = std::min(whole, start + kRun);
    __m256i sums[kRows][kOut];
    for (int i = 0; i < kRows * kOut; ++i) sums[i / kOut][i % kOut] = _mm256_setzero_si256();
    for (int64_t k = start; k < end; k += kBytesAtOnce)
      add_products(x + k, weight + k, inputs, sums);
    for (int i = 0; i < kRows * kOut; ++i) {
      y[i / kOut][i % kOut] += static_cast<float>(sum_of_lanes(sums[i / kOut][i % kOut]));
    }
  }
  for (int64_t k = whole; k < inputs; ++k) {
    for (int i = 0; i < kRows * kOut; ++i) {
      const int m = i / kOut, r = i % kOut;
      y[m][r] +=
          static_cast<float>(int32_t{weight[r * inputs + k]} * int32_t{x[m * inputs + k].value});
    }
  }
}

bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2");
  return has;
}
#else
template <int kRows, int kOut>
void dot(const PairedStep*, const int8_t*, int64_t, float (&)[kRows][kOut]) {}

bool has_avx2() { return false; }
#endif

// What a task reads and writes. `x` is in the order that dot() takes for this type of weight.
template <typename X, typename W>
struct Job {
  const X* x;               // (M, K)
  const W* weight;          // (N, K)
  const float* row_scale;   // (M,), or null: 1
  const float* scale;       // (N,), or null: 1
  float* y;                 // (M, N)
  int64_t inputs, outputs;  // K, N
};

template <int kRows, int kOut, typename X, typename W>
CBF_INLINE void few_outputs(const Job<X, W>& job, int64_t row, int64_t output) {
  float y[kRows][kOut];
  dot<kRows, kOut>(job.x + row * job.inputs, job.weight + output * job.inputs, job.inputs, y);
  for (int m = 0; m < kRows; ++m) {
    for (int r = 0; r < kOut; ++r) {
      float scale = job.scale == nullptr ? 1.0f : job.scale[output + r];
      if (job.row_scale != nullptr) scale *= job.row_scale[row + m];
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
  for (; output + kAtOnce <= end; output += kAtOnce) all_rows<kAtOnce>(job, rows, output);
  for (; output < end; ++output) all_rows<1>(job, rows, output);
}

CBF_FOR_EVERY_CPU void compute(const Job<float, float>& job, int64_t rows, int64_t begin,
                               int64_t end) {
  some_outputs(job, rows, begin, end);
}

CBF_FOR_EVERY_CPU void compute(const Job<float, at::BFloat16>& job, int64_t rows, int64_t begin,
                               int64_t end) {
  some_outputs(job, rows, begin, end);
}

CBF_FOR_EVERY_CPU void compute(const Job<int16_t, int8_t>& job, int64_t rows, int64_t begin,
                               int64_t end) {
  some_outputs(job, rows, begin, end);
}

void compute(const Job<PairedStep, int8_t>& job, int64_t rows, int64_t begin, int64_t end) {
  some_outputs(job, rows, begin, end);
}

template <typename X, typename W>
void compute_in_parallel(const Job<X, W>& job, int64_t rows) {
  const int64_t grain = std::max<int64_t>(kAtOnce, kGrain / std::max<int64_t>(job.inputs, 1));
  // Ranges of whole pairs, whatever the number of threads: a sum is always made the same way.
  const int64_t pairs = (job.outputs + kAtOnce - 1) / kAtOnce;
  at::parallel_for(0, pairs, grain / kAtOnce, [&](int64_t begin, int64_t end) {
    compute(job, rows, kAtOnce * begin, std::min(kAtOnce * end, job.outputs));
  });
}

// x with the even ones of every kGroup first; what is over stays in its order.
template <int kGroup, typename From, typename To>
void take_apart(const From* x, int64_t rows, int64_t inputs, To* apart) {
  const int64_t whole = inputs / kGroup * kGroup;
  for (int64_t m = 0; m < rows; ++m, x += inputs, apart += inputs) {
    for (int64_t k = 0; k < whole; k += kGroup) {
      for (int i = 0; i < kGroup / 2; ++i) {
        apart[k + i] = To{x[k + 2 * i]};
        apart[k + kGroup / 2 + i] = To{x[k + 2 * i + 1]};
      }
    }
    for (int64_t k = whole; k < inputs; ++k) apart[k] = To{x[k]};
  }
}

// x in whole steps; the size of a step, a row: NaN or infinite where the row has such a value.
CBF_FOR_EVERY_CPU void round_to_steps(const float* x, int64_t rows, int64_t inputs, int16_t* steps,
                                      float* step) {
  for (int64_t m = 0; m < rows; ++m, x += inputs, steps += inputs) {
    float largest = 0.0f;
    for (int64_t k = 0; k < inputs; ++k) {
      const float size = std::fabs(x[k]);
      largest = size > largest || size != size ? size : largest;
      if (largest != largest) break;
    }
    step[m] = largest / kMostSteps;
    const float steps_per_unit = largest > 0.0f && std::isfinite(largest) ? 1.0f / step[m] : 0.0f;
    for (int64_t k = 0; k < inputs; ++k) {
      // Half to even by adding and taking away 1.5 * 2^23.
      const float rounded = (x[k] * steps_per_unit + 12582912.0f) - 12582912.0f;
      steps[k] = std::isfinite(largest) ? static_cast<int16_t>(rounded) : 1;
    }
  }
}

void by_float(const at::Tensor& x, const at::Tensor& weight, const SkinnyLinearSizes& sizes,
              float* y) {
  const Job<float, float> job = {x.const_data_ptr<float>(),
                                 weight.const_data_ptr<float>(),
                                 nullptr,
                                 nullptr,
                                 y,
                                 sizes.inputs,
                                 sizes.outputs};
  compute_in_parallel(job, sizes.rows);
}

void by_bfloat16(const at::Tensor& x, const at::Tensor& weight, const SkinnyLinearSizes& sizes,
                 float* y) {
  std::vector<float> apart(sizes.rows * sizes.inputs);
  take_apart<2 * kLanes>(x.const_data_ptr<float>(), sizes.rows, sizes.inputs, apart.data());
  const Job<float, at::BFloat16> job = {
      apart.data(), weight.const_data_ptr<at::BFloat16>(), nullptr, nullptr, y, sizes.inputs,
      sizes.outputs};
  compute_in_parallel(job, sizes.rows);
}

void by_int8(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
             const SkinnyLinearSizes& sizes, float* y) {
  std::vector<int16_t> steps(sizes.rows * sizes.inputs);
  std::vector<float> step(sizes.rows);
  round_to_steps(x.const_data_ptr<float>(), sizes.rows, sizes.inputs, steps.data(), step.data());
  const auto run = [&](const auto* ordered) {
    using X = std::decay_t<decltype(*ordered)>;
    const Job<X, int8_t> job = {ordered,
                                weight.const_data_ptr<int8_t>(),
                                step.data(),
                                scale.const_data_ptr<float>(),
                                y,
                                sizes.inputs,
                                sizes.outputs};
    compute_in_parallel(job, sizes.rows);
  };
  if (!has_avx2()) return run(steps.data());
  std::vector<PairedStep> paired(steps.size());
  take_apart<32>(steps.data(), sizes.rows, sizes.inputs, paired.data());
  run(paired.data());
}

at::Tensor skinny_linear(const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& scale) {
  const SkinnyLinearSizes sizes = check_skinny_linear(x, weight, scale);
  const at::Tensor wide = x.to(at::kFloat);
  at::Tensor y = at::empty({sizes.rows, sizes.outputs}, wide.options());
  float* out = y.mutable_data_ptr<float>();
  switch (weight.scalar_type()) {
    case at::kChar:
      by_int8(wide, weight, *scale, sizes, out);
      break;
    case at::kBFloat16:
      by_bfloat16(wide, weight, sizes, out);
      break;
    default:
      by_float(wide, weight.to(at::kFloat), sizes, out);
  }
  return y.to(x.scalar_type());
}

}  // namespace

}  // namespace chatterbox_fast

TORCH_LIBRARY_IMPL(chatterbox_fast, CPU, library) {
  library.impl("skinny_linear", &chatterbox_fast::skinny_linear);
}
