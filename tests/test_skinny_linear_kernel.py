"""skinny_linear's CUDA source: run on the CPU thread by thread, and compiled by nvcc for GPUs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_cuda import build
from test_skinny_linear import FLOATING, T3, WEIGHTS, Call, check_error, random_call, whole_call
from test_skinny_linear_fused import EPS, PARTS, Fused, random_fused, some_fused
from toolkit import ARCHS, compile_kernels
from torch import Tensor

DRIVER = build.HERE / "skinny_linear.cpp"
DTYPES = {dtype: number for number, dtype in enumerate(WEIGHTS)}
VECTOR = {dtype: 16 // dtype.itemsize for dtype in WEIGHTS}
"""Weights that one load takes."""


def by_kernel(call: Call | Fused, offset: int = 0, norm_offset: int = 0, **run: Any) -> Tensor:
    """The result of the kernel; x and weight lie `offset` elements past an aligned address."""
    fused = call if isinstance(call, Fused) else Fused(call, None, None, False)
    (x, weight, scale), norm, residual, gated = fused
    shape = (len(x), len(weight) // (1 + gated))
    sizes = [len(x), x.shape[1], shape[1], DTYPES[x.dtype], DTYPES[weight.dtype], offset]
    sizes += [norm is not None, residual is not None, gated, norm_offset]
    y = torch.full(shape, -99.0, dtype=x.dtype)
    arrays = [np.array(sizes, np.int64)]
    arrays += [aligned(tensor, offset) for tensor in (x, weight)]
    arrays += [numpy_of(scale), bits_of(y).numpy()]
    arrays += [numpy_of(None) if norm is None else aligned(norm, norm_offset), numpy_of(residual)]
    arrays += [np.array([EPS], np.float32)]
    assert build.run(DRIVER, arrays, **run) == build.Outcome()
    return y


def numpy_of(tensor: Tensor | None) -> np.ndarray:
    """The same memory; nothing where there is no tensor."""
    return np.zeros(0, np.float32) if tensor is None else bits_of(tensor).numpy()


def bits_of(tensor: Tensor) -> Tensor:
    """The same memory, of a type that numpy has."""
    return tensor.view(torch.int16) if tensor.element_size() == 2 else tensor


def aligned(tensor: Tensor, offset: int) -> np.ndarray:
    """A flat copy behind `offset` elements, the first of which lies at a multiple of 16 bytes."""
    flat = bits_of(tensor).flatten().numpy()
    room = np.empty(offset + flat.size + 16, flat.dtype)
    skip = -room.ctypes.data % 16 // flat.itemsize
    whole = room[skip : skip + offset + flat.size]
    whole[offset:] = flat
    return whole


@pytest.mark.parametrize("weight_dtype", WEIGHTS)
@pytest.mark.parametrize("shape", T3, ids=str)
def test_a_decode_step(shape: tuple[int, int], weight_dtype: torch.dtype) -> None:
    call = random_call((2, *shape), torch.float32, weight_dtype)
    check_error([(call, by_kernel(call, order="shuffled"))])


@pytest.mark.parametrize("weight_dtype", WEIGHTS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_no_product_is_lost_and_none_counted_twice(
    dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    """Whole numbers are summed exactly: vectors and single elements, whole groups and what is over.

    A group is four vectors of each of 32 lanes, or two; what is over at most the rest of that.
    """
    vector = VECTOR[weight_dtype]
    vectors = (1, 31, 32, 33, 64, 65, 97, 128, 129, 200, 257)
    for inputs in [*(n * vector for n in vectors), 1, 7, 17, 127, 131, 1003]:
        for rows in (1, 2, 3, 8):
            call = whole_call((rows, inputs, 5), dtype, weight_dtype)
            expected = call.oracle().to(dtype)
            assert torch.equal(by_kernel(call), expected), (rows, inputs)
            assert torch.equal(by_kernel(call, offset=1), expected), (rows, inputs)


@pytest.mark.parametrize("outputs", [1, 2, 7, 8, 9, 15, 17])
@pytest.mark.parametrize("rows", range(1, 9))
def test_rows_and_outputs_that_fill_no_block(rows: int, outputs: int) -> None:
    call = whole_call((rows, 64, outputs), torch.float32, torch.bfloat16)
    assert torch.equal(by_kernel(call), call.oracle().float())


@pytest.mark.parametrize("shape", [(0, 16, 5), (2, 16, 0), (2, 0, 5)], ids=str)
def test_empty(shape: tuple[int, int, int]) -> None:
    y = by_kernel(random_call(shape))
    assert torch.equal(y, torch.zeros(shape[0], shape[2]))
    fused = random_fused(shape, (True, True, True))
    assert fused.residual is not None
    assert torch.equal(by_kernel(fused), fused.residual)


@pytest.mark.parametrize("weight_dtype", WEIGHTS)
@pytest.mark.parametrize("inputs", [1024, 1003])
def test_the_same_bits_in_every_order(inputs: int, weight_dtype: torch.dtype) -> None:
    """And for a row of x alone."""
    call = random_call((3, inputs, 9), torch.float32, weight_dtype)
    first = by_kernel(call)
    for order in build.ORDERS:
        assert torch.equal(by_kernel(call, order=order, seed=3), first)
    for row in range(3):
        alone = call._replace(x=call.x[row : row + 1])
        assert torch.equal(by_kernel(alone), first[row : row + 1])


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("weight_dtype", WEIGHTS)
def test_norm_gate_and_residual(weight_dtype: torch.dtype, parts: tuple[bool, bool, bool]) -> None:
    for shape, dtype in zip(((2, 1024, 9), (3, 100, 17), (8, 33, 5)), FLOATING, strict=True):
        calls = some_fused(shape, parts, dtype, weight_dtype)
        check_error([(call, by_kernel(call, order="shuffled")) for call in calls], Fused.by_float)


def test_every_dtype_has_norm_gate_and_residual() -> None:
    for dtype in FLOATING:
        for weight_dtype in WEIGHTS:
            calls = some_fused((2, 64, 9), (True, True, True), dtype, weight_dtype)
            check_error([(call, by_kernel(call)) for call in calls], Fused.by_float)


def test_a_nan_stays_in_its_row_of_x() -> None:
    fused = random_fused((3, 64, 5), (True, True, True))
    clean = by_kernel(fused)
    fused.x[1, 5] = float("nan")
    y = by_kernel(fused)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight_dtype", WEIGHTS)
def test_nan_and_infinity_stay_in_their_row(bad: float, weight_dtype: torch.dtype) -> None:
    for inputs in (64, 63):
        call = random_call((3, inputs, 5), torch.float32, weight_dtype)
        clean = by_kernel(call)
        call.x[1, 5] = bad
        finite = torch.ones(3, 5, dtype=torch.bool)
        finite[1] = False
        if weight_dtype != torch.int8:
            call.weight[2, 60] = bad
            finite[:, 2] = False
        y = by_kernel(call)
        assert torch.equal(y.isfinite(), finite)
        assert torch.equal(y[finite], clean[finite])


SMALL = ((1, 1024, 3), (2, 1003, 9), (3, 96, 1), (8, 528, 5))


PAIRS = [
    *((torch.float32, weight_dtype) for weight_dtype in WEIGHTS),
    *((dtype, torch.bfloat16) for dtype in (torch.float16, torch.bfloat16)),
]
"""Every dtype of weight, and every one of x."""


@pytest.mark.parametrize("order", build.ORDERS)
@pytest.mark.parametrize(("dtype", "weight_dtype"), PAIRS, ids=str)
def test_address_and_undefined_behaviour_sanitizers(
    dtype: torch.dtype, weight_dtype: torch.dtype, order: Any
) -> None:
    """Each array ends where its last element does."""
    for shape in SMALL:
        call = whole_call(shape, dtype, weight_dtype)
        y = by_kernel(call, variant="asan", order=order, seed=3)
        assert torch.equal(y, call.oracle().to(dtype))


FEW = [(True, False, False), (False, True, True), (True, True, True)]
"""Each of norm, gate and residual with and without the others."""


@pytest.mark.parametrize("parts", FEW, ids=str)
@pytest.mark.parametrize(("dtype", "weight_dtype"), PAIRS, ids=str)
def test_sanitizers_of_norm_gate_and_residual(
    dtype: torch.dtype, weight_dtype: torch.dtype, parts: tuple[bool, bool, bool]
) -> None:
    for shape in SMALL:
        fused = random_fused(shape, parts, dtype, weight_dtype)
        y = by_kernel(fused, variant="asan", order="shuffled", seed=3)
        assert torch.equal(y, by_kernel(fused))


@pytest.mark.parametrize("offsets", [(1, 0), (0, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("parts", [(False, False, False), *FEW], ids=str)
@pytest.mark.parametrize("weight_dtype", WEIGHTS)
def test_undefined_behaviour_sanitizer_of_odd_addresses(
    weight_dtype: torch.dtype, parts: tuple[bool, bool, bool], offsets: tuple[int, int]
) -> None:
    """A vector read there would be misaligned."""
    if offsets[1] and not parts[0]:
        pytest.skip("no norm to lie there")
    fused = random_fused((2, 1024, 3), parts, torch.float32, weight_dtype)
    y = by_kernel(fused, *offsets, variant="asan")
    assert torch.equal(y, by_kernel(fused, *offsets))
    # Six outputs are too few to compare one error with another: so do several seeds.
    more = (random_fused((2, 1024, 3), parts, torch.float32, weight_dtype, s) for s in range(1, 9))
    check_error([(fused, y), *((f, by_kernel(f, *offsets)) for f in more)], Fused.by_float)


@pytest.mark.parametrize("parts", [(False, False, False), (True, True, True)], ids=str)
@pytest.mark.parametrize("weight_dtype", WEIGHTS)
def test_thread_sanitizer(weight_dtype: torch.dtype, parts: tuple[bool, bool, bool]) -> None:
    fused = random_fused((2, 512, 9), parts, torch.float32, weight_dtype)
    y = by_kernel(fused, variant="tsan", order="shuffled", seed=3)
    assert torch.equal(y, by_kernel(fused))


# ---- nvcc

NAMES = dict(zip(WEIGHTS, ("float", "rt::half", "rt::bfloat16", "int8_t"), strict=True))
DECODE = re.compile(r"kernelILi[12]ELi[48]Ef(f|13__nv_bfloat16)E")
"""Of T3: one or two rows of float, vectors of float or bfloat16 weights."""


def some_instances(source: Path) -> Path:
    """Writes a skinny_linear.cu with half of the pairs of dtypes, for nvcc's time."""
    lines = ['#include "skinny_linear.cuh"', "using namespace chatterbox_fast;"]
    lines += [
        "template rt::Error chatterbox_fast::launch_skinny_linear("
        f"const SkinnyLinearArgs<{NAMES[dtype]}, {NAMES[weight_dtype]}>&, rt::Stream);"
        for dtype, weight_dtype in PAIRS
    ]
    source.write_text("\n".join(lines))
    return source


@pytest.mark.parametrize("arch", ARCHS)
def test_nvcc_compiles_it_without_a_warning(arch: str, tmp_path: Path) -> None:
    """Registers and spills are bounded. A decode step's loads are of 16 bytes, of weights eight
    before the loop and eight in it."""
    bounded = arch in ("89", "90")
    entries, ptx = compile_kernels(some_instances(tmp_path / "some.cu"), arch, tmp_path)
    assert len(entries) == len(PAIRS) * 5, "1, 2, 4 or 8 rows; single elements"
    if not bounded:
        return
    assert sum(1 for entry in entries if DECODE.search(entry.name)) == 4
    for entry in entries:
        assert entry.shared == 0
        assert entry.registers <= 192, "room for 8 warps a multiprocessor, two blocks"
        assert entry.spilled <= (0 if DECODE.search(entry.name) else 32)
    for body in ptx.split(".entry ")[1:]:
        if DECODE.match(body.partition("linear_")[2]):
            loads = re.findall(r"ld\.global\S*", body)
            single = [load for load in loads if ".v4." not in load]
            assert single == 2 * ["ld.global.f32"], "a scale and a residual"
            assert len(loads) - sum(load.endswith("f32") for load in loads) in (0, 18), (
                "of bfloat16"
            )
