"""skinny_linear against F.linear, eager and compiled, at T3's shapes: pytest bench --benchmark-only

Every call reads other weights than the one before, as a decode step does: on a CPU there are copies
enough that no cache holds them, on a GPU the L2 cache is overwritten.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timing import measure
from torch import Tensor

from chatterbox_fast import dispatch, ops
from chatterbox_fast.reference import skinny_linear as in_float32

ROWS = 2  # conditional and unconditional
LINEARS = {
    "qkv": (1024, 3072),
    "attention out": (1024, 1024),
    "gate and up": (1024, 8192),
    "down": (4096, 1024),
    "head": (1024, 8194),
    "head of Turbo": (1024, 6563),
}
CASES = {
    f"{name} {inputs}->{outputs}, {str(dtype).removeprefix('torch.')}": (inputs, outputs, dtype)
    for name, (inputs, outputs) in LINEARS.items()
    for dtype in (torch.bfloat16, torch.float32, torch.int8)
}
_BEYOND_CACHES = 256 * 2**20


class Linear:
    """Copies of one layer's weights, and two rows that are multiplied by each in turn."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device):
        source = torch.Generator().manual_seed(1)
        self.x = torch.randn(ROWS, inputs, generator=source).to(device)
        self.scale = None
        if dtype == torch.int8:
            weight = torch.randint(-127, 128, (outputs, inputs), generator=source, dtype=dtype)
            self.scale = torch.full((outputs,), 1 / 127 / inputs**0.5, device=device)
        else:
            weight = (torch.randn(outputs, inputs, generator=source) / inputs**0.5).to(dtype)
        self.bytes = weight.numel() * weight.element_size()
        copies = 1 if device.type == "cuda" else -(-_BEYOND_CACHES // self.bytes)
        self.weights = [weight.to(device, copy=True) for _ in range(copies)]

    def packed(self) -> list[Any]:
        """The copies as torch's dynamic int8 takes them."""
        assert self.scale is not None
        scale, zero = self.scale.double(), torch.zeros(len(self.scale), dtype=torch.long)
        quantised = (
            torch._make_per_channel_quantized_tensor(weight, scale, zero, 0)
            for weight in self.weights
        )
        return [torch.ops.quantized.linear_prepack(each, None) for each in quantised]


def in_turn(function: Callable[[Any], Tensor], weights: list[Any]) -> Callable[[], Tensor]:
    copies = itertools.cycle(weights)
    return lambda: function(next(copies))


def stock_of(linear: Linear) -> tuple[Callable[[Any], Tensor], list[Any]]:
    """F.linear in the weights' dtype. For int8 torch's dynamic int8 as its module calls it; where
    there is none, on CUDA, F.linear in bfloat16."""
    x, weights = linear.x, linear.weights
    if linear.scale is None:
        narrow = x.to(weights[0].dtype)
        return lambda weight: F.linear(narrow, weight).to(x.dtype), weights
    if x.is_cuda:
        narrow = x.bfloat16()
        wide = [(weight * linear.scale[:, None]).bfloat16() for weight in weights]
        return lambda weight: F.linear(narrow, weight).to(x.dtype), wide
    return lambda weight: torch.ops.quantized.linear_dynamic(x, weight, True), linear.packed()


def stock(linear: Linear) -> Callable[[], Tensor]:
    return in_turn(*stock_of(linear))


def stock_compiled(linear: Linear) -> Callable[[], Tensor]:
    function, weights = stock_of(linear)
    if not isinstance(weights[0], Tensor):
        pytest.skip("torch does not compile its dynamic int8")
    return in_turn(torch.compile(function, dynamic=False), weights)


def extension(linear: Linear) -> Callable[[], Tensor]:
    op = ops.skinny_linear_by("extension")
    return in_turn(lambda weight: op(linear.x, weight, linear.scale), linear.weights)


def triton(linear: Linear) -> Callable[[], Tensor]:
    op = ops.skinny_linear_by("triton")
    return in_turn(lambda weight: op(linear.x, weight, linear.scale), linear.weights)


def reference(linear: Linear) -> Callable[[], Tensor]:
    return in_turn(lambda weight: in_float32(linear.x, weight, linear.scale), linear.weights)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [stock, stock_compiled, extension, triton, reference])
def bench_skinny_linear(benchmark: Any, device: torch.device, case: str, make: Any) -> None:
    linear = Linear(*CASES[case], device)
    wanted = {"extension": "cuda", "triton": "triton"}.get(make.__name__)
    if wanted and dispatch.choose("skinny_linear", device, wanted).backend != make.__name__:
        pytest.skip(f"no {make.__name__} for {device.type} here")
    call = make(linear)
    verify(linear, call)
    benchmark.group = f"skinny_linear, {case}, {device.type}"
    benchmark.extra_info |= {"case": case, "implementation": make.__name__, "device": device.type}
    measure(benchmark, device, call, linear.bytes)
    if device.type == "cpu":
        benchmark.extra_info["timing"] = "wall clock, weights not in a cache"


def verify(linear: Linear, call: Callable[[], Tensor]) -> None:
    """What is timed is right, to the precision of the coarsest: 7 bits of x."""
    weight = linear.weights[0].double()
    expected = linear.x.double() @ weight.T
    if linear.scale is not None:
        expected *= linear.scale
    for _ in range(3):
        assert (call() - expected).abs().max() < 0.05 * expected.abs().max()
