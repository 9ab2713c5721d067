// What the CPU and the CUDA op of decode_attention share: the checks of its arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace chatterbox_fast {

constexpr int64_t kMostAttentionRows = 64;
constexpr int64_t kHeadDim = 64;
constexpr int64_t kMostHeads = 1024;
constexpr int64_t kMostCapacity = int64_t{1} << 24;             // kernels count elements in 32 bits
constexpr int64_t kMostProbabilities = (int64_t{1} << 31) - 1;  // W C
constexpr int64_t kMostSplits = 64;
constexpr int kAttentionFailed = 2;  // reference.FAILED

struct DecodeAttentionSizes {
  int64_t rows;       // B
  int64_t heads;      // H
  int64_t capacity;   // C
  int64_t positions;  // 1, shared by all rows, or B
  int64_t watched;    // W
};

// Checks every argument against the schema's contract (chatterbox_fast/reference.py,
// decode_attention); throws c10::Error with the argument's name.
DecodeAttentionSizes check_decode_attention(
    const at::Tensor& qkv, const at::Tensor& k_cache, const at::Tensor& v_cache,
    const at::Tensor& position, const at::Tensor& flags, const std::optional<at::Tensor>& cos,
    const std::optional<at::Tensor>& sin, const std::optional<at::Tensor>& watched,
    const std::optional<at::Tensor>& probabilities, const std::optional<at::Tensor>& arrivals,
    int64_t splits);

template <typename T>
const T* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

}  // namespace chatterbox_fast
