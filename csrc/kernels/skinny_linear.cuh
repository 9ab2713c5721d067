// skinny_linear: y = x weight' for a few rows of x, the matrix-vector products of a decode step.
//
//   z[m][n] = scale[n] (sum over k of x'[m][k] weight[n][k])
//   x'      = x, or where there is a norm x norm[k] / sqrt(mean over k of x[m][k]^2 + eps)
//   y[m][n] = residual[m][n] + z[m][n], or where it is gated silu(z[m][n]) z[m][N + n] for z[m][n]
//
// Shapes: x (M, K), X = float, half, bfloat16; weight (N, K), gated (2 N, K), W = one of these, or
// int8 with scale float, one for each row of weight, which is null otherwise; norm (K,) float, or
// null; y and residual (M, N), X, residual or null. M in [0, 8]; any K and N. Contiguous, without
// an alignment beyond that of their elements. Equivalent to: chatterbox_fast/reference.py,
// skinny_linear. Arithmetic: float, fused multiply-adds. A lane sums every 32nd vector of the
// inputs, then the 32 sums are added in a tree; a row's scale is applied to its sum, and so is the
// size of x, whose squares are summed on the way. The bits do not depend on the run, nor on the
// other rows of x. A NaN or an infinity stays in its row of x, or of weight.
//
// Launch: one warp multiplies two rows of weight, gate and up where it is gated, with all rows of
// x. A lane loads 16 bytes of weights at a time and keeps eight such loads in flight, 4 KiB a warp
// (four with int8 or eight rows of x). Rows of x up to the next of 1, 2, 4, 8 are computed and not
// stored. Where K or an address does not allow vectors, the code for eight rows loads single
// elements.
//
// Expected bound: the weights' bytes, each of which is read once. x comes from L1, which serves
// M sizeof(X) / (2 sizeof(W)) times as many bytes: 2 times with two float rows and bfloat16
// weights, 8 times with eight, which is near what L1 delivers while memory is at its full speed. At
// 1024 inputs (512 of float32) the weights of a warp are all in flight at once, so that 1024 x 1024
// costs memory's latency more than its bandwidth.
#pragma once

#include "arithmetic.cuh"
#include "common.cuh"
#include "runtime.h"
#include "skinny_linear.h"

namespace chatterbox_fast {

constexpr int kSkinnyWarps = 4;    // a block
constexpr int kSkinnyOutputs = 2;  // rows of weight, a warp

// Outputs that a warp computes.
RT_HOST_DEVICE int outputs_at_once(bool gated) { return gated ? 1 : kSkinnyOutputs; }

// The rows that a warp multiplies. What there is none of repeats the last, so that it can be read.
template <int kRows, typename X, typename W>
struct SkinnyRows {
  const X* x[kRows];
  const W* weight[kSkinnyOutputs];
  const float* norm;
};

template <int kRows, typename X, typename W>
RT_DEVICE SkinnyRows<kRows, X, W> skinny_rows(const SkinnyLinearArgs<X, W>& args,
                                              long long output) {
  SkinnyRows<kRows, X, W> rows;
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    rows.x[m] = args.x + (m < args.rows ? m : args.rows - 1) * args.inputs;
  }
#pragma unroll
  for (int r = 0; r < kSkinnyOutputs; ++r) {
    const long long last = args.outputs - 1;
    const long long own =
        args.gated ? output + r * args.outputs : (output + r < last ? output + r : last);
    rows.weight[r] = args.weight + own * args.inputs;
  }
  rows.norm = args.norm;
  return rows;
}

// kVector neighbours of each row of weights.
template <typename W, int kVector>
struct SkinnyWeights {
  Pack<W, kVector> of[kSkinnyOutputs];
};

template <int kVector, int kRows, typename X, typename W>
RT_DEVICE SkinnyWeights<W, kVector> load_weights(const SkinnyRows<kRows, X, W>& rows, long long k) {
  SkinnyWeights<W, kVector> weights;
#pragma unroll
  for (int r = 0; r < kSkinnyOutputs; ++r) {
    weights.of[r] = load_pack<kVector>(rows.weight[r] + k);
  }
  return weights;
}

// What a lane sums for each row of x.
template <int kRows>
struct SkinnySums {
  float products[kRows][kSkinnyOutputs];
  float squares[kRows];  // of x, where there is a norm
};

// Adds the products of the kVector inputs from k on.
template <int kVector, int kRows, typename X, typename W>
RT_DEVICE void add_products(const SkinnyRows<kRows, X, W>& rows, long long k,
                            const SkinnyWeights<W, kVector>& weights, SkinnySums<kRows>& sums) {
  Pack<float, kVector> norm = {};
  if (rows.norm != nullptr) norm = load_pack<kVector>(rows.norm + k);
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    const auto x = load_pack<kVector>(rows.x[m] + k);
#pragma unroll
    for (int n = 0; n < kVector; ++n) {
      float own = rt::to_float(x.items[n]);
      if (rows.norm != nullptr) {
        sums.squares[m] = fmaf(own, own, sums.squares[m]);
        own *= norm.items[n];
      }
#pragma unroll
      for (int r = 0; r < kSkinnyOutputs; ++r) {
        const float weight = rt::to_float(weights.of[r].items[n]);
        sums.products[m][r] = fmaf(own, weight, sums.products[m][r]);
      }
    }
  }
}

// One lane's share of all sums: kVector inputs of every 32 kVector. The weights of kSteps such
// vectors are always on their way; what is over at the end comes one by one.
template <int kVector, int kSteps, int kRows, typename X, typename W>
RT_DEVICE void add_lane(const SkinnyRows<kRows, X, W>& rows, long long inputs,
                        SkinnySums<kRows>& sums) {
  constexpr int kStride = 32 * kVector, kGroup = kSteps * kStride;
  const long long last_group = inputs - (kGroup - kStride);  // no whole group starts here or later
  long long k = threadIdx.x % 32 * kVector;
  if (k < last_group) {
    SkinnyWeights<W, kVector> weights[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) weights[i] = load_weights<kVector>(rows, k + i * kStride);
    for (; k < last_group; k += kGroup) {
      const bool more = k + kGroup < last_group;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        add_products(rows, k + i * kStride, weights[i], sums);
        if (more) weights[i] = load_weights<kVector>(rows, k + kGroup + i * kStride);
      }
    }
  }
#pragma unroll 1
  for (; k < inputs; k += kStride) {
    add_products(rows, k, load_weights<kVector>(rows, k), sums);
  }
}

// Whole sums over the lanes: of row lane / kSkinnyOutputs of x and row lane % kSkinnyOutputs of the
// warp's weights.
template <int kRows, typename X, typename W>
RT_DEVICE float product_of_lane(const SkinnyLinearArgs<X, W>& args, const SkinnySums<kRows>& sums) {
  const int lane = threadIdx.x % 32;
  float own = 0.0f;
#pragma unroll
  for (int i = 0; i < kRows * kSkinnyOutputs; ++i) {
    const float sum = sum_of_warp(sums.products[i / kSkinnyOutputs][i % kSkinnyOutputs]);
    if (lane == i) own = sum;
  }
  if (args.norm == nullptr || args.inputs == 0) return own;  // a mean of nothing is none
  float squares = 0.0f;
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    const float sum = sum_of_warp(sums.squares[m]);
    if (lane / kSkinnyOutputs == m) squares = sum;
  }
  return own / sqrtf(squares / static_cast<float>(args.inputs) + args.eps);
}

template <int kRows, int kVector, typename X, typename W>
RT_GLOBAL void RT_LAUNCH_BOUNDS(32 * kSkinnyWarps)
    skinny_linear_kernel(SkinnyLinearArgs<X, W> args) {
  const long long warp = static_cast<long long>(blockIdx.x) * kSkinnyWarps + threadIdx.x / 32;
  const long long first = warp * outputs_at_once(args.gated);
  if (first >= args.outputs) return;  // all lanes do
  // Whole groups at T3's sizes, 1024 and 4096 inputs; with eight rows more would be spilled.
  constexpr int kSteps = sizeof(W) > 1 && kRows < 8 ? 4 : 2;
  SkinnySums<kRows> sums = {};
  add_lane<kVector, kSteps>(skinny_rows<kRows>(args, first), args.inputs, sums);
  float own = product_of_lane(args, sums);
  const int row = threadIdx.x % 32 / kSkinnyOutputs, r = threadIdx.x % kSkinnyOutputs;
  if (args.scale != nullptr && (args.gated || first + r < args.outputs)) {
    own *= args.scale[args.gated ? first + r * args.outputs : first + r];
  }
  if (args.gated) own = own / (1.0f + expf(-own)) * __shfl_xor_sync(kFullWarp, own, 1);
  if (row >= args.rows || r >= outputs_at_once(args.gated) || first + r >= args.outputs) return;
  const long long at = row * args.outputs + first + r;
  if (args.residual != nullptr) own += rt::to_float(args.residual[at]);
  args.y[at] = rt::from_float<X>(own);
}

// The kernel for `rows` rows of x and loads of whole vectors, or of single elements: those, slow
// anyhow and of no size that T3 has, have one kernel for any number of rows.
template <typename X, typename W>
auto choose_skinny_linear(int rows, bool vectors) {
  constexpr int kVector = kPackBytes / sizeof(W);
  if (!vectors) return &skinny_linear_kernel<kSkinnyRows, 1, X, W>;
  if (rows == 1) return &skinny_linear_kernel<1, kVector, X, W>;
  if (rows == 2) return &skinny_linear_kernel<2, kVector, X, W>;
  if (rows <= 4) return &skinny_linear_kernel<4, kVector, X, W>;
  return &skinny_linear_kernel<kSkinnyRows, kVector, X, W>;
}

// Enqueues the op on `stream`; without rows or outputs it is a success without a launch.
template <typename X, typename W>
rt::Error launch_skinny_linear(const SkinnyLinearArgs<X, W>& args, rt::Stream stream) {
  if (args.rows == 0 || args.outputs == 0) return rt::Error{};
  const auto addresses = reinterpret_cast<std::uintptr_t>(args.x) |
                         reinterpret_cast<std::uintptr_t>(args.weight) |
                         reinterpret_cast<std::uintptr_t>(args.norm);
  const auto vector = static_cast<long long>(kPackBytes / sizeof(W));
  const bool vectors = args.inputs % vector == 0 && addresses % kPackBytes == 0;
  const int outputs = kSkinnyWarps * outputs_at_once(args.gated);  // a block
  const auto grid = static_cast<unsigned>((args.outputs + outputs - 1) / outputs);
  const auto kernel = choose_skinny_linear<X, W>(args.rows, vectors);
  return rt::launch(kernel, grid, 32 * kSkinnyWarps, 0, stream, args);
}

}  // namespace chatterbox_fast
