"""A decode step as a CUDA graph: one launch for the whole step."""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import Lock

import torch

_capturing = Lock()


def why_no_graph(device: torch.device, sampler: str) -> str | None:
    """The reason why a step on `device` runs eagerly, or None where it is captured.

    Args:
        sampler: the backend that draws the token.
    """
    if device.type != "cuda":
        return "graphs are a GPU's"
    if os.environ.get("CHATTERBOX_FAST_GRAPHS") == "0":
        return "CHATTERBOX_FAST_GRAPHS=0"
    if sampler == "reference":
        return "the reference draws from a generator, whose state a graph would freeze"
    return None


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Captures `step`, which must neither read a value on the host nor change what it allocates.

    It runs twice before: kernels are loaded, libraries get their workspaces. Other threads may go
    on with their own work meanwhile.

    Returns:
        a function that replays it on the current stream.
    """
    with _capturing, torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    return graph.replay
