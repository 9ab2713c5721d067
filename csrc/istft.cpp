// The checks that every backend of istft makes before it touches memory.
#include "istft.h"

#include <limits>

#include "checks.h"

namespace chatterbox_fast {

namespace {

constexpr int64_t kMostFrames = std::numeric_limits<int32_t>::max();  // of all rows: B M

}  // namespace

IstftSizes check_istft(const at::Tensor& spectrum, const at::Tensor& window, double limit) {
  const auto type = spectrum.scalar_type();
  CBF_CHECK(is_floating(type), "istft", "spectrum", "float32, float16 or bfloat16", type);
  CBF_CHECK(spectrum.dim() == 3 && spectrum.size(1) >= 1 && spectrum.size(2) == 18 &&
                spectrum.size(0) <= kMostFrames / spectrum.size(1),
            "istft", "spectrum", c10::str("(B, M, 18), with M >= 1 and B M at most ", kMostFrames),
            spectrum.sizes());
  CBF_CHECK_CONTIGUOUS(spectrum, "istft");
  CBF_CHECK_DTYPE(window, "istft", at::kFloat);
  CBF_CHECK_DEVICE(window, "istft", spectrum.device());
  CBF_CHECK(window.dim() == 1 && window.size(0) == 16, "istft", "window", "(16,)", window.sizes());
  CBF_CHECK_CONTIGUOUS(window, "istft");
  CBF_CHECK(limit > 0, "istft", "limit", "> 0", limit);
  return {spectrum.size(0), spectrum.size(1)};
}

}  // namespace chatterbox_fast
