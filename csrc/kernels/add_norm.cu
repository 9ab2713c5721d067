// add_norm's kernels for every pair of dtypes. Without torch, whose headers take nvcc longer than
// kernels do.
#include "add_norm.cuh"

namespace chatterbox_fast {

#define CBF_ADD_NORM(X)                                                            \
  template rt::Error launch_add_norm(const AddNormArgs<X, float>&, rt::Stream);    \
  template rt::Error launch_add_norm(const AddNormArgs<X, rt::half>&, rt::Stream); \
  template rt::Error launch_add_norm(const AddNormArgs<X, rt::bfloat16>&, rt::Stream)

CBF_ADD_NORM(float);
CBF_ADD_NORM(rt::half);
CBF_ADD_NORM(rt::bfloat16);

}  // namespace chatterbox_fast
