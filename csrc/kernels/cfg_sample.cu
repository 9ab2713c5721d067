// cfg_sample's kernels for every dtype. Without torch, whose headers take nvcc longer than kernels
// do.
#include "cfg_sample.cuh"

namespace chatterbox_fast {

template rt::Error launch_cfg_sample(const CfgSampleArgs<float>&, rt::Stream);
template rt::Error launch_cfg_sample(const CfgSampleArgs<rt::half>&, rt::Stream);
template rt::Error launch_cfg_sample(const CfgSampleArgs<rt::bfloat16>&, rt::Stream);

}  // namespace chatterbox_fast
