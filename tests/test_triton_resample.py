"""The Triton twin of resample: in Triton's interpreter against float64, and compiled.

The interpreter is chosen by an environment variable when triton is imported. It therefore runs in
a process of its own, and the rest of the suite sees triton as it is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_resample import FLOATING, METHODS, STOCK, WHOLE, Call, check_rates, rates_call, whole_call
from toolkit import interpreting_triton
from torch import Tensor

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def by_twin(call: Call) -> Tensor:
    from chatterbox_fast.triton_kernels.resample import resample as twin

    return call.by(twin)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Any]:
    """`by_twin` in a process where triton interprets."""
    with interpreting_triton() as pool:
        yield lambda call: pool.submit(by_twin, call).result()


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_no_product_is_lost(interpreted: Any, case: dict[str, int], dtype: torch.dtype) -> None:
    """Whole numbers are summed exactly."""
    call = whole_call(**case, dtype=dtype)  # type: ignore[arg-type]
    expected = call.oracle().to(dtype)
    assert torch.equal(interpreted(call), expected)
    turned = call._replace(filters=call.filters.t().contiguous().t())
    assert torch.equal(interpreted(turned), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rates", STOCK, ids=str)
def test_stocks_rates(interpreted: Any, rates: tuple[int, int], method: str) -> None:
    call = rates_call(701, rates, method)
    check_rates(interpreted(call), call.waveform, rates, method)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_as_far_as_a_filter(interpreted: Any, bad: float) -> None:
    call = whole_call(2, 200, 2, 24, 3, left=9)
    call.filters[call.filters == 0] = 1
    call.waveform[0, 100] = bad
    place = torch.arange(call.length) * 3 // 2 - 9
    meets = (place <= 100) & (place + 24 > 100)
    finite = interpreted(call).isfinite()
    assert torch.equal(finite, torch.stack((~meets, torch.ones_like(meets))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"waveform": torch.zeros(6)}, r"waveform must be \(R, T\), got \(6,\)"),
        ({"waveform": torch.zeros(2, 6).double()}, "waveform must be float32, .*, got"),
        ({"waveform": torch.zeros(6, 2).T}, r"waveform must be contiguous, got strides \(1, 2\)"),
        ({"waveform": torch.zeros(2, 6, device="meta")}, "filters must be on meta, got cpu"),
        ({"filters": torch.zeros(2, 4).double()}, "filters must be torch.float32, got"),
        ({"filters": torch.zeros(4)}, r"filters must be \(P, K\), .*got \(4,\)"),
        ({"filters": torch.zeros(2, 0)}, r"filters must be \(P, K\), .*got \(2, 0\)"),
        ({"filters": torch.zeros(1025, 1024)}, r"filters must be .* got \(1025, 1024\)"),
        ({"first": torch.zeros(1, 5)}, r"first must be \(F, 4\) as filters has, got \(1, 5\)"),
        ({"first": torch.zeros(1, 4).double()}, "first must be torch.float32, got"),
        ({"first": torch.zeros(4, 2).T}, r"first must be contiguous, got strides \(1, 2\)"),
        ({"first": torch.zeros(1, 4, device="meta")}, "first must be on cpu, got meta"),
        ({"stride": 0}, r"stride must be in \[1, 1048576\], got 0"),
        ({"left": 4}, r"left must be in \[0, 4\), before the last tap, got 4"),
        ({"length": -1}, r"length must be in \[0, \d+\], got -1"),
        (
            {"waveform": torch.zeros(2**25, 0), "length": 2**13 + 1},
            r"waveform must be of at most 33038209 rows for 8193 outputs, got \(33554432, 0\)",
        ),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    from chatterbox_fast.triton_kernels.resample import resample as twin

    arguments = {"waveform": torch.zeros(2, 6), "filters": torch.zeros(2, 4), "first": None,
                 "stride": 3, "left": 1, "length": 4}  # fmt: skip
    with pytest.raises(RuntimeError, match=f"chatterbox_fast::resample: {message}"):
        twin(**{**arguments, **change})


@pytest.mark.parametrize("architecture", [89, 90])
@pytest.mark.parametrize("with_first", [False, True])
def test_it_compiles(architecture: int, with_first: bool) -> None:
    from chatterbox_fast.triton_kernels import resample as twin
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = twin.resample_kernel
    constants: dict[str, Any] = {"OUTPUTS": twin.OUTPUTS, "TAPS": twin.TAPS}
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= {"waveform": "*bf16", "filters": "*fp32", "first": "*fp32", "y": "*bf16"}
    if not with_first:
        constants["first"] = None
    types |= dict.fromkeys(constants, "constexpr")
    target = GPUTarget("cuda", architecture, 32)
    asm = compile(ASTSource(kernel, types, constants), target=target, options=twin.LAUNCH).asm
    assert len(asm["cubin"]) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATING)
def test_results_on_a_gpu(dtype: torch.dtype) -> None:
    for case in WHOLE:
        call = whole_call(**case, dtype=dtype)  # type: ignore[arg-type]
        tensors = [None if t is None else t.cuda() for t in call[:3]]
        y = by_twin(Call(*tensors, *call[3:]))  # type: ignore[arg-type]
        assert torch.equal(y.cpu(), call.oracle().to(dtype))
