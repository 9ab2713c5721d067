// Streams, events and graphs.
#include "device.h"

using namespace gpu;

namespace {

unsigned long long captures_begun = 0;

}  // namespace

extern "C" {

cudaError_t cudaDeviceSynchronize() {
  Lock lock(device);
  if (!captures.empty()) {
    for (Graph* graph : captures) graph->invalid = true;
    return fail(cudaErrorStreamCaptureUnsupported, "cudaDeviceSynchronize");
  }
  drain_all();
  return sticky;
}

// ---- Streams.

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* to, unsigned, int priority) {
  Lock lock(device);
  auto* const stream = new Stream;
  stream->priority = priority;
  streams.insert(stream);
  *to = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* to) { return cudaStreamCreateWithPriority(to, 0, 0); }

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  Lock lock(device);
  Stream* const stream = stream_of(handle);
  drain(stream);
  streams.erase(stream);  // kept: events may name it
  return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  *priority = stream_of(handle)->priority;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Lock lock(device);
  Stream* const stream = stream_of(handle);
  if (const cudaError_t error = refuse_capture(stream, "cudaStreamSynchronize")) return error;
  drain(stream);
  return sticky;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  Lock lock(device);
  Stream* const stream = stream_of(handle);
  if (const cudaError_t error = refuse_capture(stream, "cudaStreamQuery")) return error;
  if (stream->queue.empty()) return cudaSuccess;
  drain(stream);
  return fail(cudaErrorNotReady, "cudaStreamQuery");
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  Lock lock(device);
  Stream* const stream = stream_of(handle);
  auto* const event = reinterpret_cast<Event*>(event_handle);
  if (event->captured) {
    if (captures.count(event->captured.get()) == 0) {
      return fail(cudaErrorCapturedEvent, "cudaStreamWaitEvent");
    }
    if (stream->capturing && stream->capturing != event->captured) {
      return fail(cudaErrorStreamCaptureMerge, "cudaStreamWaitEvent");
    }
    stream->capturing = event->captured;  // joins
    event->captured->streams.insert(stream);
    return cudaSuccess;
  }
  if (event->stream == nullptr) return cudaSuccess;
  if (stream->capturing) return fail(cudaErrorStreamCaptureIsolation, "cudaStreamWaitEvent");
  Stream* const other = event->stream;
  const unsigned long long position = event->position;
  if (other == stream || other->done >= position) return cudaSuccess;
  return push(stream, "wait", [=] { drain(other, position); });
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  Lock lock(device);
  return push(stream_of(handle), "host function", [=] { function(data); });
}

// ---- Events.

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* to, unsigned) {
  *to = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* to) { return cudaEventCreateWithFlags(to, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  Lock lock(device);
  delete reinterpret_cast<Event*>(handle);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  Lock lock(device);
  auto* const event = reinterpret_cast<Event*>(handle);
  Stream* const stream = stream_of(stream_handle);
  *event = Event{stream, stream->enqueued, stream->capturing, 0};
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream, unsigned) {
  return cudaEventRecord(handle, stream);
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Lock lock(device);
  const auto* const event = reinterpret_cast<Event*>(handle);
  if (event->captured) return fail(cudaErrorCapturedEvent, "cudaEventSynchronize");
  if (event->stream != nullptr) drain(event->stream, event->position);
  return sticky;
}

// The first answer is "not yet", wherever that is possible.
cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Lock lock(device);
  if (const cudaError_t error = refuse_unsafe("cudaEventQuery")) return error;
  auto* const event = reinterpret_cast<Event*>(handle);
  if (event->captured) return fail(cudaErrorCapturedEvent, "cudaEventQuery");
  if (event->stream == nullptr || event->stream->done >= event->position) return cudaSuccess;
  if (event->asked++ == 0) return fail(cudaErrorNotReady, "cudaEventQuery");
  drain(event->stream, event->position);
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}

// ---- Graphs.

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Lock lock(device);
  Stream* const stream = stream_of(handle);
  if (stream == &legacy) return fail(cudaErrorStreamCaptureUnsupported, "cudaStreamBeginCapture");
  if (stream->capturing) return fail(cudaErrorIllegalState, "cudaStreamBeginCapture");
  stream->capturing = std::make_shared<Graph>();
  stream->capturing->mode = mode;
  stream->capturing->id = ++captures_begun;
  stream->capturing->streams.insert(stream);
  captures.insert(stream->capturing.get());
  thread_captures.insert(stream->capturing.get());
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* to) {
  Lock lock(device);
  Stream* const stream = stream_of(handle);
  *to = nullptr;
  if (!stream->capturing) return fail(cudaErrorIllegalState, "cudaStreamEndCapture");
  const std::shared_ptr<Graph> graph = stream->capturing;
  for (Stream* joined : graph->streams) joined->capturing = nullptr;
  captures.erase(graph.get());
  thread_captures.erase(graph.get());
  if (graph->invalid) return fail(cudaErrorStreamCaptureInvalidated, "cudaStreamEndCapture");
  *to = reinterpret_cast<cudaGraph_t>(new std::shared_ptr<Graph>(graph));
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  Lock lock(device);
  const Stream* const stream = stream_of(handle);
  *status = !stream->capturing           ? cudaStreamCaptureStatusNone
            : stream->capturing->invalid ? cudaStreamCaptureStatusInvalidated
                                         : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, std::size_t* count) {
  Lock lock(device);
  const Stream* const stream = stream_of(handle);
  cudaStreamIsCapturing(handle, status);
  if (id != nullptr && stream->capturing) *id = stream->capturing->id;
  if (graph != nullptr) *graph = nullptr;
  if (dependencies != nullptr) *dependencies = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = 0;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t handle, cudaGraphNode_t*, std::size_t* count) {
  *count = (*reinterpret_cast<std::shared_ptr<Graph>*>(handle))->nodes.size();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* to, cudaGraph_t graph,
                                          unsigned long long) {
  Lock lock(device);
  if (const cudaError_t error = refuse_unsafe("cudaGraphInstantiate")) return error;
  *to = reinterpret_cast<cudaGraphExec_t>(
      new std::shared_ptr<Graph>(*reinterpret_cast<std::shared_ptr<Graph>*>(graph)));
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t handle, cudaStream_t stream) {
  Lock lock(device);
  const std::shared_ptr<Graph> graph = *reinterpret_cast<std::shared_ptr<Graph>*>(handle);
  return push(stream_of(stream), "graph", [=] {
    for (const auto& [name, work] : graph->nodes) run(name, work);
  });
}

cudaError_t cudaGraphDestroy(cudaGraph_t handle) {
  Lock lock(device);
  delete reinterpret_cast<std::shared_ptr<Graph>*>(handle);
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t handle) {
  Lock lock(device);
  delete reinterpret_cast<std::shared_ptr<Graph>*>(handle);
  return cudaSuccess;
}

}  // extern "C"
