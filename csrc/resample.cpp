// The checks that every backend of resample makes before it touches memory.
#include "resample.h"

#include <algorithm>

#include "checks.h"

namespace chatterbox_fast {

namespace {

void check_first(const std::optional<at::Tensor>& optional, const at::Tensor& filters) {
  if (!optional.has_value()) return;
  const at::Tensor& first = *optional;
  CBF_CHECK_DTYPE(first, "resample", at::kFloat);
  CBF_CHECK_DEVICE(first, "resample", filters.device());
  CBF_CHECK_CONTIGUOUS(first, "resample");
  CBF_CHECK(first.dim() == 2 && first.size(1) == filters.size(1), "resample", "first",
            c10::str("(F, ", filters.size(1), ") as filters has"), first.sizes());
}

}  // namespace

ResampleSizes check_resample(const at::Tensor& waveform, const at::Tensor& filters,
                             const std::optional<at::Tensor>& first, int64_t stride, int64_t left,
                             int64_t length) {
  const auto type = waveform.scalar_type();
  CBF_CHECK(is_floating(type), "resample", "waveform", "float32, float16 or bfloat16", type);
  CBF_CHECK(waveform.dim() == 2, "resample", "waveform", "(R, T)", waveform.sizes());
  CBF_CHECK_CONTIGUOUS(waveform, "resample");
  CBF_CHECK_DTYPE(filters, "resample", at::kFloat);
  CBF_CHECK_DEVICE(filters, "resample", waveform.device());
  CBF_CHECK(filters.dim() == 2 && filters.size(0) >= 1 && filters.size(1) >= 1 &&
                filters.size(0) <= kMostCoefficients / filters.size(1),
            "resample", "filters",
            c10::str("(P, K), with 1 to ", kMostCoefficients, " coefficients"), filters.sizes());
  check_first(first, filters);
  CBF_CHECK(stride >= 1 && stride <= kMostCoefficients, "resample", "stride",
            c10::str("in [1, ", kMostCoefficients, "]"), stride);
  CBF_CHECK(left >= 0 && left < filters.size(1), "resample", "left",
            c10::str("in [0, ", filters.size(1), "), before the last tap"), left);
  const int64_t most = kMostSamples / stride;
  CBF_CHECK(length >= 0 && length <= most, "resample", "length", c10::str("in [0, ", most, "]"),
            length);
  const int64_t rows = kMostTiles / std::max<int64_t>(1, (length + kLeastTile - 1) / kLeastTile);
  CBF_CHECK(waveform.size(0) <= rows, "resample", "waveform",
            c10::str("of at most ", rows, " rows for ", length, " outputs"), waveform.sizes());
  return {waveform.size(0), waveform.size(1), filters.size(0), filters.size(1),
          first.has_value() ? first->size(0) : 0};
}

}  // namespace chatterbox_fast
