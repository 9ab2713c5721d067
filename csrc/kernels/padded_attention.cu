// padded_attention's kernels for every dtype. Without torch, whose headers take nvcc longer than
// kernels do.
#include "padded_attention.cuh"

namespace chatterbox_fast {

template rt::Error launch_padded_attention(PaddedAttentionArgs<float>, rt::Stream);
template rt::Error launch_padded_attention(PaddedAttentionArgs<rt::half>, rt::Stream);
template rt::Error launch_padded_attention(PaddedAttentionArgs<rt::bfloat16>, rt::Stream);

}  // namespace chatterbox_fast
