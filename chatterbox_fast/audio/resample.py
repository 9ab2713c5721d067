"""From one sampling rate to another: torchaudio's filters, and soxr's as librosa calls it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import ops, selftest
from ..options import Backend
from .bank import Filter, bank_for, bank_of, lengths

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def resample(
    waveform: Tensor,
    orig_freq: int,
    new_freq: int,
    lowpass_filter_width: int = 6,
    rolloff: float = 0.99,
    resampling_method: str = "sinc_interp_hann",
    beta: float | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """A waveform at another sampling rate, as ``torchaudio.functional.resample`` gives it.

    Args:
        waveform: ``(..., time)`` float32, float64, float16 or bfloat16, on any device; computed in
            float32, float64 for float64. It may require a gradient.
        orig_freq, new_freq: sampling rates, whole and positive; only their ratio matters.
        lowpass_filter_width: zero crossings of the sinc on each side, whole and positive.
        rolloff: the cut-off, as a fraction of the lower Nyquist frequency; positive.
        resampling_method: ``"sinc_interp_hann"`` or ``"sinc_interp_kaiser"``, torchaudio's filters;
            or ``"soxr_hq"``, what ``librosa.resample(res_type="soxr_hq")`` gives, to 120 dB or
            more, for rates that differ by at most a factor of 48. It has no parameters, and needs
            the package soxr when a ratio is first met, to read its filter: milliseconds, seconds
            where rates differ by ten times and more.
        beta: the shape of Kaiser's window; None is 14.769656459379492.
        backend: which implementation to prefer, see `selftest.choose`.

    Returns:
        ``(..., time')`` in the waveform's dtype: ``time' = ceil(time * new_freq / orig_freq)``,
        rounded as torchaudio (librosa, for soxr_hq) rounds it. For equal rates, `waveform` itself.

    Filters are designed in float64 once for each ratio, and cached for each device and dtype.

    Raises:
        TypeError: not a tensor, a dtype that is not listed, or a parameter that is no number.
        ValueError: a parameter out of range, a waveform without dimensions, a ratio for which
            there would be more than 2**20 coefficients, or one beyond soxr_hq's factor.
        RuntimeError: soxr_hq without the package soxr, or with one that has no such filter.
    """
    design = Filter.of(orig_freq, new_freq, lowpass_filter_width, rolloff, resampling_method, beta)
    return _by(design, waveform, backend)


def _by(design: Filter | None, waveform: Tensor, backend: Backend) -> Tensor:
    if design is None:
        return waveform
    _check(waveform)
    bank = bank_for(design, waveform)
    samples = waveform.shape[-1]
    computed, length = lengths(design, samples)
    rows = waveform.reshape(math.prod(waveform.shape[:-1]), samples).contiguous()
    chosen = "reference" if ops.differentiated(rows) else _chosen(rows.device, backend, rows.dtype)
    kernel = ops.resample_by(chosen)
    y = kernel(rows, bank.filters, bank.first, stride=design.orig, left=bank.left, length=computed)
    if torch.compiler.is_compiling() or computed != length:  # compiled, a branch is a graph more
        y = nn.functional.pad(y, (0, length - computed))
    return y.reshape(*waveform.shape[:-1], length)


@torch.compiler.assume_constant_result
def _chosen(device: torch.device, backend: Backend, dtype: torch.dtype) -> str:
    """The backend by `selftest.choose`, which torch.compile does not look into."""
    return selftest.choose("resample", device, backend, dtype).backend


def _check(waveform: Tensor) -> None:
    if not isinstance(waveform, Tensor) or waveform.dtype not in _FLOATING:
        got = waveform.dtype if isinstance(waveform, Tensor) else type(waveform).__name__
        raise TypeError(
            "chatterbox_fast.resample: waveform must be a tensor of float32, float64, float16 or "
            f"bfloat16, got {got}"
        )
    if waveform.dim() == 0:
        raise ValueError("chatterbox_fast.resample: waveform must be (..., time), got a scalar")


class Resample(nn.Module):
    """`resample` with its parameters kept: ``torchaudio.transforms.Resample``'s signature.

    It holds no buffer: filters come from the cache, for the device and dtype of each waveform.

    Args:
        orig_freq, new_freq, resampling_method, lowpass_filter_width, rolloff, beta, backend: see
            `resample`, whose errors are raised here.
        dtype: for torchaudio's signature; has no effect, as filters are always designed in float64.
    """

    def __init__(
        self,
        orig_freq: int = 16000,
        new_freq: int = 16000,
        resampling_method: str = "sinc_interp_hann",
        lowpass_filter_width: int = 6,
        rolloff: float = 0.99,
        beta: float | None = None,
        *,
        dtype: torch.dtype | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        del dtype
        self.orig_freq = orig_freq
        self.new_freq = new_freq
        self.resampling_method = resampling_method
        self.lowpass_filter_width = lowpass_filter_width
        self.rolloff = rolloff
        self.beta = beta
        self.backend = backend
        self._design = Filter.of(
            orig_freq, new_freq, lowpass_filter_width, rolloff, resampling_method, beta
        )
        if self._design is not None:
            bank_of(self._design, torch.device("cpu"), torch.float32)

    def forward(self, waveform: Tensor) -> Tensor:
        """See `resample`."""
        return _by(self._design, waveform, self.backend)

    def extra_repr(self) -> str:
        """The rates and the filter."""
        return f"{self.orig_freq} -> {self.new_freq}, {self.resampling_method}"
