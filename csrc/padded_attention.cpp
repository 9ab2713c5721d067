// The checks that every backend of padded_attention makes before it touches memory.
#include "padded_attention.h"

#include "checks.h"

namespace chatterbox_fast {

namespace {

constexpr int64_t kAlignment = 16;  // bytes that a kernel loads at once

}  // namespace

PaddedAttentionSizes check_padded_attention(const at::Tensor& qkv, const at::Tensor& lengths,
                                            int64_t heads) {
  const auto type = qkv.scalar_type();
  CBF_CHECK(is_floating(type), "padded_attention", "qkv", "float32, float16 or bfloat16", type);
  CBF_CHECK(heads >= 1, "padded_attention", "heads", "at least 1", heads);
  constexpr int64_t kWidth = 3 * kPaddedDim;
  CBF_CHECK(qkv.dim() == 3 && qkv.size(2) % kWidth == 0 && qkv.size(2) / kWidth == heads,
            "padded_attention", "qkv", c10::str("(R, T, 3 * ", heads, " * 64)"), qkv.sizes());
  CBF_CHECK_CONTIGUOUS(qkv, "padded_attention");
  const auto address = reinterpret_cast<std::uintptr_t>(qkv.const_data_ptr());
  CBF_CHECK(address % kAlignment == 0, "padded_attention", "qkv", "aligned to 16 bytes",
            c10::str("an address of ", address % kAlignment, " bytes more"));
  CBF_CHECK_DTYPE(lengths, "padded_attention", at::kInt);
  CBF_CHECK_DEVICE(lengths, "padded_attention", qkv.device());
  CBF_CHECK_CONTIGUOUS(lengths, "padded_attention");
  CBF_CHECK(lengths.dim() == 1 && lengths.size(0) == qkv.size(0), "padded_attention", "lengths",
            c10::str("(", qkv.size(0), ",) as qkv has rows"), lengths.sizes());
  return {qkv.size(0), qkv.size(1)};
}

}  // namespace chatterbox_fast
