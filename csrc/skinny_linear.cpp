// The checks that every backend of skinny_linear makes before it touches memory.
#include "skinny_linear.h"

#include "checks.h"

namespace chatterbox_fast {

namespace {

void check_scale(const std::optional<at::Tensor>& optional, const at::Tensor& weight) {
  const bool quantised = weight.scalar_type() == at::kChar;
  CBF_CHECK(optional.has_value() == quantised, "skinny_linear", "scale",
            quantised ? "given for an int8 weight" : "None for a floating weight",
            optional.has_value() ? "a tensor" : "None");
  if (!quantised) return;
  const at::Tensor& scale = *optional;
  CBF_CHECK_DTYPE(scale, "skinny_linear", at::kFloat);
  CBF_CHECK_DEVICE(scale, "skinny_linear", weight.device());
  CBF_CHECK_CONTIGUOUS(scale, "skinny_linear");
  CBF_CHECK(scale.dim() == 1 && scale.size(0) == weight.size(0), "skinny_linear", "scale",
            c10::str("(", weight.size(0), ",)"), scale.sizes());
}

void check_norm(const at::Tensor& norm, const at::Tensor& weight) {
  CBF_CHECK_DTYPE(norm, "skinny_linear", at::kFloat);
  CBF_CHECK_DEVICE(norm, "skinny_linear", weight.device());
  CBF_CHECK_CONTIGUOUS(norm, "skinny_linear");
  CBF_CHECK(norm.dim() == 1 && norm.size(0) == weight.size(1), "skinny_linear", "norm",
            c10::str("(", weight.size(1), ",)"), norm.sizes());
}

void check_residual(const at::Tensor& residual, const at::Tensor& x, int64_t outputs) {
  CBF_CHECK_DTYPE(residual, "skinny_linear", x.scalar_type());
  CBF_CHECK_DEVICE(residual, "skinny_linear", x.device());
  CBF_CHECK_CONTIGUOUS(residual, "skinny_linear");
  CBF_CHECK(residual.dim() == 2 && residual.size(0) == x.size(0) && residual.size(1) == outputs,
            "skinny_linear", "residual", c10::str("(", x.size(0), ", ", outputs, ")"),
            residual.sizes());
}

}  // namespace

SkinnyLinearSizes check_skinny_linear(const at::Tensor& x, const at::Tensor& weight,
                                      const std::optional<at::Tensor>& scale,
                                      const std::optional<at::Tensor>& norm,
                                      const std::optional<at::Tensor>& residual, bool gated) {
  CBF_CHECK(is_floating(x.scalar_type()), "skinny_linear", "x", "float32, float16 or bfloat16",
            x.scalar_type());
  CBF_CHECK(is_floating(weight.scalar_type()) || weight.scalar_type() == at::kChar, "skinny_linear",
            "weight", "float32, float16, bfloat16 or int8", weight.scalar_type());
  CBF_CHECK(weight.dim() == 2, "skinny_linear", "weight", "(N, K)", weight.sizes());
  CBF_CHECK(x.dim() == 2 && x.size(0) <= kMostSkinnyRows && x.size(1) == weight.size(1),
            "skinny_linear", "x",
            c10::str("(M, ", weight.size(1), ") as weight has, M at most ", kMostSkinnyRows),
            x.sizes());
  CBF_CHECK_DEVICE(weight, "skinny_linear", x.device());
  CBF_CHECK_CONTIGUOUS(x, "skinny_linear");
  CBF_CHECK_CONTIGUOUS(weight, "skinny_linear");
  check_scale(scale, weight);
  CBF_CHECK(!gated || weight.size(0) % 2 == 0, "skinny_linear", "weight",
            "(2 N, K), gate first, where gated", weight.sizes());
  const int64_t outputs = gated ? weight.size(0) / 2 : weight.size(0);
  if (norm) check_norm(*norm, weight);
  if (residual) check_residual(*residual, x, outputs);
  return {x.size(0), x.size(1), outputs};
}

}  // namespace chatterbox_fast
