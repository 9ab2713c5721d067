// The checks that every backend of decode_attention makes before it touches memory.
#include "decode_attention.h"

#include <ATen/MemoryOverlap.h>

#include "checks.h"

namespace chatterbox_fast {

namespace {

constexpr int64_t kAlignment = 16;  // bytes that a kernel loads at once

std::string given(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? "a tensor" : "None";
}

void check_table(const at::Tensor& tensor, const char* name, at::ScalarType type,
                 const at::Tensor& qkv) {
  CBF_CHECK(tensor.scalar_type() == type, "decode_attention", name, type, tensor.scalar_type());
  CBF_CHECK(tensor.device() == qkv.device(), "decode_attention", name,
            c10::str("on ", qkv.device(), " as qkv is"), tensor.device());
  CBF_CHECK(tensor.is_contiguous(), "decode_attention", name, "contiguous",
            c10::str("strides ", tensor.strides()));
}

void check_cache(const at::Tensor& cache, const char* name, const at::Tensor& qkv) {
  CBF_CHECK(is_floating(cache.scalar_type()), "decode_attention", name,
            "float32, float16 or bfloat16", cache.scalar_type());
  CBF_CHECK(cache.device() == qkv.device(), "decode_attention", name,
            c10::str("on ", qkv.device(), " as qkv is"), cache.device());
  CBF_CHECK(cache.dim() == 4 && cache.size(0) == qkv.size(0) && cache.size(1) == qkv.size(2) &&
                cache.size(2) >= 1 && cache.size(3) == kHeadDim,
            "decode_attention", name,
            c10::str("(", qkv.size(0), ", ", qkv.size(2), ", C, 64) as qkv has, C at least 1"),
            cache.sizes());
  const int64_t step = kAlignment / cache.element_size();
  const bool aligned = reinterpret_cast<std::uintptr_t>(cache.const_data_ptr()) % kAlignment == 0;
  CBF_CHECK(cache.stride(3) == 1 && cache.stride(2) == kHeadDim && cache.stride(0) % step == 0 &&
                cache.stride(1) % step == 0 && aligned,
            "decode_attention", name,
            "contiguous in its last two dimensions and aligned to 16 bytes in every row and head",
            c10::str("strides ", cache.strides()));
  CBF_CHECK(at::has_internal_overlap(cache) != at::MemOverlap::Yes, "decode_attention", name,
            "of rows and heads of its own", c10::str("strides ", cache.strides()));
}

void check_positions(const at::Tensor& position, const at::Tensor& flags, const at::Tensor& qkv) {
  check_table(position, "position", at::kLong, qkv);
  CBF_CHECK(position.dim() == 1 && (position.size(0) == 1 || position.size(0) == qkv.size(0)),
            "decode_attention", "position", c10::str("(1,) or (", qkv.size(0), ",)"),
            position.sizes());
  check_table(flags, "flags", at::kInt, qkv);
  CBF_CHECK(flags.sizes() == position.sizes(), "decode_attention", "flags",
            c10::str(position.sizes(), " as position is"), flags.sizes());
}

void check_rope(const std::optional<at::Tensor>& cos, const std::optional<at::Tensor>& sin,
                const at::Tensor& qkv, int64_t capacity) {
  CBF_CHECK(cos.has_value() == sin.has_value(), "decode_attention", "sin",
            cos.has_value() ? "given, as cos is" : "None, as cos is", given(sin));
  if (!cos.has_value()) return;
  const auto check = [&](const at::Tensor& table, const char* name) {
    check_table(table, name, at::kFloat, qkv);
    CBF_CHECK(table.dim() == 2 && table.size(0) >= capacity && table.size(1) == kHeadDim,
              "decode_attention", name, c10::str("(", capacity, " or more, 64)"), table.sizes());
  };
  check(*cos, "cos");
  check(*sin, "sin");
}

void check_watched(const std::optional<at::Tensor>& watched,
                   const std::optional<at::Tensor>& probabilities, const at::Tensor& qkv,
                   int64_t capacity) {
  CBF_CHECK(watched.has_value() == probabilities.has_value(), "decode_attention", "probabilities",
            watched.has_value() ? "given, as watched is" : "None, as watched is",
            given(probabilities));
  if (!watched.has_value()) return;
  check_table(*watched, "watched", at::kInt, qkv);
  CBF_CHECK(watched->dim() == 2 && watched->size(1) == 2, "decode_attention", "watched", "(W, 2)",
            watched->sizes());
  check_table(*probabilities, "probabilities", at::kFloat, qkv);
  CBF_CHECK(probabilities->dim() == 2 && probabilities->size(0) == watched->size(0) &&
                probabilities->size(1) == capacity,
            "decode_attention", "probabilities",
            c10::str("(", watched->size(0), ", ", capacity, ")"), probabilities->sizes());
}

}  // namespace

DecodeAttentionSizes check_decode_attention(
    const at::Tensor& qkv, const at::Tensor& k_cache, const at::Tensor& v_cache,
    const at::Tensor& position, const at::Tensor& flags, const std::optional<at::Tensor>& cos,
    const std::optional<at::Tensor>& sin, const std::optional<at::Tensor>& watched,
    const std::optional<at::Tensor>& probabilities, const std::optional<at::Tensor>& arrivals,
    int64_t splits) {
  CBF_CHECK(is_floating(qkv.scalar_type()), "decode_attention", "qkv",
            "float32, float16 or bfloat16", qkv.scalar_type());
  CBF_CHECK(qkv.dim() == 4 && qkv.size(0) <= kMostAttentionRows && qkv.size(1) == 3 &&
                qkv.size(3) == kHeadDim,
            "decode_attention", "qkv", "(B, 3, H, 64), B at most 64", qkv.sizes());
  CBF_CHECK_CONTIGUOUS(qkv, "decode_attention");
  check_cache(k_cache, "k_cache", qkv);
  check_cache(v_cache, "v_cache", qkv);
  CBF_CHECK(v_cache.scalar_type() == k_cache.scalar_type(), "decode_attention", "v_cache",
            c10::str(k_cache.scalar_type(), " as k_cache is"), v_cache.scalar_type());
  const int64_t capacity = k_cache.size(2);
  CBF_CHECK(v_cache.size(2) == capacity, "decode_attention", "v_cache",
            c10::str(k_cache.sizes(), " as k_cache is"), v_cache.sizes());
  check_positions(position, flags, qkv);
  check_rope(cos, sin, qkv, capacity);
  check_watched(watched, probabilities, qkv, capacity);
  if (arrivals.has_value()) {
    check_table(*arrivals, "arrivals", at::kInt, qkv);
    CBF_CHECK(arrivals->numel() >= qkv.size(0) * qkv.size(2), "decode_attention", "arrivals",
              c10::str("of ", qkv.size(0) * qkv.size(2), " or more"), arrivals->sizes());
  }
  CBF_CHECK(splits >= 0 && splits <= kMostSplits, "decode_attention", "splits",
            c10::str("in [0, ", kMostSplits, "]"), splits);
  return {qkv.size(0), qkv.size(2), capacity, position.size(0),
          watched.has_value() ? watched->size(0) : 0};
}

}  // namespace chatterbox_fast
