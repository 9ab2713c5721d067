// Streams, events and graphs.
#include <algorithm>

#include "device.h"

using namespace gpu;

namespace {

unsigned long long captures_begun = 0;

// A stream that waits for one that captures captures too.
cudaError_t wait_in_capture(Stream* stream, const Event& event) {
  constexpr const char* kWhere = "cudaStreamWaitEvent";
  Graph& graph = *event.captured;
  if (captures.count(&graph) == 0) return fail(cudaErrorCapturedEvent, kWhere);
  if (stream == &legacy) return invalidate(graph, cudaErrorStreamCaptureImplicit, kWhere);
  if (stream->capturing && stream->capturing != event.captured) {
    return invalidate(graph, cudaErrorStreamCaptureMerge, kWhere);
  }
  stream->capturing = event.captured;
  graph.last.emplace(stream, 0);
  if (stream == graph.origin) {
    std::size_t& joined = graph.joined[event.stream];
    joined = std::max<std::size_t>(joined, event.position);
  }
  return cudaSuccess;
}

// Whether the origin waited for all that other streams did.
bool all_joined(const Graph& graph) {
  return std::all_of(graph.last.begin(), graph.last.end(), [&](const auto& each) {
    const auto joined = graph.joined.find(each.first);
    return each.first == graph.origin ||
           (joined != graph.joined.end() && joined->second >= each.second);
  });
}

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
  streams.push_back(stream);
  *to = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* to) { return cudaStreamCreateWithPriority(to, 0, 0); }

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  Lock lock(device);
  Stream* const stream = stream_of(handle);
  drain(stream);
  streams.erase(std::find(streams.begin(), streams.end(), stream));  // itself kept: for events
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
  if (event->captured) return wait_in_capture(stream, *event);
  if (event->stream == nullptr) return cudaSuccess;
  if (stream->capturing) {
    return invalidate(*stream->capturing, cudaErrorStreamCaptureIsolation, "cudaStreamWaitEvent");
  }
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
  const Graph* const graph = stream->capturing.get();
  *event = Event{stream, graph == nullptr ? stream->enqueued : graph->nodes.size(),
                 stream->capturing, 0};
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream, unsigned) {
  return cudaEventRecord(handle, stream);
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Lock lock(device);
  const auto* const event = reinterpret_cast<Event*>(handle);
  if (event->captured) {
    return invalidate(*event->captured, cudaErrorCapturedEvent, "cudaEventSynchronize");
  }
  if (event->stream != nullptr) drain(event->stream, event->position);
  return sticky;
}

// The first answer is "not yet", wherever that is possible.
cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Lock lock(device);
  if (const cudaError_t error = refuse_unsafe("cudaEventQuery")) return error;
  auto* const event = reinterpret_cast<Event*>(handle);
  if (event->captured) {
    return invalidate(*event->captured, cudaErrorCapturedEvent, "cudaEventQuery");
  }
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
  stream->capturing->origin = stream;
  stream->capturing->last.emplace(stream, 0);
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
  if (stream != graph->origin) {
    return invalidate(*graph, cudaErrorStreamCaptureUnmatched, "cudaStreamEndCapture");
  }
  const bool own = thread_captures.erase(graph.get()) != 0;
  if (!own && graph->mode != cudaStreamCaptureModeRelaxed) {
    return invalidate(*graph, cudaErrorStreamCaptureWrongThread, "cudaStreamEndCapture");
  }
  for (const auto& [each, last] : graph->last) each->capturing = nullptr;
  captures.erase(graph.get());
  if (graph->invalid) return fail(cudaErrorStreamCaptureInvalidated, "cudaStreamEndCapture");
  if (!all_joined(*graph)) return fail(cudaErrorStreamCaptureUnjoined, "cudaStreamEndCapture");
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
  for (const Item& node : graph->nodes) {
    const auto work = [graph, &node] { node.work(); };
    if (const cudaError_t error = push(stream_of(stream), node.name, work)) return error;
  }
  return cudaSuccess;
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
