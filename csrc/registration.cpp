// Every op of the extension: its schema, in one table. The list of what chatterbox_fast::* can do.
// Backends register their kernels in cpu/OP.cpp and cuda/OP.cu, each with TORCH_LIBRARY_IMPL.
#include <torch/library.h>

TORCH_LIBRARY(chatterbox_fast, library) {
  // No op has landed yet: sampling and attention run through chatterbox_fast/reference.py.
  (void)library;
}
