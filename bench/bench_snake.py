"""snake against stock's module, eager and compiled: pytest bench --benchmark-only

Ten seconds of audio at each stage of the vocoder. Stock has its own layout, (B, C, T); the
reference is torch's four ops on channels last. "sum": of a convolution's output and the residual
that it is added to. On a CPU stock's convolution adds its bias at no cost, and so stock is timed
without it there; on a GPU cuDNN leaves that to a pass of its own.
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
SIZES = ((4000, 256), (20000, 128), (60000, 64))
CASES = {
    f"{steps} x {channels}, {name}{', sum' * sums}": (steps, channels, dtype, sums)
    for sums in (False, True)
    for name, dtype in DTYPES.items()
    for steps, channels in SIZES
}


class Job:
    """A sequence, stock's module, and what the result must be close to."""

    def __init__(
        self, steps: int, channels: int, dtype: torch.dtype, sums: bool, device: torch.device
    ) -> None:
        source = torch.Generator().manual_seed(1)
        x = torch.randn(1, steps, channels, generator=source) * 3
        alpha = torch.rand(channels, generator=source) * 4 + 0.05
        self.x, self.alpha = x.to(device, dtype), alpha.to(device)
        self.inverse = 1.0 / (self.alpha + 1e-9)
        self.residual = torch.randn(x.shape, generator=source).to(device, dtype) if sums else None
        self.offset = torch.randn(channels, generator=source).to(device) if sums else None
        self.bytes = (4 if sums else 2) * x.numel() * dtype.itemsize
        self.module = Snake(channels).to(device, dtype).requires_grad_(False)
        self.module.alpha.copy_(alpha)

    def by(self, backend: Any) -> Tensor:
        return ops.snake(
            self.x, self.alpha, self.inverse, self.residual, self.offset, backend=backend
        )


def _stock(job: Job) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Stock's sum, which is not in place, and activation; and their arguments."""
    x = job.x.mT.contiguous()
    if job.residual is None or job.offset is None:
        return job.module, (x,)
    residual, offset = job.residual.mT.contiguous(), job.offset.to(x.dtype)[:, None]
    if x.device.type == "cpu":
        return lambda x, residual: job.module(x + residual), (x + offset, residual)
    return lambda x, residual, offset: job.module(x + offset + residual), (x, residual, offset)


def stock(job: Job) -> Callable[[], Tensor]:
    call, arguments = _stock(job)
    return lambda: call(*arguments).mT


def stock_compiled(job: Job) -> Callable[[], Tensor]:
    call, arguments = _stock(job)
    compiled = torch.compile(call, dynamic=False)
    return lambda: compiled(*arguments).mT


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [stock, stock_compiled, extension, triton, reference])
def bench_snake(benchmark: Any, device: torch.device, case: str, make: Any) -> None:
    compare(benchmark, device, "snake", case, make, lambda on: Job(*CASES[case], on), verify)


def verify(job: Job, call: Callable[[], Tensor]) -> None:
    """What is timed is right: 120 dB to float64; 30 in half precision, which stock rounds often."""
    wide = job.x.double()
    if job.residual is not None and job.offset is not None:
        wide = wide + job.offset + job.residual
    expected = wide + torch.sin(wide * job.alpha).square() * job.inverse
    loose = 1e-12 if job.x.dtype == torch.float32 else 1e-3
    verify_close(call, expected, loose, job.residual)
