// Checks of an op's arguments. One style of message, for CPU and CUDA alike:
//   chatterbox_fast::OP: ARGUMENT must be WHAT, got WHAT IT WAS
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#define CBF_CHECK(condition, op, argument, must, ...)                                        \
  TORCH_CHECK(condition, "chatterbox_fast::" op ": ", argument, " must be ", must, ", got ", \
              __VA_ARGS__)

#define CBF_CHECK_DTYPE(tensor, op, type) \
  CBF_CHECK((tensor).scalar_type() == (type), op, #tensor, type, (tensor).scalar_type())

#define CBF_CHECK_DEVICE(tensor, op, expected)                                         \
  CBF_CHECK((tensor).device() == (expected), op, #tensor, c10::str("on ", (expected)), \
            (tensor).device())

#define CBF_CHECK_CONTIGUOUS(tensor, op)                         \
  CBF_CHECK((tensor).is_contiguous(), op, #tensor, "contiguous", \
            c10::str("strides ", (tensor).strides()))

namespace chatterbox_fast {

// Whether kernels take this type of numbers.
inline bool is_floating(at::ScalarType type) {
  return type == at::kFloat || type == at::kHalf || type == at::kBFloat16;
}

}  // namespace chatterbox_fast
