// The checks that every backend of decode_attention makes before it touches memory.
#include "decode_attention.h"

#include <algorithm>
#include <vector>

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

// Elements from a cache's first to behind its last, or 0 where rows or heads share some: a row's
// heads, or a head's rows, must end before the next begin.
int64_t extent(const at::Tensor& cache) {
  const int64_t outer = cache.stride(0) < cache.stride(1) ? 1 : 0;
  int64_t end = cache.size(2) * kHeadDim;
  for (const int64_t dim : {1 - outer, outer}) {
    if (cache.size(dim) > 1 && cache.stride(dim) < end) return 0;
    end += cache.stride(dim) * (cache.size(dim) - 1);
  }
  return end;
}

// Whether two caches of one shape and type share memory; each has an extent.
bool overlap(const at::Tensor& one, const at::Tensor& other) {
  if (one.numel() == 0) return false;
  const auto address = [](const at::Tensor& cache) {
    return reinterpret_cast<std::uintptr_t>(cache.const_data_ptr());
  };
  const auto end = [&](const at::Tensor& cache) {
    return address(cache) + extent(cache) * cache.element_size();
  };
  if (end(one) <= address(other) || end(other) <= address(one)) return false;
  std::vector<std::uintptr_t> heads;  // of two caches that lie between each other
  for (const at::Tensor& cache : {one, other}) {
    for (int64_t row = 0; row < cache.size(0); ++row) {
      for (int64_t head = 0; head < cache.size(1); ++head) {
        const int64_t before = row * cache.stride(0) + head * cache.stride(1);
        heads.push_back(address(cache) + before * cache.element_size());
      }
    }
  }
  std::sort(heads.begin(), heads.end());
  const std::uintptr_t bytes = one.size(2) * kHeadDim * one.element_size();
  return std::adjacent_find(heads.begin(), heads.end(),
                            [&](auto a, auto b) { return b - a < bytes; }) != heads.end();
}

void check_cache(const at::Tensor& cache, const char* name, const at::Tensor& qkv) {
  CBF_CHECK(is_floating(cache.scalar_type()), "decode_attention", name,
            "float32, float16 or bfloat16", cache.scalar_type());
  CBF_CHECK(cache.device() == qkv.device(), "decode_attention", name,
            c10::str("on ", qkv.device(), " as qkv is"), cache.device());
  CBF_CHECK(cache.dim() == 4 && cache.size(0) == qkv.size(0) && cache.size(1) == qkv.size(2) &&
                cache.size(2) >= 1 && cache.size(2) <= kMostCapacity && cache.size(3) == kHeadDim,
            "decode_attention", name,
            c10::str("(", qkv.size(0), ", ", qkv.size(2), ", C, 64) as qkv has, C in [1, ",
                     kMostCapacity, "]"),
            cache.sizes());
  const int64_t step = kAlignment / cache.element_size();
  const bool aligned = reinterpret_cast<std::uintptr_t>(cache.const_data_ptr()) % kAlignment == 0;
  const auto steps_by = [&](int64_t dim, int64_t multiple) {
    return cache.size(dim) == 1 || cache.stride(dim) % multiple == 0;
  };
  const bool dense = cache.size(2) == 1 || cache.stride(2) == kHeadDim;
  CBF_CHECK(cache.stride(3) == 1 && dense && steps_by(0, step) && steps_by(1, step) && aligned,
            "decode_attention", name,
            "contiguous in its last two dimensions and aligned to 16 bytes in every row and head",
            c10::str("strides ", cache.strides()));
  CBF_CHECK(cache.numel() == 0 || extent(cache) > 0, "decode_attention", name,
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
  CBF_CHECK(watched->dim() == 2 && watched->size(1) == 2 &&
                watched->size(0) <= kMostProbabilities / capacity,
            "decode_attention", "watched",
            c10::str("(W, 2), W at most ", kMostProbabilities / capacity), watched->sizes());
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
                qkv.size(2) <= kMostHeads && qkv.size(3) == kHeadDim,
            "decode_attention", "qkv",
            c10::str("(B, 3, H, 64), B at most ", kMostAttentionRows, ", H at most ", kMostHeads),
            qkv.sizes());
  CBF_CHECK_CONTIGUOUS(qkv, "decode_attention");
  check_cache(k_cache, "k_cache", qkv);
  check_cache(v_cache, "v_cache", qkv);
  CBF_CHECK(v_cache.scalar_type() == k_cache.scalar_type(), "decode_attention", "v_cache",
            c10::str(k_cache.scalar_type(), " as k_cache is"), v_cache.scalar_type());
  const int64_t capacity = k_cache.size(2);
  CBF_CHECK(v_cache.size(2) == capacity, "decode_attention", "v_cache",
            c10::str(k_cache.sizes(), " as k_cache is"), v_cache.sizes());
  CBF_CHECK(!overlap(k_cache, v_cache), "decode_attention", "v_cache", "of memory of its own",
            "some of k_cache's");
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
