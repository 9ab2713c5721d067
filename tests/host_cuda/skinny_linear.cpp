// Launches skinny_linear's kernel as the CUDA op does. arrays: {rows, inputs, outputs, dtype of x,
// of weight, offset, is there a norm, a residual, is it gated, offset of norm}, x, weight, scale,
// y, norm, residual, eps. dtype: 0 float, 1 half, 2 bfloat16, 3 int8. x and weight start `offset`
// elements into their arrays, norm starts its own.
#include "kernels/skinny_linear.cuh"

using chatterbox_fast::SkinnyLinearArgs;

template <typename X, typename W>
int launch(void** arrays, const int64_t* sizes) {
  SkinnyLinearArgs<X, W> args = {};
  args.x = static_cast<const X*>(arrays[1]) + sizes[5];
  args.weight = static_cast<const W*>(arrays[2]) + sizes[5];
  args.scale = sizes[4] == 3 ? static_cast<const float*>(arrays[3]) : nullptr;
  args.y = static_cast<X*>(arrays[4]);
  args.norm = sizes[6] != 0 ? static_cast<const float*>(arrays[5]) + sizes[9] : nullptr;
  args.residual = sizes[7] != 0 ? static_cast<const X*>(arrays[6]) : nullptr;
  args.eps = *static_cast<const float*>(arrays[7]);
  args.gated = sizes[8] != 0;
  args.rows = static_cast<int>(sizes[0]);
  args.inputs = sizes[1];
  args.outputs = sizes[2];
  return chatterbox_fast::launch_skinny_linear(args, nullptr);
}

template <typename X>
int launch_for(void** arrays, const int64_t* sizes) {
  if (sizes[4] == 1) return launch<X, rt::half>(arrays, sizes);
  if (sizes[4] == 2) return launch<X, rt::bfloat16>(arrays, sizes);
  if (sizes[4] == 3) return launch<X, int8_t>(arrays, sizes);
  return launch<X, float>(arrays, sizes);
}

extern "C" int drive(void** arrays) {
  const auto* const sizes = static_cast<const int64_t*>(arrays[0]);
  if (sizes[3] == 1) return launch_for<rt::half>(arrays, sizes);
  if (sizes[3] == 2) return launch_for<rt::bfloat16>(arrays, sizes);
  return launch_for<float>(arrays, sizes);
}
