// Python module chatterbox_fast._C: importing it registers the ops; build_info() says what it is.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string>

#include "build_info.h"
#ifndef CBF_WITH_CUDA
#include "cbf_missing.h"  // written by setup.py: why there is no CUDA, as CBF_MISSING
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = "g++ " __VERSION__;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
#ifdef CBF_WITH_CUDA
  info["cuda"] = chatterbox_fast::cuda_toolkit_version();
  info["archs"] = chatterbox_fast::cuda_archs();
  info["missing"] = py::none();
#else
  info["cuda"] = py::none();
  info["archs"] = py::none();
  info["missing"] = CBF_MISSING;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "chatterbox_fast: compiled ops, registered as torch.ops.chatterbox_fast.*";
  module.def("build_info", &build_info,
             "What this extension was built with: torch, compiler, C++ standard, CUDA, archs.");
}
