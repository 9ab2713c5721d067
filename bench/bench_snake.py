"""snake against stock's module, eager and compiled: pytest bench --benchmark-only

Ten seconds of audio at each stage of the vocoder. Stock has its own layout, (B, C, T); the
reference is torch's four ops on channels last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from chatterbox.models.s3gen.hifigan import Snake
from timing import compare, extension, reference, triton, verify_close
from torch import Tensor

from chatterbox_fast import ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = {
    f"{steps} x {channels}, {name}": (steps, channels, dtype)
    for name, dtype in DTYPES.items()
    for steps, channels in ((4000, 256), (20000, 128), (60000, 64))
}


class Job:
    """A sequence, stock's module, and what the result must be close to."""

    def __init__(self, steps: int, channels: int, dtype: torch.dtype, device: torch.device) -> None:
        source = torch.Generator().manual_seed(1)
        x = torch.randn(1, steps, channels, generator=source) * 3
        alpha = torch.rand(channels, generator=source) * 4 + 0.05
        self.x, self.alpha = x.to(device, dtype), alpha.to(device)
        self.inverse = 1.0 / (self.alpha + 1e-9)
        self.bytes = 2 * x.numel() * dtype.itemsize
        self.module = Snake(channels).to(device, dtype).requires_grad_(False)
        self.module.alpha.copy_(alpha)

    def by(self, backend: Any) -> Tensor:
        return ops.snake(self.x, self.alpha, self.inverse, backend=backend)


def stock(job: Job) -> Callable[[], Tensor]:
    x = job.x.transpose(1, 2).contiguous()
    return lambda: job.module(x).transpose(1, 2)


def stock_compiled(job: Job) -> Callable[[], Tensor]:
    x, compiled = job.x.transpose(1, 2).contiguous(), torch.compile(job.module, dynamic=False)
    return lambda: compiled(x).transpose(1, 2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [stock, stock_compiled, extension, triton, reference])
def bench_snake(benchmark: Any, device: torch.device, case: str, make: Any) -> None:
    compare(benchmark, device, "snake", case, make, lambda on: Job(*CASES[case], on), verify)


def verify(job: Job, call: Callable[[], Tensor]) -> None:
    """What is timed is right: 120 dB to float64; 30 in half precision, which stock rounds often."""
    wide = job.x.double()
    expected = wide + torch.sin(wide * job.alpha).square() * job.inverse
    loose = 1e-12 if job.x.dtype == torch.float32 else 1e-3
    verify_close(call, expected, loose)
