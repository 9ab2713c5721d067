// skinny_linear's kernels for every dtype. Without torch, whose headers take nvcc longer than
// kernels do.
#include "skinny_linear.cuh"

namespace chatterbox_fast {

template rt::Error launch_skinny_linear(const SkinnyLinearArgs<float, float>&, rt::Stream);
template rt::Error launch_skinny_linear(const SkinnyLinearArgs<float, rt::half>&, rt::Stream);
template rt::Error launch_skinny_linear(const SkinnyLinearArgs<float, rt::bfloat16>&, rt::Stream);
template rt::Error launch_skinny_linear(const SkinnyLinearArgs<float, int8_t>&, rt::Stream);
template rt::Error launch_skinny_linear(const SkinnyLinearArgs<rt::half, float>&, rt::Stream);
template rt::Error launch_skinny_linear(const SkinnyLinearArgs<rt::half, rt::half>&, rt::Stream);
template rt::Error launch_skinny_linear(const SkinnyLinearArgs<rt::half, rt::bfloat16>&,
                                        rt::Stream);
template rt::Error launch_skinny_linear(const SkinnyLinearArgs<rt::half, int8_t>&, rt::Stream);
template rt::Error launch_skinny_linear(const SkinnyLinearArgs<rt::bfloat16, float>&, rt::Stream);
template rt::Error launch_skinny_linear(const SkinnyLinearArgs<rt::bfloat16, rt::half>&,
                                        rt::Stream);
template rt::Error launch_skinny_linear(const SkinnyLinearArgs<rt::bfloat16, rt::bfloat16>&,
                                        rt::Stream);
template rt::Error launch_skinny_linear(const SkinnyLinearArgs<rt::bfloat16, int8_t>&, rt::Stream);

}  // namespace chatterbox_fast
