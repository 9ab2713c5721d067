// What nvcc knew when it compiled the CUDA half of the extension.
#pragma once

#include <string>

namespace chatterbox_fast {

std::string cuda_toolkit_version();  // "13.0"
std::string cuda_archs();            // "890" or "750,800": the values of __CUDA_ARCH_LIST__

}  // namespace chatterbox_fast
