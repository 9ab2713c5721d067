"""The Triton twin of padded_attention: in Triton's interpreter against float64, and compiled.

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
from test_padded_attention import (
    CASES,
    FLOATING,
    Call,
    check,
    far_below_zero,
    nan_stays_in_its_row_and_head,
    random_call,
)
from toolkit import interpreting_triton
from torch import Tensor

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def by_twin(call: Call) -> Tensor:
    from chatterbox_fast.triton_kernels.padded_attention import padded_attention as twin

    return call.by(twin)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Any]:
    """`by_twin` in a process where triton interprets."""
    with interpreting_triton() as pool:
        yield lambda call: pool.submit(by_twin, call).result()


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results(interpreted: Any, case: Any, dtype: torch.dtype) -> None:
    positions, lengths, heads = case
    check(random_call(positions, lengths, heads=heads, dtype=dtype), interpreted)


@pytest.mark.parametrize("dtype", FLOATING)
def test_stocks_size(interpreted: Any, dtype: torch.dtype) -> None:
    check(random_call(512, [500] * 2, heads=8, dtype=dtype), interpreted)


@pytest.mark.parametrize("spread", [30.0, 1000.0])
@pytest.mark.parametrize("dtype", FLOATING)
def test_scores_far_apart(interpreted: Any, dtype: torch.dtype, spread: float) -> None:
    check(random_call(150, [140, 70], dtype=dtype, spread=spread), interpreted)


@pytest.mark.parametrize("dtype", FLOATING)
def test_scores_far_below_zero(interpreted: Any, dtype: torch.dtype) -> None:
    check(far_below_zero(dtype), interpreted)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stays_in_its_row_and_head(interpreted: Any, bad: float, dtype: torch.dtype) -> None:
    nan_stays_in_its_row_and_head(bad, dtype, interpreted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 384)}, r"qkv must be \(R, T, 3 \* 2 \* 64\), got \(2, 384\)"),
        ({"qkv": torch.zeros(2, 6, 383)}, r"qkv must be \(R, T, 3 \* 2 \* 64\), got \(2, 6, 383\)"),
        ({"heads": 1}, r"qkv must be \(R, T, 3 \* 1 \* 64\), got \(2, 6, 384\)"),
        ({"heads": 0, "qkv": torch.zeros(2, 6, 0)}, "heads must be at least 1, got 0"),
        ({"qkv": torch.zeros(2, 6, 384).double()}, "qkv must be float32, .*, got"),
        ({"qkv": torch.zeros(6, 2, 384).transpose(0, 1)}, "qkv must be contiguous, got strides"),
        ({"qkv": torch.zeros(4609)[1:].view(2, 6, 384)}, "qkv must be aligned to 16 bytes, got"),
        ({"lengths": torch.zeros(2).long()}, "lengths must be torch.int32, got"),
        ({"lengths": torch.zeros(2).int().to("meta")}, "lengths must be on cpu, got meta"),
        ({"lengths": torch.zeros(4).int()[::2]}, r"lengths must be contiguous, got strides \(2,\)"),
        ({"lengths": torch.zeros(1).int()}, r"lengths must be \(2,\) as qkv has rows, got \(1,\)"),
        ({"lengths": torch.zeros(2, 1).int()}, r"lengths must be \(2,\) .*, got \(2, 1\)"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    from chatterbox_fast.triton_kernels.padded_attention import padded_attention as twin

    arguments = {"qkv": torch.zeros(2, 6, 384), "lengths": torch.zeros(2).int(), "heads": 2}
    with pytest.raises(RuntimeError, match=f"chatterbox_fast::padded_attention: {message}"):
        twin(**{**arguments, **change})


@pytest.mark.parametrize("architecture", [89, 90])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_it_compiles(architecture: int, dtype: str) -> None:
    """In half precision onto tensor cores, in float32 without TF32."""
    from chatterbox_fast.triton_kernels import padded_attention as twin
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = twin.padded_attention_kernel
    constants: dict[str, Any] = {"QUERIES": twin.QUERIES, "KEYS": twin.KEYS, "DIM": twin.DIM}
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= {"qkv": f"*{dtype}", "lengths": "*i32", "out": f"*{dtype}"}
    types |= dict.fromkeys(constants, "constexpr")
    target = GPUTarget("cuda", architecture, 32)
    asm = compile(ASTSource(kernel, types, constants), target=target, options=twin.LAUNCH).asm
    assert len(asm["cubin"]) > 0
    assert ("mma" in asm["ptx"]) == (dtype != "fp32")
    assert "tf32" not in asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATING)
def test_results_on_a_gpu(dtype: torch.dtype) -> None:
    for positions, lengths, heads in (*CASES, (1024, [1000] * 2, 8)):
        call = random_call(positions, lengths, heads=heads, dtype=dtype, device="cuda")
        check(call, by_twin)
