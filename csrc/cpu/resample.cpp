// CPU op of resample. Contract: chatterbox_fast/reference.py, resample.
//
// A task makes a range of outputs of one row. It first copies the samples that they need into a
// buffer of its own, as floats, zeros where there are none: what is timed has no edges and one
// dtype. Outputs are made eight at a time, each as a sum of products along the taps, in eight lanes;
// a last step adds the lanes of all eight at once. The eight have the same phase where there are few
// phases, so that a vector of taps is loaded once for all of them; else they are neighbours.
// The result does not depend on the number of threads.
#include "resample.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace chatterbox_fast {

namespace {

constexpr int64_t kFewPhases = 512;
constexpr int64_t kTaskOutputs = 2048;  // about
constexpr int64_t kGrain = 1 << 15;     // products a thread has at least

struct Bank {
  const float* filters;  // (P, K)
  const float* first;    // (F, K)
  int64_t phases, taps, first_count, stride, left;

  int64_t start(int64_t output) const { return output * stride / phases - left; }
  const float* of(int64_t output) const {
    return output < first_count ? first + output * taps : filters + output % phases * taps;
  }
};

// Outputs [begin, end) of a row. `samples` is sample `origin` of it, with zeros around the row.
struct Task {
  const float* samples;
  int64_t origin, begin, end;
  float* out;  // of output 0
};

// The sum of the lanes of vector i is lane i.
CBF_INLINE Floats sum_of_each(const Floats (&v)[kLanes]) {
  Floats pairs[4], fours[2];
  for (int i = 0; i < 4; ++i) {
    pairs[i] = CBF_SHUFFLE(v[2 * i], v[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
               CBF_SHUFFLE(v[2 * i], v[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    fours[i] = CBF_SHUFFLE(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               CBF_SHUFFLE(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return CBF_SHUFFLE(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         CBF_SHUFFLE(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// Sums of products of eight windows of samples with a filter each, or with filter[0] for all.
template <bool kSameFilter>
CBF_INLINE Floats eight_dots(const float* const (&x)[kLanes], const float* const (&filter)[kLanes],
                             int64_t taps) {
  Floats sums[kLanes] = {};
  const int64_t whole = taps / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
    const auto shared = load<Floats>(filter[0] + k);
    for (int i = 0; i < kLanes; ++i) {
      const auto own = kSameFilter ? shared : load<Floats>(filter[i] + k);
      sums[i] += load<Floats>(x[i] + k) * own;
    }
  }
  Floats total = sum_of_each(sums);
  for (int64_t k = whole; k < taps; ++k) {
    for (int i = 0; i < kLanes; ++i) total[i] += x[i][k] * filter[kSameFilter ? 0 : i][k];
  }
  return total;
}

// Outputs `output`, `output + step` and so on, of which those before the task's end are stored.
template <bool kSameFilter>
CBF_INLINE void eight_outputs(const Bank& bank, const Task& task, int64_t output, int64_t step) {
  const float *x[kLanes], *filter[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const int64_t own = std::min(output + i * step, task.end - 1);
    x[i] = task.samples + (bank.start(own) - task.origin);
    filter[i] = kSameFilter ? bank.filters + output % bank.phases * bank.taps : bank.of(own);
  }
  const Floats y = eight_dots<kSameFilter>(x, filter, bank.taps);
  for (int i = 0; i < kLanes && output + i * step < task.end; ++i) {
    task.out[output + i * step] = y[i];
  }
}

CBF_FOR_EVERY_CPU void run(const Bank& bank, const Task& task) {
  int64_t output = task.begin;
  if (bank.phases <= kFewPhases) {
    const int64_t group = kLanes * bank.phases;
    for (; output < task.end; output += group) {
      const int64_t phases = std::min(bank.phases, task.end - output);
      for (int64_t p = 0; p < phases; ++p) {
        eight_outputs<true>(bank, task, output + p, bank.phases);
      }
    }
    output = task.begin;
  }
  const int64_t rest = bank.phases <= kFewPhases ? std::min(bank.first_count, task.end) : task.end;
  for (; output < rest; output += kLanes) eight_outputs<false>(bank, task, output, 1);
}

// Sample `begin` and the `count` - 1 after it; 0 where there is none.
template <typename T>
void copy_samples(const T* row, int64_t samples, int64_t begin, int64_t count, float* to) {
  const int64_t from = std::clamp<int64_t>(begin, 0, samples);
  const int64_t until = std::clamp<int64_t>(begin + count, from, samples);
  if (from >= until) return void(std::fill_n(to, count, 0.0f));
  std::fill_n(to, from - begin, 0.0f);
  std::copy(row + from, row + until, to + (from - begin));
  std::fill(to + (until - begin), to + count, 0.0f);
}

// How many outputs a task makes: whole groups of eight.
int64_t outputs_of_task(const Bank& bank) {
  const int64_t group = kLanes * (bank.phases <= kFewPhases ? bank.phases : 1);
  return group * std::max<int64_t>(1, kTaskOutputs / group);
}

template <typename T>
void compute(const Bank& bank, const ResampleSizes& sizes, int64_t length, const T* waveform,
             float* out) {
  const int64_t size = outputs_of_task(bank), tasks = (length + size - 1) / size;
  const int64_t grain = std::max<int64_t>(1, kGrain / (size * bank.taps));
  at::parallel_for(0, sizes.rows * tasks, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> samples;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = t / tasks, output = t % tasks * size;
      const int64_t until = std::min(length, output + size);
      const int64_t origin = bank.start(output);
      samples.resize(bank.start(until - 1) - origin + bank.taps);
      copy_samples(waveform + row * sizes.samples, sizes.samples, origin,
                   static_cast<int64_t>(samples.size()), samples.data());
      run(bank, {samples.data(), origin, output, until, out + row * length});
    }
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
  switch (waveform.scalar_type()) {
    case at::kHalf:
      compute(bank, sizes, length, waveform.const_data_ptr<at::Half>(), out);
      break;
    case at::kBFloat16:
      compute(bank, sizes, length, waveform.const_data_ptr<at::BFloat16>(), out);
      break;
    default:
      compute(bank, sizes, length, waveform.const_data_ptr<float>(), out);
  }
  return y.to(waveform.scalar_type());
}

}  // namespace

}  // namespace chatterbox_fast

TORCH_LIBRARY_IMPL(chatterbox_fast, CPU, library) {
  library.impl("resample", &chatterbox_fast::resample);
}
