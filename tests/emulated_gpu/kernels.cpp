// Kernels that nvcc compiled, by their names: of ours g++ has made another version.
#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <unordered_map>

#include "device.h"
#include "host_runtime.h"
#include "kernel_table.h"

using namespace gpu;

namespace {

std::unordered_map<const void*, const char*> kernel_names;
std::unordered_map<const void*, std::size_t> shared_memory;  // what a kernel asked for

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  kernel_names[function] = name;
}

void __cudaRegisterVar(void**, char*, char*, const char*, int, std::size_t, int, int) {}

struct Configuration {
  dim3 grid, block;
  std::size_t shared;
  cudaStream_t stream;
};
static thread_local std::vector<Configuration> configurations;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared,
                                     struct CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared, void* stream) {
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}

// The g++ version of a kernel that nvcc compiled; null: none. Its types are named otherwise.
static const Kernel* find_kernel(const char* mangled) {
  char* const readable = abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr);
  if (readable == nullptr) return nullptr;
  std::string name = readable;
  std::free(readable);
  for (const auto& [of_cuda, of_host] :
       {std::pair<std::string, std::string>{"__nv_bfloat16", "rt::bfloat16"},
        std::pair<std::string, std::string>{"__half", "rt::half"}}) {
    for (std::size_t at; (at = name.find(of_cuda)) != std::string::npos;) {
      name.replace(at, of_cuda.size(), of_host);
    }
  }
  for (const Kernel* kernel = kernel_table; kernel->name != nullptr; ++kernel) {
    if (name == kernel->name) return kernel;
  }
  return nullptr;
}

// Every kernel of ours takes one struct by value, on the stack as x86-64 passes what is larger than
// two registers: whatever follows it there the kernel does not read.
struct Arguments {
  char bytes[1024];
};

static cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments,
                          std::size_t shared, cudaStream_t stream) {
  Lock lock(device);
  const auto name = kernel_names.find(function);
  const Kernel* const kernel = name == kernel_names.end() ? nullptr : find_kernel(name->second);
  if (kernel == nullptr) {
    std::fprintf(stderr, "gpu: no such kernel here: %s\n",
                 name == kernel_names.end() ? "?" : name->second);
    return fail(cudaErrorInvalidDeviceFunction, "launch");
  }
  const auto granted = shared_memory.find(function);
  const std::size_t limit = granted == shared_memory.end() ? 48 << 10 : granted->second;
  const bool fits = grid.x != 0 && grid.y == 1 && grid.z == 1 && block.x != 0 && block.x <= 1024 &&
                    block.y == 1 && block.z == 1 && shared <= limit;
  if (!fits) return fail(cudaErrorInvalidConfiguration, kernel->name);
  Arguments copy = {};
  if (kernel->bytes > sizeof copy) return fail(cudaErrorInvalidValue, kernel->name);
  std::memcpy(&copy, arguments[0], kernel->bytes);
  return push(stream_of(stream), kernel->name, [=] {
    const auto run = reinterpret_cast<void (*)(Arguments)>(kernel->function);
    if (rt::host::run_grid(grid.x, block.x, shared, [&] { run(copy); }) != 0) {
      throw std::runtime_error(emu_error());
    }
  });
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             std::size_t shared, cudaStream_t stream) {
  return launch(function, grid, block, arguments, shared, stream);
}

cudaError_t __cudaLaunchKernel(cudaKernel_t function, dim3 grid, dim3 block, void** arguments,
                               std::size_t shared, cudaStream_t stream) {
  return launch(function, grid, block, arguments, shared, stream);
}

cudaError_t __cudaGetKernel(cudaKernel_t* to, const void* function) {
  *to = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  return launch(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
                config->stream);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* to, const void*) {
  std::memset(to, 0, sizeof *to);
  to->maxThreadsPerBlock = 1024;
  to->binaryVersion = to->ptxVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  Lock lock(device);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > 227 << 10) return fail(cudaErrorInvalidValue, "cudaFuncSetAttribute");
  shared_memory[function] = static_cast<std::size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int,
                                                                   std::size_t, unsigned) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** to, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *to = nullptr;
  if (result != nullptr) *result = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // extern "C"
