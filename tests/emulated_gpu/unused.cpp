// What torch's libraries name of CUDA's runtime and never call here.
#include <cstdio>
#include <cstdlib>

#define UNUSED(name)                                          \
  extern "C" int name() {                                     \
    std::fprintf(stderr, "gpu: " #name " is not emulated\n"); \
    std::abort();                                             \
  }

UNUSED(cudaDeviceEnablePeerAccess)
UNUSED(cudaDeviceGetDefaultMemPool)
UNUSED(cudaFreeAsync)
UNUSED(cudaGetSymbolAddress)
UNUSED(cudaGraphDebugDotPrint)
UNUSED(cudaGraphNodeGetDependencies)
UNUSED(cudaHostRegister)
UNUSED(cudaHostUnregister)
UNUSED(cudaIpcCloseMemHandle)
UNUSED(cudaIpcGetEventHandle)
UNUSED(cudaIpcGetMemHandle)
UNUSED(cudaIpcOpenEventHandle)
UNUSED(cudaIpcOpenMemHandle)
UNUSED(cudaLaunchCooperativeKernel)
UNUSED(cudaMallocAsync)
UNUSED(cudaMemPoolGetAttribute)
UNUSED(cudaMemPoolSetAccess)
UNUSED(cudaMemPoolSetAttribute)
UNUSED(cudaMemPoolTrimTo)
UNUSED(cudaMemcpy2DAsync)
UNUSED(cudaMemcpyPeerAsync)
UNUSED(cudaMemcpyToSymbol)
UNUSED(cudaOccupancyMaxActiveBlocksPerMultiprocessor)
UNUSED(cudaStreamAddCallback)
