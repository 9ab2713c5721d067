// istft's kernels for every dtype. Without torch, whose headers take nvcc longer than kernels do.
#include "istft.cuh"

namespace chatterbox_fast {

template rt::Error launch_istft(IstftArgs<float>, rt::Stream);
template rt::Error launch_istft(IstftArgs<rt::half>, rt::Stream);
template rt::Error launch_istft(IstftArgs<rt::bfloat16>, rt::Stream);

}  // namespace chatterbox_fast
