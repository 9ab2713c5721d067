"""Pure functions over preallocated buffers as CUDA graphs: one launch for all of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from threading import Lock
from typing import Any

import torch

_capturing = Lock()
"""One capture at a time: it begins with a wait for the device, which another would not survive."""
_beginning = Lock()


CAPTURES = 3
"""How many may fail in a row before nobody tries again: what somebody else did in this moment may
have ended the first."""


class CaptureError(RuntimeError):
    """What was to be captured cannot be."""


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What a RuntimeError says that is none of torch's own: CUDA's, a CPU's, cuBLAS's."""


def is_out_of_memory(failure: BaseException) -> bool:
    """Whether memory ran out. Only torch's allocator for a GPU has an error of its own for it."""
    said = isinstance(failure, RuntimeError) and any(s in str(failure) for s in _OUT_OF_MEMORY)
    return said or isinstance(failure, torch.OutOfMemoryError)


def graphs_wanted() -> bool:
    """Whether CHATTERBOX_FAST_GRAPHS leaves graphs on."""
    return os.environ.get("CHATTERBOX_FAST_GRAPHS") != "0"


def settle(device: torch.device) -> None:
    """Waits until what was enqueued is there for other streams too; for things made rarely."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def settle_all(device: torch.device) -> None:
    """Waits for all streams of `device`: before memory is let go that they may still read."""
    if device.type == "cuda":
        with _capturing:
            torch.cuda.synchronize(device)


def free_cached(device: torch.device) -> None:
    """Gives the driver back what nobody uses; torch 2.6 refuses to while somebody captures."""
    if device.type == "cuda":
        with _capturing:
            torch.cuda.empty_cache()


def graph_settings() -> tuple[Any, ...]:
    """Whether there are graphs, and which kernels torch takes: others ask for another engine."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    switches = graphs_wanted(), torch.backends.mkldnn.enabled
    if hasattr(cudnn, "conv"):  # since torch 2.9, where both ways of setting them show
        return *switches, cudnn.conv.fp32_precision, matmul.fp32_precision
    return *switches, cudnn.allow_tf32, matmul.allow_tf32


class Pool:
    """Memory for graphs that never run at the same time: they share what they compute on the way.

    Torch gives a stream again only what was freed on it, so all of them are captured on one.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.handle = torch.cuda.graph_pool_handle()

    def give_up(self) -> None:
        """Ends a capture that torch could not end: its allocator would wait for the end for good.

        It says so where there is nothing to end.
        """
        index = torch.cuda.current_device()
        with suppress(RuntimeError, AttributeError):  # torch 2.6 has another name
            torch._C._cuda_endAllocateToPool(index, self.handle)
            torch._C._cuda_releasePool(index, self.handle)


def why_no_graph(device: torch.device) -> str | None:
    """The reason why nothing is captured on `device`, or None."""
    if device.type != "cuda":
        return "graphs are a GPU's"
    if not graphs_wanted():
        return "CHATTERBOX_FAST_GRAPHS=0"
    return None


def drawing(
    device: torch.device, generator: torch.Generator | None
) -> AbstractContextManager[object]:
    """A context for a draw, or a look at a generator, that a capture which begins must not meet.

    Only torch's global CUDA generators are affected: see `_begin`.
    """
    return nullcontext() if generator is not None or device.type != "cuda" else _beginning


def capture(
    step: Callable[[], None], device: torch.device, pool: Pool | None = None
) -> Callable[[], None]:
    """Captures `step`, which must neither read a value on the host, nor draw from torch's global
    generator, nor change what it allocates.

    It runs twice before: kernels are loaded, libraries get their workspaces. Other threads may
    launch, allocate, draw and replay meanwhile. There is one moment, of microseconds, in which
    torch would refuse them a draw from its global CUDA generator, or draw the next one's numbers:
    ours wait for its end (`drawing`), but for those of the reference's sampler on a GPU. What draws
    elsewhere, as stock does for meanflow's noise and whoever else uses torch in this process, can
    still meet it; requests with a seed have generators of their own.

    Args:
        pool: what it computes on the way lies there; by default in one of its own.

    Returns:
        a function that replays it on the current stream.

    Raises:
        torch.OutOfMemoryError: there is not enough memory.
        CaptureError: anything else went wrong. The current stream is what it was.
    """
    try:
        return _capture(step, device, pool or Pool(device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as failure:
        said = str(failure).splitlines()[0]
        if is_out_of_memory(failure):  # a library's, or the driver's for the graph itself
            raise torch.OutOfMemoryError(f"the capture failed: {said}") from failure
        raise CaptureError(f"the capture failed: {said}") from failure


def _capture(step: Callable[[], None], device: torch.device, pool: Pool) -> Callable[[], None]:
    stream = pool.stream
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Not by torch.cuda.graph, which leaves the thread on its stream where a capture fails.
        with _capturing, torch.cuda.stream(stream):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # the graph cannot use what the two runs have left
            try:
                _begin(graph, pool)
                _run(step, graph)
            except BaseException:
                pool.give_up()
                raise
    return graph.replay


def _begin(graph: torch.cuda.CUDAGraph, pool: Pool) -> None:
    """Begins the capture with a generator of its own.

    Torch ties the state of its global generator to the capture: until that ends nobody else can
    draw from it or replay a graph that was captured with it, and after a capture that failed nobody
    ever can. So the global generator has another state for this moment.
    """
    shared = torch.cuda.default_generators[torch.cuda.current_device()]
    with _beginning:
        own = shared.graphsafe_get_state()
        shared.graphsafe_set_state(shared.clone_state())
        try:
            graph.capture_begin(pool.handle, capture_error_mode="thread_local")
        finally:
            shared.graphsafe_set_state(own)


def _run(step: Callable[[], None], graph: torch.cuda.CUDAGraph) -> None:
    """Runs `step` and ends the capture; where both fail, the step's error says why."""
    try:
        step()
    except BaseException:
        with suppress(RuntimeError):
            graph.capture_end()
        raise
    graph.capture_end()
