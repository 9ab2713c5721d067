// Launches istft's kernel as the CUDA op does. arrays: {rows, frames, dtype}, {limit}, spectrum,
// window, out. dtype: 0 float, 1 half, 2 bfloat16.
#include "kernels/istft.cuh"

template <typename T>
int launch(void** arrays, const int64_t* sizes) {
  chatterbox_fast::IstftArgs<T> args = {};
  args.limit = *static_cast<const float*>(arrays[1]);
  args.spectrum = static_cast<const T*>(arrays[2]);
  args.window = static_cast<const float*>(arrays[3]);
  args.out = static_cast<float*>(arrays[4]);
  args.rows = static_cast<int>(sizes[0]);
  args.frames = sizes[1];
  return chatterbox_fast::launch_istft(args, nullptr);
}

extern "C" int drive(void** arrays) {
  const auto* const sizes = static_cast<const int64_t*>(arrays[0]);
  if (sizes[2] == 1) return launch<rt::half>(arrays, sizes);
  if (sizes[2] == 2) return launch<rt::bfloat16>(arrays, sizes);
  return launch<float>(arrays, sizes);
}
