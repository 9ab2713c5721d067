// CPU op of resample. Contract: chatterbox_fast/reference.py, resample.
//
// A task makes a range of outputs of one row. Where the samples that they need are not all there,
// or not floats, it first copies them into a buffer of its own, zeros where there are none: the
// loops know no edges and one dtype. Where there are few phases and neighbours' filters overlap,
// four outputs share a window of samples, which their filters are widened to by zeros, and two such
// windows share the filters: six loads serve eight vectors of products. A last step adds the lanes
// of all eight sums at once.
// The result does not depend on the number of threads. What is not finite meets the zeros too: it
// reaches a few outputs more than its filters do, fewer than in torchaudio.
#include "resample.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include "floating.h"
#include "vectors.h"

namespace chatterbox_fast {

namespace {

constexpr int64_t kFewPhases = 512;
constexpr int kQuad = 4;                   // outputs that share a window
constexpr int64_t kTaskOutputs = 2048;     // at most, about
constexpr int64_t kTaskSamples = 1 << 16;  // by which a task advances at most, about
constexpr int64_t kGrain = 1 << 15;        // products a thread has at least

struct Bank {
  const float* filters;  // (P, K)
  const float* first;    // (F, K)
  int64_t phases, taps, first_count, stride, left;

  int64_t start(int64_t output) const { return output * stride / phases - left; }
  // By how many samples the last of `count` outputs is ahead of the first, at least.
  int64_t ahead(int64_t count) const { return (count - 1) * stride / phases; }
  const float* of(int64_t output) const {
    return output < first_count ? first + output * taps : filters + output % phases * taps;
  }
};

// The filters of outputs 0, 1, ... as quads use them; they repeat after `period` outputs.
struct Quads {
  at::Tensor filters;             // (period, taps); torch aligns it to a cache line
  int64_t period, taps, advance;  // `advance`: by how many samples a period advances

  explicit Quads(const Bank& bank) {
    period = std::lcm(bank.phases, int64_t{kQuad});
    advance = period / bank.phases * bank.stride;
    const int64_t widest = bank.taps + bank.ahead(kQuad) + 1;
    taps = (widest + kLanes - 1) / kLanes * kLanes;
    filters = at::zeros({period, taps}, at::kFloat);
    float* const rows = filters.mutable_data_ptr<float>();
    for (int64_t j = 0; j < period; ++j) {
      const float* own = bank.filters + j % bank.phases * bank.taps;
      const int64_t shift = bank.start(j) - bank.start(j / kQuad * kQuad);
      std::copy(own, own + bank.taps, rows + j * taps + shift);
    }
  }
};

// Outputs [begin, end) of a row. `samples` is sample `origin` of it, with zeros around the row.
struct Task {
  const float* samples;
  int64_t origin, begin, end;
  float* out;  // of output 0

  // The last four lanes are `apart` outputs after the first four.
  CBF_INLINE void put(const Floats& y, int64_t output, int64_t apart) const {
    if (output + apart + kQuad <= end) {
      std::memcpy(out + output, &y, sizeof y / 2);
      std::memcpy(out + output + apart, reinterpret_cast<const float*>(&y) + kQuad, sizeof y / 2);
      return;
    }
    for (int i = 0; i < kLanes; ++i) {
      const int64_t own = output + i / kQuad * apart + i % kQuad;
      if (own < end) out[own] = y[i];
    }
  }
};

// Floats anywhere in memory, read once: GCC would read them again for each product.
using FloatsOnce =
    const volatile float __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

CBF_INLINE Floats load_once(const float* from) { return *reinterpret_cast<FloatsOnce*>(from); }

// Sums of products of two windows of samples, `apart` apart, with four filters each.
CBF_INLINE Floats two_by_four(const float* x, int64_t apart, const float* filters, int64_t taps) {
  Floats sums[kLanes] = {};
  for (int64_t k = 0; k < taps; k += kLanes) {
    const auto one = load_once(x + k), other = load_once(x + apart + k);
    for (int i = 0; i < kQuad; ++i) {
      const auto own = load_once(filters + i * taps + k);
      sums[i] += one * own;
      sums[kQuad + i] += other * own;
    }
  }
  return sum_of_each(sums);
}

// Sums of products of eight windows with a filter each.
CBF_INLINE Floats eight_filters(const float* const (&x)[kLanes],
                                const float* const (&filters)[kLanes], int64_t taps) {
  Floats sums[kLanes] = {};
  const int64_t whole = taps / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
    for (int i = 0; i < kLanes; ++i)
      sums[i] += load<Floats>(x[i] + k) * load<Floats>(filters[i] + k);
  }
  Floats total = sum_of_each(sums);
  for (int64_t k = whole; k < taps; ++k) {
    for (int i = 0; i < kLanes; ++i) total[i] += x[i][k] * filters[i][k];
  }
  return total;
}

// Pairs of whole periods of `quads`, four outputs of both after another.
CBF_FUSED_FOR_EVERY_CPU void run_by_quads(const Bank& bank, const Quads& quads, const Task& task) {
  const int64_t taps = quads.taps, pair = 2 * quads.period;
  for (int64_t q = 0; q < quads.period; q += kQuad) {
    const float* const filters = quads.filters.const_data_ptr<float>() + q * taps;
    const float* x = task.samples + (bank.start(task.begin + q) - task.origin);
    for (int64_t output = task.begin + q; output < task.end; output += pair) {
      task.put(two_by_four(x, quads.advance, filters, taps), output, quads.period);
      x += 2 * quads.advance;
    }
  }
}

// Output by output, up to `end`.
CBF_FUSED_FOR_EVERY_CPU void run_in_order(const Bank& bank, const Task& task, int64_t end) {
  for (int64_t output = task.begin; output < end; output += kLanes) {
    const float *x[kLanes], *filters[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t own = std::min(output + i, end - 1);
      x[i] = task.samples + (bank.start(own) - task.origin);
      filters[i] = bank.of(own);
    }
    const Floats y = eight_filters(x, filters, bank.taps);
    for (int i = 0; i < kLanes && output + i < end; ++i) task.out[output + i] = y[i];
  }
}

// Sample `begin` of a row and the `count` - 1 after it, 0 where there is none: in the row itself
// where they are all there, as floats, or else in `copy`.
template <typename T>
const float* samples_of(const T* row, int64_t samples, int64_t begin, int64_t count,
                        std::vector<float>& copy) {
  if constexpr (std::is_same_v<T, float>) {
    if (begin >= 0 && begin + count <= samples) return row + begin;
  }
  const int64_t from = std::clamp<int64_t>(begin, 0, samples);
  const int64_t until = std::clamp<int64_t>(begin + count, from, samples);
  copy.assign(count, 0.0f);
  if (from < until) std::copy(row + from, row + until, copy.begin() + (from - begin));
  return copy.data();
}

// Outputs of a task: a multiple of `unit`, few where a stride of many samples lies between them.
int64_t task_outputs(const Bank& bank, int64_t unit) {
  const int64_t near = std::min(kTaskOutputs, kTaskSamples * bank.phases / bank.stride);
  return unit * std::max<int64_t>(1, near / unit);
}

// compute(task) for ranges of `task_outputs` or fewer of every row; a task may read the samples of
// a multiple of `unit` outputs with filters of `taps`, whatever its own end is.
template <typename T, typename Compute>
void for_every_task(const Bank& bank, const ResampleSizes& sizes, int64_t length, int64_t unit,
                    int64_t taps, const T* waveform, float* out, const Compute& compute) {
  const int64_t size = task_outputs(bank, unit);
  const int64_t tasks = (length + size - 1) / size;
  const int64_t grain = std::max<int64_t>(1, kGrain / (size * taps));
  at::parallel_for(0, sizes.rows * tasks, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> copy;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = t / tasks, output = t % tasks * size;
      const int64_t until = std::min(length, output + size);
      const int64_t read = (until - output + unit - 1) / unit * unit;
      const int64_t origin = bank.start(output);
      const int64_t count = bank.start(output + read - 1) - origin + taps;
      const float* samples =
          samples_of(waveform + row * sizes.samples, sizes.samples, origin, count, copy);
      compute(Task{samples, origin, output, until, out + row * length});
    }
  });
}

template <typename T>
void compute(const Bank& bank, const ResampleSizes& sizes, int64_t length, const T* waveform,
             float* out) {
  if (bank.phases > kFewPhases || bank.ahead(kQuad) > bank.taps) {
    for_every_task(bank, sizes, length, 1, bank.taps, waveform, out,
                   [&](const Task& task) { run_in_order(bank, task, task.end); });
    return;
  }
  const Quads quads(bank);
  const int64_t pair = 2 * quads.period;
  for_every_task(bank, sizes, length, pair, quads.taps, waveform, out, [&](const Task& task) {
    run_by_quads(bank, quads, task);
    run_in_order(bank, task, std::min(bank.first_count, task.end));
  });
}

at::Tensor resample(const at::Tensor& waveform, const at::Tensor& filters,
                    const std::optional<at::Tensor>& first, int64_t stride, int64_t left,
                    int64_t length) {
  const ResampleSizes sizes = check_resample(waveform, filters, first, stride, left, length);
  at::Tensor y = at::empty({sizes.rows, length}, waveform.options().dtype(at::kFloat));
  if (y.numel() == 0) return y.to(waveform.scalar_type());
  const at::Tensor rows = filters.contiguous();
  const Bank bank = {rows.const_data_ptr<float>(),
                     first.has_value() ? first->const_data_ptr<float>() : nullptr,
                     sizes.phases,
                     sizes.taps,
                     sizes.first,
                     stride,
                     left};
  float* out = y.mutable_data_ptr<float>();
  by_type(waveform.scalar_type(), [&](auto zero) {
    compute(bank, sizes, length, waveform.const_data_ptr<decltype(zero)>(), out);
  });
  return y.to(waveform.scalar_type());
}

}  // namespace

}  // namespace chatterbox_fast

TORCH_LIBRARY_IMPL(chatterbox_fast, CPU, library) {
  library.impl("resample", &chatterbox_fast::resample);
}
