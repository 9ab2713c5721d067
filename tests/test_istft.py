"""istft: every implementation against the end of stock's own decode, in float64 and in float32,
whose error is the measure."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
from typing import Any

import bench_istft
import pytest
import torch
from chatterbox.models.s3gen.hifigan import HiFTGenerator
from hypothesis import given, settings
from hypothesis import strategies as some
from toolkit import Dispatched, ulp
from torch import Tensor

from chatterbox_fast import dispatch, ops, reference

CPU = torch.device("cpu")
FLOATING = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("cuda", "reference")
"""As options name them: "cuda" is the extension, on a CPU its CPU op."""
HANN = torch.hann_window(16)
LIMIT = 0.99
NO_LIMIT = 1e9
LENGTHS = (2, 3, 4, 5, 8, 9, 10, 17, 125, 126, 127, 249, 250, 251, 252, 257, 600)
"""Of frames: all have edges, some nothing else; around what a task or a block makes."""
WINDOWS = {
    "hann": HANN,
    "hamming": torch.hamming_window(16),
    "ones": torch.ones(16),
    "askew": torch.linspace(0.1, 1.7, 16),
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_for(frames: int, enough: int = 600) -> int:
    """So many that the largest error of stock's is no matter of luck."""
    return max(2, enough // frames)


def spectrum_of(rows: int, frames: int, seed: int = 0, loudness: float = -2.0) -> Tensor:
    """As HiFT makes: magnitudes around `loudness`, any phase."""
    spectrum = noise(rows, frames, 18, seed=seed)
    spectrum[..., :9] += loudness
    spectrum[..., 9:] *= 2
    return spectrum


@functools.cache
def _hift() -> HiFTGenerator:
    """Stock's vocoder, narrow: only what comes after its last convolution matters."""
    with contextlib.redirect_stdout(io.StringIO()):
        return HiFTGenerator(base_channels=8, sampling_rate=24000, audio_limit=LIMIT)


def stock(spectrum: Tensor, window: Tensor = HANN, limit: float = LIMIT) -> Tensor:
    """What stock's decode makes of it, where its last convolution puts it out; in its dtype."""
    hift = copy.copy(_hift())
    hift.stft_window, hift.audio_limit = window.to(spectrum.dtype), limit
    last = hift.conv_post.register_forward_hook(lambda *_: spectrum.transpose(1, 2))
    stft = spectrum.new_zeros(1, 9, 65)
    hift._stft = lambda _: (stft.float(), stft.float())
    try:
        with torch.no_grad():
            return hift.decode(torch.zeros(1, 80, 1))
    finally:
        last.remove()


def compare(y: Tensor, spectrum: Tensor, window: Tensor = HANN, limit: float = NO_LIMIT) -> None:
    """To stock in float64; stock's own error in float32 is the measure."""
    expected = stock(spectrum.double(), window, limit)
    theirs = float((stock(spectrum.float(), window, limit) - expected).abs().max())
    assert y.dtype == torch.float32
    assert y.shape == expected.shape
    error = float((y - expected).abs().max())
    assert error <= 2 * theirs + ulp(expected, torch.float32), (error, theirs)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frames", LENGTHS)
def test_it_is_stocks(frames: int, backend: Any, dtype: torch.dtype) -> None:
    """A spectrum in half precision is converted first, and all else is float32."""
    spectrum = spectrum_of(rows_for(frames), frames, seed=frames).to(dtype)
    compare(ops.istft(spectrum, HANN, NO_LIMIT, backend=backend), spectrum)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_window(backend: Any, window: str) -> None:
    spectrum = spectrum_of(2, 300)
    y = ops.istft(spectrum, WINDOWS[window], NO_LIMIT, backend=backend)
    compare(y, spectrum, WINDOWS[window])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bin_", range(9))
def test_each_bin_by_itself(backend: Any, bin_: int) -> None:
    """Of one frame, so that no other hides an error."""
    spectrum = torch.full((1, 7, 18), -math.inf)
    spectrum[..., 9:] = 0.7
    spectrum[0, 3, bin_] = 0.3
    y = ops.istft(spectrum, HANN, NO_LIMIT, backend=backend)
    compare(y, spectrum)
    assert (y[0, 4 * 3 - 8 + 1 : 4 * 3 + 8] != 0).sum() >= 14
    assert (y[0, 4 * 3 + 8 :] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loudness", [-80.0, -60.0, 0.0, 4.0, 4.7, 60.0, 1e4])
def test_quiet_and_loud(backend: Any, loudness: float) -> None:
    """exp overflows; a magnitude is 100 at most."""
    spectrum = spectrum_of(1, 200, loudness=loudness)
    compare(ops.istft(spectrum, HANN, NO_LIMIT, backend=backend), spectrum)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_less_than_the_least_normal_number_may_be_0(backend: Any) -> None:
    spectrum = spectrum_of(1, 200, loudness=-95.0)
    y = ops.istft(spectrum, HANN, NO_LIMIT, backend=backend)
    assert (y - stock(spectrum.double())).abs().max() < torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-30, 1e-4, 30.0, 1e3, 3.2e4, 3.4e4, 1e6, 1e20, 1e38])
def test_angles_near_and_far(backend: Any, scale: float) -> None:
    spectrum = spectrum_of(1, 200)
    spectrum[..., 9:] *= scale / 2
    spectrum.clamp_(-3e38, 3e38)
    compare(ops.istft(spectrum, HANN, NO_LIMIT, backend=backend), spectrum)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_far_angle_in_each_channel(backend: Any) -> None:
    for channel in range(9, 18):
        spectrum = spectrum_of(1, 40)
        spectrum[0, channel, channel] = 1e6 + channel
        compare(ops.istft(spectrum, HANN, NO_LIMIT, backend=backend), spectrum)


@pytest.mark.parametrize("limit", [LIMIT, 1e-3, 1e-50, 2.0, math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_limit(backend: Any, limit: float) -> None:
    spectrum = spectrum_of(2, 3000, loudness=2.0)
    y = ops.istft(spectrum, HANN, limit, backend=backend)
    compare(y, spectrum, limit=limit)
    unlimited = ops.istft(spectrum, HANN, NO_LIMIT, backend=backend)
    assert torch.equal(y, unlimited.clamp(-limit, limit))


UGLY = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", UGLY)
@pytest.mark.parametrize("channel", [0, 4, 8, 9, 13, 17])
@pytest.mark.parametrize("frame", [0, 1, 5, 38, 39])
def test_nan_and_infinity_reach_what_they_reach_in_stock(
    frame: int, channel: int, bad: float, backend: Any
) -> None:
    spectrum = spectrum_of(2, 40)
    spectrum[1, frame, channel] = bad
    y, expected = ops.istft(spectrum, HANN, LIMIT, backend=backend), stock(spectrum)
    assert torch.equal(y.isnan(), expected.isnan())
    assert (y - expected)[~expected.isnan()].abs().max() < 1e-5
    assert expected.isnan().any() == (math.isnan(bad) or channel >= 9)


@given(
    sizes=some.tuples(some.integers(1, 3), some.integers(2, 700)),
    loudness=some.floats(-20, 8),
    width=some.floats(0, 1e5),
    dtype=some.sampled_from(FLOATING),
    backend=some.sampled_from(BACKENDS),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_any_shape(
    sizes: tuple[int, int], loudness: float, width: float, dtype: torch.dtype, backend: Any
) -> None:
    spectrum = spectrum_of(*sizes, loudness=loudness)
    spectrum[..., 9:] *= width
    spectrum = spectrum.clamp(-6e4, 6e4).to(dtype)
    compare(ops.istft(spectrum, HANN, NO_LIMIT, backend=backend), spectrum)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "frames"), [(0, 5), (0, 1), (1, 1), (3, 1)])
def test_nothing_to_make(rows: int, frames: int, backend: Any) -> None:
    y = ops.istft(torch.zeros(rows, frames, 18), HANN, LIMIT, backend=backend)
    assert y.shape == (rows, 4 * (frames - 1))
    assert y.dtype == torch.float32


def test_the_same_bits_by_any_number_of_threads_and_rows(threads: Any) -> None:
    spectrum = spectrum_of(3, 5003)
    results = []
    for count in (1, 2, 2, 1):
        threads(count)
        results.append(ops.istft(spectrum, HANN, LIMIT))
    assert all(torch.equal(y, results[0]) for y in results)
    alone = ops.istft(spectrum[1:2].clone(), HANN, LIMIT)
    assert torch.equal(alone[0], results[0][1])
    # The middle does not depend on where it lies: in another place of a task, and of a vector.
    later = ops.istft(spectrum[:1, 333:].contiguous(), HANN, LIMIT)
    assert torch.equal(later[0, 12:-12], results[0][0, 4 * 333 + 12 : -12])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spectrum": torch.zeros(5, 18)}, r"spectrum must be \(B, M, 18\), .*, got \[5, 18\]"),
        ({"spectrum": torch.zeros(1, 18, 5)}, r"spectrum must be \(B, M, 18\), .* \[1, 18, 5\]"),
        ({"spectrum": torch.zeros(1, 0, 18)}, r"spectrum must be .* M >= 1 .*, got \[1, 0, 18\]"),
        ({"spectrum": torch.zeros(1, 1, 18).expand(2**16, 2**15, 18)},
         r"spectrum must be .* B M at most 2147483647, got \[65536, 32768, 18\]"),
        ({"spectrum": torch.zeros(1, 5, 18).double()}, "spectrum must be float32, .*, got Double"),
        ({"spectrum": torch.zeros(1, 5, 18).int()}, "spectrum must be float32, .*, got Int"),
        ({"spectrum": torch.zeros(1, 18, 5).mT},
         r"spectrum must be contiguous, got strides \[90, 1, 5\]"),
        ({"window": torch.ones(15)}, r"window must be \(16,\), got \[15\]"),
        ({"window": torch.ones(1, 16)}, r"window must be \(16,\), got \[1, 16\]"),
        ({"window": torch.ones(16).double()}, "window must be Float, got Double"),
        ({"window": torch.ones(32)[::2]}, r"window must be contiguous, got strides \[2\]"),
        ({"limit": 0.0}, "limit must be > 0, got 0"),
        ({"limit": -1.0}, "limit must be > 0, got -1"),
        ({"limit": math.nan}, "limit must be > 0, got nan"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"spectrum": torch.zeros(1, 5, 18), "window": HANN, "limit": LIMIT, **change}
    op = torch.ops.chatterbox_fast.istft.default
    with pytest.raises(RuntimeError, match=f"chatterbox_fast::istft: {message}"):
        op(*arguments.values())


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("frames", [1, 9])
def test_opcheck(frames: int, dtype: torch.dtype) -> None:
    op = torch.ops.chatterbox_fast.istft.default
    torch.library.opcheck(op, (spectrum_of(2, frames).to(dtype), HANN, LIMIT))


def test_one_graph_for_every_length() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda spectrum: 2 * ops.istft(spectrum + 1, HANN, LIMIT), fullgraph=True, dynamic=True
    )
    for frames in (40, 41, 300):
        spectrum = spectrum_of(1, frames)
        expected = 2 * ops.istft(spectrum + 1, HANN, LIMIT)
        torch.testing.assert_close(compiled(spectrum), expected, rtol=0, atol=1e-6)


def test_nothing_is_read_on_the_host() -> None:
    """By the reference, which stands in for kernels under a CUDA graph; torch.istft looks."""
    spectrum = spectrum_of(1, 20)
    looking = "aten::equal"
    with Dispatched() as dispatched:
        reference.istft(spectrum, HANN, LIMIT)
    assert dispatched.looks() + dispatched.ops[looking] == 0
    with Dispatched() as dispatched:
        stock(spectrum)
    assert dispatched.ops[looking] == 1, "at its envelope"


def test_the_reference_is_stocks_in_float64() -> None:
    spectrum = spectrum_of(2, 300).double()
    y = ops.istft(spectrum, HANN.double(), LIMIT)
    assert y.dtype == torch.float64
    assert (y - stock(spectrum)).abs().max() < 1e-14


def test_a_gradient_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    spectrum = spectrum_of(1, 9).double().requires_grad_()
    window = HANN.double()
    assert torch.autograd.gradcheck(lambda x: ops.istft(x, window, 10.0), spectrum)
    asked: list[str] = []
    monkeypatch.setattr(ops, "istft_by", lambda b: asked.append(b) or reference.istft)
    for own in (spectrum_of(1, 9), spectrum_of(1, 9).requires_grad_()):
        ops.istft(own, HANN, LIMIT)
    with torch.no_grad():
        ops.istft(spectrum_of(1, 9).requires_grad_(), HANN, LIMIT)
    assert asked == ["extension", "reference", "extension"]


def test_which_implementation_runs() -> None:
    assert dispatch.choose("istft", CPU).backend == "extension"
    assert ops.istft_by("extension") is torch.ops.chatterbox_fast.istft.default
    assert ops.istft_by("reference") is reference.istft


@pytest.mark.parametrize("case", bench_istft.CASES)
def test_what_is_timed_is_stocks(case: str) -> None:
    job = bench_istft.Job(bench_istft.CASES[case], CPU)
    assert torch.equal(bench_istft.stock(job)(), stock(job.spectrum))
    for make in (bench_istft.convolution, bench_istft.extension, bench_istft.reference):
        bench_istft.verify(job, make(job))
        with pytest.raises(AssertionError):
            bench_istft.verify(job, lambda make=make: 1.0001 * make(job)())
