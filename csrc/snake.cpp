// The checks that every backend of snake makes before it touches memory.
#include "snake.h"

#include "checks.h"

namespace chatterbox_fast {

namespace {

// A number a channel of x: alpha or inverse.
void check_of_channels(const at::Tensor& numbers, const char* name, const at::Tensor& x) {
  const auto type = numbers.scalar_type();
  CBF_CHECK(type == at::kFloat, "snake", name, at::kFloat, type);
  CBF_CHECK(numbers.device() == x.device(), "snake", name, c10::str("on ", x.device()),
            numbers.device());
  CBF_CHECK(numbers.dim() == 1 && numbers.size(0) == x.size(-1), "snake", name,
            c10::str("(", x.size(-1), ",), a number a channel"), numbers.sizes());
  CBF_CHECK(numbers.is_contiguous(), "snake", name, "contiguous",
            c10::str("strides ", numbers.strides()));
}

}  // namespace

void check_snake(const at::Tensor& x, const at::Tensor& alpha, const at::Tensor& inverse) {
  const auto type = x.scalar_type();
  CBF_CHECK(is_floating(type), "snake", "x", "float32, float16 or bfloat16", type);
  CBF_CHECK(x.dim() >= 1, "snake", "x", "(..., C)", x.sizes());
  CBF_CHECK_CONTIGUOUS(x, "snake");
  check_of_channels(alpha, "alpha", x);
  check_of_channels(inverse, "inverse", x);
}

}  // namespace chatterbox_fast
