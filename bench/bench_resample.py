"""resample against torchaudio, eager and compiled, and librosa: pytest bench --benchmark-only

Ten seconds of one channel. Of torchaudio's filter, stock is its module, whose filter is made
before; of soxr's it is librosa, on one thread of the CPU: on a GPU with the way there and back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import librosa
import pytest
import torch
import torchaudio
from timing import compare, extension, reference, triton, verify_close
from torch import Tensor

from chatterbox_fast.audio import resample

SECONDS = 10
HANN, SOXR = "sinc_interp_hann", "soxr_hq"
RATES = ((24000, 16000), (16000, 24000), (24000, 32000), (32000, 24000), (22050, 24000),
         (44100, 24000), (48000, 24000))  # fmt: skip
CASES = {
    f"{name}, {orig}->{new}": (orig, new, method)
    for name, method in (("torchaudio's filter", HANN), ("soxr HQ", SOXR))
    for orig, new in RATES
}


class Job:
    """A waveform to resample, and what the result must be close to."""

    def __init__(self, orig: int, new: int, method: str, device: torch.device) -> None:
        self.rates, self.method = (orig, new), method
        source = torch.Generator().manual_seed(1)
        self.waveform = (torch.rand(1, SECONDS * orig, generator=source) * 2 - 1).to(device)
        self.bytes = 4 * SECONDS * (orig + new)

    def by(self, backend: Any) -> Tensor:
        return resample(self.waveform, *self.rates, resampling_method=self.method, backend=backend)

    def by_librosa(self) -> Tensor:
        orig, new = self.rates
        x = self.waveform.cpu().numpy()
        y = librosa.resample(x, orig_sr=orig, target_sr=new, res_type="soxr_hq")
        return torch.from_numpy(y).to(self.waveform.device)


def stock(job: Job) -> Callable[[], Tensor]:
    if job.method == SOXR:
        return job.by_librosa
    module = torchaudio.transforms.Resample(*job.rates).to(job.waveform.device)
    return lambda: module(job.waveform)


def stock_compiled(job: Job) -> Callable[[], Tensor]:
    if job.method == SOXR:
        pytest.skip("librosa is not torch's")
    module = torchaudio.transforms.Resample(*job.rates).to(job.waveform.device)
    compiled = torch.compile(module, dynamic=False)
    return lambda: compiled(job.waveform)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [stock, stock_compiled, extension, triton, reference])
def bench_resample(benchmark: Any, device: torch.device, case: str, make: Any) -> None:
    compare(benchmark, device, "resample", case, make, lambda on: Job(*CASES[case], on), verify)


def verify(job: Job, call: Callable[[], Tensor]) -> None:
    """What is timed is right: 120 dB to librosa, or 80 to torchaudio in float64.

    torchaudio rounds the places of its taps to float32. On a GPU, where it may take TF32: 60.
    """
    if job.method == SOXR:
        expected, loose = job.by_librosa().double(), 1e-12
    else:
        expected = torchaudio.functional.resample(job.waveform.double(), *job.rates)
        loose = 1e-6 if job.waveform.is_cuda else 1e-8
    verify_close(call, expected, loose)
