"""The Triton twin of istft: in Triton's interpreter against stock in float64, and compiled.

The interpreter is chosen by an environment variable when triton is imported. It therefore runs in
a process of its own, and the rest of the suite sees triton as it is.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_istft import (
    FLOATING,
    HANN,
    LIMIT,
    NO_LIMIT,
    WINDOWS,
    compare,
    rows_for,
    spectrum_of,
    stock,
)
from toolkit import interpreting_triton
from torch import Tensor

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def by_twin(spectrum: Tensor, window: Tensor = HANN, limit: float = NO_LIMIT) -> Tensor:
    from chatterbox_fast.triton_kernels.istft import istft as twin

    return twin(spectrum, window, limit)


def default_dtypes() -> list[torch.dtype]:
    """What the twin returns where torch's default is bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        return [by_twin(torch.zeros(1, 3, 18, dtype=dtype)).dtype for dtype in FLOATING]
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Any]:
    """`by_twin` in a process where triton interprets."""
    with interpreting_triton() as pool:
        yield lambda *arguments: pool.submit(by_twin, *arguments).result()


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("frames", [2, 3, 4, 5, 32, 33, 34, 65, 100])
def test_it_is_stocks(interpreted: Any, frames: int, dtype: torch.dtype) -> None:
    spectrum = spectrum_of(rows_for(frames, 100), frames, seed=frames).to(dtype)
    compare(interpreted(spectrum), spectrum)


def test_it_is_float32_whatever_torchs_default_is() -> None:
    with interpreting_triton() as pool:
        assert set(pool.submit(default_dtypes).result()) == {torch.float32}


@pytest.mark.parametrize("window", WINDOWS)
def test_any_window(interpreted: Any, window: str) -> None:
    spectrum = spectrum_of(2, 50)
    compare(interpreted(spectrum, WINDOWS[window]), spectrum, WINDOWS[window])


@pytest.mark.parametrize("loudness", [-60.0, 4.7, 1e4])
@pytest.mark.parametrize("scale", [1e-4, 1e3, 1e20])
def test_far_angles_and_loud_magnitudes(interpreted: Any, loudness: float, scale: float) -> None:
    spectrum = spectrum_of(1, 60, loudness=loudness)
    spectrum[..., 9:] *= scale
    compare(interpreted(spectrum), spectrum)


def test_the_limit(interpreted: Any) -> None:
    spectrum = spectrum_of(2, 50, loudness=2.0)
    compare(interpreted(spectrum, HANN, LIMIT), spectrum, limit=LIMIT)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channel", [0, 4, 8, 9, 13, 17])
def test_nan_and_infinity_reach_what_they_reach_in_stock(
    interpreted: Any, channel: int, bad: float
) -> None:
    spectrum = spectrum_of(2, 40)
    spectrum[0, 0, channel] = spectrum[1, 20, channel] = bad
    y, expected = interpreted(spectrum, HANN, LIMIT), stock(spectrum)
    assert torch.equal(y.isnan(), expected.isnan())
    assert (y - expected)[~expected.isnan()].abs().max() < 1e-5


@pytest.mark.parametrize(("rows", "frames"), [(0, 5), (1, 1)])
def test_nothing_to_make(interpreted: Any, rows: int, frames: int) -> None:
    assert interpreted(torch.zeros(rows, frames, 18)).shape == (rows, 4 * (frames - 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spectrum": torch.zeros(5, 18)}, r"spectrum must be \(B, M, 18\), .*, got \(5, 18\)"),
        ({"spectrum": torch.zeros(1, 18, 5)}, r"spectrum must be \(B, M, 18\), .* \(1, 18, 5\)"),
        ({"spectrum": torch.zeros(1, 0, 18)}, r"spectrum must be .* M >= 1 .*, got \(1, 0, 18\)"),
        ({"spectrum": torch.zeros(1, 1, 18).expand(2**16, 2**15, 18)},
         r"spectrum must be .* B M at most 2147483647, got \(65536, 32768, 18\)"),
        ({"spectrum": torch.zeros(1, 5, 18).double()}, "spectrum must be float32, .*, got"),
        ({"spectrum": torch.zeros(1, 18, 5).mT},
         r"spectrum must be contiguous, got strides \(90, 1, 5\)"),
        ({"window": torch.ones(15)}, r"window must be \(16,\), got \(15,\)"),
        ({"window": torch.ones(16).double()}, "window must be torch.float32, got"),
        ({"window": torch.ones(32)[::2]}, r"window must be contiguous, got strides \(2,\)"),
        ({"window": torch.ones(16, device="meta")}, "window must be on cpu, got meta"),
        ({"limit": 0.0}, "limit must be > 0, got 0"),
        ({"limit": math.nan}, "limit must be > 0, got nan"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"spectrum": torch.zeros(1, 5, 18), "window": HANN, "limit": LIMIT, **change}
    with pytest.raises(RuntimeError, match=f"chatterbox_fast::istft: {message}"):
        by_twin(**arguments)


@pytest.mark.parametrize("architecture", [89, 90])
@pytest.mark.parametrize("spectrum", ["*fp32", "*fp16", "*bf16"])
def test_it_compiles(architecture: int, spectrum: str) -> None:
    from chatterbox_fast.triton_kernels import istft as twin
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = twin.istft_kernel
    constants: dict[str, Any] = {"HOPS": twin.HOPS, "CUDA": True}
    types = {"spectrum": spectrum, "window": "*fp32", "y": "*fp32", "frames": "i32",
             "limit": "fp32"} | dict.fromkeys(constants, "constexpr")  # fmt: skip
    target = GPUTarget("cuda", architecture, 32)
    asm = compile(ASTSource(kernel, types, constants), target=target, options=twin.LAUNCH).asm
    assert len(asm["cubin"]) > 0


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", FLOATING)
def test_results_on_a_gpu(dtype: torch.dtype, backend: Any) -> None:
    from chatterbox_fast import ops

    for frames in (2, 5, 126, 127, 3000):
        spectrum = spectrum_of(rows_for(frames), frames).to(dtype)
        y = ops.istft(spectrum.cuda(), HANN.cuda(), NO_LIMIT, backend=backend)
        compare(y.cpu(), spectrum)
