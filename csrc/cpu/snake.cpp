// CPU op of snake. Contract: chatterbox_fast/reference.py, snake.
//
// The squared sine has period pi and no sign: alpha x, rounded to float as stock rounds it, less
// its nearest multiple of pi, taken in double, then a polynomial. Where the multiple is no longer
// exact, at 2^52, what is left is held within a period: x is so much larger that any sine will do.
// Where there are few channels, several rows of x are taken for one, the channels' numbers
// repeated.
#include "snake.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>

#include "floating.h"
#include "vectors.h"

namespace chatterbox_fast {

namespace {

constexpr int64_t kShortest = 512;   // elements of a row, about
constexpr int64_t kGrain = 1 << 14;  // elements a thread has at least

using Doubles = double __attribute__((vector_size(8 * kLanes)));

// sin(angle)^2, the sine to about two units in the last place.
CBF_INLINE Floats squared_sine(Floats angle) {
  constexpr double kPi = 3.14159265358979323846, kPerPi = 0.31830988618379067154;
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: added and taken away, it rounds
  constexpr float kHalfPi = 1.5707964f;
  const Doubles wide = __builtin_convertvector(angle, Doubles);
  const Doubles multiple = (wide * kPerPi + kRound) - kRound;
  Floats rest = __builtin_convertvector(wide - multiple * kPi, Floats);
  rest = rest > kHalfPi ? all(kHalfPi) : rest;  // NaN is kept
  rest = rest < -kHalfPi ? all(-kHalfPi) : rest;
  const Floats square = rest * rest;
  // The minimax polynomial of the sine, 6e-9 relative.
  Floats tail = square * 2.6057496143039316e-06f - 1.9809589139185846e-04f;
  tail = tail * square + 8.33306647837162e-03f;
  tail = tail * square - 1.6666659712791443e-01f;
  const Floats sine = rest + rest * (square * tail);
  return sine * sine;
}

// A number a channel each, the channels repeated; the offset may be zeros.
struct Numbers {
  const float *alpha, *inverse, *offset;
};

template <bool kSum, typename T>
CBF_INLINE void activate_vector(const T* x, const Numbers& numbers, int64_t place, T* residual,
                                T* y) {
  Floats z = finite<T>(floats_of(x)) + load<Floats>(numbers.offset + place);
  if (kSum) z = floats_of(residual) + z;
  z = finite<T>(z);
  if (kSum) narrow(z, residual);
  const Floats sine = squared_sine(load<Floats>(numbers.alpha + place) * z);
  narrow(finite<T>(z + sine * load<Floats>(numbers.inverse + place)), y);
}

template <bool kSum, typename T>
CBF_INLINE void activate_sums(const T* x, const Numbers& numbers, int64_t count, T* residual,
                              T* y) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    activate_vector<kSum>(x + i, numbers, i, kSum ? residual + i : nullptr, y + i);
  }
  if (i == count) return;
  T few[kLanes] = {}, few_sums[kLanes] = {};
  float own[3][kLanes] = {};
  const float* const all[3] = {numbers.alpha, numbers.inverse, numbers.offset};
  std::copy(x + i, x + count, few);
  if (kSum) std::copy(residual + i, residual + count, few_sums);
  for (int j = 0; j < 3; ++j) std::copy(all[j] + i, all[j] + count, own[j]);
  activate_vector<kSum>(few, {own[0], own[1], own[2]}, 0, few_sums, few);
  std::copy(few, few + (count - i), y + i);
  if (kSum) std::copy(few_sums, few_sums + (count - i), residual + i);
}

template <typename T>
CBF_INLINE void activate_each(const T* x, const Numbers& numbers, int64_t count, T* residual,
                              T* y) {
  if (residual == nullptr) return activate_sums<false>(x, numbers, count, residual, y);
  activate_sums<true>(x, numbers, count, residual, y);
}

CBF_FOR_EVERY_CPU void activate(const float* x, const Numbers& numbers, int64_t count,
                                float* residual, float* y) {
  activate_each(x, numbers, count, residual, y);
}

CBF_FOR_EVERY_CPU void activate(const at::Half* x, const Numbers& numbers, int64_t count,
                                at::Half* residual, at::Half* y) {
  activate_each(x, numbers, count, residual, y);
}

CBF_FOR_EVERY_CPU void activate(const at::BFloat16* x, const Numbers& numbers, int64_t count,
                                at::BFloat16* residual, at::BFloat16* y) {
  activate_each(x, numbers, count, residual, y);
}

template <typename T>
void compute(const at::Tensor& x, const at::Tensor& alpha, const at::Tensor& inverse,
             const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& offset,
             at::Tensor& y) {
  const int64_t repeats = std::max<int64_t>(1, kShortest / x.size(-1));
  const at::Tensor own_alpha = alpha.repeat(repeats), own_inverse = inverse.repeat(repeats);
  const at::Tensor own_offset = offset ? offset->repeat(repeats) : at::zeros_like(own_alpha);
  const Numbers numbers = {own_alpha.const_data_ptr<float>(), own_inverse.const_data_ptr<float>(),
                           own_offset.const_data_ptr<float>()};
  const T* from = x.const_data_ptr<T>();
  T* const sums = residual ? residual->mutable_data_ptr<T>() : nullptr;
  T* to = y.mutable_data_ptr<T>();
  const int64_t all = x.numel(), length = own_alpha.numel();
  const int64_t rows = (all + length - 1) / length;
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / length), [&](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      const int64_t start = row * length, count = std::min(length, all - start);
      activate(from + start, numbers, count, sums == nullptr ? nullptr : sums + start, to + start);
    }
  });
}

at::Tensor snake(const at::Tensor& x, const at::Tensor& alpha, const at::Tensor& inverse,
                 const std::optional<at::Tensor>& residual,
                 const std::optional<at::Tensor>& offset) {
  check_snake(x, alpha, inverse, residual, offset);
  at::Tensor y = at::empty_like(x);
  if (y.numel() == 0) return y;
  by_type(x.scalar_type(),
          [&](auto zero) { compute<decltype(zero)>(x, alpha, inverse, residual, offset, y); });
  return y;
}

}  // namespace

}  // namespace chatterbox_fast

TORCH_LIBRARY_IMPL(chatterbox_fast, CPU, library) {
  library.impl("snake", &chatterbox_fast::snake);
}
