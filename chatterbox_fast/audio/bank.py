"""The filters of a pair of sampling rates: checked, designed in float64, cached."""

from __future__ import annotations

import functools
import math
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_COEFFICIENTS = 2**20
"""The most that all filters of a ratio may have together: 4 MiB in float32."""
CACHED_RATIOS = 16
"""Ratios whose design is kept, and four times as many copies by device and dtype."""

HANN, KAISER, SOXR_HQ = METHODS = ("sinc_interp_hann", "sinc_interp_kaiser", "soxr_hq")
_KAISER_BETA = 14.769656459379492
_PARAMETERS = (6, 0.99, None)
"""lowpass_filter_width, rolloff and beta that mean nothing was chosen."""
_AT_ONCE = 8
"""Taps are filled up with zeros to a multiple of what a CPU multiplies at once."""


class BankTooLarge(ValueError):
    """More coefficients than `MAX_COEFFICIENTS`."""


class Bank(NamedTuple):
    """What `ops.resample` is given, beside the stride.

    Attributes:
        filters: ``(P, K)``, P the reduced new rate.
        first: ``(F, K)``, or None.
        left: see `reference.resample`.
    """

    filters: Tensor
    first: Tensor | None
    left: int


class Filter(NamedTuple):
    """A ratio of sampling rates, reduced, and the filter to use.

    Attributes:
        orig, new: the rates by their greatest common divisor.
        method: one of `METHODS`.
        width, rolloff, beta: see `resample`; not used by soxr_hq.
    """

    orig: int
    new: int
    method: str
    width: int
    rolloff: float
    beta: float

    @classmethod
    def of(
        cls, orig_freq: Any, new_freq: Any, width: Any, rolloff: Any, method: Any, beta: Any
    ) -> Filter | None:
        """From the parameters of `resample`, checked; None for equal rates."""
        orig, new = _whole("orig_freq", orig_freq), _whole("new_freq", new_freq)
        if not isinstance(method, str) or method not in METHODS:
            raise ValueError(
                "chatterbox_fast.resample: resampling_method must be one of "
                f"{', '.join(METHODS)}, got {method!r}"
            )
        if method == SOXR_HQ and (width, rolloff, beta) != _PARAMETERS:
            raise ValueError(
                "chatterbox_fast.resample: lowpass_filter_width, rolloff and beta must be left at "
                f"their defaults for soxr_hq, got {width!r}, {rolloff!r}, {beta!r}"
            )
        whole = _whole("lowpass_filter_width", width)
        cutoff = _positive("rolloff", rolloff)
        shape = _KAISER_BETA if beta is None else _number("beta", beta)
        if orig == new:
            return None
        common = math.gcd(orig, new)
        return cls(orig // common, new // common, method, whole, cutoff, shape)

    def check_size(self, taps: int) -> None:
        """Raises `BankTooLarge` where filters of `taps` are too many coefficients."""
        if self.new * taps > MAX_COEFFICIENTS:
            raise BankTooLarge(
                f"chatterbox_fast.resample: orig_freq and new_freq must reduce to at most "
                f"{MAX_COEFFICIENTS} coefficients, got {self.orig} -> {self.new}: "
                f"{self.new} filters of {taps}"
            )


def _number(name: str, value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"chatterbox_fast.resample: {name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"chatterbox_fast.resample: {name} must be finite, got {value!r}")
    return float(value)


def _positive(name: str, value: Any) -> float:
    if (number := _number(name, value)) <= 0:
        raise ValueError(f"chatterbox_fast.resample: {name} must be positive, got {value!r}")
    return number


def _whole(name: str, value: Any) -> int:
    """Of any type of number."""
    if (number := _positive(name, value)) % 1:
        raise ValueError(f"chatterbox_fast.resample: {name} must be whole, got {value!r}")
    return int(number)


@functools.lru_cache(4 * CACHED_RATIOS)
def _bank_on(design: Filter, device: torch.device, dtype: torch.dtype) -> Bank:
    bank = _designed(design)
    with torch.inference_mode(False):
        filters = bank.filters.to(device, dtype)
        if device.type == "cuda":  # where neighbouring outputs read neighbouring phases
            filters = filters.t().contiguous().t()
        first = None if bank.first is None else bank.first.to(device, dtype)
        return Bank(filters, first, bank.left)


@torch.compiler.assume_constant_result
def bank_of(design: Filter, device: torch.device, dtype: torch.dtype) -> Bank:
    """The filters of `design` on `device`, in `dtype`: float32 or float64."""
    return _bank_on(design, device, dtype)


@functools.lru_cache(CACHED_RATIOS)
def _designed(design: Filter) -> Bank:
    """In float64 on the CPU; taps are filled up to a multiple of `_AT_ONCE`."""
    from . import soxr_hq

    with torch.inference_mode(False):
        bank = soxr_hq.probe(design) if design.method == SOXR_HQ else _sinc(design)
        fill = -bank.filters.shape[1] % _AT_ONCE
        first = None if bank.first is None else torch.nn.functional.pad(bank.first, (0, fill))
        return Bank(torch.nn.functional.pad(bank.filters, (0, fill)), first, bank.left)


def _sinc(design: Filter) -> Bank:
    """torchaudio's windowed sinc, without the taps that its window leaves at 0.

    Filter p weighs sample i, counted from ``floor(p orig / new)``, by its distance in time from
    output p, in zero crossings of a sinc that is cut off at `rolloff` times the lower rate.
    """
    orig, new, width = design.orig, design.new, design.width
    cutoff = min(orig, new) * design.rolloff
    left = math.floor(width * orig / cutoff)
    taps = 2 * left + 2
    design.check_size(taps + -taps % _AT_ONCE)
    phase = torch.arange(new, device="cpu")[:, None]
    sample = torch.arange(taps, device="cpu") - left + phase * orig // new
    crossings = (sample * new - phase * orig).double() * (cutoff / (orig * new))
    inside = crossings.abs() < width
    crossings = crossings.clamp(-width, width)
    if design.method == HANN:
        window = torch.cos(crossings * (math.pi / 2 / width)).square()
    else:  # torchaudio holds beta, and the value it divides by, in float32
        beta = torch.tensor(design.beta, dtype=torch.float32, device="cpu")
        shape = torch.sqrt(1 - (crossings / width).square())
        window = torch.i0(beta.double() * shape) / torch.i0(beta).double()
    filters = torch.special.sinc(crossings) * window * (cutoff / orig)
    return Bank(filters.where(inside, 0.0), None, left)


def lengths(design: Filter, samples: int) -> tuple[int, int]:
    """Of `samples`: how many outputs are computed, and how many there are; the rest is 0.

    As torchaudio counts, which rounds to float32 before it rounds up, and has no more than whole
    periods. As librosa counts, which fills up what soxr returns with zeros.
    """
    orig, new = design.orig, design.new
    if design.method == SOXR_HQ:
        length = math.ceil(samples * (new / orig))
        return min(math.floor(samples / (orig / new) + 0.5), length), length
    rounded = _to_float32(new * samples / orig) if samples > 0 else 0.0
    length = min(math.ceil(rounded), new * (samples // orig + 1))
    return length, length


def _to_float32(value: float) -> float:
    """A positive number rounded to float32, in steps that torch.compile can follow."""
    scale = 1.0  # to 24 bits before the point
    while value * scale < 2**23:
        scale *= 2
    while value * scale >= 2**24:
        scale /= 2
    whole = math.floor(value * scale + 0.5)
    if whole - value * scale == 0.5:
        whole -= whole % 2
    return whole / scale
