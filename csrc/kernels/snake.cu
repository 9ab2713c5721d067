// snake's kernels for every dtype. Without torch, whose headers take nvcc longer than kernels do.
#include "snake.cuh"

namespace chatterbox_fast {

template rt::Error launch_snake(const SnakeArgs<float>&, rt::Stream);
template rt::Error launch_snake(const SnakeArgs<rt::half>&, rt::Stream);
template rt::Error launch_snake(const SnakeArgs<rt::bfloat16>&, rt::Stream);

}  // namespace chatterbox_fast
