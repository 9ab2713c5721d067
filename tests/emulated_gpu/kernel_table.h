// Our kernels as g++ compiled them: build.py writes the table.
#pragma once

struct Kernel {
  const char* name;  // as __cxa_demangle writes it
  void (*function)();
  unsigned long bytes;  // of its argument
};

extern "C" const Kernel kernel_table[];  // ends with a null name
