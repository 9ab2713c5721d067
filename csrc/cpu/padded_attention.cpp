// CPU op of padded_attention. Contract: chatterbox_fast/reference.py, padded_attention.
//
// torch's own flash kernel for the CPU is vectorised, threaded and blocked for its caches. It has
// no lengths, and a mask costs it time; so each row is a call of its own for the prefix that is
// valid. Pads are neither read nor computed.
#include "padded_attention.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/library.h>

#include <algorithm>

namespace chatterbox_fast {

namespace {

// Attention of `length` positions, from the first on: qkv (T, 3 H 64), out (T, H 64).
void attend(const at::Tensor& qkv, int64_t length, int64_t heads, const at::Tensor& out) {
  const at::Tensor parts =  // (3, 1, H, length, 64)
      qkv.narrow(0, 0, length).view({1, length, 3, heads, kPaddedDim}).permute({2, 0, 3, 1, 4});
  const at::Tensor y = at::scaled_dot_product_attention(parts[0], parts[1], parts[2]);
  out.narrow(0, 0, length).view({length, heads, kPaddedDim}).copy_(y[0].transpose(0, 1));
}

at::Tensor padded_attention(const at::Tensor& qkv, const at::Tensor& lengths, int64_t heads) {
  const PaddedAttentionSizes sizes = check_padded_attention(qkv, lengths, heads);
  const at::AutoDispatchBelowADInplaceOrView no_gradient;  // the op has none
  at::Tensor out = at::empty({sizes.rows, sizes.positions, heads * kPaddedDim}, qkv.options());
  const int* const given = lengths.const_data_ptr<int>();
  for (int64_t row = 0; row < sizes.rows; ++row) {
    const int64_t length = std::clamp<int64_t>(given[row], 0, sizes.positions);
    if (length > 0) attend(qkv[row], length, heads, out[row]);
    out[row].narrow(0, length, sizes.positions - length).zero_();
  }
  return out;
}

}  // namespace

}  // namespace chatterbox_fast

TORCH_LIBRARY_IMPL(chatterbox_fast, CPU, library) {
  library.impl("padded_attention", &chatterbox_fast::padded_attention);
}
