// The device itself: its queues, and what is refused. See device.h.
#include "device.h"

#include <cstdio>
#include <cstdlib>
#include <exception>

namespace gpu {

std::recursive_mutex device;
Stream& legacy = *new Stream;  // never destroyed: work may be left when the process ends
std::vector<Stream*> streams{&legacy};
std::set<Graph*> captures;
cudaError_t sticky = cudaSuccess;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local std::set<Graph*> thread_captures;

namespace {

const bool traced = std::getenv("EMULATED_GPU_TRACE") != nullptr;
const bool eager = std::getenv("EMULATED_GPU_EAGER") != nullptr;
long long launched = 0;

}  // namespace

cudaError_t fail(cudaError_t error, const char* where) {
  if (traced) std::fprintf(stderr, "gpu: %s -> error %d\n", where, error);
  return last_error = error;
}

Stream* stream_of(cudaStream_t stream) {
  if (stream == nullptr || stream == cudaStreamLegacy) return &legacy;
  return reinterpret_cast<Stream*>(stream);
}

void run(const std::string& name, const Work& work) {
  if (traced) std::fprintf(stderr, "gpu: run %s\n", name.c_str());
  try {
    work();
  } catch (const std::exception& failure) {  // as a device-side assertion
    std::fprintf(stderr, "gpu: %s: %s\n", name.c_str(), failure.what());
    sticky = cudaErrorAssert;
  }
}

namespace {

void run_next(Stream* stream) {
  const Item item = std::move(stream->queue.front());
  stream->queue.pop_front();
  run(item.name, item.work);
  ++stream->done;
}

}  // namespace

void drain(Stream* stream, unsigned long long position) {
  while (stream->done < position && !stream->queue.empty()) run_next(stream);
}

void drain(Stream* stream) { drain(stream, stream->enqueued); }

void drain_all() {
  for (bool ran = true; ran;) {
    ran = false;
    for (Stream* stream : streams) {
      if (stream->queue.empty()) continue;
      run_next(stream);
      ran = true;
    }
  }
}

cudaError_t push(Stream* stream, std::string name, Work work) {
  if (sticky != cudaSuccess) return fail(sticky, name.c_str());
  ++launched;
  if (Graph* const graph = stream->capturing.get()) {
    if (graph->invalid) return fail(cudaErrorStreamCaptureInvalidated, name.c_str());
    if (traced) std::fprintf(stderr, "gpu: capture %s\n", name.c_str());
    graph->nodes.push_back({std::move(name), std::move(work)});
    graph->last[stream] = graph->nodes.size();
    return cudaSuccess;
  }
  if (traced) std::fprintf(stderr, "gpu: enqueue %s\n", name.c_str());
  stream->queue.push_back({std::move(name), std::move(work)});
  ++stream->enqueued;
  if (eager) drain(stream);
  return cudaSuccess;
}

cudaError_t invalidate(Graph& graph, cudaError_t error, const char* where) {
  graph.invalid = true;
  return fail(error, where);
}

cudaError_t refuse_capture(Stream* stream, const char* where) {
  if (!stream->capturing) return cudaSuccess;
  return invalidate(*stream->capturing, cudaErrorStreamCaptureUnsupported, where);
}

cudaError_t refuse_unsafe(const char* where) {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (Graph* graph : captures) {
    const bool own = thread_captures.count(graph) != 0;
    const bool global =
        graph->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    if (graph->mode != cudaStreamCaptureModeRelaxed && (own || global)) {
      return invalidate(*graph, cudaErrorStreamCaptureUnsupported, where);
    }
  }
  return cudaSuccess;
}

}  // namespace gpu

int gpu_enqueue(void* stream, const char* name, const std::function<void()>& work) {
  const gpu::Lock lock(gpu::device);
  return gpu::push(gpu::stream_of(static_cast<cudaStream_t>(stream)), name, work);
}

long long gpu_launched() {
  const gpu::Lock lock(gpu::device);
  return gpu::launched;
}
