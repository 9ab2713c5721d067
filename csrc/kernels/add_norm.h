// The arguments and the launcher of add_norm.cuh, as a host's compiler may see them. For what they
// mean see there.
#pragma once

#include "types.h"

namespace chatterbox_fast {

constexpr int kAddNormChannels = 1024;  // at most

template <typename X, typename Y>
struct AddNormArgs {
  const X* x;
  const float* weight;
  const float* bias;
  float* residual;      // or null
  const float* offset;  // or null
  const float* shift;   // or null
  Y* y;
  long long rows, times;  // R T, T
  long long x_row_stride, x_time_stride;
  int channels;
  float eps;
  bool mish;
};

// Compiled for every pair of dtypes by add_norm.cu.
template <typename X, typename Y>
rt::Error launch_add_norm(const AddNormArgs<X, Y>& args, rt::Stream stream);

}  // namespace chatterbox_fast
