// CPU op of istft. Contract: chatterbox_fast/reference.py, istft.
//
// A task makes kHops hops of output of one row. Eight frames at a time it turns the channels of
// frames into vectors of neighbouring frames, which exp, sin, cos and the transform keep, and puts
// the windowed samples into a buffer, in which hops overlap by plain additions of vectors. Frames
// that there are not are silence: the loops know no edges but in the envelope.
// The result does not depend on the number of threads.
#include "istft.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/inverse_dft.cuh"
#include "vectors.h"

namespace chatterbox_fast {

namespace {

constexpr int kHop = 4;
constexpr int kOverlap = kDftSize / kHop;  // frames that reach a sample
constexpr int kChannels = 2 * kDftBins;
constexpr int kFrames = 256;             // of a task
constexpr int kHops = kFrames - kLanes;  // its first frame is one ahead, its last two behind
constexpr int kPitch = kFrames + 16;     // a power of two would fill few sets of the cache
constexpr int64_t kGrain = 2;            // tasks a thread has at least
constexpr float kLoudest = 100.0f;       // stock's clip of a magnitude
constexpr float kNear = 32768.0f;        // how far from 0 `sine` is accurate

struct Head {
  const float* window;  // (16,)
  float limit;
  IstftSizes sizes;
};

// Hops [begin, end) of a row, and kFrames frames from begin - 1 on.
struct Task {
  float* frames;
  int64_t begin, end;
  float* out;  // of the row
};

using Samples = float[kDftSize][kPitch];

// c[i], lane j = from[i + kChannels * j]
CBF_INLINE void load_channels(const float* from, Floats* c) {
  Floats rows[kLanes], pairs[kLanes], fours[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = load<Floats>(from + i * kChannels);
  for (int i = 0; i < kLanes; i += 2) {
    const Floats a = rows[i], b = rows[i + 1];
    pairs[i] = CBF_SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = CBF_SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < kLanes; i += 4) {
    for (int half = 0; half < 2; ++half) {
      const Floats a = pairs[i + half], b = pairs[i + 2 + half];
      fours[i + 2 * half] = CBF_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
      fours[i + 2 * half + 1] = CBF_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; ++i) {
    const Floats a = fours[i], b = fours[4 + i];
    c[i] = CBF_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
    c[4 + i] = CBF_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// sin(x) for |x| <= pi / 2, cos(x) for |x| <= 1, to about one unit in the last place of 1: minimax
// polynomials.
CBF_INLINE Floats sine_near_zero(Floats x) {
  const Floats square = x * x;
  Floats y = all(-2.39073632e-8f);
  for (const float c : {2.75265188e-6f, -1.98408918e-4f, 8.33333097e-3f, -1.66666672e-1f}) {
    y = y * square + c;
  }
  return x + x * square * y;
}

CBF_INLINE Floats cosine_near_zero(Floats x) {
  const Floats square = x * x;
  Floats y = all(2.42154656e-5f);
  for (const float c : {-1.38849136e-3f, 4.16665822e-2f}) y = y * square + c;
  return 1.0f - (0.5f * square - square * square * y);
}

// sin(x) for |x| <= kNear, as accurately: x less whole turns of pi, whose parts are short enough
// for exact products.
CBF_INLINE Floats sine(Floats x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: added and taken away, it rounds
  const Floats shifted = x * 0.318309886f + kRound;
  const Floats turns = shifted - kRound;
  Floats rest = x;
  for (const float part : {3.140625f, 9.67025757e-4f, 6.27711415e-7f, 1.21542013e-10f}) {
    rest = rest - turns * part;
  }
  const Words odd = (Words)shifted << 31;
  return (Floats)((Words)sine_near_zero(rest) ^ odd);
}

CBF_INLINE Floats magnitude(Floats log) {
  const Floats loud = exponential(log > 5.0f ? all(5.0f) : log);  // beyond, it is clipped
  return loud > kLoudest ? all(kLoudest) : loud;                  // NaN is kept
}

// Angles too far from 0 for `sine` become their equals near it.
void bring_near(float* frames) {
  for (int i = 0; i < kLanes * kChannels; ++i) {
    const bool is_angle = i % kChannels >= kDftBins;
    if (!is_angle || !(std::fabs(frames[i]) > kNear)) continue;
    const double angle = frames[i];
    frames[i] = static_cast<float>(std::atan2(std::sin(angle), std::cos(angle)));
  }
}

CBF_INLINE bool any_far(const float* frames) {
  Words far = {};
  for (int i = 0; i < kChannels; ++i) {
    const auto value = load<Floats>(frames + i * kLanes);
    far |= (Words)(value > kNear) | (Words)(value < -kNear);
  }
  uint32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= far[i];
  return any != 0;
}

// samples[n][at + lane] = sample n of frame `lane` of `frames`, windowed.
CBF_INLINE void make_samples(const float* frames, const float* window, Samples& samples, int at) {
  Floats channels[kChannels], real[kDftBins], imaginary[kDftBins], own[kDftSize];
  for (const int first : {0, kLanes, kChannels - kLanes}) {
    load_channels(frames + first, channels + first);
  }
  for (int k = 0; k < kDftBins; ++k) {
    const Floats loud = magnitude(channels[k]), phase = sine(channels[kDftBins + k]);
    real[k] = loud * cosine_near_zero(phase);
    imaginary[k] = loud * sine_near_zero(phase);
  }
  inverse_dft16(real, imaginary, own);
  for (int n = 0; n < kDftSize; ++n) {
    const Floats windowed = own[n] * window[n];
    std::memcpy(&samples[n][at], &windowed, sizeof windowed);
  }
}

// The sum of squares of the windows that reach sample `place` of a hop.
float envelope_at(const Head& head, int64_t hop, int place) {
  float sum = 0.0f;
  for (int i = 0; i < kOverlap; ++i) {
    const int64_t frame = hop - 1 + i;
    const float weight = head.window[(kOverlap - 1 - i) * kHop + place];
    if (frame >= 0 && frame < head.sizes.frames) sum += weight * weight;
  }
  return sum;
}

// Of kLanes hops from `hop` on.
CBF_INLINE void load_envelopes(const Head& head, int64_t hop, Floats (&envelopes)[kHop]) {
  for (int place = 0; place < kHop; ++place) {
    for (int i = 0; i < kLanes; ++i) envelopes[place][i] = envelope_at(head, hop + i, place);
  }
}

// to[kHop * lane + place] = y[place], lane
CBF_INLINE void store_hops(const Floats (&y)[kHop], float* to) {
  const Floats halves[2][2] = {{CBF_SHUFFLE(y[0], y[1], 0, 8, 1, 9, 2, 10, 3, 11),
                                CBF_SHUFFLE(y[2], y[3], 0, 8, 1, 9, 2, 10, 3, 11)},
                               {CBF_SHUFFLE(y[0], y[1], 4, 12, 5, 13, 6, 14, 7, 15),
                                CBF_SHUFFLE(y[2], y[3], 4, 12, 5, 13, 6, 14, 7, 15)}};
  for (int i = 0; i < 2; ++i) {
    const Floats a = halves[i][0], b = halves[i][1];
    const Floats both[2] = {CBF_SHUFFLE(a, b, 0, 1, 8, 9, 2, 3, 10, 11),
                            CBF_SHUFFLE(a, b, 4, 5, 12, 13, 6, 7, 14, 15)};
    std::memcpy(to + i * 2 * kLanes, both, sizeof both);
  }
}

// kLanes hops; samples[n][at] is of the frame before the first.
CBF_INLINE void add_up(const Samples& samples, int at, const Floats (&envelopes)[kHop], float limit,
                       float* to) {
  Floats y[kHop];
  for (int place = 0; place < kHop; ++place) {
    Floats sum = {};
    for (int i = 0; i < kOverlap; ++i) {
      sum += load<Floats>(&samples[(kOverlap - 1 - i) * kHop + place][at + i]);
    }
    sum /= envelopes[place];
    sum = sum > limit ? all(limit) : sum;  // NaN is kept
    y[place] = sum < -limit ? all(-limit) : sum;
  }
  store_hops(y, to);
}

CBF_FOR_EVERY_CPU void run(const Head& head, const Task& task) {
  Samples samples;
  const int64_t whole = (task.end - task.begin + kLanes - 1) / kLanes * kLanes;
  const int64_t used = whole + kOverlap - 1;
  for (int at = 0; at < used; at += kLanes) {
    if (any_far(task.frames + at * kChannels)) bring_near(task.frames + at * kChannels);
    make_samples(task.frames + at * kChannels, head.window, samples, at);
  }
  Floats envelopes[kHop];
  bool has_edge = true;
  for (int64_t hop = task.begin; hop < task.end; hop += kLanes) {
    // All hops of a row but the first and the last have one envelope.
    const bool had_edge = has_edge;
    has_edge = hop == 0 || hop + kLanes >= head.sizes.frames - 1;
    if (has_edge || had_edge) load_envelopes(head, hop, envelopes);
    float y[kHop * kLanes];
    add_up(samples, static_cast<int>(hop - task.begin), envelopes, head.limit, y);
    std::copy_n(y, kHop * std::min<int64_t>(kLanes, task.end - hop), task.out + kHop * hop);
  }
}

// kFrames frames from `first` on; silence where there is none.
void copy_frames(const float* row, int64_t frames, int64_t first, float* to) {
  const int64_t begin = std::max<int64_t>(0, -first);
  const int64_t end = std::min<int64_t>(kFrames, frames - first);
  for (int64_t i = 0; i < kFrames; ++i) {
    if (i >= begin && i < end) continue;
    float* const frame = to + i * kChannels;
    std::fill_n(frame, kDftBins, -std::numeric_limits<float>::infinity());
    std::fill_n(frame + kDftBins, kDftBins, 0.0f);
  }
  std::copy(row + (first + begin) * kChannels, row + (first + end) * kChannels,
            to + begin * kChannels);
}

void compute(const Head& head, const float* spectrum, float* out) {
  const int64_t hops = head.sizes.frames - 1, tasks = (hops + kHops - 1) / kHops;
  at::parallel_for(0, head.sizes.rows * tasks, kGrain, [&](int64_t from, int64_t until) {
    float frames[kFrames * kChannels];
    for (int64_t t = from; t < until; ++t) {
      const int64_t row = t / tasks, begin = t % tasks * kHops;
      copy_frames(spectrum + row * head.sizes.frames * kChannels, head.sizes.frames, begin - 1,
                  frames);
      run(head, {frames, begin, std::min(hops, begin + kHops), out + row * hops * kHop});
    }
  });
}

at::Tensor istft(const at::Tensor& spectrum, const at::Tensor& window, double limit) {
  const IstftSizes sizes = check_istft(spectrum, window, limit);
  at::Tensor y = at::empty({sizes.rows, sizes.length()}, window.options());
  if (y.numel() == 0) return y;
  const at::Tensor wide = spectrum.to(at::kFloat);
  const Head head = {window.const_data_ptr<float>(), static_cast<float>(limit), sizes};
  compute(head, wide.const_data_ptr<float>(), y.mutable_data_ptr<float>());
  return y;
}

}  // namespace

}  // namespace chatterbox_fast

TORCH_LIBRARY_IMPL(chatterbox_fast, CPU, library) {
  library.impl("istft", &chatterbox_fast::istft);
}
