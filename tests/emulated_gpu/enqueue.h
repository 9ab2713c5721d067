// The emulated GPU as torch's operators see it.
#pragma once

#include <functional>

// Appends `work` to a cudaStream_t, or to the graph that it captures; the name is for the trace.
// Returns a cudaError_t.
extern "C" int gpu_enqueue(void* stream, const char* name, const std::function<void()>& work);

// How much was enqueued or captured so far.
extern "C" long long gpu_launched();
