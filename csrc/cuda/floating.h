// The types that kernels have for torch's floating dtypes.
#pragma once

#include <c10/core/ScalarType.h>

#include "kernels/types.h"

namespace chatterbox_fast {

// call(a value of the kernel's type for float32, float16 or bfloat16)
template <typename Call>
void with_floating_type(at::ScalarType type, const Call& call) {
  switch (type) {
    case at::kHalf:
      return call(rt::half());
    case at::kBFloat16:
      return call(rt::bfloat16());
    default:
      return call(float());
  }
}

}  // namespace chatterbox_fast
