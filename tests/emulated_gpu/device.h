// CUDA's runtime library, as torch and our extension call it, for a GPU that is a CPU.
//
// torch's own allocator, streams, events, graphs and generators for CUDA run as they are. What it
// enqueues runs late: not before somebody waits for it or asks for the second time whether it is
// done. So a host that reads too early reads what was there before, and a stream that did not wait
// for another one computes with what it finds. The rules of capture are CUDA's.
//
// What runs: copies; torch's operators, as operators of the CPU (operators.cpp); our kernels, as
// nvcc compiled their launches, in g++'s version of the same source (tests/host_cuda). The launch
// of any other kernel is an error.
//
// Not modelled: time; several devices; that a host cannot read a GPU's memory, nor a GPU a host's
// that is not pinned; which stream of a capture runs first; a kernel's own launch bounds;
// libraries' kernels, and so their rounding; cudaMallocAsync, IPC.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "enqueue.h"

namespace gpu {

using Work = std::function<void()>;

struct Stream;

struct Item {
  std::string name;
  Work work;
};

// A capture, then what it captured: in the order of the calls, though of several streams.
struct Graph {
  std::vector<Item> nodes;
  Stream* origin = nullptr;
  std::map<Stream*, std::size_t> last;    // of every stream in it: nodes up to its last one
  std::map<Stream*, std::size_t> joined;  // of the streams that the origin waited for: up to where
  bool invalid = false;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  unsigned long long id = 0;
};

struct Stream {
  std::deque<Item> queue;
  unsigned long long enqueued = 0, done = 0;
  std::shared_ptr<Graph> capturing;
  int priority = 0;
};

struct Event {
  Stream* stream = nullptr;         // null: never recorded
  unsigned long long position = 0;  // in the stream, or in what it captures
  std::shared_ptr<Graph> captured;
  int asked = 0;
};

// One lock for all of the device. Work may enqueue nothing.
extern std::recursive_mutex device;
using Lock = std::lock_guard<std::recursive_mutex>;

extern Stream& legacy;
extern std::vector<Stream*> streams;  // in the order in which they were made
extern std::set<Graph*> captures;     // under way
extern cudaError_t sticky;            // of work that failed: for whoever calls next
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

// The bytes that it has.
std::size_t total_bytes();

// Runs everything, the streams in turns: those that do not wait for each other mix.
void drain_all();

// Fails, and the capture with it.
cudaError_t invalidate(Graph& graph, cudaError_t error, const char* where);

// What a capture on this stream does not survive.
cudaError_t refuse_capture(Stream* stream, const char* where);

// What CUDA calls unsafe while this thread captures, or any thread in global mode.
cudaError_t refuse_unsafe(const char* where);

}  // namespace gpu
