// What the CPU and the CUDA op of istft share: the checks of its arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace chatterbox_fast {

struct IstftSizes {
  int64_t rows;    // B
  int64_t frames;  // M

  int64_t length() const { return 4 * (frames - 1); }  // of a row of output
};

// Checks every argument against the schema's contract (chatterbox_fast/reference.py, istft); throws
// c10::Error with the argument's name.
IstftSizes check_istft(const at::Tensor& spectrum, const at::Tensor& window, double limit);

}  // namespace chatterbox_fast
