// istft: the head of HiFT, from the last convolution's output to audio.
//
//   magnitude = min(exp(spectrum[b][m][k]), 100), phase = sin(spectrum[b][m][9 + k])
//   frame[m]  = the 16 samples whose spectrum is magnitude e^(i phase), bins k = 0 .. 8
//   y[b][j]   = sum over m of window[n] frame[m][n] / sum over m of window[n]^2, n = j + 8 - 4 m
//   out       = y clamped to [-limit, limit]
//
// Shapes: spectrum (B, M, 18) of float, half or bfloat16; window (16,) float; out (B, 4 (M - 1))
// float. All contiguous; B may be 0; M >= 1; B M < 2^31. No alignment beyond that of the elements.
// Equivalent to: chatterbox_fast/reference.py, istft.
// Arithmetic: float, with the accurate expf, sinf and cosf; what overlaps is added in order of
// time. The bits depend neither on the run of the program, nor on the other rows. A NaN or an
// infinity of an angle reaches all samples of its frame, and no others; exp of a large number is
// 100. Where no window reaches a sample, or its squares add up to 0, the result is NaN or limit.
//
// Launch: a block makes kIstftHops hops of output from kIstftFrames frames, three of which its
// neighbours make too. Its threads share the bins out, then each makes the 16 samples of a frame in
// its own column of shared memory, then they share the output out. No atomics.
//
// Expected bound: the launch. 10 s at 24 kHz are 4.3 MB read and 1 MB written: 1.6 us at 3.3 TB/s,
// and about as long in arithmetic, on 132 multiprocessors (not measured).
#pragma once

#include <math.h>

#include "inverse_dft.cuh"
#include "istft.h"
#include "runtime.h"

namespace chatterbox_fast {

constexpr int kIstftHop = 4;
constexpr int kIstftOverlap = kDftSize / kIstftHop;  // frames that reach a sample
constexpr int kIstftChannels = 2 * kDftBins;
constexpr int kIstftFrames = 128;  // of a block, which has a thread for each
constexpr int kIstftHops = kIstftFrames - (kIstftOverlap - 1);
constexpr int kIstftPitch = kIstftFrames + 8;  // so that four rows apart are four times eight banks
constexpr float kIstftLoudest = 100.0f;        // stock's clip of a magnitude

// The frame that a block's frame 0 is; -1 for the first block: hop j is made of frames j - 1 .. j
// + 2.
template <typename T>
RT_DEVICE long long istft_first_frame(const IstftArgs<T>& args) {
  return blockIdx.x % args.tiles * kIstftHops - 1;
}

// column[k][f], column[9 + k][f]: the real and the imaginary part of bin k of the block's frame f;
// 0 where there is no such frame.
template <typename T>
RT_DEVICE void istft_bins(const IstftArgs<T>& args, float* columns) {
  const long long first = istft_first_frame(args);
  const T* const row = args.spectrum + blockIdx.x / args.tiles * args.frames * kIstftChannels;
  for (int i = threadIdx.x; i < kIstftFrames * kDftBins; i += kIstftFrames) {
    const int own = i / kDftBins, bin = i % kDftBins;
    const long long frame = first + own;
    float real = 0.0f, imaginary = 0.0f;
    if (frame >= 0 && frame < args.frames) {
      const T* const at = row + frame * kIstftChannels + bin;
      const float loudness = expf(rt::to_float(at[0]));
      const float magnitude = loudness > kIstftLoudest ? kIstftLoudest : loudness;  // NaN is kept
      const float phase = sinf(rt::to_float(at[kDftBins]));
      real = magnitude * cosf(phase);
      imaginary = magnitude * sinf(phase);
    }
    columns[bin * kIstftPitch + own] = real;
    columns[(kDftBins + bin) * kIstftPitch + own] = imaginary;
  }
}

// column[n][f] = sample n of the block's frame f, windowed. A thread reads and writes its own f.
RT_DEVICE void istft_frame(const float* window, float* columns) {
  float* const column = columns + threadIdx.x;
  float real[kDftBins], imaginary[kDftBins], samples[kDftSize];
#pragma unroll
  for (int k = 0; k < kDftBins; ++k) {
    real[k] = column[k * kIstftPitch];
    imaginary[k] = column[(kDftBins + k) * kIstftPitch];
  }
  inverse_dft16(real, imaginary, samples);
#pragma unroll
  for (int n = 0; n < kDftSize; ++n) column[n * kIstftPitch] = samples[n] * window[n];
}

// Sample `place` of the hop that the block's frame `hop` + 1 is centred on.
template <typename T>
RT_DEVICE float istft_sample(const IstftArgs<T>& args, const float* columns, int hop, int place) {
  const long long first = istft_first_frame(args);
  float sum = 0.0f, envelope = 0.0f;
#pragma unroll
  for (int i = 0; i < kIstftOverlap; ++i) {
    const int own = hop + i, n = (kIstftOverlap - 1 - i) * kIstftHop + place;
    sum += columns[n * kIstftPitch + own];
    const bool is_frame = first + own >= 0 && first + own < args.frames;
    envelope += is_frame ? args.window[n] * args.window[n] : 0.0f;
  }
  const float y = sum / envelope;
  return y > args.limit ? args.limit : y < -args.limit ? -args.limit : y;  // NaN is kept
}

template <typename T>
RT_GLOBAL void RT_LAUNCH_BOUNDS(kIstftFrames) istft_kernel(IstftArgs<T> args) {
  RT_SHARED(float, columns, kIstftChannels* kIstftPitch);
  istft_bins(args, columns);
  __syncthreads();
  istft_frame(args.window, columns);
  __syncthreads();
  const long long length = (args.frames - 1) * kIstftHop;
  const long long begin = blockIdx.x % args.tiles * kIstftHops * kIstftHop;
  float* const out = args.out + blockIdx.x / args.tiles * length;
  for (int i = threadIdx.x; i < kIstftHops * kIstftHop; i += kIstftFrames) {
    if (begin + i >= length) break;
    out[begin + i] = istft_sample(args, columns, i / kIstftHop, i % kIstftHop);
  }
}

// Enqueues the op on `stream`; without output it is a success without a launch.
template <typename T>
rt::Error launch_istft(IstftArgs<T> args, rt::Stream stream) {
  if (args.rows == 0 || args.frames < 2) return rt::Error{};
  args.tiles = (args.frames - 1 + kIstftHops - 1) / kIstftHops;
  const auto grid = static_cast<unsigned>(args.rows * args.tiles);
  return rt::launch(&istft_kernel<T>, grid, kIstftFrames, 0, stream, args);
}

}  // namespace chatterbox_fast
