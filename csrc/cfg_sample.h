// What the CPU and the CUDA op of cfg_sample share: the checks of its arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace chatterbox_fast {

constexpr int64_t kMaxRows = 64;
constexpr int64_t kMaxVocabulary = 65536;
constexpr int64_t kSamplingParams = 6;

struct CfgSampleSizes {
  int64_t rows;        // sequences drawn
  int64_t vocabulary;  // V
  bool guided;         // logits hold unconditional rows too
};

// Checks every argument against the schema's contract (chatterbox_fast/reference.py, cfg_sample);
// throws c10::Error with the argument's name.
CfgSampleSizes check_cfg_sample(const at::Tensor& logits, const at::Tensor& seen,
                                const at::Tensor& params, const at::Tensor& flags,
                                const std::optional<at::Tensor>& philox,
                                const std::optional<at::Tensor>& stop_action, int64_t stop_token,
                                int64_t forget, int64_t philox_threads);

}  // namespace chatterbox_fast
