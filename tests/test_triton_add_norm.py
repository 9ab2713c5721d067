"""The Triton twin of add_norm: in Triton's interpreter against torch in float64, and compiled.

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
from test_add_norm import EPS, PAIRS, PARTS, SHAPES, Call, a_call, check, overflowed
from toolkit import interpreting_triton
from torch import Tensor

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def by_twin(call: Call) -> tuple[Tensor, Tensor | None]:
    """The result, and the residual after."""
    from chatterbox_fast.triton_kernels.add_norm import add_norm as twin

    return call.run(twin), call.residual


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Any]:
    """`by_twin` in a process where triton interprets."""
    with interpreting_triton() as pool:
        yield lambda call: pool.submit(by_twin, call.copy()).result()  # tensors are shared


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("parts", PARTS)
def test_it_is_torchs(interpreted: Any, parts: str, pair: Any) -> None:
    shapes = SHAPES if pair == PAIRS[0] else SHAPES[3:]
    for shape in shapes:
        call = a_call(shape, PARTS[parts], *pair)
        check(call, *interpreted(call))


def test_x_is_read_by_its_strides(interpreted: Any) -> None:
    wide = a_call((3, 12, 80)).x
    for x in (wide[:, :9], wide[1:, 3:, 4:68], wide.transpose(0, 1), wide[:1].expand(2, -1, -1)):
        call = a_call(x.shape)._replace(x=x)
        check(call, *interpreted(call))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mish", [False, True])
def test_nan_and_infinity_stay_in_their_row(interpreted: Any, bad: float, mish: bool) -> None:
    call = a_call((1, 6, 19), PARTS["all"]._replace(mish=mish))
    expected, _ = interpreted(call)
    call.x[0, 2, 5] = bad
    y, _ = interpreted(call)
    assert y[0, 2].isnan().all()
    y[0, 2] = expected[0, 2]
    assert torch.equal(y, expected)


def test_infinity_in_float16_is_its_largest_number(interpreted: Any) -> None:
    call, finite = overflowed(19)
    (y, residual), (expected, sums) = interpreted(call), interpreted(finite)
    assert torch.equal(y[:, :4], expected[:, :4])
    assert torch.equal(residual[:, :4], sums[:, :4])
    assert y[:, :4].isfinite().all()
    assert y[:, 4].isnan().all()


def test_a_large_result_is_float16s_largest_number(interpreted: Any) -> None:
    call = a_call((1, 2, 19), PARTS["norm"], dtype=torch.float16)
    call.weight[::3] = 1e6
    y, _ = interpreted(call)
    assert y.isfinite().all()
    assert (y[0, :, ::3].abs() == 65504).any()


ZEROS = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": ZEROS.double()}, "x must be float32, .*, got torch.float64"),
        ({"x": torch.zeros(3, 4)}, r"x must be \(R, T, C\), C at most 1024, got \(3, 4\)"),
        ({"x": torch.zeros(1, 1, 1025)}, r"x must be \(R, T, C\), C at most 1024, got \(1, 1, 10"),
        ({"x": torch.zeros(2, 4, 3).mT}, r"x must be channels last, got strides \(12, 1, 3\)"),
        ({"x": torch.zeros(2, 3, 4, device="meta")}, "weight must be on meta, got cpu"),
        ({"weight": torch.zeros(3)}, r"weight must be \(4,\), a number a channel, got \(3,\)"),
        ({"bias": torch.zeros(4).half()}, "bias must be torch.float32, got torch.float16"),
        ({"offset": torch.zeros(8)[::2]}, r"offset must be contiguous, got strides \(2,\)"),
        ({"shift": torch.zeros(1, 4)}, r"shift must be \(4,\), a number a channel, got \(1, 4\)"),
        ({"residual": ZEROS[:, :2]}, "residual must be contiguous, got strides"),
        ({"residual": torch.zeros(1, 3, 4)}, r"residual must be \(2, 3, 4\) as x is, got \(1, 3"),
        ({"x": ZEROS, "residual": ZEROS}, "residual must be in memory of its own, got x's"),
        ({"dtype": torch.float64}, "dtype must be float32, .*, got torch.float64"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    from chatterbox_fast.triton_kernels.add_norm import add_norm as twin

    arguments = {"x": torch.zeros(2, 3, 4), "weight": torch.zeros(4), "bias": torch.zeros(4)}
    with pytest.raises(RuntimeError, match=f"chatterbox_fast::add_norm: {message}"):
        twin(**{**arguments, **change}, eps=EPS)


@pytest.mark.parametrize("architecture", [89, 90])
@pytest.mark.parametrize("element", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mish", [False, True])
def test_it_compiles(architecture: int, element: str, mish: bool) -> None:
    """As the engine calls it; what is aligned is loaded 16 bytes at a time."""
    from chatterbox_fast.triton_kernels import add_norm as twin
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants: dict[str, Any] = {
        "MISH": mish,
        "TO_HALF": element == "fp16",
        "ROWS": 8,
        "CHANNELS": 256,
    }
    constants |= {"residual": None} if mish else {"offset": None, "shift": None}
    types = {"x": f"*{element}", "weight": "*fp32", "bias": "*fp32", "residual": "*fp32",
             "offset": "*fp32", "shift": "*fp32", "y": f"*{element}", "rows": "i32",
             "times": "i32", "row_stride": "i32", "time_stride": "i32", "channels": "i32",
             "eps": "fp32"} | dict.fromkeys(constants, "constexpr")  # fmt: skip
    tensors = [name for name, type in types.items() if type.startswith("*")]
    aligned = {(list(types).index(name),): [["tt.divisibility", 16]]
               for name in (*tensors, "row_stride", "time_stride", "channels")}  # fmt: skip
    source = ASTSource(twin.add_norm_kernel, types, constants, aligned)
    target = GPUTarget("cuda", architecture, 32)
    asm = compile(source, target=target, options=twin.LAUNCH).asm
    assert len(asm["cubin"]) > 0
    assert "ld.global.v4.b32" in asm["ptx"]
    assert "st.global.v4.b32" in asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("parts", PARTS)
def test_results_on_a_gpu(parts: str, pair: Any) -> None:
    for shape in SHAPES:
        call = a_call(shape, PARTS[parts], *pair)
        y, residual = by_twin(call.map(torch.Tensor.cuda))
        check(call, y.cpu(), None if residual is None else residual.cpu())
