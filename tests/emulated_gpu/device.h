// CUDA's runtime library, as torch and our extension call it, for a GPU that is a CPU.
//
// torch's own code for CUDA runs as it is: allocator, streams, events, graphs, generators. What it
// enqueues runs late: not before somebody waits for it or asks for the second time whether it is
// done. So a host that reads too early reads what was there before, and a stream that did not wait
// for another one computes with what it finds. The rules of capture are CUDA's.
//
// What runs: copies; torch's operators, as operators of the CPU (operators.cpp); our kernels, as
// nvcc compiled their launches, in g++'s version of the same source (tests/host_cuda). The launch
// of any other kernel is an error.
//
// Not modelled: time, several devices, which stream runs first where nobody waits, IPC,
// cudaMallocAsync.
#pragma once

#include <cuda_runtime_api.h>

#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "enqueue.h"

namespace gpu {

using Work = std::function<void()>;

struct Stream;

struct Graph {
  std::vector<std::pair<std::string, Work>> nodes;
  std::set<Stream*> streams;
  bool invalid = false;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  unsigned long long id = 0;
};

struct Item {
  std::string name;
  Work work;
};

struct Stream {
  std::deque<Item> queue;
  unsigned long long enqueued = 0, done = 0;
  std::shared_ptr<Graph> capturing;
  int priority = 0;
};

struct Event {
  Stream* stream = nullptr;  // null: never recorded
  unsigned long long position = 0;
  std::shared_ptr<Graph> captured;
  int asked = 0;
};

// One lock for all of the device. Work may enqueue nothing.
extern std::recursive_mutex device;
using Lock = std::lock_guard<std::recursive_mutex>;

extern Stream legacy;
extern std::set<Stream*> streams;
extern std::set<Graph*> captures;  // under way
extern cudaError_t sticky;         // of work that failed: for everybody who waits
extern thread_local cudaError_t last_error;
extern thread_local cudaStreamCaptureMode thread_mode;
extern thread_local std::set<Graph*> thread_captures;

// Notes an error as the thread's last one and returns it.
cudaError_t fail(cudaError_t error, const char* where);

Stream* stream_of(cudaStream_t stream);

// Appends to the stream, or to the graph that it captures.
cudaError_t push(Stream* stream, std::string name, Work work);

// Does the work itself; an exception is an assertion that failed on the device.
void run(const std::string& name, const Work& work);

// Runs a stream's work up to `position`, or all of it.
void drain(Stream* stream, unsigned long long position);
void drain(Stream* stream);

// Runs everything, the streams in turns: those that do not wait for each other mix.
void drain_all();

// What a capture on this stream does not survive.
cudaError_t refuse_capture(Stream* stream, const char* where);

// What CUDA calls unsafe while this thread captures, or any thread in global mode.
cudaError_t refuse_unsafe(const char* where);

}  // namespace gpu
