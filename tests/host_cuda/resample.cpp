// Launches resample's kernel as the CUDA op does. arrays: {rows, samples, phases, taps, first,
// stride, left, length, dtype, phase stride, tap stride}, waveform, filters, first, out. dtype: 0
// float, 1 half, 2 bfloat16.
#include "kernels/resample.cuh"

template <typename T>
int launch(void** arrays, const int64_t* sizes) {
  chatterbox_fast::ResampleArgs<T> args = {};
  args.waveform = static_cast<const T*>(arrays[1]);
  args.filters = static_cast<const float*>(arrays[2]);
  args.first = sizes[4] > 0 ? static_cast<const float*>(arrays[3]) : nullptr;
  args.out = static_cast<T*>(arrays[4]);
  args.rows = static_cast<int>(sizes[0]);
  args.samples = sizes[1];
  args.phases = static_cast<int>(sizes[2]);
  args.taps = static_cast<int>(sizes[3]);
  args.first_count = static_cast<int>(sizes[4]);
  args.stride = static_cast<int>(sizes[5]);
  args.left = static_cast<int>(sizes[6]);
  args.length = sizes[7];
  args.phase_stride = sizes[9];
  args.tap_stride = sizes[10];
  return chatterbox_fast::launch_resample(args, nullptr);
}

extern "C" int drive(void** arrays) {
  const auto* const sizes = static_cast<const int64_t*>(arrays[0]);
  if (sizes[8] == 1) return launch<rt::half>(arrays, sizes);
  if (sizes[8] == 2) return launch<rt::bfloat16>(arrays, sizes);
  return launch<float>(arrays, sizes);
}
