// What the CPU and the CUDA op of padded_attention share: the checks of its arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace chatterbox_fast {

constexpr int64_t kPaddedDim = 64;  // of a head

struct PaddedAttentionSizes {
  int64_t rows;       // R
  int64_t positions;  // T
};

// Checks every argument against the schema's contract (chatterbox_fast/reference.py,
// padded_attention); throws c10::Error with the argument's name.
PaddedAttentionSizes check_padded_attention(const at::Tensor& qkv, const at::Tensor& lengths,
                                            int64_t heads);

}  // namespace chatterbox_fast
