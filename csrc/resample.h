// What the CPU and the CUDA op of resample share: the checks of its arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace chatterbox_fast {

constexpr int64_t kMostCoefficients = int64_t{1} << 20;  // of all filters: P K
constexpr int64_t kMostSamples = int64_t{1} << 40;       // read or written a row
constexpr int64_t kLeastTile = 128;                      // outputs that a block makes of a row
constexpr int64_t kMostTiles = (int64_t{1} << 31) - 1;   // of all rows: blocks of a launch

struct ResampleSizes {
  int64_t rows;     // R
  int64_t samples;  // T
  int64_t phases;   // P
  int64_t taps;     // K
  int64_t first;    // F
};

// Checks every argument against the schema's contract (chatterbox_fast/reference.py, resample);
// throws c10::Error with the argument's name.
ResampleSizes check_resample(const at::Tensor& waveform, const at::Tensor& filters,
                             const std::optional<at::Tensor>& first, int64_t stride, int64_t left,
                             int64_t length);

}  // namespace chatterbox_fast
