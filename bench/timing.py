"""Times one call: on a CPU by pytest-benchmark, on a GPU by CUDA events: by itself with a cold L2
cache, and in a CUDA graph, where only its kernels count."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chatterbox_fast import selftest
from chatterbox_fast.demo import commit_id, describe_machine

ROUNDS = 200
GRAPH_CALLS = 20
_FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2


def compare(
    benchmark: Any, device: torch.device, op: str, case: str, make: Any, work: Any, verify: Any
) -> None:
    """Times one implementation of `op` on `device`, once it is seen to be right.

    Skips the implementations of this package that `device` does not have, or that fail there.

    Args:
        make: named as the implementation: `work` -> the call to time.
        work: (device) -> inputs, with `bytes` as `measure` takes them.
        verify: (inputs, call) raises where the call is wrong.
    """
    wanted = {"extension": "cuda", "triton": "triton"}.get(make.__name__)
    if wanted:
        found = selftest.choose(op, device, wanted, torch.float32)  # type: ignore[arg-type]
        if found.backend != make.__name__:
            pytest.skip(f"no {make.__name__} for {device.type} here: it would be {found}")
    inputs = work(device)
    call = make(inputs)
    verify(inputs, call)
    benchmark.group = f"{op}, {case}, {device.type}"
    benchmark.extra_info |= {"case": case, "implementation": make.__name__, "device": device.type}
    measure(benchmark, device, call, inputs.bytes)


# Ours, for inputs with a method `by`, which takes the backend to prefer.


def extension(inputs: Any) -> Callable[[], Any]:
    return lambda: inputs.by("cuda")


def triton(inputs: Any) -> Callable[[], Any]:
    return lambda: inputs.by("triton")


def reference(inputs: Any) -> Callable[[], Any]:
    return lambda: inputs.by("reference")


def verify_close(
    call: Callable[[], Tensor], expected: Tensor, loose: float, updated: Tensor | None = None
) -> None:
    """What is timed is right, three times: the error's energy is below `loose` of the signal's.

    Args:
        updated: what the call changes in place; each time it starts as it is now.
    """
    first = None if updated is None else updated.clone()
    for _ in range(3):
        if updated is not None and first is not None:
            updated.copy_(first)
        error = (call() - expected).square().sum()
        assert error < loose * expected.square().sum()


def measure(
    benchmark: Any, device: torch.device, call: Callable[[], Any], bytes_moved: int
) -> None:
    """Runs `call` under `benchmark` and notes median, p20 and p80 in microseconds.

    Notes `graph_time` too, as ``graph_us`` and ``no_graph``.

    Args:
        bytes_moved: what the call must read and write at least. On a GPU it is set against the
            bandwidth of a large copy, measured in the same process; in a graph only where it is
            more than the L2 cache holds, from which calls one after another read otherwise.
    """
    for _ in range(10):
        call()
    if device.type == "cuda":
        samples, l2_bytes = _cold(call), torch.cuda.get_device_properties(device).L2_cache_size
        graph = f"{GRAPH_CALLS} calls, warm L2"
        benchmark.extra_info["timing"] = f"CUDA events, cold L2 (in a graph: {graph})"
        peak = _copy_bandwidth()
    else:
        samples, l2_bytes, peak = None, 0, None
        benchmark.extra_info["timing"] = "wall clock, warm"
    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=0)
    if samples is None:
        samples = [1e6 * seconds for seconds in benchmark.stats.stats.data]
    graph_us, no_graph = graph_time(device, call)
    samples.sort()
    median = samples[len(samples) // 2]
    benchmark.extra_info |= {
        "median_us": median,
        "p20_us": samples[len(samples) // 5],
        "p80_us": samples[len(samples) * 4 // 5],
        "graph_us": graph_us,
        "no_graph": no_graph,
        "bytes": bytes_moved,
        "share_of_copy_bandwidth": _share(peak, bytes_moved, median),
        "graph_share_of_copy_bandwidth": (
            _share(peak, bytes_moved, graph_us) if bytes_moved > l2_bytes else None
        ),
    }


def _share(peak: float | None, bytes_moved: int, microseconds: float | None) -> float | None:
    """Of `peak`, bytes a second."""
    if peak is None or microseconds is None:
        return None
    return bytes_moved / (microseconds * 1e-6) / peak


def graph_time(device: torch.device, call: Callable[[], Any]) -> tuple[float | None, str | None]:
    """Microseconds of one call, `GRAPH_CALLS` of which are replayed as one CUDA graph.

    A call that waits for the device cannot be captured. That is found by a trial, as a capture that
    fails leaves torch's generator unusable; what passes the trial and fails then is an error.

    Returns:
        The median and None; or None and why there is no graph.
    """
    if device.type != "cuda":
        return None, "no CUDA graph on a CPU"
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    try:
        with torch.cuda.stream(stream), _waiting_is_an_error():
            call()
    except RuntimeError as error:
        return None, str(error).splitlines()[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(GRAPH_CALLS):
            call()
    samples = sorted(_elapsed(graph.replay) / GRAPH_CALLS for _ in range(ROUNDS))
    return samples[ROUNDS // 2], None


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _elapsed(work: Callable[[], Any]) -> float:
    """Microseconds on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def _cold(call: Callable[[], Any]) -> list[float]:
    """Microseconds of each call, the L2 cache full of something else that was read before it.

    Had that been written, it would go from the cache to memory while the call is timed.
    """
    flush = torch.zeros(_FLUSH_BYTES // 4, device="cuda")
    samples = []
    for _ in range(ROUNDS):
        flush.sum()
        samples.append(_elapsed(call))
    return samples


def _copy_bandwidth() -> float:
    """Bytes a second, read and written, of a 1 GiB copy on the device."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    fastest = min(_elapsed(lambda: target.copy_(source)) for _ in range(10))
    return 2 * 2**30 / (1e-6 * fastest)


def conditions(device: torch.device | str, size: str) -> dict[str, Any]:
    """What a script's raw figures begin with: when, of what code, where, with which weights."""
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit_id(),
        "machine": describe_machine(device),
        "weights": f"random, {size}",
    }


def save(path: Path | None, raw: dict[str, Any]) -> None:
    """Writes a script's raw figures so far: what is interrupted has left them up to there."""
    if path is not None:
        path.write_text(json.dumps(raw, indent=2) + "\n")
