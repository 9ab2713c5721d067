// Launches add_norm's kernel as the CUDA op does. arrays: {rows R, times T, channels C, stride of a
// row of x, of a time, dtype of x, of y, is there a residual, an offset, a shift, Mish; elements
// before x, weight, bias, residual, offset, shift, y}, those seven, eps. dtype: 0 float, 1 half,
// 2 bfloat16.
#include "kernels/add_norm.cuh"

using chatterbox_fast::AddNormArgs;

template <typename X, typename Y>
int launch(void** arrays, const int64_t* sizes) {
  const auto floats = [&](int array) {
    return static_cast<float*>(arrays[array]) + sizes[10 + array];
  };
  AddNormArgs<X, Y> args = {};
  args.times = sizes[1];
  args.rows = sizes[0] * sizes[1];
  args.channels = static_cast<int>(sizes[2]);
  args.x_row_stride = sizes[3];
  args.x_time_stride = sizes[4];
  args.mish = sizes[10] != 0;
  args.x = static_cast<const X*>(arrays[1]) + sizes[11];
  args.weight = floats(2);
  args.bias = floats(3);
  args.residual = sizes[7] != 0 ? floats(4) : nullptr;
  args.offset = sizes[8] != 0 ? floats(5) : nullptr;
  args.shift = sizes[9] != 0 ? floats(6) : nullptr;
  args.y = static_cast<Y*>(arrays[7]) + sizes[17];
  args.eps = *static_cast<const float*>(arrays[8]);
  return chatterbox_fast::launch_add_norm(args, nullptr);
}

template <typename X>
int launch_for(void** arrays, const int64_t* sizes) {
  if (sizes[6] == 1) return launch<X, rt::half>(arrays, sizes);
  if (sizes[6] == 2) return launch<X, rt::bfloat16>(arrays, sizes);
  return launch<X, float>(arrays, sizes);
}

extern "C" int drive(void** arrays) {
  const auto* const sizes = static_cast<const int64_t*>(arrays[0]);
  if (sizes[5] == 1) return launch_for<rt::half>(arrays, sizes);
  if (sizes[5] == 2) return launch_for<rt::bfloat16>(arrays, sizes);
  return launch_for<float>(arrays, sizes);
}
