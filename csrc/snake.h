// What the CPU and the CUDA op of snake share: the checks of its arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace chatterbox_fast {

// Checks every argument against the schema's contract (chatterbox_fast/reference.py, snake);
// throws c10::Error with the argument's name.
void check_snake(const at::Tensor& x, const at::Tensor& alpha, const at::Tensor& inverse,
                 const std::optional<at::Tensor>& residual,
                 const std::optional<at::Tensor>& offset);

}  // namespace chatterbox_fast
