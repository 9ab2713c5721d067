"""resample: every implementation against a float64 oracle, with torchaudio's own error as the
measure, and against torchaudio and librosa as they are called."""

from __future__ import annotations

import copy
import math
import pickle
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import librosa
import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import assume, given, settings
from hypothesis import strategies as some
from toolkit import ulp
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad

from chatterbox_fast import ops, reference, selftest
from chatterbox_fast.audio import Resample, resample
from chatterbox_fast.audio import bank as banks

CPU = torch.device("cpu")
FLOATING = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("cuda", "reference")
"""As options name them: "cuda" is the extension, on a CPU its CPU op."""
STOCK = (
    (24000, 16000), (16000, 24000), (24000, 32000), (32000, 24000), (22050, 24000),
    (44100, 24000), (48000, 24000),
)  # fmt: skip
"""What stock Chatterbox and Perth convert."""
METHODS = ("sinc_interp_hann", "soxr_hq")
ODD = (*STOCK, (3, 1), (1, 3), (7, 5), (16000, 44100), (16000, 22050))


class Call(NamedTuple):
    """The arguments of one call of the op."""

    waveform: Tensor
    filters: Tensor
    first: Tensor | None
    stride: int
    left: int
    length: int

    def oracle(self) -> Tensor:
        """In float64, an output at a time."""
        x, phases, taps = self.waveform.double(), *self.filters.shape
        y = torch.zeros(len(x), self.length, dtype=torch.float64)
        for j in range(self.length):
            start = j * self.stride // phases - self.left
            is_first = self.first is not None and j < len(self.first)
            row = self.first[j] if is_first else self.filters[j % phases]  # type: ignore[index]
            begin, end = max(start, 0), min(start + taps, x.shape[1])
            if begin < end:
                y[:, j] = x[:, begin:end] @ row[begin - start : end - start].double()
        return y

    def by_convolution(self) -> Tensor:
        """By torch as torchaudio calls it; without `first`."""
        phases, taps = self.filters.shape
        place = torch.arange(phases) * self.stride // phases
        filters = torch.zeros(phases, 1, int(place[-1]) + taps)
        for row, own, begin in zip(filters, self.filters, place.tolist(), strict=True):
            row[0, begin : begin + taps] = own
        after = self.length * self.stride // phases + filters.shape[2]
        x = torch.nn.functional.pad(self.waveform, (self.left, after))[:, None]
        y = torch.nn.functional.conv1d(x, filters, stride=self.stride)
        return y.transpose(1, 2).flatten(1)[:, : self.length]

    def by(self, function: Any, **more: Any) -> Tensor:
        rest = {name: getattr(self, name) for name in ("stride", "left", "length")}
        return function(self.waveform, self.filters, self.first, **rest, **more)


def whole_call(
    rows: int, samples: int, phases: int, taps: int, stride: int, *,
    left: int = 0, first: int = 0, length: int | None = None, dtype: torch.dtype = torch.float32,
) -> Call:  # fmt: skip
    """Small whole numbers: in float32 every sum is exact, in whatever order."""
    source = torch.Generator().manual_seed(samples + taps)

    def numbers(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=source).float()

    if length is None:
        length = -(-samples * phases // stride)
    return Call(
        numbers(rows, samples).to(dtype), numbers(phases, taps),
        numbers(first, taps) if first else None, stride, min(left, taps - 1), length,
    )  # fmt: skip


WHOLE = (
    dict(rows=1, samples=100, phases=2, taps=24, stride=3, left=9),
    dict(rows=3, samples=77, phases=1, taps=1, stride=1),
    dict(rows=2, samples=50, phases=5, taps=17, stride=2, left=16, first=3),
    dict(rows=1, samples=1, phases=3, taps=9, stride=7, left=4),
    dict(rows=2, samples=0, phases=3, taps=9, stride=7, left=4, length=5),
    dict(rows=1, samples=400, phases=160, taps=21, stride=147, left=10, first=170),
    dict(rows=1, samples=3000, phases=2, taps=40, stride=3, left=20, first=5),
    dict(rows=1, samples=900, phases=700, taps=12, stride=641, left=5, first=9),
    dict(rows=1, samples=5000, phases=1, taps=3, stride=1000, left=1),
    dict(rows=2, samples=300_000, phases=1, taps=5, stride=1000, left=2, first=70),
    dict(rows=1, samples=2**21 + 3, phases=1, taps=9, stride=2**20, left=4, length=4),
    dict(rows=1, samples=20, phases=4, taps=8, stride=1, left=0, length=200),
    dict(rows=0, samples=20, phases=4, taps=8, stride=1),
    dict(rows=2, samples=20, phases=4, taps=8, stride=1, length=0),
)
"""Few phases and many, strides of many samples, ends beyond the waveform, first filters that fill
blocks or do not."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def rates_call(samples: int, rates: tuple[int, int], method: str) -> Call:
    """Two rows of noise, with the filters of `rates`."""
    design = banks.Filter.of(*rates, 6, 0.99, method, None)
    assert design is not None
    bank = banks.bank_of(design, CPU, torch.float32)
    computed, _ = banks.lengths(design, samples)
    return Call(noise(2, samples), bank.filters, bank.first, design.orig, bank.left, computed)


def check_rates(y: Tensor, waveform: Tensor, rates: tuple[int, int], method: str) -> None:
    """Of stock's rates: within twice the error of torchaudio in float32, plus one ulp, of itself in
    float64. Of soxr's filter, which torch does not have, the CPU op is the measure.
    """
    if method == "soxr_hq":
        theirs, expected = (resample(x, *rates, resampling_method=method)
                            for x in (waveform, waveform.double()))  # fmt: skip
    else:
        stock = torchaudio.functional.resample
        theirs, expected = stock(waveform, *rates), stock(waveform.double(), *rates)
    error, of_stock = (float((t - expected[:, : y.shape[1]]).abs().max())
                       for t in (y, theirs[:, : y.shape[1]]))  # fmt: skip
    assert error <= 2 * of_stock + ulp(expected, torch.float32)
    assert error <= 1e-6, "and small by itself: torchaudio rounds the places of some taps"


def decibels(own: Tensor, expected: Any) -> float:
    """The ratio of `expected` to the difference."""
    expected = torch.as_tensor(expected).double()
    difference = (own.double() - expected).square().sum()
    return float(10 * torch.log10(expected.square().sum() / difference.clamp(min=1e-300)))


# ---- the op


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_no_product_is_lost(case: dict[str, int], backend: Any, dtype: torch.dtype) -> None:
    """Whole numbers are summed exactly."""
    call = whole_call(**case, dtype=dtype)  # type: ignore[arg-type]
    assert torch.equal(call.by(ops.resample, backend=backend), call.oracle().to(dtype))


@given(
    sizes=some.tuples(some.integers(0, 3), some.integers(0, 300), some.integers(1, 40)),
    taps=some.integers(1, 40),
    stride=some.integers(1, 60),
    left=some.integers(0, 39),
    first=some.integers(0, 20),
    length=some.integers(0, 400),
    dtype=some.sampled_from(FLOATING),
    backend=some.sampled_from(BACKENDS),
)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_any_shape(
    sizes: tuple[int, int, int], taps: int, stride: int, left: int, first: int, length: int,
    dtype: torch.dtype, backend: Any,
) -> None:  # fmt: skip
    call = whole_call(*sizes, taps, stride, left=left, first=first, length=length, dtype=dtype)
    assert torch.equal(call.by(ops.resample, backend=backend), call.oracle().to(dtype))


@pytest.mark.parametrize("method", ["sinc_interp_hann", "soxr_hq"])
def test_the_same_bits_by_any_number_of_threads_and_rows(threads: Any, method: str) -> None:
    waveform = noise(3, 30001)
    for rates in ((24000, 16000), (44100, 24000)):
        results = []
        for count in (1, 2, 2, 1):
            threads(count)
            results.append(resample(waveform, *rates, resampling_method=method))
        assert all(torch.equal(y, results[0]) for y in results)
        alone = resample(waveform[1], *rates, resampling_method=method)
        assert torch.equal(alone, results[0][1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_reach_as_far_as_a_filter(backend: Any, bad: float) -> None:
    call = whole_call(2, 200, 2, 24, 3, left=9)
    call.waveform[0, 100] = bad
    place = torch.arange(call.length) * 3 // 2 - 9
    meets = (place <= 100) & (place + 24 > 100)
    call.filters[call.filters == 0] = 1
    finite = call.by(ops.resample, backend=backend).isfinite()
    assert finite[1].all()
    assert not (finite[0] & meets).any()
    near = (place <= 100 + 14) & (place + 24 > 100 - 14)
    assert finite[0][~near].all(), "further only by the zeros that fill filters up"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"waveform": torch.zeros(6)}, r"waveform must be \(R, T\), got \[6\]"),
        ({"waveform": torch.zeros(2, 6).double()}, "waveform must be float32, .*, got Double"),
        ({"waveform": torch.zeros(2, 6).int()}, "waveform must be float32, .*, got Int"),
        ({"waveform": torch.zeros(6, 2).T}, r"waveform must be contiguous, got strides \[1, 2\]"),
        ({"filters": torch.zeros(2, 4).double()}, "filters must be Float, got Double"),
        ({"filters": torch.zeros(4)}, r"filters must be \(P, K\), with 1 to 1048576 .*got \[4\]"),
        ({"filters": torch.zeros(0, 4)}, r"filters must be \(P, K\), .*got \[0, 4\]"),
        ({"filters": torch.zeros(2, 0)}, r"filters must be \(P, K\), .*got \[2, 0\]"),
        ({"filters": torch.zeros(1025, 1024)}, r"filters must be .* got \[1025, 1024\]"),
        ({"first": torch.zeros(1, 5)}, r"first must be \(F, 4\) as filters has, got \[1, 5\]"),
        ({"first": torch.zeros(4)}, r"first must be \(F, 4\) as filters has, got \[4\]"),
        ({"first": torch.zeros(1, 4).double()}, "first must be Float, got Double"),
        ({"first": torch.zeros(4, 2).T}, r"first must be contiguous, got strides \[1, 2\]"),
        ({"stride": 0}, r"stride must be in \[1, 1048576\], got 0"),
        ({"stride": 2**20 + 1}, r"stride must be in \[1, 1048576\], got 1048577"),
        ({"left": -1}, r"left must be in \[0, 4\), before the last tap, got -1"),
        ({"left": 4}, r"left must be in \[0, 4\), before the last tap, got 4"),
        ({"length": -1}, r"length must be in \[0, \d+\], got -1"),
        ({"length": 2**40}, r"length must be in \[0, \d+\], got \d+"),
        (
            {"waveform": torch.zeros(2**25, 0), "length": 2**13 + 1},
            r"waveform must be of at most 33038209 rows for 8193 outputs, got \[33554432, 0\]",
        ),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"waveform": torch.zeros(2, 6), "filters": torch.zeros(2, 4), "first": None,
                 "stride": 3, "left": 1, "length": 4}  # fmt: skip
    with pytest.raises(RuntimeError, match=f"chatterbox_fast::resample: {message}"):
        torch.ops.chatterbox_fast.resample(**{**arguments, **change})


@contextmanager
def at_most_more(mebibytes: int) -> Iterator[None]:
    """Allocations fail that need more than this beyond what the process has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    now = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + mebibytes * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_stride_takes_little_memory(threads: Any) -> None:
    """No more than the samples that the outputs there are need."""
    threads(1)
    call = whole_call(1, 2**21 + 3, 1, 3, 2**20, left=1)
    expected = call.oracle()
    with at_most_more(32):
        assert torch.equal(call.by(ops.resample, backend="cuda").double(), expected)
    seconds = torch.ones(3 * 48000)
    Resample(48000, 1)
    with at_most_more(128):
        y = resample(seconds, 48000, 1, backend="cuda")
    assert decibels(y, resample(seconds.double(), 48000, 1)) >= 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rates", [(24000, 16000), (16001, 16000)], ids=str)
def test_autocast_does_not_reach_the_reference(rates: Any, dtype: torch.dtype) -> None:
    waveform = noise(2, 3000).to(dtype)
    for method in ("sinc_interp_hann", "soxr_hq")[: 2 if rates[0] == 24000 else 1]:
        options: dict[str, Any] = {"resampling_method": method, "backend": "reference"}
        expected = resample(waveform, *rates, **options)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(resample(waveform, *rates, **options), expected)


@pytest.mark.parametrize("first", [0, 3])
def test_opcheck(first: int) -> None:
    call = whole_call(2, 33, 3, 8, 2, left=3, first=first, dtype=torch.bfloat16)
    rest = {name: getattr(call, name) for name in ("stride", "left", "length")}
    op = torch.ops.chatterbox_fast.resample.default
    torch.library.opcheck(op, (call.waveform, call.filters, call.first), rest)


def test_which_implementation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert selftest.choose("resample", CPU, "auto", torch.float32).backend == "extension"
    assert ops.resample_by("extension") is torch.ops.chatterbox_fast.resample.default
    assert ops.resample_by("reference") is reference.resample
    asked = []
    monkeypatch.setattr(ops, "resample_by", lambda b: asked.append(b) or reference.resample)
    for waveform in (noise(9), noise(9).double(), noise(9).requires_grad_()):
        resample(waveform, 3, 2)
    with torch.no_grad():
        resample(noise(9).requires_grad_(), 3, 2)
    assert asked == ["extension", "reference", "reference", "extension"]


def test_the_widest_filter_there_is_and_the_next() -> None:
    """In taps: 2**20 coefficients, of two phases."""
    most = banks.MAX_COEFFICIENTS // 2 // 2 - 1
    assert banks._sinc(banks.Filter(1, 2, banks.HANN, most, 1.0, 0.0)).filters.shape == (2, 2**19)
    with pytest.raises(banks.BankTooLarge, match="lowpass_filter_width / rolloff must need"):
        banks._sinc(banks.Filter(1, 2, banks.HANN, most + 1, 1.0, 0.0))


# ---- torchaudio's filters

PARAMETERS: tuple[dict[str, Any], ...] = (
    {},
    {"lowpass_filter_width": 64, "rolloff": 0.9475937167399596,
     "resampling_method": "sinc_interp_kaiser", "beta": 14.769656459379492},
    {"lowpass_filter_width": 16, "rolloff": 0.85, "resampling_method": "sinc_interp_kaiser",
     "beta": 8.555504641634386},
    {"lowpass_filter_width": 1, "resampling_method": "sinc_interp_kaiser"},
    {"lowpass_filter_width": 3, "rolloff": 1.2},
)  # fmt: skip


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
@pytest.mark.parametrize("rates", ODD, ids=str)
def test_it_is_torchaudios(rates: tuple[int, int], parameters: dict[str, Any]) -> None:
    """In float64 to its rounding. Of the function and the module in float32, which round their
    filters earlier, the error is the measure."""
    waveform = noise(2, 5003)
    stock = torchaudio.functional.resample
    expected = stock(waveform.double(), *rates, **parameters)
    module = torchaudio.transforms.Resample(*rates, **parameters)
    theirs = max(
        float((stock(waveform, *rates, **parameters) - expected).abs().max()),
        float((module(waveform) - expected).abs().max()),
    )
    own = resample(waveform.double(), *rates, **parameters)
    assert own.shape == expected.shape
    assert (own - expected).abs().max() < 1e-13 * expected.abs().max()
    for backend in BACKENDS:
        y = resample(waveform, *rates, **parameters, backend=backend)  # type: ignore[arg-type]
        assert y.dtype == torch.float32
        error = float((y - expected).abs().max())
        assert error <= 2 * theirs + ulp(expected, torch.float32), (backend, error, theirs)
        assert error <= 2e-6, "and small by itself"
    assert torch.equal(
        Resample(*rates, **parameters)(waveform), resample(waveform, *rates, **parameters)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rates", STOCK, ids=str)
def test_half_precision_is_rounded_once(rates: tuple[int, int], dtype: torch.dtype) -> None:
    """torchaudio, whose filter is in half precision too, is far off."""
    waveform = noise(2, 2000).to(dtype)
    expected = torchaudio.functional.resample(waveform.double(), *rates)
    for backend in BACKENDS:
        y = resample(waveform, *rates, backend=backend)  # type: ignore[arg-type]
        assert y.dtype == dtype
        assert (y.double() - expected).abs().max() <= 0.51 * ulp(expected, dtype)


@given(
    rates=some.one_of(
        some.sampled_from(ODD), some.tuples(some.integers(1, 999), some.integers(1, 999))
    ),
    samples=some.one_of(
        some.integers(1, 400), some.integers(10**4, 10**6), some.integers(10**6, 10**8),
        some.integers(2, 26).map(lambda power: 2**power + 1),
    ),
)  # fmt: skip
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
def test_lengths_are_torchaudios(rates: tuple[int, int], samples: int) -> None:
    """Also where it rounds them to float32: it is called on a device that computes shapes alone."""
    assume(samples * rates[1] < 2**32 * rates[0])
    waveform = torch.empty(1, samples, device="meta")
    expected = torchaudio.functional.resample(waveform, *rates, 1).shape[-1]
    design = banks.Filter.of(*rates, 1, 0.99, "sinc_interp_hann", None)
    assert (samples if design is None else banks.lengths(design, samples)[0]) == expected
    if samples <= 400:
        assert resample(torch.zeros(1, samples), *rates, 1).shape == (1, expected)


@given(
    rates=some.tuples(some.integers(1, 200), some.integers(1, 200)),
    samples=some.integers(1, 500),
    width=some.integers(1, 20),
    kaiser=some.booleans(),
)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_any_rates(rates: tuple[int, int], samples: int, width: int, kaiser: bool) -> None:
    waveform = noise(1, samples)
    method = "sinc_interp_kaiser" if kaiser else "sinc_interp_hann"
    expected = torchaudio.functional.resample(waveform.double(), *rates, width, 0.99, method)
    y = resample(waveform, *rates, width, 0.99, method)
    assert y.shape == expected.shape
    assert (y - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps * max(
        1.0, float(expected.abs().max())
    )


# ---- soxr's filter


@pytest.mark.parametrize("rates", STOCK, ids=str)
def test_soxr_hq_is_librosas(rates: tuple[int, int]) -> None:
    """From the first sample to the last, and at each end by itself."""
    orig, new = rates
    waveform = noise(2, 12345)
    expected = librosa.resample(waveform.numpy(), orig_sr=orig, target_sr=new)
    for backend in BACKENDS:
        y = resample(waveform, *rates, resampling_method="soxr_hq", backend=backend)  # type: ignore[arg-type]
        assert y.shape == expected.shape
        for part in (slice(None), slice(0, 8), slice(0, 200), slice(-200, None)):
            assert decibels(y[:, part], expected[:, part]) >= 120
    wide = resample(waveform.double(), *rates, resampling_method="soxr_hq")
    assert (
        decibels(wide, librosa.resample(waveform.double().numpy(), orig_sr=orig, target_sr=new))
        >= 120
    )


@pytest.mark.parametrize(
    "rates", [(13, 1), (192000, 8000), (1, 13), (8000, 192000), (48, 1), (1, 48)], ids=str
)
def test_soxr_hq_of_rates_far_apart_is_librosas(rates: tuple[int, int]) -> None:
    orig, new = rates
    waveform = noise(1, 3000 + 1000 * max(1, orig // new))
    expected = librosa.resample(waveform.numpy(), orig_sr=orig, target_sr=new)
    y = resample(waveform, *rates, resampling_method="soxr_hq")
    assert y.shape == expected.shape
    for part in (slice(None), slice(0, 200), slice(-200, None)):
        assert decibels(y[:, part], expected[:, part]) >= 120


@pytest.mark.parametrize("rates", STOCK, ids=str)
def test_soxr_hq_is_rounded_as_torch_rounds(rates: tuple[int, int]) -> None:
    """Of the same filters, a convolution by torch is the measure."""
    design = banks.Filter.of(*rates, 6, 0.99, "soxr_hq", None)
    assert design is not None
    bank = banks.bank_of(design, CPU, torch.float32)
    call = Call(noise(1, 3001), bank.filters, bank.first, design.orig, bank.left, 1500)
    expected, stock = call.oracle(), call.by_convolution()
    differs = 0 if bank.first is None else len(bank.first)  # stock torch has one filter for a phase
    theirs = (stock - expected)[:, differs:].abs().max()
    for backend in BACKENDS:
        error = (call.by(ops.resample, backend=backend) - expected).abs().max()
        assert error <= 2 * theirs + ulp(expected, torch.float32), backend


@pytest.mark.parametrize("rates", STOCK, ids=str)
def test_soxr_hq_of_short_waveforms_is_librosas(rates: tuple[int, int]) -> None:
    """A waveform shorter than the filter, and where librosa fills up what soxr did not return."""
    orig, new = rates
    for samples in (*range(1, 40), 146, 147, 148, 149, 294, 1000, 1001):
        waveform = noise(1, samples, seed=samples)
        expected = librosa.resample(waveform.numpy(), orig_sr=orig, target_sr=new)
        y = resample(waveform, *rates, resampling_method="soxr_hq")
        assert y.shape == expected.shape
        assert decibels(y, expected) >= 120
        assert torch.equal(y == 0, torch.from_numpy(expected) == 0)


@pytest.mark.parametrize(
    ("rates", "samples"),
    [((24000, 16000), 10**6 + 1), ((44100, 24000), 999_999), ((22050, 24000), 1_234_567),
     ((48000, 24000), 2**24 + 3), ((16000, 24000), 10**6 + 3)],
)  # fmt: skip
def test_soxr_hq_has_librosas_length(rates: tuple[int, int], samples: int) -> None:
    """And knows how much of it is soxr's."""
    import soxr

    design = banks.Filter.of(*rates, 6, 0.99, "soxr_hq", None)
    assert design is not None
    silence = np.zeros(samples, np.float32)
    computed = len(soxr.resample(silence, *rates, quality="HQ"))
    length = len(librosa.resample(silence, orig_sr=rates[0], target_sr=rates[1]))
    assert banks.lengths(design, samples) == (computed, length)


def test_without_soxr(monkeypatch: pytest.MonkeyPatch) -> None:
    banks._designed.cache_clear()
    banks._bank_on.cache_clear()
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(RuntimeError, match="'soxr_hq' needs the package soxr: pip install soxr"):
        Resample(3, 2, "soxr_hq")


def test_a_soxr_with_another_filter_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import soxr

    banks._designed.cache_clear()
    banks._bank_on.cache_clear()
    stock = soxr.resample
    monkeypatch.setattr(soxr, "resample", lambda *a, **k: stock(*a, **k) ** 3)
    with pytest.raises(RuntimeError, match="soxr's filter for 3 -> 2 is not periodic: error"):
        resample(noise(9), 3, 2, resampling_method="soxr_hq")


# ---- the public function and module


@pytest.mark.parametrize("method", ["sinc_interp_hann", "soxr_hq"])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 0), (0, 7), (2, 3, 50), (1, 1, 1, 9)], ids=str)
def test_shapes(shape: tuple[int, ...], method: str) -> None:
    waveform = noise(*shape)
    y = resample(waveform, 24000, 16000, resampling_method=method)
    assert y.shape == (*shape[:-1], -(-2 * shape[-1] // 3))
    rows = waveform.reshape(-1, shape[-1]) if waveform.numel() else ()
    alone = [resample(row, 24000, 16000, resampling_method=method) for row in rows]
    assert torch.equal(y.reshape(-1), torch.cat([torch.empty(0), *alone]))


def test_a_waveform_that_is_not_contiguous() -> None:
    waveform = noise(50, 3, 2)
    expected = resample(waveform.permute(2, 1, 0).contiguous(), 3, 2)
    assert torch.equal(resample(waveform.permute(2, 1, 0), 3, 2), expected)
    assert torch.equal(resample(noise(100)[::2], 3, 2), resample(noise(100)[::2].clone(), 3, 2))


def test_equal_rates_give_the_waveform_itself() -> None:
    waveform = torch.arange(5)
    assert resample(waveform, 16000, 16000.0) is waveform
    assert Resample(8000, 8000)(waveform) is waveform
    assert Resample()(waveform) is waveform


def test_gradients_are_torchaudios() -> None:
    own, theirs = (noise(2, 300).double().requires_grad_() for _ in range(2))
    resample(own, 3, 2).square().sum().backward()
    torchaudio.functional.resample(theirs, 3, 2).square().sum().backward()
    torch.testing.assert_close(own.grad, theirs.grad)
    with torch.inference_mode():  # a filter that is made here is used outside
        resample(noise(9), 5, 11)
    resample(noise(9).requires_grad_(), 5, 11).sum().backward()


def test_tangents_are_torchaudios() -> None:
    """The map is linear: its derivative is itself."""
    waveform, tangent = noise(2, 300), noise(2, 300, seed=1)
    expected = torchaudio.functional.resample(tangent.double(), 3, 2)
    with forward_ad.dual_level():
        plain = resample(waveform, 3, 2)
        assert forward_ad.unpack_dual(plain).tangent is None
        dual = resample(forward_ad.make_dual(waveform, tangent), 3, 2)
        primal, own = forward_ad.unpack_dual(dual)
    assert (primal - plain).abs().max() < 1e-6
    assert (own - expected).abs().max() < 1e-6
    _, own = torch.func.jvp(lambda x: resample(x, 3, 2), (waveform,), (tangent,))
    assert (own - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 16000), ValueError, "orig_freq must be positive, got 0"),
        ((16000, -1), ValueError, "new_freq must be positive, got -1"),
        ((-1, -1), ValueError, "orig_freq must be positive, got -1"),
        ((16000, 5512.5), ValueError, r"new_freq must be whole, got 5512\.5"),
        ((math.nan, 16000), ValueError, "orig_freq must be finite, got nan"),
        ((10**400, 3), ValueError, "orig_freq must be finite, got 1000"),
        ((3, 2, 6, 0.99, "sinc_interp_hann", math.nan), ValueError, "beta must be finite"),
        ((16000, math.inf), ValueError, "new_freq must be finite, got inf"),
        (("16000", 8000), TypeError, "orig_freq must be a number, got '16000'"),
        ((16000, None), TypeError, "new_freq must be a number, got None"),
        ((True, 16000), TypeError, "orig_freq must be a number, got True"),
        ((3, 2, 0), ValueError, "lowpass_filter_width must be positive, got 0"),
        ((3, 2, 6.5), ValueError, r"lowpass_filter_width must be whole, got 6\.5"),
        ((3, 2, 6, 0.0), ValueError, r"rolloff must be positive, got 0\.0"),
        ((3, 2, 6, "1"), TypeError, "rolloff must be a number, got '1'"),
        ((3, 2, 6, 0.99, "hann"), ValueError, "resampling_method must be one of .*, got 'hann'"),
        ((3, 2, 6, 0.99, []), ValueError, r"resampling_method must be one of .*, got \[\]"),
        ((3, 2, 6, 0.99, "sinc_interp_kaiser", math.nan), ValueError, "beta must be finite"),
        ((3, 2, 7, 0.99, "soxr_hq"), ValueError, "must be left at their defaults for soxr_hq"),
        ((3, 2, 6, 0.99, "soxr_hq", 1.0), ValueError, "must be left at their defaults"),
        (
            (24000, 16000, 10**6),
            ValueError,
            r"lowpass_filter_width / rolloff must need at most 1048576 coefficients for 3 -> 2, "
            r"got 1e\+06 / 0.99",
        ),
        ((3, 2, int(1e308)), ValueError, r"lowpass_filter_width / .*, got 1e\+308 / 0\.99"),
        ((3, 2, 6, 1e-320), ValueError, "/ rolloff must need at most 1048576 .*, got 6 / 9.*e-321"),
        ((480001, 480000, 10**6), ValueError, "orig_freq and new_freq must reduce to at most"),
        ((480001, 480000), ValueError, "must reduce to at most 1048576 coefficients, got 480001"),
        (
            (98000, 2000, 6, 0.99, "soxr_hq"),
            ValueError,
            "orig_freq and new_freq must differ by at most a factor of 48 for soxr_hq, got 49 -> 1",
        ),
        (
            (1, 49, 6, 0.99, "soxr_hq"),
            ValueError,
            "orig_freq and new_freq must differ by at most a factor of 48 for soxr_hq, got 1 -> 49",
        ),
        ((4999, 4800, 6, 0.99, "soxr_hq"), ValueError, "must reduce to at most 1048576"),
    ],
)
def test_bad_parameters_are_named(arguments: Any, error: type, message: str) -> None:
    """By the function, and by the module when it is made."""
    with pytest.raises(error, match=f"chatterbox_fast.resample: .*{message}"):
        resample(noise(5), *arguments)
    names = (
        "orig_freq",
        "new_freq",
        "lowpass_filter_width",
        "rolloff",
        "resampling_method",
        "beta",
    )
    with pytest.raises(error, match=message):
        Resample(**dict(zip(names, arguments, strict=False)))


@pytest.mark.parametrize(
    ("waveform", "error", "message"),
    [
        (torch.zeros(5, dtype=torch.int16), TypeError, "waveform must be .*, got torch.int16"),
        (torch.zeros(5, dtype=torch.complex64), TypeError, "waveform must be .*complex64"),
        ([0.0], TypeError, "waveform must be a tensor .*, got list"),
        (torch.tensor(1.0), ValueError, r"waveform must be \(..., time\), got a scalar"),
    ],
)
def test_bad_waveforms_are_named(waveform: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        resample(waveform, 3, 2)


def test_the_largest_bank_is_used_and_correct() -> None:
    """Rates without a common divisor, for which torchaudio would take gigabytes."""
    waveform = noise(1, 2000)
    for rates in ((44101, 48000), (48000, 44101)):
        for backend in BACKENDS:
            y = resample(waveform, *rates, backend=backend)  # type: ignore[arg-type]
            near = torchaudio.functional.resample(
                waveform.double(), rates[0] // 100, rates[1] // 100
            )
            assert decibels(y[:, :200], near[:, :200]) > 40
            wide = resample(waveform.double(), *rates)
            assert (y - wide).abs().max() <= 4 * ulp(wide, torch.float32)


def test_filters_are_cached_and_caches_are_bounded() -> None:
    design = banks.Filter.of(24000, 16000, 6, 0.99, "sinc_interp_hann", None)
    assert design is not None
    first = banks.bank_of(design, CPU, torch.float32)
    resample(noise(9), 3, 2)
    assert banks.bank_of(design, CPU, torch.float32) is first
    assert banks.bank_of(design, CPU, torch.float64) is not first
    other = banks.Filter.of(24000, 16000, 6, 0.98, "sinc_interp_hann", None)
    assert other is not None
    assert banks.bank_of(other, CPU, torch.float32) is not first
    for rate in range(2, 100):
        resample(noise(9), 1, rate)
    assert banks._bank_on.cache_info().currsize == 4 * banks.CACHED_RATIOS
    assert banks._designed.cache_info().currsize == banks.CACHED_RATIOS


def test_a_module_is_copied_pickled_and_moved() -> None:
    module = Resample(24000, 16000, "soxr_hq")
    waveform = noise(100)
    expected = module(waveform)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied is not module
        assert torch.equal(copied(waveform), expected)
    assert torch.equal(copy.deepcopy(module).half()(waveform), expected), "no filter was rounded"
    assert module.state_dict() == {}
    assert repr(module) == "Resample(24000 -> 16000, soxr_hq)"


@pytest.mark.parametrize("method", ["sinc_interp_hann", "soxr_hq"])
def test_compiles_as_one_graph(method: str) -> None:
    module = Resample(24000, 16000, method)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for samples in (300, 300, 301, 400):
        assert torch.equal(compiled(noise(2, samples)), module(noise(2, samples)))


@pytest.mark.parametrize("method", ["sinc_interp_hann", "soxr_hq"])
@pytest.mark.parametrize("rates", [(24000, 16000), (44100, 24000)], ids=str)
def test_one_graph_serves_all_lengths(rates: tuple[int, int], method: str) -> None:
    """After the first, which torch.compile makes for its length alone."""
    module = Resample(*rates, method)
    graphs = CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend=graphs)
    for octave in range(20):
        waveform = noise(1, int(100 * 10 ** (octave / 5)) + octave)
        assert torch.equal(compiled(waveform), module(waveform))
    assert graphs.frame_count == 2


@pytest.fixture
def no_banks() -> None:
    """Filters are made anew."""
    banks._designed.cache_clear()
    banks._bank_on.cache_clear()
    banks._captured.clear()


@pytest.mark.usefixtures("no_banks")
@pytest.mark.parametrize("method", ["sinc_interp_hann", "soxr_hq"])
@pytest.mark.parametrize("strict", [True, False])
def test_filters_made_in_a_fake_mode_are_real(method: str, strict: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=not strict):
        waveform = torch.empty(2, 300)
        for _ in range(2):
            fake = resample(waveform, 44100, 24000, resampling_method=method)
            assert isinstance(fake, FakeTensor)
            assert fake.shape == (2, 164)
    y = resample(noise(2, 300), 44100, 24000, resampling_method=method)
    assert type(y) is Tensor
    banks._designed.cache_clear()
    banks._bank_on.cache_clear()
    assert torch.equal(y, resample(noise(2, 300), 44100, 24000, resampling_method=method))


@pytest.mark.usefixtures("no_banks")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("method", ["sinc_interp_hann", "soxr_hq"])
def test_filters_made_in_an_export_are_real(method: str, strict: bool) -> None:
    class Later(torch.nn.Module):
        def forward(self, waveform: Tensor) -> Tensor:
            return resample(waveform, 44100, 24000, resampling_method=method)

    waveform = noise(2, 300)
    exported = torch.export.export(Later(), (waveform,), strict=strict).module()
    y = resample(waveform, 44100, 24000, resampling_method=method)
    assert type(y) is Tensor
    assert torch.equal(exported(waveform), y)


@pytest.mark.usefixtures("no_banks")
def test_filters_made_in_a_transform_are_plain() -> None:
    waveform = noise(2, 30).double()
    torch.func.grad(lambda x: resample(x, 3, 2).sum())(waveform)
    torch.func.vmap(lambda x: resample(x, 5, 7, backend="reference"))(waveform)
    with torch.device("meta"):
        resample(waveform, 2, 9)
    for rates in ((3, 2), (5, 7), (2, 9)):
        expected = torchaudio.functional.resample(waveform, *rates)
        torch.testing.assert_close(resample(waveform, *rates), expected)


# ---- on a GPU


def forget_and_overwrite() -> list[Tensor]:
    """The caches forget their filters, and what gets such memory next is NaN."""
    banks._designed.cache_clear()
    banks._bank_on.cache_clear()
    sizes = (2**power for power in range(7, 19) for _ in range(16))
    written = [torch.full((size,), math.nan, device="cuda") for size in sizes]
    torch.cuda.current_stream().synchronize()
    return written


@pytest.mark.gpu
@pytest.mark.kernel
class TestOnAGpu:
    def test_the_kernel_is_what_runs(self) -> None:
        found = selftest.choose("resample", torch.device("cuda", 0), "cuda", torch.float32)
        assert found == ("extension", "compiled for cuda")

    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize("case", WHOLE, ids=str)
    def test_no_product_is_lost(self, case: dict[str, int], dtype: torch.dtype) -> None:
        call = whole_call(**case, dtype=dtype)  # type: ignore[arg-type]
        tensors = [None if t is None else t.cuda() for t in call[:3]]
        moved = Call(*tensors, *call[3:])  # type: ignore[arg-type]
        y = moved.by(ops.resample, backend="cuda")
        assert torch.equal(y.cpu(), call.oracle().to(dtype))

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("rates", STOCK, ids=str)
    def test_rates(self, rates: tuple[int, int], method: str) -> None:
        waveform = noise(2, 24001)
        y = resample(waveform.cuda(), *rates, resampling_method=method, backend="cuda")
        check_rates(y.cpu(), waveform, rates, method)

    def test_a_captured_graph_is_replayed(self) -> None:
        waveform = noise(1, 24000).cuda()
        resample(waveform, 24000, 16000, backend="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = resample(waveform, 24000, 16000, backend="cuda")
        waveform.copy_(noise(1, 24000, seed=1))
        graph.replay()
        assert torch.equal(y, resample(waveform, 24000, 16000, backend="cuda"))

    @pytest.mark.usefixtures("no_banks")
    @pytest.mark.parametrize("method", METHODS)
    def test_a_graph_outlives_the_cache(self, method: str) -> None:
        """Its filters' memory is not given to others, who would write over it."""
        waveform = noise(1, 4000).cuda()
        expected = resample(waveform, 44100, 24000, resampling_method=method, backend="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = resample(waveform, 44100, 24000, resampling_method=method, backend="cuda")
        (kept,) = banks._captured.values()
        written = forget_and_overwrite()
        graph.replay()
        assert torch.equal(y, expected)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            resample(waveform, 44100, 24000, resampling_method=method, backend="cuda")
        assert list(banks._captured.values()) == [kept], "one, whoever else captures it"
        del written

    @pytest.mark.usefixtures("no_banks")
    def test_a_kernel_of_another_stream_outlives_the_cache(self) -> None:
        """Which on an emulated GPU has not begun before somebody waits for that stream."""
        waveform, stream = noise(1, 4000).cuda(), torch.cuda.Stream()
        expected = resample(waveform, 44100, 24000, backend="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            y = resample(waveform, 44100, 24000, backend="cuda")
        written = forget_and_overwrite()
        stream.synchronize()
        assert torch.equal(y, expected)
        del written

    def test_filters_on_another_device_are_named(self) -> None:
        call = whole_call(2, 33, 3, 8, 2)
        with pytest.raises(RuntimeError, match="filters must be on cuda:0, got cpu"):
            call._replace(waveform=call.waveform.cuda()).by(ops.resample, backend="cuda")
