// Launches snake's kernel as the CUDA op does. arrays: {rows, channels, dtype, elements before x,
// before alpha, before inverse, before out, before residual, before offset, is there a residual, an
// offset}, x, alpha, inverse, out, residual, offset. dtype: 0 float, 1 half, 2 bfloat16.
#include "kernels/snake.cuh"

template <typename T>
int launch(void** arrays, const int64_t* sizes) {
  chatterbox_fast::SnakeArgs<T> args = {};
  args.rows = sizes[0];
  args.channels = sizes[1];
  args.x = static_cast<const T*>(arrays[1]) + sizes[3];
  args.alpha = static_cast<const float*>(arrays[2]) + sizes[4];
  args.inverse = static_cast<const float*>(arrays[3]) + sizes[5];
  if (sizes[9] != 0) args.residual = static_cast<T*>(arrays[5]) + sizes[7];
  if (sizes[10] != 0) args.offset = static_cast<const float*>(arrays[6]) + sizes[8];
  args.out = static_cast<T*>(arrays[4]) + sizes[6];
  return chatterbox_fast::launch_snake(args, nullptr);
}

extern "C" int drive(void** arrays) {
  const auto* const sizes = static_cast<const int64_t*>(arrays[0]);
  if (sizes[2] == 1) return launch<rt::half>(arrays, sizes);
  if (sizes[2] == 2) return launch<rt::bfloat16>(arrays, sizes);
  return launch<float>(arrays, sizes);
}
