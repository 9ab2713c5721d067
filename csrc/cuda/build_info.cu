// Asks the compiler, not the build script, which toolkit and architectures went into the binary.
#include "build_info.h"

#define CBF_TEXT_(...) #__VA_ARGS__
#define CBF_TEXT(...) CBF_TEXT_(__VA_ARGS__)

namespace chatterbox_fast {

std::string cuda_toolkit_version() {
  return std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__);
}

std::string cuda_archs() { return CBF_TEXT(__CUDA_ARCH_LIST__); }

}  // namespace chatterbox_fast
