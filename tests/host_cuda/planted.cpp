// Launches the kernels of planted.cuh. arrays: {bug, rows, width}, rows, normalised rows;
// or {bug, blocks, 0}, rows, numbers, arrivals, sum; or {-1 - misuse}.
#include "planted.cuh"

template <Bug kBug>
int normalise(void** arrays, int rows, int width) {
  return rt::launch(normalise_rows<kBug>, rows, kThreads, width * sizeof(float), nullptr,
                    static_cast<const float*>(arrays[1]), static_cast<float*>(arrays[2]), width);
}

template <Bug kBug>
int sum(void** arrays, int blocks) {
  return rt::launch(add_up<kBug>, blocks, kThreads, 0, nullptr,
                    static_cast<const float*>(arrays[1]), static_cast<float*>(arrays[2]),
                    static_cast<unsigned*>(arrays[3]), static_cast<float*>(arrays[4]));
}

extern "C" int drive(void** arrays) {
  const auto* const arguments = static_cast<const int64_t*>(arrays[0]);
  if (arguments[0] < 0) {
    return rt::launch(misuse, 1, 32, 0, nullptr, static_cast<Misuse>(-1 - arguments[0]));
  }
  if (arguments[2] == 0) {
    constexpr decltype(&sum<Bug::kNone>) kSums[] = {sum<Bug::kNone>, sum<Bug::kMissingFenceBefore>,
                                                    sum<Bug::kMissingFenceAfter>,
                                                    sum<Bug::kMissingBarrierBeforeFence>};
    return kSums[arguments[0]](arrays, arguments[1]);
  }
  constexpr decltype(&normalise<Bug::kNone>) kByBug[] = {
      normalise<Bug::kNone>,
      normalise<Bug::kMissingBarrier>,
      normalise<Bug::kPastStaticArray>,
      normalise<Bug::kPastDynamicArray>,
      normalise<Bug::kShuffleAsFence>,
      normalise<Bug::kBlocksShareRow>,
  };
  return kByBug[arguments[0]](arrays, arguments[1], arguments[2]);
}
