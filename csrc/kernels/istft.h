// The arguments and the launcher of istft.cuh, as a host's compiler may see them. For what they
// mean see there.
#pragma once

#include "types.h"

namespace chatterbox_fast {

template <typename T>
struct IstftArgs {
  const T* spectrum;
  const float* window;
  float* out;
  long long frames;  // M
  int rows;          // B
  float limit;
  long long tiles;  // blocks a row; set by launch_istft
};

// Compiled for every dtype by istft.cu.
template <typename T>
rt::Error launch_istft(IstftArgs<T> args, rt::Stream stream);

}  // namespace chatterbox_fast
