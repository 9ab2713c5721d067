"""padded_attention's CUDA source: run on the CPU thread by thread, and compiled by nvcc."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_cuda import build
from test_padded_attention import (
    CASES,
    DIM,
    FLOATING,
    Call,
    check,
    far_below_zero,
    nan_stays_in_its_row_and_head,
    random_call,
)
from toolkit import ARCHS, KERNELS, compile_kernels
from torch import Tensor

DRIVER = build.HERE / "padded_attention.cpp"
PATHS = [(dtype, False) for dtype in FLOATING] + [(dtype, True) for dtype in FLOATING[1:]]
"""Types, and whether without the tensor cores, which float never has."""
on_every_path = pytest.mark.parametrize(("dtype", "plain"), PATHS, ids=str)


def by_kernel(plain: bool = False, **run: Any) -> Any:
    """A function that calls the kernel."""

    def run_it(call: Call) -> Tensor:
        rows, positions, _ = call.qkv.shape
        sizes = [rows, positions, call.heads, FLOATING.index(call.qkv.dtype), plain]
        out = torch.full((rows, positions, call.heads * DIM), -99.0, dtype=call.qkv.dtype)
        arrays = [np.array(sizes, np.int64), bits_of(call.qkv).numpy()]
        arrays += [call.lengths.numpy(), bits_of(out).numpy()]
        assert build.run(DRIVER, arrays, **run) == build.Outcome()
        return out

    return run_it


def bits_of(tensor: Tensor) -> Tensor:
    """The same memory, of a type that numpy has."""
    return tensor.view(torch.int16) if tensor.element_size() == 2 else tensor


@on_every_path
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results(case: Any, dtype: torch.dtype, plain: bool) -> None:
    positions, lengths, heads = case
    check(random_call(positions, lengths, heads=heads, dtype=dtype), by_kernel(plain))


@on_every_path
def test_stocks_length(dtype: torch.dtype, plain: bool) -> None:
    """Of fewer heads than stock's, each of which is some blocks of its own."""
    check(random_call(560, [500], dtype=dtype), by_kernel(plain))


def test_a_sum_over_thousands_of_keys_rounds_as_torchs() -> None:
    """In float32; in half precision the result is rounded by more than the sum."""
    check(random_call(3000, [3000], heads=1), by_kernel(plain=True))


@on_every_path
def test_every_length(dtype: torch.dtype, plain: bool) -> None:
    """Around what a tile of keys and of queries takes."""
    lengths = sorted({near + off for near in (0, 16, 32, 64, 96, 128) for off in (-1, 0, 1)})
    check(random_call(130, lengths, heads=1, dtype=dtype), by_kernel(plain))


@pytest.mark.parametrize("spread", [30.0, 1000.0])
@on_every_path
def test_scores_far_apart(dtype: torch.dtype, plain: bool, spread: float) -> None:
    check(random_call(150, [140, 70], dtype=dtype, spread=spread), by_kernel(plain))


@on_every_path
def test_scores_far_below_zero(dtype: torch.dtype, plain: bool) -> None:
    check(far_below_zero(dtype), by_kernel(plain))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@on_every_path
def test_nan_stays_in_its_row_and_head(dtype: torch.dtype, plain: bool, bad: float) -> None:
    nan_stays_in_its_row_and_head(bad, dtype, by_kernel(plain))


@on_every_path
def test_a_score_of_minus_infinity_has_no_weight(dtype: torch.dtype, plain: bool) -> None:
    """Also where a whole tile has no other."""
    call = random_call(140, [140], heads=1, dtype=dtype)
    parts = call.qkv.view(140, 3, DIM)
    parts[:, 0, 0] = 1.0
    parts[:70, 1, 0] = -math.inf
    out = by_kernel(plain)(call)
    assert out.isfinite().all()
    parts[:70, 1, 0] = torch.finfo(dtype).min  # has none either
    assert torch.equal(out, by_kernel(plain)(call))


@on_every_path
def test_the_same_bits_in_every_order_and_for_a_row_alone(dtype: torch.dtype, plain: bool) -> None:
    call = random_call(150, [150, 75], dtype=dtype)
    out = by_kernel(plain)(call)
    for order in build.ORDERS:
        assert torch.equal(by_kernel(plain, order=order, seed=3)(call), out)
    alone = Call(call.qkv[1:2].clone(), call.lengths[1:2].clone(), call.heads)
    assert torch.equal(by_kernel(plain)(alone), out[1:2])


# ---- sanitizers


@pytest.mark.parametrize("order", build.ORDERS)
@on_every_path
def test_address_and_undefined_behaviour_sanitizers(
    dtype: torch.dtype, plain: bool, order: Any
) -> None:
    """Each array ends where its last element does."""
    for positions, lengths, heads in ((70, [70, 33], 1), (5, [4, 0], 2)):
        call = random_call(positions, lengths, heads=heads, dtype=dtype)
        check(call, by_kernel(plain, variant="asan", order=order, seed=3))


@on_every_path
def test_thread_sanitizer(dtype: torch.dtype, plain: bool) -> None:
    call = random_call(100, [100, 20], heads=1, dtype=dtype)
    check(call, by_kernel(plain, variant="tsan", order="shuffled", seed=3))


# ---- nvcc


@pytest.mark.parametrize("arch", ARCHS)
def test_nvcc_compiles_it_without_a_warning(arch: str, tmp_path: Path) -> None:
    """Nothing is spilled; half precision is on tensor cores from sm_80 on, float never."""
    entries, ptx = compile_kernels(KERNELS / "padded_attention.cu", arch, tmp_path)
    assert len(entries) == len(FLOATING)
    bodies = ptx.split(".entry ")[1:]
    named = {body.partition("(")[0].strip(): body for body in bodies}
    for entry in entries:
        on_tensor_cores = arch != "75" and "kernelIf" not in entry.name
        kind = "bf16" if "bfloat16" in entry.name else "f16"
        products = re.findall(r"mma\.sync\.\S+", named[entry.name])
        assert set(products) <= {f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"}
        assert len(products) == (2 * 8 * 4 if on_tensor_cores else 0), "scores, values of a tile"
        assert entry.spilled == 0
        assert entry.shared == (2 * 64 * 72 * 2 if on_tensor_cores else 4 * (2 * 64 * 68 + 64 * 36))
        if arch in ("89", "90") and on_tensor_cores:
            assert entry.registers <= 168, "three blocks a multiprocessor"
        elif arch in ("89", "90"):  # shared memory has room for two of them on sm_89
            assert entry.registers <= (176 if arch == "89" else 128)
