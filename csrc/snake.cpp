// The checks that every backend of snake makes before it touches memory.
#include "snake.h"

#include "checks.h"

namespace chatterbox_fast {

void check_snake(const at::Tensor& x, const at::Tensor& alpha, const at::Tensor& inverse,
                 const std::optional<at::Tensor>& residual,
                 const std::optional<at::Tensor>& offset) {
  const auto type = x.scalar_type();
  CBF_CHECK(is_floating(type), "snake", "x", "float32, float16 or bfloat16", type);
  CBF_CHECK(x.dim() >= 1, "snake", "x", "(..., C)", x.sizes());
  CBF_CHECK_CONTIGUOUS(x, "snake");
  check_of_channels(alpha, "snake", "alpha", x);
  check_of_channels(inverse, "snake", "inverse", x);
  if (residual) check_residual(*residual, "snake", type, x);
  if (offset) check_of_channels(*offset, "snake", "offset", x);
}

}  // namespace chatterbox_fast
