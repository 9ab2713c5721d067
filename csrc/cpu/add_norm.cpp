// CPU op of add_norm. Contract: chatterbox_fast/reference.py, add_norm.
//
// A row is taken to floats, normalised where it lies, in the first-level cache, and written out.
// What there is of channels is filled up to whole vectors; those of the last one that are none
// count for nothing.
#include "add_norm.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "floating.h"
#include "vectors.h"

namespace chatterbox_fast {

namespace {

constexpr int64_t kGrain = 1 << 14;  // elements a thread has at least

// A number a channel, and zeros up to a whole vector.
struct Numbers {
  float of[kMostAddNormChannels] = {};

  void set(const at::Tensor& numbers) {
    std::copy_n(numbers.const_data_ptr<float>(), numbers.numel(), of);
  }
  void set(const std::optional<at::Tensor>& numbers) {
    if (numbers) set(*numbers);
  }
};

// What all rows share.
struct Rules {
  Numbers weight, bias, offset, shift;
  int64_t channels;
  float eps;
  bool mish, has_offset;
};

// x tanh(log(1 + exp(x))), where tanh is of exponentials alone; from 20 on it is x.
CBF_INLINE Floats mish_of(Floats x) {
  const Floats e = exponential(x > 20.0f ? all(20.0f) : x);  // NaN is kept
  const Floats n = e * (e + 2.0f);
  return x * (n / (n + 2.0f));
}

// row + offset, and of that and the residual the sum, in both.
CBF_FOR_EVERY_CPU void add(const Rules& rules, float* row, float* residual) {
  if (rules.has_offset) {
    for (int64_t i = 0; i < rules.channels; ++i) row[i] += rules.offset.of[i];
  }
  if (residual == nullptr) return;
  for (int64_t i = 0; i < rules.channels; ++i) residual[i] = row[i] += residual[i];
}

constexpr int kSums = 4;  // that do not wait for each other

CBF_FUSED_FOR_EVERY_CPU void normalise(const Rules& rules, float* row) {
  constexpr int64_t kStep = kSums * kLanes;
  const int64_t channels = rules.channels, whole = (channels + kStep - 1) / kStep * kStep;
  std::fill(row + channels, row + whole, 0.0f);
  Floats sums[kSums] = {}, squares[kSums] = {};
  for (int64_t i = 0; i < whole; i += kStep) {
    for (int j = 0; j < kSums; ++j) sums[j] += load<Floats>(row + i + j * kLanes);
  }
  const float mean = sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / channels;
  std::fill(row + channels, row + whole, mean);
  for (int64_t i = 0; i < whole; i += kStep) {
    for (int j = 0; j < kSums; ++j) {
      const Floats rest = load<Floats>(row + i + j * kLanes) - mean;
      squares[j] += rest * rest;
    }
  }
  const float variance = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / channels;
  const float scale = 1.0f / std::sqrt(variance + rules.eps);
  for (int64_t i = 0; i < channels; i += kLanes) {
    const Floats own = (load<Floats>(row + i) - mean) * scale;
    Floats y = own * load<Floats>(rules.weight.of + i) + load<Floats>(rules.bias.of + i);
    if (rules.mish) y = mish_of(y);
    y += load<Floats>(rules.shift.of + i);
    std::memcpy(row + i, &y, sizeof y);
  }
}

// ---- Rows of the types.

template <typename T>
CBF_INLINE void widen_each(const T* x, int64_t count, float* row) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) narrow(finite<T>(floats_of(x + i)), row + i);
  if (i == count) return;
  T few[kLanes] = {};
  std::copy(x + i, x + count, few);
  float wide[kLanes];
  narrow(finite<T>(floats_of(few)), wide);
  std::copy(wide, wide + (count - i), row + i);
}

template <typename T>
CBF_INLINE void narrow_each(const float* row, int64_t count, T* y) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) narrow(finite<T>(load<Floats>(row + i)), y + i);
  if (i == count) return;
  T few[kLanes];  // the row goes on to a whole vector
  narrow(finite<T>(load<Floats>(row + i)), few);
  std::copy(few, few + (count - i), y + i);
}

CBF_FOR_EVERY_CPU void widen(const at::Half* x, int64_t count, float* row) {
  widen_each(x, count, row);
}
CBF_FOR_EVERY_CPU void widen(const at::BFloat16* x, int64_t count, float* row) {
  widen_each(x, count, row);
}
void widen(const float* x, int64_t count, float* row) { std::copy_n(x, count, row); }

CBF_FOR_EVERY_CPU void narrow_row(const float* row, int64_t count, at::Half* y) {
  narrow_each(row, count, y);
}
CBF_FOR_EVERY_CPU void narrow_row(const float* row, int64_t count, at::BFloat16* y) {
  narrow_each(row, count, y);
}
void narrow_row(const float* row, int64_t count, float* y) { std::copy_n(row, count, y); }

template <typename X, typename Y>
void compute(const at::Tensor& x, const Rules& rules, float* residual, at::Tensor& y) {
  const X* from = x.const_data_ptr<X>();
  Y* to = y.mutable_data_ptr<Y>();
  const int64_t times = x.size(1), channels = rules.channels, rows = x.size(0) * times;
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / channels), [&](int64_t r, int64_t end) {
    float row[kMostAddNormChannels];
    for (; r < end; ++r) {
      widen(from + r / times * x.stride(0) + r % times * x.stride(1), channels, row);
      add(rules, row, residual == nullptr ? nullptr : residual + r * channels);
      normalise(rules, row);
      narrow_row(row, channels, to + r * channels);
    }
  });
}

at::Tensor add_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                    const std::optional<at::Tensor>& residual,
                    const std::optional<at::Tensor>& offset, const std::optional<at::Tensor>& shift,
                    double eps, bool mish, std::optional<at::ScalarType> dtype) {
  const auto type = check_add_norm(x, weight, bias, residual, offset, shift, dtype);
  at::Tensor y = at::empty(x.sizes(), x.options().dtype(type));
  if (y.numel() == 0) return y;
  Rules rules = {};
  rules.weight.set(weight);
  rules.bias.set(bias);
  rules.offset.set(offset);
  rules.shift.set(shift);
  rules.channels = x.size(2);
  rules.eps = static_cast<float>(eps);
  rules.mish = mish;
  rules.has_offset = offset.has_value();
  float* const sums = residual ? residual->mutable_data_ptr<float>() : nullptr;
  by_type(x.scalar_type(), [&](auto x_zero) {
    by_type(type,
            [&](auto y_zero) { compute<decltype(x_zero), decltype(y_zero)>(x, rules, sums, y); });
  });
  return y;
}

}  // namespace

}  // namespace chatterbox_fast

TORCH_LIBRARY_IMPL(chatterbox_fast, CPU, library) {
  library.impl("add_norm", &chatterbox_fast::add_norm);
}
