"""What skinny_linear does before and after the product: RMSNorm, gate, residual. Against a float64
oracle, with the very transformers modules that are replaced as the measure."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from test_skinny_linear import (
    BACKENDS,
    FLOATING,
    WEIGHTS,
    Call,
    check_error,
    off_by_rounding,
    random_call,
)
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from chatterbox_fast import ops, reference

EPS = 1e-5
PARTS = tuple(itertools.product((False, True), repeat=3))[1:]
"""Whether there is a norm, a gate, a residual."""
SHAPES = ((2, 1024, 48), (1, 4096, 7), (3, 100, 17), (8, 33, 5), (1, 1, 1))


class Fused(NamedTuple):
    """The arguments of one call."""

    call: Call
    norm: Tensor | None
    residual: Tensor | None
    gated: bool

    @property
    def x(self) -> Tensor:
        return self.call.x

    def run(self, kernel: Any = None, **where: Any) -> Tensor:
        """By `kernel`, else by ops.skinny_linear."""
        kernel = kernel or ops.skinny_linear
        return kernel(*self.call, self.norm, self.residual, eps=EPS, gated=self.gated, **where)

    def oracle(self) -> Tensor:
        return self._after(self.exact().oracle())

    def exact(self) -> Call:
        """The product alone, of an x that is normalised in float64."""
        x = self.x.double()
        if self.norm is not None:
            x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * self.norm.double()
        return self.call._replace(x=x)

    def by_float(self) -> Tensor:
        """Stock's modules in float32, on the widened weights."""
        return self._after(self._normed().by_float()).to(self.x.dtype)

    def _normed(self) -> Call:
        x = self.x.float()
        if self.norm is not None:
            stock = LlamaRMSNorm(len(self.norm), EPS)
            stock.weight.data = self.norm
            x = stock(x).detach()
        return self.call._replace(x=x)

    def _after(self, y: Tensor) -> Tensor:
        if self.gated:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        return y if self.residual is None else self.residual.to(y.dtype) + y


def random_fused(
    shape: tuple[int, int, int],
    parts: tuple[bool, bool, bool],
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Fused:
    """`shape`: M, K, N. `parts`: norm, gated, residual."""
    rows, inputs, outputs = shape
    norm, gated, residual = parts
    source = torch.Generator().manual_seed(seed + 1)
    call = random_call((rows, inputs, (1 + gated) * outputs), dtype, weight_dtype, seed)
    return Fused(
        call._replace(x=call.x * 3),
        torch.rand(inputs, generator=source) + 0.5 if norm else None,
        torch.randn(rows, outputs, generator=source).to(dtype) if residual else None,
        gated,
    )  # fmt: skip


def some_fused(shape: tuple[int, int, int], *how: Any, outputs: int = 64) -> list[Fused]:
    """The largest error of a few outputs is luck: calls for `outputs` of them, or 65 calls."""
    calls = 1 + min(outputs // (shape[0] * shape[2]), 64)
    return [random_fused(shape, *how, seed=seed) for seed in range(calls)]


def check_rounded(fused: Fused, y: Tensor) -> None:
    """By the CPU op with int8 weights, whose rounding of x goes through the gate."""
    product, expected = fused.exact(), fused.oracle()
    assert product.scale is not None
    off = 1.01 * off_by_rounding(product.x, product.weight, product.scale)
    size = product.x.abs() @ product.weight.double().abs().T * product.scale
    off += 8 * torch.finfo(torch.float32).eps * size  # of float sums and the norm
    if fused.gated:  # the slope of silu is at most 1.1
        (_, off_up), (gate, up) = off.chunk(2, dim=-1), product.oracle().chunk(2, dim=-1)
        off = 1.1 * off.chunk(2, dim=-1)[0] * (up.abs() + off_up) + F.silu(gate).abs() * off_up
    off += 4 * torch.finfo(torch.float32).eps * fused._replace(residual=None).oracle().abs()
    kind = torch.finfo(y.dtype)
    off += kind.eps * expected.abs().clamp_min(kind.smallest_normal)
    assert y.dtype == fused.x.dtype
    assert ((y - expected).abs() <= off).all()


# ---- results


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("weight_dtype", WEIGHTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_part(
    backend: Any, weight_dtype: torch.dtype, parts: tuple[bool, bool, bool]
) -> None:
    for shape, dtype in itertools.product(SHAPES, FLOATING):
        calls = some_fused(shape, parts, dtype, weight_dtype, outputs=1024)
        results = [(call, call.run(backend=backend)) for call in calls]
        if weight_dtype != torch.int8 or backend != "cuda":
            check_error(results, Fused.by_float)
            continue
        for call, y in results:
            check_rounded(call, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_llama_mlp(backend: Any) -> None:
    """Norm, gated MLP and residual of transformers, in two calls."""
    config = LlamaConfig(hidden_size=64, intermediate_size=160, mlp_bias=False)
    torch.manual_seed(0)
    mlp, norm = LlamaMLP(config), LlamaRMSNorm(64, EPS)
    norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(2, 64)
    with torch.no_grad():
        expected = x + mlp(norm(x))
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        hidden = ops.skinny_linear(
            x, gate_up, norm=norm.weight, eps=EPS, gated=True, backend=backend
        )
        y = ops.skinny_linear(hidden, mlp.down_proj.weight, residual=x, backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_and_the_size_of_x(backend: Any) -> None:
    weight, norm = torch.eye(4), torch.tensor([1.0, 2, 3, 4])
    x = torch.tensor([[0.0, 0, 0, 0], [2, 2, 2, 2], [1e-3, 0, 0, 0]])
    y = ops.skinny_linear(x, weight, norm=norm, eps=1.0, backend=backend)
    expected = torch.stack([0 * norm, norm * 2 / math.sqrt(5), norm * x[2]])
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)
    assert ops.skinny_linear(x, weight, norm=norm, backend=backend)[0].isnan().all()  # 0 / 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gate_far_from_0(backend: Any) -> None:
    gate = torch.tensor([[-1e30], [-200.0], [-87.0], [-1.0], [0.0], [1.0], [200.0], [1e30]])
    weight = torch.tensor([[1.0], [0.0]])
    both = torch.cat([gate, torch.ones(8, 1)], dim=1)
    y = ops.skinny_linear(both, torch.eye(2), gated=True, backend=backend)
    torch.testing.assert_close(y, F.silu(gate), rtol=1e-6, atol=1e-36)
    assert (ops.skinny_linear(gate, weight, gated=True, backend=backend) == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("weight_dtype", WEIGHTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_stay_in_their_row(
    backend: Any, weight_dtype: torch.dtype, bad: float
) -> None:
    fused = random_fused((3, 100, 5), (True, True, True), torch.float32, weight_dtype)
    clean = fused.run(backend=backend)
    fused.x[1, 16] = bad
    y = fused.run(backend=backend)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("weight_dtype", WEIGHTS)
def test_a_row_does_not_depend_on_the_others(weight_dtype: torch.dtype) -> None:
    fused = random_fused((8, 100, 33), (True, True, True), torch.float32, weight_dtype)
    y = fused.run()
    for row in range(8):
        own = slice(row, row + 1)
        assert fused.residual is not None
        alone = fused._replace(
            call=fused.call._replace(x=fused.x[own]), residual=fused.residual[own]
        )
        assert torch.equal(alone.run(), y[own])


@pytest.mark.parametrize("shape", [(0, 16, 5), (2, 16, 0), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: Any, shape: tuple[int, int, int]) -> None:
    """Without inputs there is nothing to normalise."""
    fused = random_fused(shape, (True, True, True))
    assert fused.residual is not None
    assert torch.equal(fused.run(backend=backend), fused.residual)


@pytest.mark.parametrize("name", ["x", "weight", "norm", "residual"])
def test_a_gradient_is_the_references(name: str) -> None:
    """The kernels have none, and must not drop it silently."""
    fused = random_fused((2, 32, 5), (True, True, True))
    assert fused.norm is not None
    assert fused.residual is not None
    given = {"x": fused.x, "weight": fused.call.weight, "norm": fused.norm}
    given |= {"residual": fused.residual}
    gradients = []
    for function in (ops.skinny_linear, reference.skinny_linear):
        leaf = given[name].clone().requires_grad_()
        function(**{**given, name: leaf}, eps=EPS, gated=True).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0
    leaf = given[name].clone().requires_grad_()
    with torch.no_grad():
        own = ops.skinny_linear(**{**given, name: leaf}, eps=EPS, gated=True)
    assert torch.equal(own, fused.run())


def test_arguments_are_not_written_to() -> None:
    for weight_dtype in WEIGHTS:
        fused = random_fused((2, 64, 5), (True, True, True), torch.float32, weight_dtype)
        assert fused.norm is not None
        assert fused.residual is not None
        before = [tensor.clone() for tensor in (fused.x, fused.norm, fused.residual)]
        fused.run()
        after = (fused.x, fused.norm, fused.residual)
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


# ---- arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": torch.zeros(5)}, r"norm must be \(6,\), got \[5\]"),
        ({"norm": torch.zeros(1, 6)}, r"norm must be \(6,\), got \[1, 6\]"),
        ({"norm": torch.zeros(6).half()}, "norm must be Float, got Half"),
        ({"norm": torch.zeros(12)[::2]}, r"norm must be contiguous, got strides \[2\]"),
        ({"residual": torch.zeros(2, 5)}, r"residual must be \(2, 4\), got \[2, 5\]"),
        ({"residual": torch.zeros(4)}, r"residual must be \(2, 4\), got \[4\]"),
        ({"residual": torch.zeros(2, 4).half()}, "residual must be Float, got Half"),
        ({"residual": torch.zeros(4, 2).T}, r"residual must be contiguous, got strides \[1, 2\]"),
        (
            {"residual": torch.zeros(2, 4), "gated": True},
            r"residual must be \(2, 2\), got \[2, 4\]",
        ),
        (
            {"weight": torch.zeros(3, 6), "gated": True},
            r"weight must be \(2 N, K\), gate first, where gated, got \[3, 6\]",
        ),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(2, 6), "weight": torch.zeros(4, 6)}
    with pytest.raises(RuntimeError, match=f"chatterbox_fast::skinny_linear: {message}"):
        torch.ops.chatterbox_fast.skinny_linear(**{**arguments, **change})


# ---- the op as torch sees it


@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated: bool) -> None:
    fused = random_fused((2, 33, 5), (True, gated, True), torch.bfloat16, torch.int8)
    arguments = (*fused.call, fused.norm, fused.residual)
    named = {"eps": EPS, "gated": gated}
    torch.library.opcheck(torch.ops.chatterbox_fast.skinny_linear.default, arguments, named)


def test_compiles_as_one_graph() -> None:
    fused = random_fused((2, 64, 5), (True, True, True), torch.float32, torch.bfloat16)

    def function(x: Tensor) -> Tensor:
        return fused._replace(call=fused.call._replace(x=x + 1)).run(
            torch.ops.chatterbox_fast.skinny_linear
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(fused.x), function(fused.x))


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("weight_dtype", WEIGHTS)
def test_every_part_on_a_gpu(weight_dtype: torch.dtype, parts: tuple[bool, bool, bool]) -> None:
    for shape, dtype in itertools.product(SHAPES, FLOATING):
        calls = some_fused(shape, parts, dtype, weight_dtype, outputs=1024)
        on_gpu = [on(call, "cuda").run(backend="cuda").cpu() for call in calls]
        check_error(list(zip(calls, on_gpu, strict=True)), Fused.by_float)


def on(fused: Fused, device: str) -> Fused:
    """`fused` on a device."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    x, weight, scale = map(moved, fused.call)
    assert x is not None
    assert weight is not None
    return Fused(Call(x, weight, scale), moved(fused.norm), moved(fused.residual), fused.gated)


def test_the_reference_is_the_formula_of_the_modules() -> None:
    """In float64, where the kernels do not run."""
    fused = random_fused((2, 50, 7), (True, True, True))
    assert fused.norm is not None
    assert fused.residual is not None
    y = reference.skinny_linear(
        fused.x.double(), fused.call.weight.double(), None, fused.norm, fused.residual.double(),
        eps=EPS, gated=True,
    )  # fmt: skip
    torch.testing.assert_close(y, fused.oracle(), rtol=1e-12, atol=1e-12)
