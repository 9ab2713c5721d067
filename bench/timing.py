"""Times one call: on a CPU by pytest-benchmark, on a GPU by CUDA events with a cold L2 cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

ROUNDS = 200
_L2_BYTES = 256 * 2**20  # more than any GPU's L2


def measure(
    benchmark: Any, device: torch.device, call: Callable[[], Any], bytes_moved: int
) -> None:
    """Runs `call` under `benchmark` and notes median, p20 and p80 in microseconds.

    Args:
        bytes_moved: what the call must read and write at least. On a GPU it is set against the
            bandwidth of a large copy, measured in the same process.
    """
    for _ in range(10):
        call()
    if device.type == "cuda":
        samples = _cold(call)
        benchmark.extra_info["timing"] = "CUDA events, cold L2"
        peak = _copy_bandwidth()
    else:
        samples, peak = None, None
        benchmark.extra_info["timing"] = "wall clock, warm"
    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=0)
    if samples is None:
        samples = [1e6 * seconds for seconds in benchmark.stats.stats.data]
    samples.sort()
    median = samples[len(samples) // 2]
    benchmark.extra_info |= {
        "median_us": median,
        "p20_us": samples[len(samples) // 5],
        "p80_us": samples[len(samples) * 4 // 5],
        "bytes": bytes_moved,
        "share_of_copy_bandwidth": None if peak is None else bytes_moved / (median * 1e-6) / peak,
    }


def _cold(call: Callable[[], Any]) -> list[float]:
    """Microseconds of each call, the L2 cache overwritten before it."""
    flush = torch.empty(_L2_BYTES, dtype=torch.uint8, device="cuda")
    samples = []
    for _ in range(ROUNDS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(1e3 * start.elapsed_time(end))
    return samples


def _copy_bandwidth() -> float:
    """Bytes a second, read and written, of a 1 GiB copy on the device."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = max(best, 2 * 2**30 / (1e-3 * start.elapsed_time(end)))
    return best
