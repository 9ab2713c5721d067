// CPU op of padded_attention. Contract: chatterbox_fast/reference.py, padded_attention.
//
// torch's own flash kernel for the CPU is vectorised, threaded and blocked for its caches. It has
// no lengths, and a mask costs it time; so it is called for the prefix that is valid, once for all
// neighbouring rows of the same length, as both of guidance are. Pads are neither read nor
// computed. The result is moved by the thread that calls: to wake others takes longer.
#include "padded_attention.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/library.h>

#include <algorithm>

namespace chatterbox_fast {

namespace {

// (R, length, H, 64), contiguous: attention of the first `length` positions of qkv (R, T, 3 H 64).
at::Tensor attend(const at::Tensor& qkv, int64_t length, int64_t heads) {
  if (length == 0) return at::empty({qkv.size(0), 0, heads, kPaddedDim}, qkv.options());
  const at::Tensor parts =  // (3, R, H, length, 64)
      qkv.narrow(1, 0, length).unflatten(2, {3, heads, kPaddedDim}).permute({2, 0, 3, 1, 4});
  const at::Tensor y = at::scaled_dot_product_attention(parts[0], parts[1], parts[2]);
  return y.transpose(1, 2).contiguous();  // as the flash kernel leaves it
}

// Writes rows of `valid` bytes to where each has `bytes`, zeros behind them.
char* put_rows(const at::Tensor& y, int64_t valid, int64_t bytes, char* to) {
  const char* from = static_cast<const char*>(y.const_data_ptr());
  for (int64_t row = 0; row < y.size(0); ++row, from += valid) {
    to = std::copy_n(from, valid, to);
    to = std::fill_n(to, bytes - valid, char{0});
  }
  return to;
}

at::Tensor padded_attention(const at::Tensor& qkv, const at::Tensor& lengths, int64_t heads) {
  const PaddedAttentionSizes sizes = check_padded_attention(qkv, lengths, heads);
  const at::AutoDispatchBelowADInplaceOrView no_gradient;  // the op has none
  at::Tensor out = at::empty({sizes.rows, sizes.positions, heads * kPaddedDim}, qkv.options());
  const int64_t position = heads * kPaddedDim * out.element_size();  // bytes
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int* const given = lengths.const_data_ptr<int>();
  for (int64_t row = 0, end = 0; row < sizes.rows; row = end) {
    while (end < sizes.rows && given[end] == given[row]) ++end;
    const int64_t length = std::clamp<int64_t>(given[row], 0, sizes.positions);
    const at::Tensor y = attend(qkv.narrow(0, row, end - row), length, heads);
    to = put_rows(y, length * position, sizes.positions * position, to);
  }
  return out;
}

}  // namespace

}  // namespace chatterbox_fast

TORCH_LIBRARY_IMPL(chatterbox_fast, CPU, library) {
  library.impl("padded_attention", &chatterbox_fast::padded_attention);
}
