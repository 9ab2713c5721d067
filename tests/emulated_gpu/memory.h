// The device's memory.
#pragma once

#include <cstddef>

namespace gpu {

std::size_t total_bytes();

}  // namespace gpu
