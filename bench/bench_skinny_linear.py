"""skinny_linear against transformers' layer around F.linear, eager and compiled, at T3's shapes and
with what T3 has it do before and after the product: pytest bench --benchmark-only

Every call reads other weights than the one before, as a decode step does: on a CPU there are copies
enough that no cache holds them, on a GPU the L2 cache is overwritten.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from timing import compare
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from chatterbox_fast import ops
from chatterbox_fast.reference import skinny_linear as in_float32

ROWS = 2  # conditional and unconditional
EPS = 1e-5


class Layer(NamedTuple):
    """A linear layer, and whether T3 normalises before, gates, and adds a residual."""

    inputs: int
    outputs: int
    norm: bool = False
    gated: bool = False
    residual: bool = False


LAYERS = {
    "norm, qkv": Layer(1024, 3072, norm=True),
    "attention out, residual": Layer(1024, 1024, residual=True),
    "norm, gate and up": Layer(1024, 4096, norm=True, gated=True),
    "down, residual": Layer(4096, 1024, residual=True),
    "norm, head": Layer(1024, 8194, norm=True),
    "head of Turbo": Layer(1024, 6563),
}
CASES = {
    f"{name} {layer.inputs}->{layer.outputs}, {str(dtype).removeprefix('torch.')}": (layer, dtype)
    for name, layer in LAYERS.items()
    for dtype in (torch.bfloat16, torch.float32, torch.int8)
}
_BEYOND_CACHES = 256 * 2**20


class Linear:
    """Copies of one layer's weights, and two rows that are multiplied by each in turn."""

    def __init__(self, layer: Layer, dtype: torch.dtype, device: torch.device):
        inputs, outputs = layer.inputs, layer.outputs * (1 + layer.gated)
        source = torch.Generator().manual_seed(1)
        self.layer = layer
        self.x = torch.randn(ROWS, inputs, generator=source).to(device)
        self.norm = torch.rand(inputs, generator=source).to(device) if layer.norm else None
        self.residual = None
        if layer.residual:
            self.residual = torch.randn(ROWS, outputs, generator=source).to(device)
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
    """Stock's modules, all in the weights' dtype. For int8 torch's dynamic int8 as its module calls
    it, in float32; where there is none, on CUDA, bfloat16."""
    weights: list[Any] = linear.weights
    dtype, product = weights[0].dtype, F.linear
    if linear.scale is not None and linear.x.is_cuda:
        dtype = torch.bfloat16
        weights = [(weight * linear.scale[:, None]).to(dtype) for weight in weights]
    elif linear.scale is not None:
        dtype, weights = torch.float32, linear.packed()

        def product(x: Tensor, weight: Any) -> Tensor:
            return torch.ops.quantized.linear_dynamic(x, weight, True)

    return around(linear, product, dtype), weights


def around(linear: Linear, product: Any, dtype: torch.dtype) -> Callable[[Any], Tensor]:
    """`product` with norm, gate and residual as transformers computes them in `dtype`."""
    x, layer, norm, residual = linear.x.to(dtype), linear.layer, None, None
    if linear.norm is not None:
        norm = LlamaRMSNorm(layer.inputs, EPS)
        norm.weight = torch.nn.Parameter(linear.norm.to(dtype), requires_grad=False)
    if linear.residual is not None:
        residual = linear.residual.to(dtype)

    def function(weight: Any) -> Tensor:
        y = product(x if norm is None else norm(x), weight)
        if layer.gated:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        return y if residual is None else residual + y

    return function


def stock(linear: Linear) -> Callable[[], Tensor]:
    return in_turn(*stock_of(linear))


def stock_compiled(linear: Linear) -> Callable[[], Tensor]:
    function, weights = stock_of(linear)
    if not isinstance(weights[0], Tensor):
        pytest.skip("torch does not compile its dynamic int8")
    return in_turn(torch.compile(function, dynamic=False), weights)


def ours(linear: Linear, op: Callable[..., Tensor]) -> Callable[[], Tensor]:
    more, named = (linear.norm, linear.residual), {"eps": EPS, "gated": linear.layer.gated}
    return in_turn(
        lambda weight: op(linear.x, weight, linear.scale, *more, **named), linear.weights
    )


def extension(linear: Linear) -> Callable[[], Tensor]:
    return ours(linear, ops.skinny_linear_by("extension"))


def triton(linear: Linear) -> Callable[[], Tensor]:
    return ours(linear, ops.skinny_linear_by("triton"))


def reference(linear: Linear) -> Callable[[], Tensor]:
    return ours(linear, in_float32)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [stock, stock_compiled, extension, triton, reference])
def bench_skinny_linear(benchmark: Any, device: torch.device, case: str, make: Any) -> None:
    compare(
        benchmark, device, "skinny_linear", case, make, lambda on: Linear(*CASES[case], on), verify
    )
    if device.type == "cpu":
        benchmark.extra_info["timing"] = "wall clock, weights not in a cache"


def verify(linear: Linear, call: Callable[[], Tensor]) -> None:
    """What is timed is right, to the precision of the coarsest: 7 bits of x."""
    weight = linear.weights[0].double()
    if linear.scale is not None:
        weight = weight * linear.scale.double()[:, None]
    expected = around(linear, F.linear, torch.float64)(weight)
    for _ in range(3):
        assert (call() - expected).abs().max() < 0.05 * expected.abs().max()
