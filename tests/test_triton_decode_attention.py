"""The Triton twin of decode_attention: in Triton's interpreter against float64, and compiled.

The interpreter is chosen by an environment variable when triton is imported. It therefore runs in
a process of its own, and the rest of the suite sees triton as it is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from test_decode_attention import (
    BAD,
    DIM,
    FLOATING,
    LONG_CAPACITIES,
    Call,
    arguments,
    check,
    check_seeds,
    random_call,
)
from toolkit import interpreting_triton
from torch import Tensor

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def by_twin(call: Call, splits: int = 0) -> Tensor:
    from chatterbox_fast.triton_kernels.decode_attention import decode_attention

    return decode_attention(*call.arguments, splits=splits)


def changed_by_twin(call: Call, splits: int) -> tuple[Call, Tensor]:
    """In another process, so that what was written to has to come back."""
    return call, by_twin(call, splits)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Any]:
    """Makes a function like `by_twin`, in a process where triton interprets, for `splits`."""
    with interpreting_triton() as pool:

        def with_splits(splits: int) -> Any:
            def run(call: Call) -> Tensor:
                after, out = pool.submit(changed_by_twin, call, splits).result()
                for field in fields(Call):
                    if (own := getattr(call, field.name)) is not None:
                        own.copy_(getattr(after, field.name))
                return out

            return run

        yield with_splits


def representable(call: Call) -> Call:
    """k and v are what a cache of bfloat16 can hold: the interpreter would truncate others."""
    call.qkv[:, 1:] = call.qkv[:, 1:].bfloat16().to(call.qkv.dtype)
    return call


@pytest.mark.parametrize(("position", "splits"), [(0, 16), (63, 16), (249, 4), (999, 16), (999, 1)])
def test_a_decode_step(interpreted: Any, position: int, splits: int) -> None:
    call = random_call(1024, [position], rows=2, heads=2)
    check(call, interpreted(splits))


@pytest.mark.parametrize("capacity", LONG_CAPACITIES)
def test_a_long_prefix(interpreted: Any, capacity: int) -> None:
    call = random_call(capacity, [capacity - 1], rows=1, watched=[(0, 1)])
    check(call, interpreted(17))


@pytest.mark.parametrize("cache_dtype", FLOATING)
@pytest.mark.parametrize("dtype", FLOATING)
def test_rows_at_positions_of_their_own(
    interpreted: Any, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    rope = cache_dtype != torch.bfloat16
    for capacity, positions in ((1, [0]), (300, [299, 0, 1, 33, 128, 127, 200])):

        def make(seed: int, capacity: int = capacity, positions: list[int] = positions) -> Call:
            call = random_call(
                capacity, positions, dtype=dtype, cache_dtype=cache_dtype, rope=rope, seed=seed
            )
            return call if rope else representable(call)

        check_seeds(make, interpreted(3), seeds=4)


@pytest.mark.parametrize("outside", [20, -1, 2**40])
def test_a_position_outside_is_flagged(interpreted: Any, outside: int) -> None:
    watched = [(0, 1), (1, 0), (2, 1)]
    every = random_call(20, [outside], rows=3, watched=watched)
    one = random_call(20, [4, outside, 19], watched=watched)
    for call in (every, one):
        call.flags[:] = 4  # of others: kept
        check(call, interpreted(2))


@pytest.mark.parametrize("splits", [1, 4])
def test_watched_rows_and_heads(interpreted: Any, splits: int) -> None:
    watched = [(2, 1), (0, 3), (0, 0), (2, 1), (1, 2)]
    for positions in ([0, 76, 299], [130]):

        def make(seed: int, positions: list[int] = positions) -> Call:
            return random_call(300, positions, rows=3, heads=4, watched=watched, seed=seed)

        check_seeds(make, interpreted(splits), seeds=4)


def test_caches_that_are_views(interpreted: Any) -> None:
    call = random_call(12, [11], rows=2, heads=3)
    slots = torch.randn(2, 3, 20, DIM)[:, :, :12]
    turned = torch.randn(3, 2, 16, DIM).transpose(0, 1)[:, :, :12]
    check(replace(call, k_cache=slots, v_cache=turned), interpreted(2))


def test_what_lies_behind_the_position_is_not_read(interpreted: Any) -> None:
    call = random_call(200, [70, 0, 198], watched=[(0, 0), (1, 1)])
    for row, slot in enumerate(call.slots()):
        call.k_cache[row, :, slot + 1 :] = float("nan")
        call.v_cache[row, :, slot + 1 :] = float("nan")
    check(call, interpreted(3))


def test_scores_far_apart(interpreted: Any) -> None:
    check(random_call(500, [499, 250], spread=1000.0, watched=[(0, 0)]), interpreted(8))


@pytest.mark.parametrize(("rows", "heads"), [(0, 2), (2, 0)])
def test_empty(interpreted: Any, rows: int, heads: int) -> None:
    call = random_call(5, [3], rows=rows, heads=heads)
    assert interpreted(1)(call).shape == (rows, heads * DIM)


@pytest.mark.parametrize(("changed", "message"), BAD)
def test_arguments_are_checked(changed: dict[str, Any], message: str) -> None:
    """With the messages of the compiled op, but for how Python shows a shape."""
    message = message.replace(".65, 3", r"\(65, 3")
    with pytest.raises(RuntimeError, match=f"chatterbox_fast::decode_attention: {message}"):
        by_twin(Call(*arguments(**changed)))


def test_a_split_count_is_checked() -> None:
    with pytest.raises(RuntimeError, match=r"splits must be in \[0, 64\], got 65"):
        by_twin(Call(*arguments()), splits=65)


TYPES = {
    "qkv": "*fp32",
    "position": "*i64",
    "flags": "*i32",
    "cos": "*fp32",
    "sin": "*fp32",
    "watched": "*i32",
    "probabilities": "*fp32",
    "partials": "*fp32",
    "out": "*fp32",
    **dict.fromkeys(("k_row", "k_head", "v_row", "v_head"), "i64"),
    **dict.fromkeys(("heads", "capacity", "watched_count", "splits"), "i32"),
}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("architecture", "cache"), [(89, "*bf16"), (90, "*bf16"), (89, "*fp32")])
def test_it_compiles(architecture: int, cache: str, whole: bool) -> None:
    """With and without what is optional; caches are loaded 16 bytes at a time."""
    from chatterbox_fast.triton_kernels import decode_attention as twin
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    optional = ("watched", "probabilities", "cos", "sin")
    none = {} if whole else dict.fromkeys(optional)
    types = TYPES | {"k_cache": cache, "v_cache": cache}
    for kernel in (twin.attention_part_kernel, twin.attention_whole_kernel):
        constants: dict[str, Any] = {"SHARED": whole, "DIM": 64, "SLOTS": 64, "PARTS": 16, **none}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        signature = {
            name: "constexpr" if name in constants else types[name] for name in kernel.arg_names
        }
        aligned = {
            (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
            for name in ("qkv", "k_cache", "v_cache", "k_row", "k_head", "v_row", "v_head", "out")
            if name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constants, aligned)
        target = GPUTarget("cuda", architecture, 32)
        asm = compile(source, target=target, options=twin.LAUNCH).asm
        assert len(asm["cubin"]) > 0
        if kernel is twin.attention_part_kernel:
            assert "ld.global.v4.b32" in asm["ptx"]
            assert "ld.global.b16" not in asm["ptx"]
            assert "fma.rn.f32" not in asm["ptx"], "torch rounds the rotation's products first"


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", FLOATING)
@pytest.mark.parametrize("dtype", FLOATING)
def test_results_on_a_gpu(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    for rows, position in ((2, 0), (2, 1), (2, 250), (2, 1023), (2, 1024), (32, 1000)):
        call = random_call(
            1024, [position], rows=rows, heads=16, dtype=dtype, cache_dtype=cache_dtype,
            watched=[(0, 3), (1, 9)], device="cuda",
        )  # fmt: skip
        check(call, by_twin)
