"""snake's CUDA source: run on the CPU thread by thread, and compiled by nvcc for GPUs."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_cuda import build
from test_snake import (
    FLOATING,
    SHAPES,
    SUMS,
    check_stocks,
    held,
    inverse_of,
    noise,
    offset_overflows,
    summed,
    ties,
    trained,
)
from toolkit import ARCHS, KERNELS, compile_kernels
from torch import Tensor

DRIVER = build.HERE / "snake.cpp"
FEW = ((2, 7, 65), (3, 9, 1), (1, 37, 64), (1, 2, 1032), (1, 3, 1025), (2, 3, 5, 24), (2, 0, 8))
"""Whole packs and single elements, one tile a row and several, a last block that is not full."""
ALIGNED = (0,) * 6
EACH = 2
"""Rows a thread, kSnakeEach."""


def by_kernel(
    x: Tensor, alpha: Tensor, inverse: Tensor, residual: Tensor | None = None,
    offset: Tensor | None = None, ahead: tuple[int, ...] = ALIGNED, **run: Any,
) -> Tensor:  # fmt: skip
    """The result of the kernel; the residual is updated.

    `ahead`: how many elements lie before x, alpha, inverse, y, residual and offset.
    """
    channels = x.shape[-1]
    rows = x.numel() // channels if channels else 0
    y = torch.full_like(x, -99.0)
    there = residual is not None, offset is not None
    arrays = [np.array([rows, channels, FLOATING.index(x.dtype), *ahead, *there], np.int64)]
    tensors = (x, alpha, inverse, y, x[:0] if residual is None else residual,
               alpha[:0] if offset is None else offset)  # fmt: skip
    arrays += [behind(t, by) for t, by in zip(tensors, ahead, strict=True)]
    assert build.run(DRIVER, arrays, **run) == build.Outcome()
    if residual is not None:
        residual.copy_(torch.from_numpy(arrays[5][ahead[4] :]).view(x.dtype).view_as(x))
    return torch.from_numpy(arrays[4][ahead[3] :]).view(x.dtype).view_as(x)


def behind(tensor: Tensor, by: int) -> np.ndarray:
    """The same elements, of a type that numpy has, behind `by` others; numpy aligns the first."""
    flat = tensor.flatten()
    bits = flat.view(torch.int16) if flat.element_size() == 2 else flat
    return np.concatenate([np.full(by, 7, bits.numpy().dtype), bits.numpy()])


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_stocks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, alpha = noise(shape, dtype), trained(shape[-1])
    y = by_kernel(x, alpha, inverse_of(alpha))
    check_stocks(y, x, alpha)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("sums", SUMS)
def test_of_a_sum(sums: tuple[bool, bool], dtype: torch.dtype) -> None:
    """The same bits as of the sum in float32, which the residual has after, rounded."""
    for shape in FEW:
        x, alpha = noise(shape, dtype), trained(shape[-1])
        residual = noise(shape, dtype, seed=1) if sums[0] else None
        offset = noise(shape[-1:], seed=2) if sums[1] else None
        own = None if residual is None else residual.clone()
        y = by_kernel(x, alpha, inverse_of(alpha), own, offset)
        total = summed(x, residual, offset)
        assert torch.equal(y, held(by_kernel(total, alpha, inverse_of(alpha)), dtype))
        assert own is None or torch.equal(own, held(total, dtype))


@pytest.mark.parametrize("channels", [19, 64])
def test_nothing_becomes_infinite_in_float16(channels: int) -> None:
    alpha, inverse = torch.full((channels,), 0.7), torch.full((channels,), 1e6)
    x, residual = (torch.full((5, channels), 6e4, dtype=torch.float16) for _ in range(2))
    x[1], x[2], residual[2], x[3, 3] = math.inf, -math.inf, -6e4, math.nan
    y = by_kernel(x, alpha, inverse, residual)
    for found in (y, residual):
        assert found[3, 3].isnan()
        found[3, 3] = 0
        assert found.isfinite().all()
    assert residual[0, 0] == residual[1, 0] == -residual[2, 0] == 65504


@pytest.mark.parametrize("channels", [19, 64])
def test_a_sum_with_an_offset_alone_is_held(channels: int) -> None:
    call, expected = offset_overflows(channels)
    torch.testing.assert_close(by_kernel(*call), expected)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(
    "ahead",
    [
        (1, 0, 0, 0, 0, 0),
        (0, 1, 0, 0, 0, 0),
        (0, 0, 3, 0, 0, 0),
        (0, 0, 0, 1, 0, 0),
        (4, 0, 0, 0, 0, 0),
        (0, 2, 0, 0, 0, 0),
        (0, 0, 0, 4, 0, 0),
        (0, 0, 0, 0, 1, 0),
        (0, 0, 0, 0, 4, 0),
        (0, 0, 0, 0, 0, 1),
    ],
    ids=str,
)
def test_any_pointer_may_be_misaligned(ahead: tuple[int, ...], dtype: torch.dtype) -> None:
    """With the same bits; UBSan sees a pack that is loaded from where none may be."""
    for shape in ((1, 37, 64), (1, 2, 1032)):
        x, alpha = noise(shape, dtype), trained(shape[-1])
        arguments = x, alpha, inverse_of(alpha)
        sums = [noise(shape, dtype, seed=1) for _ in range(2)]
        y = by_kernel(*arguments, sums[0], alpha, ahead=ahead, variant="asan")
        assert torch.equal(y, by_kernel(*arguments, sums[1], alpha))
        assert torch.equal(*sums)


def test_the_same_bits_in_every_order_and_for_a_row_alone() -> None:
    for shape in FEW[:-1]:
        x, alpha = noise(shape), trained(shape[-1])
        y = by_kernel(x, alpha, inverse_of(alpha))
        for order in build.ORDERS:
            assert torch.equal(by_kernel(x, alpha, inverse_of(alpha), order=order, seed=3), y)
        alone = by_kernel(x[..., -1, :].clone(), alpha, inverse_of(alpha))
        assert torch.equal(alone, y[..., -1, :])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float_and_rounded_once(dtype: torch.dtype) -> None:
    x, alpha = noise((2, 50, 65), dtype), trained(65)
    y = by_kernel(x, alpha, inverse_of(alpha))
    assert torch.equal(y, held(by_kernel(x.float(), alpha, inverse_of(alpha)), dtype))
    assert by_kernel(*ties(dtype)).tolist() == [[1, 1 + 2 * torch.finfo(dtype).eps]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_where_they_are(bad: float) -> None:
    x, alpha = noise((7, 20)), trained(20)
    expected = by_kernel(x, alpha, inverse_of(alpha))
    for place in range(0, x.numel(), 9):
        own = x.clone()
        own.flatten()[place] = bad
        y = by_kernel(own, alpha, inverse_of(alpha))
        assert y.flatten()[place].isnan()
        y.flatten()[place] = expected.flatten()[place]
        assert torch.equal(y, expected)


@pytest.mark.parametrize("order", build.ORDERS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_address_and_undefined_behaviour_sanitizers(dtype: torch.dtype, order: Any) -> None:
    """Each array ends where its last element does."""
    for shape in FEW:
        x, alpha = noise(shape, dtype), trained(shape[-1])
        for offset in (None, alpha):
            sums = [None if offset is None else noise(shape, dtype, seed=1) for _ in range(2)]
            call = x, alpha, inverse_of(alpha)
            y = by_kernel(*call, sums[0], offset, variant="asan", order=order, seed=3)
            assert torch.equal(y, by_kernel(*call, sums[1], offset))


@pytest.mark.parametrize("shape", FEW[:3], ids=str)
def test_thread_sanitizer(shape: tuple[int, ...]) -> None:
    x, alpha = noise(shape), trained(shape[-1])
    for offset in (None, alpha):
        sums = [None if offset is None else noise(shape, seed=1) for _ in range(2)]
        call = x, alpha, inverse_of(alpha)
        y = by_kernel(*call, sums[0], offset, variant="tsan", order="shuffled", seed=3)
        assert torch.equal(y, by_kernel(*call, sums[1], offset))
        assert offset is None or torch.equal(*sums)


# ---- nvcc


@pytest.mark.parametrize("arch", ARCHS)
def test_nvcc_compiles_it_without_a_warning(arch: str, tmp_path: Path) -> None:
    entries, ptx = compile_kernels(KERNELS / "snake.cu", arch, tmp_path)
    assert len(entries) == 3 * 2 * 2, "in packs or not, of a sum or not"
    assert "sin.approx" not in ptx, "which is of no use for large arguments"
    for kernel in (text for text in ptx.split(".entry ")[1:] if "Li1E" not in text):
        stores = re.findall(r"st\.global[\w.]*", kernel)
        sums = "Lb1E" in kernel.partition("(")[0]
        assert len(stores) == (1 + sums) * EACH, "of y and the residual"
        assert all(".v4." in each for each in stores), "16 bytes at a time"
        assert "st.global.u16" not in kernel
        assert len(re.findall(r"ld\.global\.v4", kernel)) >= EACH + 2, "of x, alpha and inverse"
    for entry in entries if arch in ("89", "90") else ():
        assert entry.shared == 0
        assert entry.spilled == 0
        halves_sum = "Lb1E" in entry.name and "kernelIf" not in entry.name
        most = 80 if halves_sum else 64
        assert entry.registers <= most, "four blocks a multiprocessor; of that three"
