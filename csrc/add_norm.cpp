// The checks that every backend of add_norm makes before it touches memory.
#include "add_norm.h"

#include "checks.h"

namespace chatterbox_fast {

at::ScalarType check_add_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                              const std::optional<at::Tensor>& residual,
                              const std::optional<at::Tensor>& offset,
                              const std::optional<at::Tensor>& shift,
                              std::optional<at::ScalarType> dtype) {
  const auto type = x.scalar_type();
  CBF_CHECK(is_floating(type), "add_norm", "x", "float32, float16 or bfloat16", type);
  CBF_CHECK(x.dim() == 3 && x.size(2) <= kMostAddNormChannels, "add_norm", "x",
            c10::str("(R, T, C), C at most ", kMostAddNormChannels), x.sizes());
  CBF_CHECK(x.size(2) <= 1 || x.stride(2) == 1, "add_norm", "x", "channels last",
            c10::str("strides ", x.strides()));
  check_of_channels(weight, "add_norm", "weight", x);
  check_of_channels(bias, "add_norm", "bias", x);
  if (residual) check_residual(*residual, "add_norm", at::kFloat, x);
  if (offset) check_of_channels(*offset, "add_norm", "offset", x);
  if (shift) check_of_channels(*shift, "add_norm", "shift", x);
  const auto result = dtype.value_or(type);
  CBF_CHECK(is_floating(result), "add_norm", "dtype", "float32, float16 or bfloat16", result);
  return result;
}

}  // namespace chatterbox_fast
