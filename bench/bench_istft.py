"""istft against stock and a transposed convolution, eager and compiled: pytest bench
--benchmark-only

One row. Stock and the convolution get the spectrum as their last convolution makes it, channels
first; the op gets it channels last. Stock, the end of HiFTGenerator.decode, is written out here: a
test compares it with decode itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timing import compare, extension, reference, triton, verify_close
from torch import Tensor

from chatterbox_fast import ops

RATE, HOP, SIZE, LIMIT = 24000, 4, 16, 0.99
CASES = {"1 s": 1, "10 s": 10}


class Job:
    """A spectrum in both layouts, and the audio that comes out in float64."""

    def __init__(self, seconds: int, device: torch.device) -> None:
        frames = seconds * RATE // HOP + 1
        source = torch.Generator().manual_seed(1)
        spectrum = torch.randn(1, frames, 2 * (SIZE // 2 + 1), generator=source)
        spectrum[..., : SIZE // 2 + 1] -= 2
        self.spectrum = spectrum.to(device)
        self.channels_first = self.spectrum.transpose(1, 2).contiguous()
        self.window = torch.hann_window(SIZE, device=device)
        self.expected = by_stock(self.channels_first.double(), self.window.double())
        self.bytes = 4 * (self.spectrum.numel() + self.expected.numel())

    def by(self, backend: Any) -> Tensor:
        return ops.istft(self.spectrum, self.window, LIMIT, backend=backend)


def by_stock(x: Tensor, window: Tensor) -> Tensor:
    bins = SIZE // 2 + 1
    magnitude = torch.clip(torch.exp(x[:, :bins, :]), max=1e2)
    phase = torch.sin(x[:, bins:, :])
    both = torch.complex(magnitude * torch.cos(phase), magnitude * torch.sin(phase))
    return torch.istft(both, SIZE, HOP, SIZE, window=window).clamp(-LIMIT, LIMIT)


class Convolution:
    """The inverse transform and the overlap as one transposed convolution, by torch.

    For torch.compile, which leaves stock's complex numbers as they are.
    """

    def __init__(self, job: Job) -> None:
        bins, samples = torch.arange(SIZE // 2 + 1), torch.arange(SIZE)
        angle = 2 * math.pi / SIZE * (bins[:, None] * samples % SIZE).double()
        twice = torch.where((bins == 0) | (bins == SIZE // 2), 1.0, 2.0)[:, None] / SIZE
        window = job.window.cpu().double()
        basis = torch.cat((twice * angle.cos(), -twice * angle.sin())) * window
        self.basis = basis[:, None].float().to(job.spectrum.device)
        squares = window.square().expand(job.spectrum.shape[1], SIZE).T[None]
        envelope = F.conv_transpose1d(squares, torch.eye(SIZE).double()[:, None], stride=HOP)
        half = SIZE // 2
        self.envelope = envelope[0, :, half:-half].float().to(job.spectrum.device)

    def __call__(self, x: Tensor) -> Tensor:
        log_magnitude, angle = x.chunk(2, dim=1)
        magnitude, phase = log_magnitude.exp().clip(max=1e2), angle.sin()
        both = torch.cat((magnitude * phase.cos(), magnitude * phase.sin()), dim=1)
        total = F.conv_transpose1d(both, self.basis, stride=HOP)[:, 0, SIZE // 2 : -SIZE // 2]
        return (total / self.envelope).clamp(-LIMIT, LIMIT)


def stock(job: Job) -> Callable[[], Tensor]:
    return lambda: by_stock(job.channels_first, job.window)


def stock_compiled(job: Job) -> Callable[[], Tensor]:
    compiled = torch.compile(by_stock, fullgraph=True, dynamic=False)
    return lambda: compiled(job.channels_first, job.window)


def convolution(job: Job) -> Callable[[], Tensor]:
    module = Convolution(job)
    return lambda: module(job.channels_first)


def convolution_compiled(job: Job) -> Callable[[], Tensor]:
    compiled = torch.compile(Convolution(job), fullgraph=True, dynamic=False)
    return lambda: compiled(job.channels_first)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "make",
    [stock, stock_compiled, convolution, convolution_compiled, extension, triton, reference],
)
def bench_istft(benchmark: Any, device: torch.device, case: str, make: Any) -> None:
    with torch.inference_mode():
        compare(benchmark, device, "istft", case, make, lambda on: Job(CASES[case], on), verify)


def verify(job: Job, call: Callable[[], Tensor]) -> None:
    """What is timed is right: 100 dB. On a GPU, where the convolution may take TF32: 50."""
    loose = 1e-5 if job.spectrum.is_cuda else 1e-10
    verify_close(call, job.expected, loose)
