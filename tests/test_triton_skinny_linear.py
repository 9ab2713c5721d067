"""The Triton twin of skinny_linear: in Triton's interpreter against float64, and compiled.

The interpreter is chosen by an environment variable when triton is imported. It therefore runs in
a process of its own, and the rest of the suite sees triton as it is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_skinny_linear import (
    FLOATING,
    T3,
    UGLY,
    WEIGHTS,
    Call,
    check_error,
    random_call,
    some_calls,
    whole_call,
)
from test_skinny_linear_fused import PARTS, Fused, on, random_fused, some_fused
from toolkit import interpreting_triton
from torch import Tensor

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def by_twin(call: Call | Fused) -> Tensor:
    from chatterbox_fast.triton_kernels.skinny_linear import skinny_linear

    return call.run(skinny_linear) if isinstance(call, Fused) else skinny_linear(*call)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Any]:
    """`by_twin` in a process where triton interprets."""
    with interpreting_triton() as pool:
        yield lambda call: pool.submit(by_twin, call).result()


@pytest.mark.parametrize("weight_dtype", WEIGHTS)
def test_a_decode_step(interpreted: Any, weight_dtype: torch.dtype) -> None:
    for shape in ((2, 1024, 66), (1, 4096, 18)):
        call = random_call(shape, torch.float32, weight_dtype)
        check_error([(call, interpreted(call))])


@pytest.mark.parametrize("weight_dtype", WEIGHTS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_no_product_is_lost(
    interpreted: Any, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    """Whole numbers are summed exactly, so the result is the reference's."""
    for inputs in (1, 7, 17, 256, 1000, 2049):
        for rows in (1, 2, 3, 8):
            call = whole_call((rows, inputs, 5), dtype, weight_dtype)
            assert torch.equal(interpreted(call), call.by_float()), (rows, inputs)


def test_results_are_rounded_to_the_nearest(interpreted: Any) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        call = random_call((8, 100, 40), dtype)
        check_error([(call, interpreted(call))])


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_norm_gate_and_residual(interpreted: Any, parts: tuple[bool, bool, bool]) -> None:
    for weight_dtype, dtype in zip(WEIGHTS, (*FLOATING, torch.float32), strict=True):
        for shape in ((2, 1024, 9), (3, 100, 17), (1, 1, 1)):
            calls = some_fused(shape, parts, dtype, weight_dtype)
            check_error([(call, interpreted(call)) for call in calls], Fused.by_float)


def test_a_nan_stays_in_its_row_of_x(interpreted: Any) -> None:
    fused = random_fused((3, 100, 5), (True, True, True))
    clean = interpreted(fused)
    fused.x[1, 99] = float("nan")
    y = interpreted(fused)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("shape", [(0, 16, 5), (2, 16, 0), (2, 0, 5)], ids=str)
def test_empty(interpreted: Any, shape: tuple[int, int, int]) -> None:
    y = interpreted(random_call(shape, torch.float32, torch.int8))
    assert torch.equal(y, torch.zeros(shape[0], shape[2]))
    fused = random_fused(shape, (True, True, True))
    assert torch.equal(interpreted(fused), fused.residual)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row(interpreted: Any, bad: float) -> None:
    call = random_call((3, 100, 5))
    clean = interpreted(call)
    call.x[1, 99], call.weight[2, 99] = bad, bad
    finite = torch.ones(3, 5, dtype=torch.bool)
    finite[1], finite[:, 2] = False, False
    y = interpreted(call)
    assert torch.equal(y.isfinite(), finite)
    assert torch.equal(y[finite], clean[finite])


INT8 = torch.zeros(4, 6, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(9, 6)}, r"x must be \(M, 6\) as weight has, M at most 8, got \(9, 6\)"),
        ({"x": torch.zeros(2, 5)}, r"x must be \(M, 6\) as weight has, .*, got \(2, 5\)"),
        ({"x": torch.zeros(6)}, r"x must be \(M, 6\) as weight has, .*, got \(6,\)"),
        ({"x": torch.zeros(2, 6).double()}, "x must be float32, float16 or bfloat16, got"),
        ({"x": torch.zeros(6, 2).T}, r"x must be contiguous, got strides \(1, 2\)"),
        ({"x": torch.zeros(2, 6, device="meta")}, "weight must be on meta, got cpu"),
        ({"weight": torch.zeros(4, 6).double()}, "weight must be float32, .* int8, got"),
        ({"weight": torch.zeros(6)}, r"weight must be \(N, K\), got \(6,\)"),
        ({"weight": torch.zeros(6, 4).T}, r"weight must be contiguous, got strides \(1, 4\)"),
        ({"weight": INT8}, "scale must be given for an int8 weight, got None"),
        ({"scale": torch.zeros(4)}, "scale must be None for a floating weight, got a tensor"),
        (
            {"weight": INT8, "scale": torch.zeros(4).double()},
            "scale must be torch.float32, got torch.float64",
        ),
        ({"weight": INT8, "scale": torch.zeros(5)}, r"scale must be \(4,\), got \(5,\)"),
        ({"weight": INT8, "scale": torch.zeros(8)[::2]}, "scale must be contiguous, got strides"),
        ({"weight": INT8, "scale": torch.zeros(4, device="meta")}, "scale must be on cpu, got"),
    ],
)
def test_arguments_are_checked(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(2, 6), "weight": torch.zeros(4, 6), "scale": None}
    with pytest.raises(RuntimeError, match=f"chatterbox_fast::skinny_linear: {message}"):
        by_twin(Call(**{**arguments, **change}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": torch.zeros(5)}, r"norm must be \(6,\), got \(5,\)"),
        ({"norm": torch.zeros(6).half()}, "norm must be torch.float32, got torch.float16"),
        ({"residual": torch.zeros(2, 5)}, r"residual must be \(2, 4\), got \(2, 5\)"),
        ({"residual": torch.zeros(4, 2).T}, "residual must be contiguous, got strides"),
        ({"weight": torch.zeros(3, 6), "gated": True}, r"weight must be \(2 N, K\), gate first"),
    ],
)
def test_what_is_fused_is_checked(change: dict[str, Any], message: str) -> None:
    from chatterbox_fast.triton_kernels.skinny_linear import skinny_linear

    arguments = {"x": torch.zeros(2, 6), "weight": torch.zeros(4, 6)}
    with pytest.raises(RuntimeError, match=f"chatterbox_fast::skinny_linear: {message}"):
        skinny_linear(**{**arguments, **change})


def kernel_and_options() -> tuple[Any, dict[str, int]]:
    from chatterbox_fast.triton_kernels import skinny_linear as twin

    return twin.skinny_linear_kernel, twin.LAUNCH


@pytest.mark.parametrize("architecture", [89, 90])
@pytest.mark.parametrize("weight", ["*fp32", "*bf16", "*i8"])
@pytest.mark.parametrize("gated", [False, True])
def test_it_compiles(architecture: int, weight: str, gated: bool) -> None:
    """As at a decode step; weights are loaded 16 bytes at a time."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, options = kernel_and_options()
    types = {"x": "*fp32", "weight": weight, "y": "*fp32", "eps": "fp32"}
    types |= dict.fromkeys(("rows", "inputs", "outputs"), "i32")
    constants: dict[str, Any] = {"ROWS": 2, "OUTPUTS": 4, "INPUTS": 1024, "GATED": gated}
    constants["residual" if gated else "norm"] = None  # as gate_up is called, and as down is
    types["norm" if gated else "residual"] = "*fp32"
    if weight == "*i8":
        types["scale"] = "*fp32"
    else:
        constants["scale"] = None
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in ("x", "weight", "y", "inputs")
    }
    signature = {name: types[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, aligned)
    asm = compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm
    assert len(asm["cubin"]) > 0
    assert "ld.global.v4.b32" in asm["ptx"]
    assert "ld.global.b16" not in asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("weight_dtype", WEIGHTS)
def test_norm_gate_and_residual_on_a_gpu(
    weight_dtype: torch.dtype, parts: tuple[bool, bool, bool]
) -> None:
    for dtype in FLOATING:
        calls = some_fused((2, 1024, 48), parts, dtype, weight_dtype)
        on_gpu = [by_twin(on(call, "cuda")).cpu() for call in calls]
        check_error(list(zip(calls, on_gpu, strict=True)), Fused.by_float)


@pytest.mark.gpu
@pytest.mark.parametrize("weight_dtype", WEIGHTS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_results_on_a_gpu(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    for shape in [*T3, *UGLY]:
        for rows in (1, 2, 3, 8):
            calls = some_calls((rows, *shape), dtype, weight_dtype, "cuda")
            check_error([(call, by_twin(call)) for call in calls])
