// resample's kernels for every dtype. Without torch, whose headers take nvcc longer than kernels
// do.
#include "resample.cuh"

namespace chatterbox_fast {

template rt::Error launch_resample(ResampleArgs<float>, rt::Stream);
template rt::Error launch_resample(ResampleArgs<rt::half>, rt::Stream);
template rt::Error launch_resample(ResampleArgs<rt::bfloat16>, rt::Stream);

}  // namespace chatterbox_fast
