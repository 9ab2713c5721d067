"""The Triton twin of snake: in Triton's interpreter against float64, and compiled.

The interpreter is chosen by an environment variable when triton is imported. It therefore runs in
a process of its own, and the rest of the suite sees triton as it is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_snake import (
    FLOATING,
    SHAPES,
    SUMS,
    check_stocks,
    further,
    held,
    inverse_of,
    noise,
    offset_overflows,
    summed,
    trained,
)
from toolkit import interpreting_triton
from torch import Tensor

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def by_twin(*arguments: Any, **how: Any) -> Tensor:
    """Tensors are shared between processes: the residual is updated here as well."""
    from chatterbox_fast.triton_kernels.snake import snake as twin

    return twin(*arguments, **how)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Any]:
    """`by_twin` in a process where triton interprets."""
    with interpreting_triton() as pool:
        yield lambda *arguments: pool.submit(by_twin, *arguments).result()


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_stocks(interpreted: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, alpha = noise(shape, dtype), trained(shape[-1])
    y = interpreted(x, alpha, inverse_of(alpha))
    check_stocks(y, x, alpha)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("sums", SUMS)
def test_of_a_sum(interpreted: Any, sums: tuple[bool, bool], dtype: torch.dtype) -> None:
    """The same bits as of the sum in float32, which the residual has after, rounded."""
    for shape in SHAPES[-14:]:
        x, alpha = noise(shape, dtype), trained(shape[-1])
        residual = noise(shape, dtype, seed=1) if sums[0] else None
        offset = noise(shape[-1:], seed=2) if sums[1] else None
        own = None if residual is None else residual.clone()
        y = interpreted(x, alpha, inverse_of(alpha), own, offset)
        total = summed(x, residual, offset)
        assert torch.equal(y, held(interpreted(total, alpha, inverse_of(alpha)), dtype))
        assert own is None or torch.equal(own, held(total, dtype))


def test_nothing_becomes_infinite_in_float16(interpreted: Any) -> None:
    alpha, inverse = torch.full((19,), 0.7), torch.full((19,), 1e6)
    x, residual = (torch.full((4, 19), 6e4, dtype=torch.float16) for _ in range(2))
    x[1], x[2], residual[2] = float("inf"), -float("inf"), -6e4
    y = interpreted(x, alpha, inverse, residual)
    assert y.isfinite().all()
    assert residual[0, 0] == residual[1, 0] == -residual[2, 0] == 65504


def test_a_sum_with_an_offset_alone_is_held(interpreted: Any) -> None:
    call, expected = offset_overflows(19)
    torch.testing.assert_close(interpreted(*call), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_where_they_are(interpreted: Any, bad: float) -> None:
    x, alpha = noise((7, 20)), trained(20)
    expected = interpreted(x, alpha, inverse_of(alpha))
    x[3, 5] = bad
    y = interpreted(x, alpha, inverse_of(alpha))
    assert y[3, 5].isnan()
    y[3, 5] = expected[3, 5]
    assert torch.equal(y, expected)


ZEROS = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4).double()}, "x must be float32, .*, got"),
        ({"x": torch.zeros(())}, r"x must be \(\.\.\., C\), got \(\)"),
        ({"x": torch.zeros(4, 2).T}, r"x must be contiguous, got strides \(1, 2\)"),
        ({"x": torch.zeros(2, 4, device="meta")}, "alpha must be on meta, got cpu"),
        ({"alpha": torch.zeros(3)}, r"alpha must be \(4,\), a number a channel, got \(3,\)"),
        ({"alpha": torch.zeros(1, 4)}, r"alpha must be \(4,\), .* got \(1, 4\)"),
        ({"alpha": torch.zeros(4).half()}, "alpha must be torch.float32, got"),
        ({"inverse": torch.zeros(5)}, r"inverse must be \(4,\), .* got \(5,\)"),
        ({"inverse": torch.zeros(8)[::2]}, r"inverse must be contiguous, got strides \(2,\)"),
        ({"inverse": torch.zeros(4, device="meta")}, "inverse must be on cpu, got meta"),
        ({"offset": torch.zeros(5)}, r"offset must be \(4,\), .* got \(5,\)"),
        ({"residual": torch.zeros(2, 4).half()}, "residual must be torch.float32, got"),
        ({"residual": torch.zeros(2, 3)}, r"residual must be \(2, 4\) as x is, got \(2, 3\)"),
        ({"x": ZEROS, "residual": ZEROS}, "residual must be in memory of its own, got x's"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(2, 4), "alpha": torch.zeros(4), "inverse": torch.zeros(4)}
    with pytest.raises(RuntimeError, match=f"chatterbox_fast::snake: {message}"):
        by_twin(**{**arguments, **change})


@pytest.mark.parametrize("architecture", [89, 90])
@pytest.mark.parametrize("element", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("sums", [False, True])
def test_it_compiles(architecture: int, element: str, sums: bool) -> None:
    """With an accurate sine; what is aligned is loaded 16 bytes at a time."""
    from chatterbox_fast.triton_kernels import snake as twin
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants: dict[str, Any] = {"ROWS": 16, "CHANNELS": 64}
    constants |= {} if sums else {"residual": None, "offset": None}
    types = {"x": f"*{element}", "alpha": "*fp32", "inverse": "*fp32", "residual": f"*{element}",
             "offset": "*fp32", "y": f"*{element}", "rows": "i32",
             "channels": "i32"} | dict.fromkeys(constants, "constexpr")  # fmt: skip
    tensors = [name for name, type in types.items() if type.startswith("*")]
    aligned = {(list(types).index(name),): [["tt.divisibility", 16]]
               for name in (*tensors, "channels")}  # fmt: skip
    source = ASTSource(twin.snake_kernel, types, constants, aligned)
    target = GPUTarget("cuda", architecture, 32)
    asm = compile(source, target=target, options=twin.LAUNCH).asm
    assert len(asm["cubin"]) > 0
    assert "sin.approx" not in asm["ptx"]
    assert "ld.global.v4.b32" in asm["ptx"]
    assert "st.global.v4.b32" in asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATING)
def test_results_on_a_gpu(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x, alpha = noise(shape, dtype), trained(shape[-1])
        own = [t.cuda() for t in (x, alpha, inverse_of(alpha))]
        y = by_twin(*own)
        check_stocks(y.cpu(), x, alpha)
        assert torch.equal(by_twin(further(own[0], 1), *own[1:]), y)
