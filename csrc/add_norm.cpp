// The checks that every backend of add_norm makes before it touches memory.
#include "add_norm.h"

#include "checks.h"

namespace chatterbox_fast {

namespace {

void check_placed(const at::Tensor& tensor, const char* name, const at::Tensor& x) {
  const auto type = tensor.scalar_type();
  CBF_CHECK(type == at::kFloat, "add_norm", name, at::kFloat, type);
  CBF_CHECK(tensor.device() == x.device(), "add_norm", name, c10::str("on ", x.device()),
            tensor.device());
  CBF_CHECK(tensor.is_contiguous(), "add_norm", name, "contiguous",
            c10::str("strides ", tensor.strides()));
}

// A number a channel of x.
void check_of_channels(const at::Tensor& numbers, const char* name, const at::Tensor& x) {
  check_placed(numbers, name, x);
  CBF_CHECK(numbers.dim() == 1 && numbers.size(0) == x.size(2), "add_norm", name,
            c10::str("(", x.size(2), ",), a number a channel"), numbers.sizes());
}

void check_residual(const at::Tensor& residual, const at::Tensor& x) {
  check_placed(residual, "residual", x);
  CBF_CHECK(residual.sizes() == x.sizes(), "add_norm", "residual", c10::str(x.sizes(), " as x is"),
            residual.sizes());
  CBF_CHECK(!residual.is_alias_of(x), "add_norm", "residual", "in memory of its own", "x's");
}

}  // namespace

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
  check_of_channels(weight, "weight", x);
  check_of_channels(bias, "bias", x);
  if (residual) check_residual(*residual, x);
  if (offset) check_of_channels(*offset, "offset", x);
  if (shift) check_of_channels(*shift, "shift", x);
  const auto result = dtype.value_or(type);
  CBF_CHECK(is_floating(result), "add_norm", "dtype", "float32, float16 or bfloat16", result);
  return result;
}

}  // namespace chatterbox_fast
