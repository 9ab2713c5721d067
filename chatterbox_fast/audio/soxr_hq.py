"""soxr's HQ filter, read off soxr itself: what it answers to single samples.

soxr is linear, and shifts its answer by `new` outputs where the input is shifted by `orig` samples,
except near the start: for some ratios its first stage has not seen the zeros before the waveform.
Its end is as if zeros followed. It computes in float32, so that an answer is off by some 1e-8;
several are averaged.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..reference import resample
from .bank import Bank, BankTooLarge, Filter, lengths

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_RATIO = 48
"""Rates may differ by this factor: reading the filter takes seconds there, and grows with it."""
_REACH = 104
"""Samples of the lower rate on each side beyond which HQ has nothing but rounding errors."""
_NOISE = 2.0**-25
"""Half a unit in the last place of a float32 of 1: taps at the ends below this are left out."""
_START_NOISE = 1e-7
_READINGS, _SAMPLES = 64, 2_000_000
"""How many readings of the filters are averaged at most, and samples to spend on them."""
_FIRST_READINGS, _CHANNELS, _TOGETHER = 4, 8192, 32
"""Of the first outputs' filters: readings at most, channels to spend on them, of which each takes
soxr a third of a millisecond to set up, and how many are read together, which bounds the memory."""
_LEAST_DB = 120.0


def probe(design: Filter) -> Bank:
    """The filters of soxr's HQ for a ratio, in float64, and those of its first outputs.

    Raises:
        BankTooLarge: the ratio has too many coefficients, or is beyond `MOST_RATIO`.
        RuntimeError: soxr is not installed, or what was read does not give soxr's own answer.
    """
    try:
        import soxr
    except ImportError as error:
        raise RuntimeError(
            "chatterbox_fast.resample: resampling_method='soxr_hq' needs the package soxr: "
            "pip install soxr (stock Chatterbox brings it, through librosa)"
        ) from error
    ratio = max(design.orig / design.new, design.new / design.orig)
    if ratio > MOST_RATIO:
        raise BankTooLarge(
            "chatterbox_fast.resample: orig_freq and new_freq must differ by at most a factor of "
            f"{MOST_RATIO} for soxr_hq, got {design.orig} -> {design.new}"
        )
    reach = math.ceil(_REACH * max(1.0, design.orig / design.new))
    design.check_size(2 * reach + 2)

    def by_soxr(x: NDArray[Any]) -> NDArray[Any]:
        """Of channels ``(time, channels)``."""
        answer: NDArray[Any] = soxr.resample(x, design.orig, design.new, quality="HQ")
        return answer

    filters = _filters(by_soxr, design, reach)
    first = _first_filters(by_soxr, design, filters)
    scale = min(1.0, 2 * design.new / design.orig)  # taps are smaller where rates fall by more
    differs = np.abs(first - filters[np.arange(len(first)) % design.new]).max(axis=1)
    count = int(np.flatnonzero(differs > scale * _START_NOISE).max(initial=-1)) + 1
    kept = np.flatnonzero(np.abs(filters).max(axis=0) > scale * _NOISE)
    taps = slice(int(kept[0]), int(kept[-1]) + 1)
    bank = Bank(
        torch.from_numpy(filters[:, taps].copy()),
        torch.from_numpy(first[:count, taps].copy()) if count else None,
        reach - taps.start,
    )
    _verify(by_soxr, design, bank, reach)
    return bank


def _filters(by_soxr: Any, design: Filter, reach: int) -> NDArray[Any]:
    """``(P, 2 reach + 2)``: tap k is what sample ``j orig // new - reach + k`` gives output j.

    Samples further apart than HQ reaches, which meet every place in a period once a reading, as
    `apart` has no divisor in common with it.
    """
    orig, new = design.orig, design.new
    apart = next(s for s in itertools.count(2 * reach + 2) if math.gcd(s, orig) == 1)
    readings = min(max(_SAMPLES // (apart * orig), 1), _READINGS)
    samples = 4 * reach + apart * np.arange(readings * orig)
    x = np.zeros((int(samples[-1]) + 2 * reach, 1))
    x[samples] = 1
    y = by_soxr(x)[:, 0]
    phase, tap = np.arange(new)[:, None], np.arange(2 * reach + 2)
    place = phase * orig // new - reach + tap  # of the sample, from the output's period on
    total = np.zeros(place.shape)
    for reading in samples.reshape(readings, orig):
        met = reading[np.argsort(reading % orig)]
        period = (met[place % orig] - place) // orig
        total += y[period * new + phase]
    return total / readings


def _first_filters(by_soxr: Any, design: Filter, filters: NDArray[Any]) -> NDArray[Any]:
    """The same for the first outputs, as many as reach before the start: a channel for each sample.

    Taps before the start are those of `filters`.
    """
    orig, new = design.orig, design.new
    reach = filters.shape[1] // 2 - 1
    output = np.arange(-(-reach * new // orig))[:, None]
    place = output * orig // new - reach + np.arange(2 * reach + 2)
    samples = int(place.max()) + 1
    readings = min(max(_CHANNELS // samples, 1), _FIRST_READINGS)
    total = np.zeros((len(output), samples))
    for scale in 1 + np.arange(readings) / 7:  # other mantissas, other errors
        for begin in range(0, samples, _TOGETHER):
            read = slice(begin, begin + _TOGETHER)
            x = np.eye(samples, min(_TOGETHER, samples - begin), -begin)
            total[:, read] += by_soxr(scale * x)[: len(output)] / scale
    own = total[output, place.clip(0)] / readings
    return np.where(place < 0, filters[output[:, 0] % new], own)


def _verify(by_soxr: Any, design: Filter, bank: Bank, reach: int) -> None:
    """Noise from start to end, by soxr and by what was read of it."""
    noise = np.random.default_rng(0).uniform(-1, 1, (8 * reach + 3 * design.orig + 1, 1))
    expected = by_soxr(noise)[:, 0]
    own = resample(
        torch.from_numpy(noise.T.copy()), bank.filters, bank.first, stride=design.orig,
        left=bank.left, length=len(expected),
    )[0].numpy()  # fmt: skip
    error = float(np.square(own - expected).sum() / np.square(expected).sum())
    if len(expected) != lengths(design, len(noise))[0] or not error < 10 ** (-_LEAST_DB / 10):
        raise RuntimeError(
            f"chatterbox_fast.resample: soxr's filter for {design.orig} -> {design.new} is not "
            f"periodic: error {error:.1e}"
        )
