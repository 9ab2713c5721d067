// snake: the periodic activation of S3Gen's vocoder, channels last, and the sums before it.
//
//   z[r][c] = x[r][c] + offset[c] + residual[r][c], which is written back to the residual
//   y[r][c] = z[r][c] + sin(alpha[c] z[r][c])^2 inverse[c]
//
// Shapes: x, residual and y (R, C), contiguous, of float, half or bfloat16; the residual is no
// memory of x; alpha, inverse and offset (C,) float. Residual and offset may be missing. Any sizes,
// 0 too; places are counted in 64 bits. No alignment beyond that of the elements.
// Equivalent to: chatterbox_fast/reference.py, snake.
// Arithmetic: float for every type, alpha z rounded to float, its sine by sinf, which is accurate
// for arguments of any size, each product and the sum rounded, as stock's separate kernels round
// them. Half precision is rounded once, at the end; z as the residual has it, too, but y is of the
// z before. Of half, x, z and y are held within its finite numbers. A NaN, or an infinity of the
// other types, gives NaN there and nowhere else.
//
// Launch: a block makes rows of up to kSnakeThreads packs of channels. A thread keeps its channels
// for kSnakeEach rows, which it loads before it computes, so that no channel is found by a division
// and alpha and inverse are loaded once. A pack is 16 bytes of x where C is a multiple of its
// elements and every pointer of 16 bytes, else one element. No shared memory.
//
// Expected bound: bytes, one read and one write of x (and of the residual): 31 MB for (60000, 64)
// in float, some 10 us at 3.3 TB/s, of which 50 MB of L2 take a part (not measured).
#pragma once

#include <cstdint>

#include "arithmetic.cuh"
#include "common.cuh"
#include "runtime.h"
#include "snake.h"

namespace chatterbox_fast {

constexpr int kSnakeThreads = 256;  // at most
constexpr int kSnakeEach = 2;       // rows a thread

RT_DEVICE float snake_of(float x, float alpha, float inverse) {
  const float sine = sinf(alpha * x);
  return x + sine * sine * inverse;
}

template <typename T, int kPack, bool kSum>
RT_GLOBAL void RT_LAUNCH_BOUNDS(kSnakeThreads) snake_kernel(SnakeArgs<T> args) {
  const int deep = blockDim.x / args.wide;  // rows that a block makes at a time
  const long long tile = blockIdx.x % args.tiles, group = blockIdx.x / args.tiles;
  const long long column = tile * args.wide + threadIdx.x % args.wide;
  if (column >= args.packs) return;
  const auto alpha = load_pack<kPack>(args.alpha + column * kPack);
  const auto inverse = load_pack<kPack>(args.inverse + column * kPack);
  const auto offset = load_numbers<kPack>(args.offset, column);
  const long long first = group * deep * kSnakeEach + threadIdx.x / args.wide;
  Pack<T, kPack> packs[kSnakeEach] = {}, sums[kSnakeEach] = {};
#pragma unroll
  for (int e = 0; e < kSnakeEach; ++e) {
    const long long row = first + e * deep, place = row * args.packs + column;
    if (row >= args.rows) continue;
    packs[e] = load_pack<kPack>(args.x + place * kPack);
    if (kSum) sums[e] = load_pack<kPack>(args.residual + place * kPack);
  }
#pragma unroll
  for (int e = 0; e < kSnakeEach; ++e) {
    const long long row = first + e * deep, place = row * args.packs + column;
    if (row >= args.rows) return;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      float z = finite<T>(rt::to_float(packs[e].items[i])) + offset.items[i];
      if (kSum) z = rt::to_float(sums[e].items[i]) + z;
      z = finite<T>(z);
      sums[e].items[i] = rt::from_float<T>(z);
      const float y = snake_of(z, alpha.items[i], inverse.items[i]);
      packs[e].items[i] = rt::from_float<T>(finite<T>(y));
    }
    // Counted in packs: of a sum of elements nvcc does not see that it is aligned, and stores
    // singly.
    if (kSum) reinterpret_cast<Pack<T, kPack>*>(args.residual)[place] = sums[e];
    reinterpret_cast<Pack<T, kPack>*>(args.out)[place] = packs[e];
  }
}

template <typename T, int kPack>
rt::Error launch_snake_in_packs(SnakeArgs<T> args, rt::Stream stream) {
  args.packs = args.channels / kPack;
  args.tiles = static_cast<int>((args.packs + kSnakeThreads - 1) / kSnakeThreads);
  args.wide = static_cast<int>((args.packs + args.tiles - 1) / args.tiles);
  const int deep = kSnakeThreads / args.wide;
  const long long groups = (args.rows + deep * kSnakeEach - 1) / (deep * kSnakeEach);
  const auto grid = static_cast<unsigned>(groups * args.tiles);
  const bool sum = args.residual != nullptr;
  return rt::launch(sum ? &snake_kernel<T, kPack, true> : &snake_kernel<T, kPack, false>, grid,
                    deep * args.wide, 0, stream, args);
}

// Enqueues the op on `stream`; without elements it is a success without a launch.
template <typename T>
rt::Error launch_snake(const SnakeArgs<T>& args, rt::Stream stream) {
  if (args.rows == 0 || args.channels == 0) return rt::Error{};
  constexpr int kWhole = kPackBytes / sizeof(T);
  const bool packed = args.channels % kWhole == 0 && in_packs<kWhole>(args.x) &&
                      in_packs<kWhole>(args.out) && in_packs<kWhole>(args.residual) &&
                      in_packs<kWhole>(args.alpha) && in_packs<kWhole>(args.inverse) &&
                      in_packs<kWhole>(args.offset);
  return packed ? launch_snake_in_packs<T, kWhole>(args, stream)
                : launch_snake_in_packs<T, 1>(args, stream);
}

}  // namespace chatterbox_fast
