"""resample's CUDA source: run on the CPU thread by thread, and compiled by nvcc for GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_cuda import build
from test_resample import (
    FLOATING,
    METHODS,
    STOCK,
    WHOLE,
    Call,
    check_rates,
    noise,
    rates_call,
    whole_call,
)
from toolkit import ARCHS, KERNELS, compile_kernels
from torch import Tensor

DRIVER = build.HERE / "resample.cpp"
LARGE = {"rows": 1, "samples": 9000, "phases": 1, "taps": 12000, "stride": 40, "left": 6000}
"""More samples than shared memory holds."""


def by_kernel(call: Call, taps_first: bool = False, **run: Any) -> Tensor:
    """The result of the kernel; `taps_first`: a tap's phases are contiguous."""
    rows, samples = call.waveform.shape
    phases, taps = call.filters.shape
    filters = call.filters.t().contiguous().t() if taps_first else call.filters.contiguous()
    first = torch.zeros(0, taps) if call.first is None else call.first
    sizes = [rows, samples, phases, taps, len(first), call.stride, call.left, call.length,
             FLOATING.index(call.waveform.dtype), *filters.stride()]  # fmt: skip
    y = torch.full((rows, call.length), -99.0, dtype=call.waveform.dtype)
    arrays = [np.array(sizes, np.int64), bits_of(call.waveform).numpy()]
    arrays += [filters.t().numpy() if taps_first else filters.numpy()]
    arrays += [first.numpy(), bits_of(y).numpy()]
    assert build.run(DRIVER, arrays, **run) == build.Outcome()
    return y


def bits_of(tensor: Tensor) -> Tensor:
    """The same memory, of a type that numpy has."""
    return tensor.view(torch.int16) if tensor.element_size() == 2 else tensor


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("case", [*WHOLE, LARGE], ids=str)
def test_no_product_is_lost_and_none_counted_twice(
    case: dict[str, int], dtype: torch.dtype
) -> None:
    """Whole numbers are summed exactly."""
    call = whole_call(**case, dtype=dtype)  # type: ignore[arg-type]
    expected = call.oracle().to(dtype)
    assert torch.equal(by_kernel(call), expected)
    assert torch.equal(by_kernel(call, taps_first=True, order="shuffled", seed=2), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rates", STOCK, ids=str)
def test_stocks_rates(rates: tuple[int, int], method: str) -> None:
    call = rates_call(3001, rates, method)
    check_rates(by_kernel(call, taps_first=True), call.waveform, rates, method)


def test_the_same_bits_in_every_order_and_for_a_row_alone() -> None:
    waveform = noise(3, 3000)
    filters, first = noise(2, 290, seed=1), noise(5, 290, seed=2)
    call = Call(waveform, filters, first, 3, 145, 2000)
    y = by_kernel(call)
    for order in build.ORDERS:
        assert torch.equal(by_kernel(call, order=order, seed=3), y)
    for row in range(3):
        alone = call._replace(waveform=waveform[row : row + 1].clone())
        assert torch.equal(by_kernel(alone), y[row : row + 1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_as_far_as_a_filter(bad: float) -> None:
    call = whole_call(2, 200, 2, 24, 3, left=9)
    call.filters[call.filters == 0] = 1
    call.waveform[0, 100] = bad
    place = torch.arange(call.length) * 3 // 2 - 9
    meets = (place <= 100) & (place + 24 > 100)
    finite = by_kernel(call).isfinite()
    assert torch.equal(finite, torch.stack((~meets, torch.ones_like(meets))))


@pytest.mark.parametrize("order", build.ORDERS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_address_and_undefined_behaviour_sanitizers(dtype: torch.dtype, order: Any) -> None:
    """Each array ends where its last element does."""
    for case in [*WHOLE, LARGE]:
        call = whole_call(**case, dtype=dtype)  # type: ignore[arg-type]
        y = by_kernel(call, variant="asan", order=order, seed=3)
        assert torch.equal(y, call.oracle().to(dtype))


@pytest.mark.parametrize("case", [WHOLE[5], WHOLE[6]], ids=str)
def test_thread_sanitizer(case: dict[str, int]) -> None:
    call = whole_call(**case)
    y = by_kernel(call, variant="tsan", order="shuffled", seed=3)
    assert torch.equal(y, call.oracle().float())


# ---- nvcc


@pytest.mark.parametrize("arch", ARCHS)
def test_nvcc_compiles_it_without_a_warning(arch: str, tmp_path: Path) -> None:
    entries, _ = compile_kernels(KERNELS / "resample.cu", arch, tmp_path)
    assert len(entries) == 3 * 2, "staged or not"
    for entry in entries if arch in ("89", "90") else ():
        assert entry.shared == 0, "all of it is the launch's"
        assert entry.spilled == 0
        assert entry.registers <= 64, "four blocks a multiprocessor"
