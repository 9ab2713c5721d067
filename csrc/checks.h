// Checks of an op's arguments. One style of message, for CPU and CUDA alike:
//   chatterbox_fast::OP: ARGUMENT must be WHAT, got WHAT IT WAS
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#define CBF_CHECK(condition, op, argument, must, ...)                                          \
  TORCH_CHECK(condition, "chatterbox_fast::", op, ": ", argument, " must be ", must, ", got ", \
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

// That `numbers` has a float a channel of x, where that is.
inline void check_of_channels(const at::Tensor& numbers, const char* op, const char* name,
                              const at::Tensor& x) {
  const auto type = numbers.scalar_type();
  CBF_CHECK(type == at::kFloat, op, name, at::kFloat, type);
  CBF_CHECK(numbers.device() == x.device(), op, name, c10::str("on ", x.device()),
            numbers.device());
  CBF_CHECK(numbers.dim() == 1 && numbers.size(0) == x.size(-1), op, name,
            c10::str("(", x.size(-1), ",), a number a channel"), numbers.sizes());
  CBF_CHECK(numbers.is_contiguous(), op, name, "contiguous",
            c10::str("strides ", numbers.strides()));
}

// That `residual` is as x is, of `type`, and that what is written to it is not read as x.
inline void check_residual(const at::Tensor& residual, const char* op, at::ScalarType type,
                           const at::Tensor& x) {
  CBF_CHECK_DTYPE(residual, op, type);
  CBF_CHECK_DEVICE(residual, op, x.device());
  CBF_CHECK_CONTIGUOUS(residual, op);
  CBF_CHECK(residual.sizes() == x.sizes(), op, "residual", c10::str(x.sizes(), " as x is"),
            residual.sizes());
  CBF_CHECK(!residual.is_alias_of(x), op, "residual", "in memory of its own", "x's");
}

}  // namespace chatterbox_fast
