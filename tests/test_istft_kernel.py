"""istft's CUDA source: run on the CPU thread by thread, and compiled by nvcc for GPUs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_cuda import build
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
from toolkit import ARCHS, KERNELS, compile_kernels
from torch import Tensor

DRIVER = build.HERE / "istft.cpp"
LENGTHS = (2, 3, 4, 5, 125, 126, 127, 128, 129, 251, 252)
"""Of frames: all have edges, some nothing else; around what one and two blocks make."""


def by_kernel(
    spectrum: Tensor, window: Tensor = HANN, limit: float = NO_LIMIT, **run: Any
) -> Tensor:
    rows, frames, _ = spectrum.shape
    y = torch.full((rows, 4 * (frames - 1)), -99.0)
    bits = spectrum.view(torch.int16) if spectrum.element_size() == 2 else spectrum
    arrays = [np.array([rows, frames, FLOATING.index(spectrum.dtype)], np.int64)]
    arrays += [np.array([limit], np.float32), bits.numpy(), window.numpy(), y.numpy()]
    assert build.run(DRIVER, arrays, **run) == build.Outcome()
    return y


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("frames", LENGTHS)
def test_it_is_stocks(frames: int, dtype: torch.dtype) -> None:
    spectrum = spectrum_of(rows_for(frames, 200), frames, seed=frames).to(dtype)
    compare(by_kernel(spectrum, order="shuffled", seed=1), spectrum)


@pytest.mark.parametrize("window", WINDOWS)
def test_any_window(window: str) -> None:
    spectrum = spectrum_of(2, 140)
    compare(by_kernel(spectrum, WINDOWS[window]), spectrum, WINDOWS[window])


@pytest.mark.parametrize("loudness", [-60.0, 4.7, 1e4])
@pytest.mark.parametrize("scale", [1e-4, 1e3, 1e20])
def test_far_angles_and_loud_magnitudes(loudness: float, scale: float) -> None:
    spectrum = spectrum_of(1, 60, loudness=loudness)
    spectrum[..., 9:] *= scale
    compare(by_kernel(spectrum), spectrum)


def test_the_limit() -> None:
    spectrum = spectrum_of(2, 140, loudness=2.0)
    compare(by_kernel(spectrum, limit=LIMIT), spectrum, limit=LIMIT)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channel", [0, 4, 8, 9, 13, 17])
@pytest.mark.parametrize("frame", [0, 1, 124, 125, 126, 139])
def test_nan_and_infinity_reach_what_they_reach_in_stock(
    frame: int, channel: int, bad: float
) -> None:
    spectrum = spectrum_of(2, 140)
    spectrum[1, frame, channel] = bad
    y, expected = by_kernel(spectrum, limit=LIMIT), stock(spectrum)
    assert torch.equal(y.isnan(), expected.isnan())
    assert (y - expected)[~expected.isnan()].abs().max() < 1e-5


@pytest.mark.parametrize(("rows", "frames"), [(0, 5), (1, 1)])
def test_nothing_to_make(rows: int, frames: int) -> None:
    assert by_kernel(torch.zeros(rows, frames, 18)).numel() == 0


def test_the_same_bits_in_every_order_and_for_a_row_alone() -> None:
    spectrum = spectrum_of(3, 300)
    y = by_kernel(spectrum)
    for order in build.ORDERS:
        assert torch.equal(by_kernel(spectrum, order=order, seed=3), y)
    for row in range(3):
        assert torch.equal(by_kernel(spectrum[row : row + 1].clone()), y[row : row + 1])


@pytest.mark.parametrize("order", build.ORDERS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_address_and_undefined_behaviour_sanitizers(dtype: torch.dtype, order: Any) -> None:
    """Each array ends where its last element does."""
    for frames in (2, 4, 126, 127, 200):
        spectrum = spectrum_of(rows_for(frames, 200), frames).to(dtype)
        compare(by_kernel(spectrum, variant="asan", order=order, seed=3), spectrum)


def test_thread_sanitizer() -> None:
    spectrum = spectrum_of(2, 130)
    compare(by_kernel(spectrum, variant="tsan", order="shuffled", seed=3), spectrum)


# ---- nvcc


@pytest.mark.parametrize("arch", ARCHS)
def test_nvcc_compiles_it_without_a_warning(arch: str, tmp_path: Path) -> None:
    entries, _ = compile_kernels(KERNELS / "istft.cu", arch, tmp_path)
    assert len(entries) == 3
    for entry in entries if arch in ("89", "90") else ():
        assert entry.shared == 4 * 18 * 136, "the columns"
        assert entry.spilled == 0
        assert entry.registers <= 64, "eight blocks a multiprocessor"
