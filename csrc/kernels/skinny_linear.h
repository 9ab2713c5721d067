// The arguments and the launcher of skinny_linear.cuh, as a host's compiler may see them. For what
// they mean see there.
#pragma once

#include "types.h"

namespace chatterbox_fast {

constexpr int kSkinnyRows = 8;  // of x, at most

template <typename X, typename W>
struct SkinnyLinearArgs {
  const X* x;
  const W* weight;
  const float* scale;  // null: 1
  const float* norm;   // null: none
  const X* residual;   // null: 0
  X* y;
  long long inputs, outputs;  // K, N
  float eps;
  int rows;  // M
  bool gated;
};

// Compiled for every dtype by skinny_linear.cu.
template <typename X, typename W>
rt::Error launch_skinny_linear(const SkinnyLinearArgs<X, W>& args, rt::Stream stream);

}  // namespace chatterbox_fast
