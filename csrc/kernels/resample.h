// The arguments and the launcher of resample.cuh, as a host's compiler may see them. For what they
// mean see there.
#pragma once

#include "types.h"

namespace chatterbox_fast {

template <typename T>
struct ResampleArgs {
  const T* waveform;
  const float* filters;
  const float* first;  // null: F = 0
  T* out;
  long long samples, length;           // T
  long long phase_stride, tap_stride;  // of filters
  int rows, phases, taps, first_count, stride, left;
  // Set by launch_resample:
  int step;         // outputs between two of a thread
  long long tiles;  // blocks a row
};

// Compiled for every dtype by resample.cu.
template <typename T>
rt::Error launch_resample(ResampleArgs<T> args, rt::Stream stream);

}  // namespace chatterbox_fast
