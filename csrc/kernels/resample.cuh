// resample: a waveform at another sampling rate, a convolution with a filter for each phase.
//
//   y[r][j] = sum over k of f[k] x[r][j stride / P - left + k]      (division rounds down)
//   f = first[j] where j < F, else filters[j % P]; x is 0 outside of its samples
//
// Shapes: waveform (R, T), x, of float, half or bfloat16; filters (P, K) float, of any strides;
// first (F, K) float, contiguous, or F = 0; out (R, length), y, of x's type. All sizes but P, K
// and stride may be 0; P K and stride at most 2^20, blocks of a launch at most 2^31 - 1. No
// alignment beyond that of the elements. Equivalent to: chatterbox_fast/reference.py, resample.
// Arithmetic: float, fused multiply-adds in runs of kResampleRun taps, whose sums are added. The
// bits depend neither on the run of the program, nor on the other rows. A NaN or an infinity
// reaches the outputs whose taps it meets.
//
// Launch: a block makes kResampleEach outputs a thread of one row, which lie a whole number of
// periods apart, so that a filter's tap is loaded once for all of them; with more than
// kResampleThreads phases, and where `first` is used, each output loads its own. The samples that a
// block needs lie in shared memory, as floats, zeros where there are none; where they do not fit,
// as with strides of many samples, they are read where they are.
//
// Expected bound: with some 24 taps the launch; with soxr's 300, (1 + 1 / kResampleEach) loads from
// shared memory or L1 a product, some 7 us for 10 s from 24 to 16 kHz on 132 multiprocessors (not
// measured). Neighbouring outputs read neighbouring phases: a tap's phases should be contiguous.
#pragma once

#include "common.cuh"
#include "resample.h"
#include "runtime.h"

namespace chatterbox_fast {

constexpr int kResampleThreads = 256;         // at most
constexpr int kResampleEach = 4;              // outputs a thread
constexpr int kResampleRun = 32;              // taps
constexpr long long kResampleWindow = 12288;  // samples in shared memory at most: 48 KiB

// Samples of a row from `origin` on.
template <typename T, bool kStaged>
struct ResampleWindow {
  const float* staged;
  const T* row;
  long long origin, samples;

  RT_DEVICE float operator[](long long i) const {
    if (kStaged) return staged[i];
    const long long place = origin + i;
    return place >= 0 && place < samples ? rt::to_float(row[place]) : 0.0f;
  }
};

// sums[e] = the products of one filter with kCount windows of samples, `apart` apart.
template <int kCount, typename Window>
RT_DEVICE void resample_dots(const Window& x, long long start, long long apart, const float* filter,
                             long long tap_stride, int taps, float (&sums)[kCount]) {
  for (int k = 0; k < taps;) {
    const int end = taps - k < kResampleRun ? taps : k + kResampleRun;
    float run[kCount] = {};
#pragma unroll 4
    for (; k < end; ++k) {
      const float tap = filter[k * tap_stride];
#pragma unroll
      for (int e = 0; e < kCount; ++e) run[e] = fmaf(tap, x[start + e * apart + k], run[e]);
    }
#pragma unroll
    for (int e = 0; e < kCount; ++e) sums[e] += run[e];
  }
}

// The place of an output's first tap, from the row's first sample on.
template <typename T>
RT_DEVICE long long resample_start(const ResampleArgs<T>& args, long long output) {
  return output * args.stride / args.phases - args.left;
}

template <typename T, typename Window>
RT_DEVICE void resample_each(const ResampleArgs<T>& args, const Window& x, long long output,
                             float (&y)[kResampleEach]) {
#pragma unroll 1
  for (int e = 0; e < kResampleEach; ++e, output += args.step) {
    if (output >= args.length) return;
    const bool is_first = output < args.first_count;
    const float* filter = is_first ? args.first + output * args.taps
                                   : args.filters + output % args.phases * args.phase_stride;
    float sum[1] = {};
    resample_dots(x, resample_start(args, output) - x.origin, 0, filter,
                  is_first ? 1 : args.tap_stride, args.taps, sum);
    y[e] = sum[0];
  }
}

template <typename T, bool kStaged>
RT_GLOBAL void RT_LAUNCH_BOUNDS(kResampleThreads) resample_kernel(ResampleArgs<T> args) {
  RT_DYN_SHARED(float, staged);
  const long long row = blockIdx.x / args.tiles;
  const long long begin = blockIdx.x % args.tiles * args.step * kResampleEach;
  const ResampleWindow<T, false> source = {nullptr, args.waveform + row * args.samples,
                                           resample_start(args, begin), args.samples};
  const ResampleWindow<T, kStaged> x = {staged, source.row, source.origin, source.samples};
  if (kStaged) {
    const long long last = begin + static_cast<long long>(args.step) * kResampleEach - 1;
    const long long count = resample_start(args, last) - x.origin + args.taps;
    for (long long i = threadIdx.x; i < count; i += blockDim.x) staged[i] = source[i];
    __syncthreads();
  }
  const long long output = begin + threadIdx.x;
  float y[kResampleEach] = {};
  if (args.step % args.phases == 0 && output >= args.first_count) {
    const long long apart = static_cast<long long>(args.step / args.phases) * args.stride;
    resample_dots(x, resample_start(args, output) - x.origin, apart,
                  args.filters + output % args.phases * args.phase_stride, args.tap_stride,
                  args.taps, y);
  } else {
    resample_each(args, x, output, y);
  }
#pragma unroll
  for (int e = 0; e < kResampleEach; ++e) {
    const long long own = output + e * args.step;
    if (own < args.length) args.out[row * args.length + own] = rt::from_float<T>(y[e]);
  }
}

// Enqueues the op on `stream`; without outputs it is a success without a launch.
template <typename T>
rt::Error launch_resample(ResampleArgs<T> args, rt::Stream stream) {
  if (args.rows == 0 || args.length == 0) return rt::Error{};
  const int whole_periods = kResampleThreads / args.phases * args.phases;
  args.step = whole_periods > 0 ? whole_periods : kResampleThreads;
  const long long tile = static_cast<long long>(args.step) * kResampleEach;
  args.tiles = (args.length + tile - 1) / tile;
  const long long window = (tile - 1) * args.stride / args.phases + 1 + args.taps;
  const bool staged = window <= kResampleWindow;
  const auto kernel = staged ? &resample_kernel<T, true> : &resample_kernel<T, false>;
  const auto grid = static_cast<unsigned>(args.rows * args.tiles);
  return rt::launch(kernel, grid, args.step, staged ? window * sizeof(float) : 0, stream, args);
}

}  // namespace chatterbox_fast
