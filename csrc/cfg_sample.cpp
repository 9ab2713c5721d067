// The checks that every backend of cfg_sample makes before it touches memory.
#include "cfg_sample.h"

#include "checks.h"

namespace chatterbox_fast {

namespace {

void check_philox(const std::optional<at::Tensor>& optional, const at::Tensor& seen,
                  int64_t philox_threads) {
  if (!optional.has_value()) return;
  const at::Tensor& philox = *optional;
  CBF_CHECK_DTYPE(philox, "cfg_sample", at::kLong);
  CBF_CHECK_DEVICE(philox, "cfg_sample", seen.device());
  CBF_CHECK_CONTIGUOUS(philox, "cfg_sample");
  CBF_CHECK(philox.dim() == 2 && philox.size(0) == seen.size(0) && philox.size(1) == 2,
            "cfg_sample", "philox", c10::str("(", seen.size(0), ", 2)"), philox.sizes());
  CBF_CHECK(philox_threads > 0 && philox_threads % 256 == 0 && philox_threads < int64_t{1} << 31,
            "cfg_sample", "philox_threads",
            "a positive multiple of 256 below 2^31 where philox is given", philox_threads);
}

void check_stop_action(const std::optional<at::Tensor>& optional, const at::Tensor& seen) {
  if (!optional.has_value()) return;
  const at::Tensor& stop_action = *optional;
  CBF_CHECK_DTYPE(stop_action, "cfg_sample", at::kInt);
  CBF_CHECK_DEVICE(stop_action, "cfg_sample", seen.device());
  CBF_CHECK_CONTIGUOUS(stop_action, "cfg_sample");
  CBF_CHECK(stop_action.dim() == 1 && stop_action.size(0) == seen.size(0), "cfg_sample",
            "stop_action", c10::str("(", seen.size(0), ",)"), stop_action.sizes());
}

}  // namespace

CfgSampleSizes check_cfg_sample(const at::Tensor& logits, const at::Tensor& seen,
                                const at::Tensor& params, const at::Tensor& flags,
                                const std::optional<at::Tensor>& philox,
                                const std::optional<at::Tensor>& stop_action, int64_t stop_token,
                                int64_t forget, int64_t philox_threads) {
  CBF_CHECK_DTYPE(seen, "cfg_sample", at::kBool);
  CBF_CHECK(seen.dim() == 2 && seen.size(0) <= kMaxRows && seen.size(1) >= 1 &&
                seen.size(1) <= kMaxVocabulary,
            "cfg_sample", "seen", "(R, V), R at most 64 and V in [1, 65536]", seen.sizes());
  const int64_t rows = seen.size(0), vocabulary = seen.size(1);
  const auto type = logits.scalar_type();
  CBF_CHECK(is_floating(type), "cfg_sample", "logits", "float32, float16 or bfloat16", type);
  CBF_CHECK(logits.dim() == 2 && logits.size(1) == vocabulary &&
                (logits.size(0) == rows || logits.size(0) == 2 * rows),
            "cfg_sample", "logits",
            c10::str("(", rows, " or ", 2 * rows, ", ", vocabulary, ") as seen is"),
            logits.sizes());
  CBF_CHECK_DTYPE(params, "cfg_sample", at::kFloat);
  CBF_CHECK(params.dim() == 2 && params.size(0) == rows && params.size(1) == kSamplingParams,
            "cfg_sample", "params", c10::str("(", rows, ", 6)"), params.sizes());
  CBF_CHECK_DTYPE(flags, "cfg_sample", at::kInt);
  CBF_CHECK(flags.dim() == 1 && flags.size(0) == rows, "cfg_sample", "flags",
            c10::str("(", rows, ",)"), flags.sizes());
  CBF_CHECK_DEVICE(seen, "cfg_sample", logits.device());
  CBF_CHECK_DEVICE(params, "cfg_sample", logits.device());
  CBF_CHECK_DEVICE(flags, "cfg_sample", logits.device());
  CBF_CHECK_CONTIGUOUS(logits, "cfg_sample");
  CBF_CHECK_CONTIGUOUS(seen, "cfg_sample");
  CBF_CHECK_CONTIGUOUS(params, "cfg_sample");
  CBF_CHECK_CONTIGUOUS(flags, "cfg_sample");
  CBF_CHECK(stop_token >= 0 && stop_token < vocabulary, "cfg_sample", "stop_token",
            c10::str("in [0, ", vocabulary, ")"), stop_token);
  CBF_CHECK(forget >= -1 && forget < vocabulary, "cfg_sample", "forget",
            c10::str("-1 or in [0, ", vocabulary, ")"), forget);
  check_philox(philox, seen, philox_threads);
  check_stop_action(stop_action, seen);
  return {rows, vocabulary, rows > 0 && logits.size(0) == 2 * rows};
}

}  // namespace chatterbox_fast
