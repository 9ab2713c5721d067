// What the CPU and the CUDA op of add_norm share: the checks of its arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace chatterbox_fast {

constexpr int kMostAddNormChannels = 1024;

// Checks every argument against the schema's contract (chatterbox_fast/reference.py, add_norm);
// throws c10::Error with the argument's name. Returns the dtype of the result.
at::ScalarType check_add_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                              const std::optional<at::Tensor>& residual,
                              const std::optional<at::Tensor>& offset,
                              const std::optional<at::Tensor>& shift,
                              std::optional<at::ScalarType> dtype);

}  // namespace chatterbox_fast
