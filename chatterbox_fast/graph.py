"""Pure functions over preallocated buffers as CUDA graphs: one launch for all of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import Lock

import torch

_capturing = Lock()


class CaptureError(RuntimeError):
    """What was to be captured cannot be."""


def graphs_wanted() -> bool:
    """Whether CHATTERBOX_FAST_GRAPHS leaves graphs on."""
    return os.environ.get("CHATTERBOX_FAST_GRAPHS") != "0"


def settle(device: torch.device) -> None:
    """Waits until what was enqueued is there for other streams too; for things made rarely."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def why_no_graph(device: torch.device) -> str | None:
    """The reason why nothing is captured on `device`, or None."""
    if device.type != "cuda":
        return "graphs are a GPU's"
    if not graphs_wanted():
        return "CHATTERBOX_FAST_GRAPHS=0"
    return None


def capture(
    step: Callable[[], None], device: torch.device, pool: tuple[int, int] | None = None
) -> Callable[[], None]:
    """Captures `step`, which must neither read a value on the host nor change what it allocates.

    It runs twice before: kernels are loaded, libraries get their workspaces. Other threads may
    launch and allocate meanwhile. Torch may refuse them a draw from its global CUDA generator
    while the capture lasts; requests with a seed have their own.

    Args:
        pool: of ``torch.cuda.graph_pool_handle``: graphs with the same one share the memory of
            what they compute on the way. They must never run at the same time.

    Returns:
        a function that replays it on the current stream.

    Raises:
        torch.OutOfMemoryError: there is not enough memory.
        CaptureError: anything else went wrong.
    """
    try:
        return _capture(step, device, pool)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as failure:
        said = str(failure).splitlines()[0]
        raise CaptureError(f"the capture failed: {said}") from failure


def _capture(
    step: Callable[[], None], device: torch.device, pool: tuple[int, int] | None
) -> Callable[[], None]:
    with _capturing, torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            step()
    return graph.replay
