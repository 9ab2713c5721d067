"""add_norm against torch's modules, eager and compiled: pytest bench --benchmark-only

Ten seconds of audio after a prompt of ten: 1000 frames, two rows of the estimator. "sum" is what
stands before a transformer's products: residual and LayerNorm. "conv" is what follows a residual
block's first convolution: its bias, stock's LayerNorm between two transpositions, Mish, and what
the time adds; stock has its own layout, (B, C, T). On a CPU stock's convolution adds the bias at no
cost, and so stock is timed without it there; on a GPU cuDNN leaves that to a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from chatterbox.models.s3gen.decoder import CausalBlock1D
from timing import compare, extension, reference, triton, verify_close
from torch import Tensor, nn

from chatterbox_fast import ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = {
    f"{kind}, {rows} x {frames} x {channels}, {name}": (kind, rows, frames, channels, dtype)
    for kind in ("sum", "conv")
    for name, dtype in DTYPES.items()
    for rows, frames, channels in ((2, 1000, 256), (1, 1000, 512))
    if kind == "sum" or channels == 256
}


class Job:
    """One call's arguments, torch's modules, and what the result must be close to."""

    def __init__(
        self, kind: str, rows: int, frames: int, channels: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        source = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source).to(device)

        self.conv = kind == "conv"
        self.x = normal(rows, frames, channels).to(dtype)
        self.residual = None if self.conv else normal(rows, frames, channels)
        self.offset, self.shift = normal(2, channels) if self.conv else (None, None)
        block = CausalBlock1D(channels, channels).requires_grad_(False).to(device)
        block.block[2].weight.copy_(normal(channels))
        block.block[2].bias.copy_(normal(channels))
        self.norm = block.block[2]
        # Under autocast, too, a norm and what follows it are in float32.
        self.after_conv = nn.Sequential(*block.block[1:])
        numbers = self.x.numel()
        self.bytes = 2 * numbers * dtype.itemsize + (0 if self.conv else 8 * numbers)

    def by(self, backend: Any) -> Tensor:
        return ops.add_norm(
            self.x, self.norm.weight, self.norm.bias, self.residual, self.offset, self.shift,
            eps=self.norm.eps, mish=self.conv, backend=backend,
        )  # fmt: skip

    def expected(self) -> Tensor:
        wide = self.x.double() + (self.residual if self.residual is not None else self.offset)
        norm = self.norm
        y = nn.functional.layer_norm(
            wide, norm.weight.shape, norm.weight.double(), norm.bias.double(), norm.eps
        )
        return nn.functional.mish(y) + self.shift if self.conv else y


def _stock(job: Job) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Stock's modules, and their arguments."""
    dtype = job.x.dtype
    if not job.conv:
        residual = job.residual
        assert residual is not None

        def add_and_norm(x: Tensor) -> Tensor:
            return job.norm(x + residual).to(dtype)

        return add_and_norm, (job.x,)
    assert job.offset is not None
    assert job.shift is not None
    x, offset, shift = job.x.mT.contiguous(), job.offset[:, None], job.shift[:, None]
    if x.device.type == "cpu":
        x = x + offset.to(dtype)

    def conv_block(x: Tensor) -> Tensor:
        biased = x + offset if x.device.type == "cuda" else x
        return (job.after_conv(biased.to(torch.float32)) + shift).to(dtype).mT

    return conv_block, (x,)


def stock(job: Job) -> Callable[[], Tensor]:
    call, arguments = _stock(job)
    return lambda: call(*arguments)


def stock_compiled(job: Job) -> Callable[[], Tensor]:
    call, arguments = _stock(job)
    compiled = torch.compile(call, dynamic=False)
    return lambda: compiled(*arguments)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [stock, stock_compiled, extension, triton, reference])
def bench_add_norm(benchmark: Any, device: torch.device, case: str, make: Any) -> None:
    compare(benchmark, device, "add_norm", case, make, lambda on: Job(*CASES[case], on), verify)


def verify(job: Job, call: Callable[[], Tensor]) -> None:
    """What is timed is right: 100 dB to float64; 40 in half precision."""
    loose = 1e-10 if job.x.dtype == torch.float32 else 1e-4
    verify_close(call, job.expected(), loose, job.residual)
