"""decode_attention against stock's rotation, cache and SDPA, eager and compiled, and SDPA alone
over the valid prefix, at T3's shapes: pytest bench --benchmark-only

Every call reads another layer's cache than the one before, as a decode step does: on a CPU there
are layers enough that no cache holds them, on a GPU the L2 cache is overwritten.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timing import compare
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from chatterbox_fast import ops
from chatterbox_fast.reference import decode_attention as in_torch

HEADS, DIM = 16, 64
_SIZES = (
    *itertools.product((2, 32), (100, 250, 500, 1000), (torch.bfloat16, torch.float32)),
    *itertools.product((1,), (100, 1000), (torch.bfloat16,)),  # Turbo's one
    *itertools.product((2,), (100, 1000), (torch.float16,)),  # of GPUs without bfloat16
)
CASES = {
    f"{rows} row{'s' * (rows > 1)}, {positions} positions, {str(dtype).removeprefix('torch.')}": (
        rows, positions, dtype,
    )
    for rows, positions, dtype in _SIZES
}  # fmt: skip
_BEYOND_CACHES = 256 * 2**20


class Step:
    """The caches of some layers with `positions` slots valid, the last of which is about to be
    written, and the new token."""

    def __init__(self, rows: int, positions: int, dtype: torch.dtype, device: torch.device) -> None:
        source = torch.Generator().manual_seed(1)
        capacity = next(size for size in (256, 512, 1024) if size >= positions)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=source).to(device)

        self.bytes = 2 * rows * HEADS * positions * DIM * dtype.itemsize
        layers = 1 if device.type == "cuda" else -(-_BEYOND_CACHES // self.bytes)
        angles = draw(capacity, DIM // 2).repeat(1, 2)
        self.qkv, self.cos, self.sin = draw(rows, 3, HEADS, DIM), angles.cos(), angles.sin()
        shape = (layers, rows, HEADS, capacity, DIM)
        caches = (torch.empty(shape, dtype=dtype, device=device).normal_() for _ in "kv")
        self.k, self.v = caches
        self.positions = positions
        self.position = torch.tensor([positions - 1], device=device)
        self.flags = torch.zeros(1, dtype=torch.int32, device=device)
        self.arrivals = torch.zeros(rows * HEADS, dtype=torch.int32, device=device)

    def arguments(self, layer: int) -> list[Tensor]:
        return [self.qkv, self.k[layer], self.v[layer], self.position, self.flags, self.cos,
                self.sin]  # fmt: skip

    def rotated(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v ``(B, H, 1, D)`` by transformers."""
        q, k, v = self.qkv.to(dtype).unbind(1)
        at = self.positions - 1
        cos, sin = (table[None, at : at + 1].to(dtype) for table in (self.cos, self.sin))
        q, k = apply_rotary_pos_emb(q[:, :, None], k[:, :, None], cos, sin)
        return q, k, v[:, :, None]

    def stock(self, layer: int) -> Tensor:
        """As transformers' Llama with a DynamicCache: the cache is copied at every token."""
        q, k, v = self.rotated(self.k.dtype)
        before = self.positions - 1
        k = torch.cat([self.k[layer, :, :, :before], k], dim=2)
        v = torch.cat([self.v[layer, :, :, :before], v], dim=2)
        return F.scaled_dot_product_attention(q, k, v).flatten(1)

    def in_place(self, layer: int) -> Tensor:
        """The same without the copy, knowing the position on the host."""
        q, k, v = self.rotated(self.k.dtype)
        last = self.positions - 1
        self.k[layer, :, :, last], self.v[layer, :, :, last] = k[:, :, 0], v[:, :, 0]
        return self.attended(q, layer)

    def attended(self, q: Tensor, layer: int) -> Tensor:
        """SDPA over the valid prefix."""
        k, v = (cache[layer, :, :, : self.positions] for cache in (self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v).flatten(1)


def in_turn(step: Step, function: Callable[[int], Tensor]) -> Callable[[], Tensor]:
    layers = itertools.cycle(range(len(step.k)))
    return lambda: function(next(layers))


def stock(step: Step) -> Callable[[], Tensor]:
    return in_turn(step, step.stock)


def stock_compiled(step: Step) -> Callable[[], Tensor]:
    return in_turn(step, torch.compile(step.stock, dynamic=True))


def sdpa_in_place(step: Step) -> Callable[[], Tensor]:
    return in_turn(step, step.in_place)


def sdpa_of_prefix(step: Step) -> Callable[[], Tensor]:
    """SDPA alone: q is rotated, and k and v are in their slots, before."""
    q, k, v = step.rotated(step.k.dtype)
    for caches, new in ((step.k, k), (step.v, v)):
        caches[:, :, :, step.positions - 1] = new[:, :, 0]
    return in_turn(step, lambda i: step.attended(q, i))


def extension(step: Step) -> Callable[[], Tensor]:
    op = ops.decode_attention_by("extension")
    return in_turn(step, lambda i: op(*step.arguments(i), arrivals=step.arrivals))


def triton(step: Step) -> Callable[[], Tensor]:
    op = ops.decode_attention_by("triton")
    return in_turn(step, lambda i: op(*step.arguments(i)))


def reference(step: Step) -> Callable[[], Tensor]:
    return in_turn(step, lambda i: in_torch(*step.arguments(i)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "make",
    [stock, stock_compiled, sdpa_in_place, sdpa_of_prefix, extension, triton, reference],
)
def bench_decode_attention(benchmark: Any, device: torch.device, case: str, make: Any) -> None:
    compare(
        benchmark, device, "decode_attention", case, make, lambda on: Step(*CASES[case], on), verify
    )
    if device.type == "cpu":
        benchmark.extra_info["timing"] = "wall clock, KV caches not in a cache"


def verify(step: Step, call: Callable[[], Tensor]) -> None:
    """What is timed is right, to the precision of the coarsest: q in bfloat16."""
    for layer in range(min(2, len(step.k))):
        q, k, v = (x.double() for x in step.rotated(torch.float32))
        before = step.positions - 1
        k = torch.cat([step.k[layer, :, :, :before].double(), k], dim=2)
        v = torch.cat([step.v[layer, :, :, :before].double(), v], dim=2)
        expected = F.scaled_dot_product_attention(q, k, v).flatten(1)
        assert (call() - expected).abs().max() < 0.03 * expected.abs().max()
    assert not step.flags.any()
