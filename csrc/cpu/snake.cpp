// CPU op of snake. Contract: chatterbox_fast/reference.py, snake.
//
// The squared sine has period pi and no sign: alpha x, rounded to float as stock rounds it, less
// its nearest multiple of pi, taken in double, then a polynomial. Where the multiple is no longer
// exact, at 2^52, what is left is held within a period: x is so much larger that any sine will do.
// Where there are few channels, several rows of x are taken for one, alpha and inverse repeated.
#include "snake.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
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

template <typename T>
CBF_INLINE void activate_vector(const T* x, const float* alpha, const float* inverse, T* y) {
  const Floats own = floats_of(x);
  narrow(own + squared_sine(load<Floats>(alpha) * own) * load<Floats>(inverse), y);
}

template <typename T>
CBF_INLINE void activate_each(const T* x, const float* alpha, const float* inverse, int64_t count,
                              T* y) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) activate_vector(x + i, alpha + i, inverse + i, y + i);
  if (i == count) return;
  T few[kLanes] = {};
  float few_alpha[kLanes] = {}, few_inverse[kLanes] = {};
  std::copy(x + i, x + count, few);
  std::copy(alpha + i, alpha + count, few_alpha);
  std::copy(inverse + i, inverse + count, few_inverse);
  activate_vector(few, few_alpha, few_inverse, few);
  std::copy(few, few + (count - i), y + i);
}

CBF_FOR_EVERY_CPU void activate(const float* x, const float* alpha, const float* inverse,
                                int64_t count, float* y) {
  activate_each(x, alpha, inverse, count, y);
}

CBF_FOR_EVERY_CPU void activate(const at::Half* x, const float* alpha, const float* inverse,
                                int64_t count, at::Half* y) {
  activate_each(x, alpha, inverse, count, y);
}

CBF_FOR_EVERY_CPU void activate(const at::BFloat16* x, const float* alpha, const float* inverse,
                                int64_t count, at::BFloat16* y) {
  activate_each(x, alpha, inverse, count, y);
}

template <typename T>
void compute(const at::Tensor& x, const at::Tensor& alpha, const at::Tensor& inverse,
             at::Tensor& y) {
  const int64_t repeats = std::max<int64_t>(1, kShortest / x.size(-1));
  const at::Tensor own_alpha = alpha.repeat(repeats), own_inverse = inverse.repeat(repeats);
  const auto *alphas = own_alpha.const_data_ptr<float>(),
             *inverses = own_inverse.const_data_ptr<float>();
  const T* from = x.const_data_ptr<T>();
  T* to = y.mutable_data_ptr<T>();
  const int64_t all = x.numel(), length = own_alpha.numel();
  const int64_t rows = (all + length - 1) / length;
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / length), [&](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      const int64_t start = row * length;
      activate(from + start, alphas, inverses, std::min(length, all - start), to + start);
    }
  });
}

at::Tensor snake(const at::Tensor& x, const at::Tensor& alpha, const at::Tensor& inverse) {
  check_snake(x, alpha, inverse);
  at::Tensor y = at::empty_like(x);
  if (y.numel() == 0) return y;
  by_type(x.scalar_type(), [&](auto zero) { compute<decltype(zero)>(x, alpha, inverse, y); });
  return y;
}

}  // namespace

}  // namespace chatterbox_fast

TORCH_LIBRARY_IMPL(chatterbox_fast, CPU, library) {
  library.impl("snake", &chatterbox_fast::snake);
}
