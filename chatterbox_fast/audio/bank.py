"""The filters of a pair of sampling rates: checked, designed in float64, cached."""

from __future__ import annotations

import functools
import math
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..selftest import outside_modes

MAX_COEFFICIENTS = 2**20
"""The most that all filters of a ratio may have together: 4 MiB in float32."""
CACHED_RATIOS = 16
"""Ratios whose design is kept, and four times as many copies by device and dtype."""

HANN, KAISER, SOXR_HQ = METHODS = ("sinc_interp_hann", "sinc_interp_kaiser", "soxr_hq")
_KAISER_BETA = 14.769656459379492
_PARAMETERS: tuple[int, float, None] = (6, 0.99, None)
"""lowpass_filter_width, rolloff and beta that mean nothing was chosen."""
_AT_ONCE = 8
"""Taps are filled up with zeros to a multiple of what a CPU multiplies at once."""
_captured: dict[tuple[Filter, torch.device, torch.dtype], Bank] = {}
"""For good: a CUDA graph reads the filters that it captured at every replay."""


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
        width, rolloff: see `resample`; not used by soxr_hq.
        beta: of Kaiser's window; 0 for other methods, so that one design has one key.
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
        used = shape if method == KAISER else 0.0
        return cls(orig // common, new // common, method, whole, cutoff, used)

    def reach(self, width: int, rolloff: float) -> int:
        """How many samples a windowed sinc weighs on each side; `MAX_COEFFICIENTS` is too many."""
        samples = float(width) * self.orig / (min(self.orig, self.new) * rolloff)
        return math.floor(min(MAX_COEFFICIENTS, samples))

    def check_width(self) -> None:
        """Raises `BankTooLarge` where rates would do that the filter's width and rolloff do not."""
        needed, usual = (
            self.new * _filled(2 * self.reach(width, rolloff) + 2)
            for width, rolloff in ((self.width, self.rolloff), _PARAMETERS[:2])
        )
        if usual <= MAX_COEFFICIENTS < needed:
            raise BankTooLarge(
                "chatterbox_fast.resample: lowpass_filter_width / rolloff must need at most "
                f"{MAX_COEFFICIENTS} coefficients for {self.orig} -> {self.new}, got "
                f"{self.width:g} / {self.rolloff:g}"
            )

    def check_size(self, taps: int) -> None:
        """Raises `BankTooLarge` where filters of `taps` are too many coefficients."""
        if self.new * taps > MAX_COEFFICIENTS:
            raise BankTooLarge(
                f"chatterbox_fast.resample: orig_freq and new_freq must reduce to at most "
                f"{MAX_COEFFICIENTS} coefficients, got {self.orig} -> {self.new}: "
                f"{self.new} filters of {taps}"
            )


def _filled(taps: int) -> int:
    return taps + -taps % _AT_ONCE


def _number(name: str, value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"chatterbox_fast.resample: {name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond a double's range
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"chatterbox_fast.resample: {name} must be finite, got {value!r}")
    return number


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

    def move() -> Bank:
        filters = bank.filters.to(dtype)
        if device.type == "cuda":  # where neighbouring outputs read neighbouring phases
            filters = filters.t().contiguous().to(device).t()
        first = None if bank.first is None else bank.first.to(device, dtype)
        return Bank(filters.to(device), first, bank.left)

    return outside_modes(move)


@torch.compiler.assume_constant_result
def bank_of(design: Filter, device: torch.device, dtype: torch.dtype) -> Bank:
    """The filters of `design` on `device`, in `dtype`: float32 or float64."""
    return _captured.get((design, device, dtype)) or _bank_on(design, device, dtype)


def bank_for(design: Filter, waveform: Tensor) -> Bank:
    """The filters of `design` as `waveform` needs them; fake ones where only fakes are taken."""
    wide = torch.float64 if waveform.dtype == torch.float64 else torch.float32
    bank: Bank = bank_of(design, waveform.device, wide)
    if torch.compiler.is_compiling():
        return bank
    if not isinstance(waveform, FakeTensor):
        if waveform.is_cuda:
            return _outliving_eviction(bank, (design, waveform.device, wide))
        return bank
    if (mode := waveform.fake_mode).allow_non_fake_inputs:
        return bank
    first = None if bank.first is None else mode.from_tensor(bank.first)
    return bank._replace(filters=mode.from_tensor(bank.filters), first=first)


def _outliving_eviction(bank: Bank, key: tuple[Filter, torch.device, torch.dtype]) -> Bank:
    """The filters, kept for kernels that read them after the cache has let them go."""
    if torch.cuda.is_current_stream_capturing():
        return _captured.setdefault(key, bank)  # of two at once all graphs read the first
    for tensor in (bank.filters, bank.first):
        if tensor is not None:  # made on the default stream, which would use its memory at once
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return bank


@functools.lru_cache(CACHED_RATIOS)
def _designed(design: Filter) -> Bank:
    """In float64 on the CPU; taps are filled up to a multiple of `_AT_ONCE`."""
    from . import soxr_hq

    def make() -> Bank:
        bank = soxr_hq.probe(design) if design.method == SOXR_HQ else _sinc(design)
        taps = bank.filters.shape[1]
        fill = _filled(taps) - taps
        first = None if bank.first is None else torch.nn.functional.pad(bank.first, (0, fill))
        return Bank(torch.nn.functional.pad(bank.filters, (0, fill)), first, bank.left)

    return outside_modes(make)


def _sinc(design: Filter) -> Bank:
    """torchaudio's windowed sinc, without the taps that its window leaves at 0.

    Filter p weighs sample i, counted from ``floor(p orig / new)``, by its distance in time from
    output p, in zero crossings of a sinc that is cut off at `rolloff` times the lower rate.
    """
    orig, new, width = design.orig, design.new, design.width
    cutoff = min(orig, new) * design.rolloff
    left = design.reach(width, design.rolloff)
    taps = 2 * left + 2
    design.check_width()
    design.check_size(_filled(taps))
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
        return _least(math.floor(samples / (orig / new) + 0.5), length), length
    length = _least(_ceil_of_float32(new * samples, orig), new * (samples // orig + 1))
    return length, length


def _least(one: int, other: int) -> int:
    """The smaller, without a branch on a symbol: torch.compile takes ``min`` for that itself."""
    symbolic = isinstance(one, torch.SymInt) or isinstance(other, torch.SymInt)
    return torch.sym_min(one, other) if symbolic else min(one, other)


def _ceil_of_float32(numerator: int, divisor: int) -> int:
    """``ceil(float32(numerator / divisor))``, for quotients below 2**32.

    In whole numbers and without a branch on `numerator`, which torch.compile may hold as a symbol:
    a branch would be a guard, and a loop over powers of two a new graph for each of them.
    Where float32 has more than ``bits`` bits behind the point, rounding to it moves no quotient to
    or over a whole number, so that ``bits`` of them are enough.
    """
    bits = divisor.bit_length()
    doubled = range(24 - bits, 32)  # powers of two from where on float32 has a bit less each
    coarser = sum(_least(1, numerator // (divisor << power)) for power in doubled)
    unit = 2**coarser  # in 2**-bits: float32's last place
    scaled, step = numerator << bits, divisor * unit
    is_odd = scaled // step % 2
    units = (2 * scaled + step - 1 + is_odd) // (2 * step)  # the nearest, the even one of two
    return -(-units * unit // 2**bits)
