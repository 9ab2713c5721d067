// Launches the kernel `tensor_cores` of wrappers.cuh. arrays: {dtype}, then its arguments. dtype: 1
// half, 2 bfloat16.
#include "wrappers.cuh"

template <typename T>
int launch(void** arrays) {
  return rt::launch(tensor_cores<T>, 1, 32, 0, nullptr, static_cast<const T*>(arrays[1]),
                    static_cast<const unsigned*>(arrays[2]), static_cast<const float*>(arrays[3]),
                    static_cast<unsigned*>(arrays[4]), static_cast<float*>(arrays[5]),
                    static_cast<unsigned*>(arrays[6]));
}

extern "C" int drive(void** arrays) {
  const auto dtype = *static_cast<const int64_t*>(arrays[0]);
  return dtype == 1 ? launch<rt::half>(arrays) : launch<rt::bfloat16>(arrays);
}
