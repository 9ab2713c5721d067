"""add_norm's CUDA source: run on the CPU thread by thread, and compiled by nvcc for GPUs."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_cuda import build
from test_add_norm import EPS, FLOATING, PAIRS, PARTS, SHAPES, Call, a_call, check, overflowed
from test_snake_kernel import behind
from toolkit import ARCHS, KERNELS, compile_kernels
from torch import Tensor

DRIVER = build.HERE / "add_norm.cpp"
FEW = ((2, 3, 256), (1, 5, 65), (1, 2, 1024), (1, 1, 1023), (3, 2, 1), (2, 1, 132), (2, 0, 8))
"""In packs and not, a last lane that has none, a last block that is not full."""
ALIGNED = (0,) * 7


def by_kernel(
    call: Call, ahead: tuple[int, ...] = ALIGNED, strides: tuple[int, int] | None = None, **run: Any
) -> Tensor:
    """The result of the kernel; the residual is updated.

    Args:
        ahead: how many elements lie before x, weight, bias, residual, offset, shift and y.
        strides: of a row and a time of x, which is then given as all that it is a part of.
    """
    shape = call.x.shape if call.residual is None else call.residual.shape
    dtype = call.dtype or call.x.dtype
    y = torch.full(shape, -99.0, dtype=dtype)
    optional = call.residual, call.offset, call.shift
    sizes = [
        *shape, *(strides or (shape[1] * shape[2], shape[2])),
        FLOATING.index(call.x.dtype), FLOATING.index(dtype),
        *(each is not None for each in optional), call.mish, *ahead,
    ]  # fmt: skip
    tensors = [torch.empty(0) if each is None else each for each in (*call[:6], y)]
    arrays = [np.array(sizes, np.int64)]
    arrays += [behind(t, by) for t, by in zip(tensors, ahead, strict=True)]
    arrays.append(np.array([EPS], np.float32))
    assert build.run(DRIVER, arrays, **run) == build.Outcome()
    if call.residual is not None:
        call.residual.copy_(torch.from_numpy(arrays[4][ahead[3] :]).view(shape))
    return torch.from_numpy(arrays[7][ahead[6] :]).view(dtype).view(shape)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("parts", PARTS)
def test_it_is_torchs(parts: str, pair: Any) -> None:
    for shape in SHAPES:
        call = a_call(shape, PARTS[parts], *pair)
        own = call.copy()
        check(call, by_kernel(own), own.residual)


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[4], PAIRS[6]], ids=str)
@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("by", [1, 2])
def test_any_pointer_may_be_misaligned(number: int, by: int, pair: Any) -> None:
    """With nearly the same bits: sums in another order. UBSan sees a pack loaded from where none
    may be.
    """
    call = a_call((1, 3, 64), PARTS["all"], *pair)
    ahead = tuple(by if i == number else 0 for i in range(7))
    own = call.copy()
    check(call, by_kernel(own, ahead, variant="asan"), own.residual)


@pytest.mark.parametrize("x_dtype", FLOATING)
def test_x_is_read_by_its_strides(x_dtype: torch.dtype) -> None:
    """Those that packs divide, and those that they do not."""
    for extra_rows, extra_channels in ((2, 0), (0, 4), (3, 5)):
        wide = a_call((2, 4 + extra_rows, 64 + extra_channels), x_dtype=x_dtype).x
        call = a_call((2, 4, 64), x_dtype=x_dtype)
        part = call._replace(x=wide[:, :4, :64])
        own = part.copy()._replace(x=wide)
        check(part, by_kernel(own, strides=wide.stride()[:2], variant="asan"), own.residual)


def test_the_same_bits_in_every_order_and_for_a_row_alone() -> None:
    for shape in FEW[:-1]:
        call = a_call(shape)
        y = by_kernel(call.copy())
        for order in build.ORDERS:
            assert torch.equal(by_kernel(call.copy(), order=order, seed=3), y)
        one = call._replace(x=call.x[-1:, -1:].clone(), residual=call.residual[-1:, -1:].clone())
        assert torch.equal(by_kernel(one)[0, 0], y[-1, -1])


@pytest.mark.parametrize("dtype", FLOATING[1:])
def test_half_precision_is_computed_in_float_and_rounded_once(dtype: torch.dtype) -> None:
    for shape in ((1, 20, 65), (1, 20, 64)):
        call = a_call(shape, x_dtype=dtype, dtype=torch.float32)
        expected = by_kernel(call.copy()._replace(x=call.x.float()))
        assert torch.equal(by_kernel(call.copy()), expected)
        assert torch.equal(by_kernel(call.copy()._replace(dtype=dtype)), expected.to(dtype))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mish", [False, True])
def test_nan_and_infinity_stay_in_their_row(bad: float, mish: bool) -> None:
    for channels in (19, 64):
        call = a_call((1, 6, channels), PARTS["all"]._replace(mish=mish))
        expected = by_kernel(call.copy())
        for name, place in itertools.product(("x", "residual"), (0, 7, channels - 1)):
            own = call.copy()
            getattr(own, name)[0, 2, place] = bad
            y = by_kernel(own)
            assert y[0, 2].isnan().all()
            y[0, 2] = expected[0, 2]
            assert torch.equal(y, expected)


def test_infinity_in_float16_is_its_largest_number() -> None:
    for channels in (19, 64):
        call, finite = overflowed(channels)
        y = by_kernel(call)
        assert torch.equal(y[:, :4], by_kernel(finite)[:, :4])
        assert y[:, :4].isfinite().all()
        assert y[:, 4].isnan().all()


@pytest.mark.parametrize("channels", [19, 64])
def test_a_large_result_is_float16s_largest_number(channels: int) -> None:
    call = a_call((1, 2, channels), PARTS["norm"], dtype=torch.float16)
    call.weight[::3] = 1e6
    y = by_kernel(call)
    assert y.isfinite().all()
    assert (y[0, :, ::3].abs() == 65504).any()


@pytest.mark.parametrize("order", build.ORDERS)
@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[4], PAIRS[8]], ids=str)
def test_address_and_undefined_behaviour_sanitizers(pair: Any, order: Any) -> None:
    """Each array ends where its last element does."""
    for shape, parts in itertools.product(FEW, ("norm", "all")):
        call = a_call(shape, PARTS[parts], *pair)
        y = by_kernel(call.copy(), variant="asan", order=order, seed=3)
        assert torch.equal(y, by_kernel(call.copy()))


@pytest.mark.parametrize("shape", FEW[:3], ids=str)
def test_thread_sanitizer(shape: tuple[int, int, int]) -> None:
    call = a_call(shape)
    y = by_kernel(call.copy(), variant="tsan", order="shuffled", seed=3)
    assert torch.equal(y, by_kernel(call.copy()))


# ---- nvcc


@pytest.mark.parametrize("arch", ARCHS)
def test_nvcc_compiles_it_without_a_warning(arch: str, tmp_path: Path) -> None:
    entries, ptx = compile_kernels(KERNELS / "add_norm.cu", arch, tmp_path)
    assert len(entries) == 9 * 2, "in packs or not"
    packed = [text for text in ptx.split(".entry ")[1:] if "Li4EEE" in text.partition("(")[0]]
    assert len(packed) == 9
    for kernel in packed:
        accesses = re.findall(r"(?:ld|st)\.global[\w.]*", kernel)
        assert [each for each in accesses if ".v4." not in each] == [], "a pack at a time"
        assert sum(each.startswith("st") for each in accesses) >= 2 * 8, "residual and result"
    for entry in entries if arch in ("89", "90") else ():
        assert entry.shared == 0
        assert entry.spilled == 0
        assert entry.registers <= 80, "six blocks of four rows a multiprocessor"
