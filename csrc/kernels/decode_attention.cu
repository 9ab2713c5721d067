// decode_attention's kernels for every dtype. Without torch, whose headers take nvcc longer than
// kernels do.
#include "decode_attention.cuh"

namespace chatterbox_fast {

template rt::Error launch_decode_attention(const DecodeAttentionArgs<float, float>&, rt::Stream);
template rt::Error launch_decode_attention(const DecodeAttentionArgs<float, rt::half>&, rt::Stream);
template rt::Error launch_decode_attention(const DecodeAttentionArgs<float, rt::bfloat16>&,
                                           rt::Stream);
template rt::Error launch_decode_attention(const DecodeAttentionArgs<rt::half, float>&, rt::Stream);
template rt::Error launch_decode_attention(const DecodeAttentionArgs<rt::half, rt::half>&,
                                           rt::Stream);
template rt::Error launch_decode_attention(const DecodeAttentionArgs<rt::half, rt::bfloat16>&,
                                           rt::Stream);
template rt::Error launch_decode_attention(const DecodeAttentionArgs<rt::bfloat16, float>&,
                                           rt::Stream);
template rt::Error launch_decode_attention(const DecodeAttentionArgs<rt::bfloat16, rt::half>&,
                                           rt::Stream);
template rt::Error launch_decode_attention(const DecodeAttentionArgs<rt::bfloat16, rt::bfloat16>&,
                                           rt::Stream);

}  // namespace chatterbox_fast
