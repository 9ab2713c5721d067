// The arguments and the launcher of snake.cuh, as a host's compiler may see them. For what they
// mean see there.
#pragma once

#include "types.h"

namespace chatterbox_fast {

template <typename T>
struct SnakeArgs {
  const T* x;
  const float* alpha;
  const float* inverse;
  T* residual;          // or null
  const float* offset;  // or null
  T* out;
  long long rows, channels;  // R, C
  // Set by launch_snake:
  long long packs;  // of a row
  int tiles;        // of a row
  int wide;         // packs of a tile; the last one may be narrower
};

// Compiled for every dtype by snake.cu.
template <typename T>
rt::Error launch_snake(const SnakeArgs<T>& args, rt::Stream stream);

}  // namespace chatterbox_fast
