"""Pure functions over preallocated buffers as CUDA graphs: one launch for all of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import Lock

import torch

_capturing = Lock()


def graphs_wanted() -> bool:
    """Whether CHATTERBOX_FAST_GRAPHS leaves graphs on."""
    return os.environ.get("CHATTERBOX_FAST_GRAPHS") != "0"


def settle(device: torch.device) -> None:
    """Waits until what was enqueued is there for other streams too; for things made rarely."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def why_no_graph(device: torch.device, sampler: str) -> str | None:
    """The reason why a step on `device` runs eagerly, or None where it is captured.

    Args:
        sampler: the backend that draws the token.
    """
    if device.type != "cuda":
        return "graphs are a GPU's"
    if not graphs_wanted():
        return "CHATTERBOX_FAST_GRAPHS=0"
    if sampler == "reference":
        return "the reference draws from a generator, whose state a graph would freeze"
    return None


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Captures `step`, which must neither read a value on the host nor change what it allocates.

    It runs twice before: kernels are loaded, libraries get their workspaces. Other threads may
    launch and allocate meanwhile. Torch may refuse them a draw from its global CUDA generator
    while the capture lasts; requests with a seed have their own.

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
