// Launches the kernels of wrappers.cuh. arrays: results, counters, signed counter, wide counter,
// 65536 bit patterns, the same as half in float, as bfloat16 in float, 4 * 65536 floats, the same
// as half, as bfloat16, as float.
#include "wrappers.cuh"

extern "C" int drive(void** arrays) {
  const rt::Error error =
      rt::launch(every_wrapper, 1, 64, 0, nullptr, static_cast<unsigned long long*>(arrays[0]),
                 static_cast<unsigned*>(arrays[1]), static_cast<int*>(arrays[2]),
                 static_cast<unsigned long long*>(arrays[3]), 1.5f);
  if (error != 0) return error;
  const rt::Error widened =
      rt::launch(widen, 64, 1024, 0, nullptr, static_cast<const rt::half*>(arrays[4]),
                 static_cast<const rt::bfloat16*>(arrays[4]), static_cast<float*>(arrays[5]),
                 static_cast<float*>(arrays[6]));
  if (widened != 0) return widened;
  return rt::launch(narrow, 256, 1024, 0, nullptr, static_cast<const float*>(arrays[7]),
                    static_cast<rt::half*>(arrays[8]), static_cast<rt::bfloat16*>(arrays[9]),
                    static_cast<float*>(arrays[10]));
}
