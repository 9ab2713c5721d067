// What the CPU and the CUDA op of skinny_linear share: the checks of its arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace chatterbox_fast {

constexpr int64_t kMostSkinnyRows = 8;

struct SkinnyLinearSizes {
  int64_t rows;     // M
  int64_t inputs;   // K
  int64_t outputs;  // N, of y
};

// Checks every argument against the schema's contract (chatterbox_fast/reference.py,
// skinny_linear); throws c10::Error with the argument's name.
SkinnyLinearSizes check_skinny_linear(const at::Tensor& x, const at::Tensor& weight,
                                      const std::optional<at::Tensor>& scale,
                                      const std::optional<at::Tensor>& norm,
                                      const std::optional<at::Tensor>& residual, bool gated);

}  // namespace chatterbox_fast
