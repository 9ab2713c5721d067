// add_norm: what stands between two matrix products or convolutions of S3Gen, in one launch.
//
//   z[r][t] = finite(x[r][t]) + offset + residual[r][t], which is written back to the residual
//   n[r][t] = (z[r][t] - mean) / sqrt(variance + eps) * weight + bias, over the channels
//   y[r][t] = n[r][t], or mish(n[r][t]) + shift
//
// Shapes: x (R, T, C) of X = float, half or bfloat16, any strides but for the channels, which are
// neighbours; y (R, T, C) of Y, one of those, contiguous; residual (R, T, C) float, contiguous, no
// memory of x; weight, bias, offset, shift (C,) float. Residual, offset and shift may be missing,
// shift without Mish too. C at most kAddNormChannels; no alignment beyond that of the elements.
// Equivalent to: chatterbox_fast/reference.py, add_norm.
// finite: of half, an infinity is the largest number, 65504, as what overflowed in a product would
// else be NaN from here on; of other types x itself.
// Arithmetic: float for every type. The mean is a sum in float, the variance one of squares of what
// differs from it; half precision is rounded once, at the end, half to finite numbers. Mish by expf
// and one division. A NaN or an infinity of z makes its own row NaN, and no other one.
//
// Launch: a warp has a row, whose channels stay in its registers from the first load to the last
// store; a block has kAddNormWarps rows. A lane reads four neighbours at a time where C, strides
// and pointers allow it, else one. No shared memory.
//
// Expected bound: bytes; 6 MB for (2, 1000, 256) with a residual, bfloat16 in and out, some 2 us at
// 3.3 TB/s, and a launch (not measured).
#pragma once

#include <cstdint>

#include "add_norm.h"
#include "arithmetic.cuh"

namespace chatterbox_fast {

constexpr int kAddNormWarps = 4;  // a block

// x tanh(log(1 + exp(x))), where tanh is of exponentials alone; from 20 on it is x.
RT_DEVICE float mish_of(float x) {
  const float e = expf(x > 20.0f ? 20.0f : x);
  const float n = e * (e + 2.0f);
  return x * (n / (n + 2.0f));
}

// By a warp: the residual's row of x + offset, or what there is of that, a lane's part of it.
template <int kPack, int kEach, typename X, typename Y>
RT_DEVICE void load_row(const AddNormArgs<X, Y>& args, long long row, int packs,
                        Pack<float, kPack> (&own)[kEach]) {
  const X* const x =
      args.x + row / args.times * args.x_row_stride + row % args.times * args.x_time_stride;
  float* const residual = args.residual == nullptr ? nullptr : args.residual + row * args.channels;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int pack = e * 32 + threadIdx.x % 32;
    own[e] = {};
    if (pack >= packs) continue;
    const auto given = load_pack<kPack>(x + pack * kPack);
    const auto offset = load_numbers<kPack>(args.offset, pack);
    const auto before = load_numbers<kPack>(residual, pack);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      own[e].items[i] =
          before.items[i] + (finite<X>(rt::to_float(given.items[i])) + offset.items[i]);
    }
    if (residual != nullptr) reinterpret_cast<Pack<float, kPack>*>(residual)[pack] = own[e];
  }
}

template <int kPack, int kEach>
RT_DEVICE float mean_of(const Pack<float, kPack> (&own)[kEach], int channels) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum += own[e].items[i];
  }
  return sum_of_warp(sum) / channels;
}

template <int kPack, int kEach>
RT_DEVICE float variance_of(const Pack<float, kPack> (&own)[kEach], int packs, int channels,
                            float mean) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    if (e * 32 + static_cast<int>(threadIdx.x % 32) >= packs) continue;
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum += (own[e].items[i] - mean) * (own[e].items[i] - mean);
  }
  return sum_of_warp(sum) / channels;
}

template <typename X, typename Y, int kPack>
RT_GLOBAL void RT_LAUNCH_BOUNDS(32 * kAddNormWarps) add_norm_kernel(AddNormArgs<X, Y> args) {
  constexpr int kEach = kAddNormChannels / 32 / kPack;
  const long long row = static_cast<long long>(blockIdx.x) * kAddNormWarps + threadIdx.x / 32;
  if (row >= args.rows) return;
  const int packs = args.channels / kPack;
  Pack<float, kPack> own[kEach];
  load_row(args, row, packs, own);
  const float mean = mean_of(own, args.channels);
  const float scale = 1.0f / sqrtf(variance_of(own, packs, args.channels, mean) + args.eps);
  auto* const y = reinterpret_cast<Pack<Y, kPack>*>(args.y + row * args.channels);
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int pack = e * 32 + threadIdx.x % 32;
    if (pack >= packs) return;
    const auto weight = load_numbers<kPack>(args.weight, pack);
    const auto bias = load_numbers<kPack>(args.bias, pack);
    const auto shift = load_numbers<kPack>(args.shift, pack);
    Pack<Y, kPack> out;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float n = (own[e].items[i] - mean) * scale * weight.items[i] + bias.items[i];
      out.items[i] = rt::from_float<Y>(finite<Y>((args.mish ? mish_of(n) : n) + shift.items[i]));
    }
    y[pack] = out;
  }
}

// Enqueues the op on `stream`; without elements it is a success without a launch.
template <typename X, typename Y>
rt::Error launch_add_norm(const AddNormArgs<X, Y>& args, rt::Stream stream) {
  if (args.rows == 0 || args.channels == 0) return rt::Error{};
  constexpr int kPack = 4;
  bool packed = in_packs<kPack>(args.x) && in_packs<kPack>(args.y);
  for (const float* numbers : {static_cast<const float*>(args.residual), args.weight, args.bias,
                               args.offset, args.shift}) {
    packed &= in_packs<kPack>(numbers);
  }
  for (const long long count :
       {static_cast<long long>(args.channels), args.x_row_stride, args.x_time_stride}) {
    packed &= count % kPack == 0;
  }
  const auto grid = static_cast<unsigned>((args.rows + kAddNormWarps - 1) / kAddNormWarps);
  return rt::launch(packed ? &add_norm_kernel<X, Y, kPack> : &add_norm_kernel<X, Y, 1>, grid,
                    32 * kAddNormWarps, 0, stream, args);
}

}  // namespace chatterbox_fast
