"""add_norm: every implementation against torch's modules in float64, with their own error in
float32 as the measure; and against the very block of stock that it stands for."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from chatterbox.models.s3gen.decoder import CausalBlock1D
from hypothesis import given, settings
from hypothesis import strategies as some
from test_snake import further, spacing
from torch import Tensor, nn

from chatterbox_fast import dispatch, ops, reference

CPU = torch.device("cpu")
FLOATING = (torch.float32, torch.float16, torch.bfloat16)
PAIRS = tuple(itertools.product(FLOATING, FLOATING))
"""Dtypes of x and of the result."""
BACKENDS = ("cuda", "reference")
"""As options name them: "cuda" is the extension, on a CPU its CPU op."""
SHAPES = (
    (2, 300, 256), (1, 130, 512), (1, 3, 1024), (1, 5, 1023), (2, 7, 65), (3, 9, 1), (1, 40, 3),
    (2, 3, 132), (1, 1, 36), (2, 1, 31), (1, 0, 8), (0, 4, 8), (2, 3, 0),
)  # fmt: skip
"""The engine's, shortened; odd ones; empty ones."""
EPS = 1e-5


class Parts(NamedTuple):
    """What is asked for beyond the norm."""

    residual: bool = False
    offset: bool = False
    shift: bool = False
    mish: bool = False


PARTS = {
    "norm": Parts(),
    "sum": Parts(residual=True),
    "conv": Parts(offset=True, mish=True),
    "timed conv": Parts(offset=True, shift=True, mish=True),
    "all": Parts(residual=True, offset=True, shift=True, mish=True),
    "shift": Parts(shift=True),
}


class Call(NamedTuple):
    """The arguments of one call."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None
    offset: Tensor | None
    shift: Tensor | None
    mish: bool = False
    dtype: torch.dtype | None = None

    def run(self, kernel: Any = None, **where: Any) -> Tensor:
        """By `kernel`, else by ops.add_norm."""
        kernel = kernel or ops.add_norm
        return kernel(*self[:6], eps=EPS, mish=self.mish, dtype=self.dtype, **where)

    def map(self, change: Any) -> Call:
        """With every tensor changed."""
        return self._replace(
            **{k: change(v) for k, v in self._asdict().items() if isinstance(v, Tensor)}
        )

    def copy(self) -> Call:
        return self.map(torch.clone)

    def by_torch(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of the whole sum, and of the result, by torch's modules in `dtype`."""
        wide = self.map(lambda t: t.to(dtype))
        total = wide.x if wide.offset is None else wide.x + wide.offset
        total = total if wide.residual is None else wide.residual + total
        norm = nn.LayerNorm(len(wide.weight), EPS, dtype=dtype).requires_grad_(False)
        norm.weight.copy_(wide.weight)
        norm.bias.copy_(wide.bias)
        y = norm(total)
        y = nn.Mish()(y) if self.mish else y
        return total, y if wide.shift is None else y + wide.shift

    def ulps(self) -> Tensor:
        """An ulp in float32 of what each number of the result is made of."""
        total, y = self.by_torch(torch.float64)
        scale = 1 / (total.var(-1, correction=0, keepdim=True) + EPS).sqrt()
        size = total.abs().amax(-1, keepdim=True) * scale * self.weight.abs() + self.bias.abs()
        size = size if self.shift is None else size + self.shift.abs()
        return torch.finfo(torch.float32).eps * (size + y.abs())


def a_call(
    shape: tuple[int, int, int], parts: Parts = PARTS["all"], x_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype | None = None, seed: int = 0,
) -> Call:  # fmt: skip
    """Rows of many sizes, with a mean; Mish sees large and small numbers."""
    source = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=source)

    channels = shape[2]
    x = normal(*shape) * 2 + normal(*shape[:2], 1) * 3
    x[:, 1::3] *= 50
    optional = [
        normal(*size) if there else None
        for there, size in zip(parts[:3], (shape, (channels,), (channels,)), strict=True)
    ]
    weight, bias = normal(channels) * 4, normal(channels)
    return Call(x.to(x_dtype), weight, bias, *optional, parts.mish, dtype)


@functools.cache
def torchs_ulps(mish: bool) -> float:
    """By how many of those ulps torch is off in float32, at most, in many numbers."""
    worst = 0.0
    for seed in range(4):
        call = a_call((2, 500, 256), Parts(True, True, True, mish), seed=seed)
        error = (call.by_torch(torch.float32)[1] - call.by_torch(torch.float64)[1]).abs()
        worst = max(worst, float((error / call.ulps()).max()))
    return worst


def check(call: Call, y: Tensor, residual: Tensor | None) -> None:
    """Each number to twice torch's error in float32 and one ulp; in half precision half an ulp of
    the result more. The sum is torch's to the bit.

    Args:
        call: as it was before.
        residual: after.
    """
    dtype = call.dtype or call.x.dtype
    assert (y.dtype, y.shape) == (dtype, call.x.shape)
    assert y.is_contiguous()
    if residual is not None:
        assert torch.equal(residual, call.by_torch(torch.float32)[0])
    if y.numel() == 0:
        return
    _, oracle = call.by_torch(torch.float64)
    allowed = (2 * torchs_ulps(call.mish) + 1) * call.ulps()
    if dtype != torch.float32:
        allowed += 0.5 * spacing(oracle, dtype)
    assert ((y.double() - oracle).abs() <= allowed).all()


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parts", PARTS)
def test_it_is_torchs(parts: str, backend: Any, pair: tuple[torch.dtype, torch.dtype]) -> None:
    for shape in SHAPES:
        before = a_call(shape, PARTS[parts], *pair)
        own = before.copy()
        check(before, own.run(backend=backend), own.residual)
        for name, was, now in zip(Call._fields, before, own, strict=True):
            assert name == "residual" or not isinstance(was, Tensor) or torch.equal(was, now)


def test_the_measure_is_what_it_seems() -> None:
    """The reference in float64 is the oracle; torch's error is a few ulps."""
    for parts in PARTS.values():
        call = a_call((2, 30, 33), parts).map(torch.Tensor.double)
        total, expected = call.by_torch(torch.float64)
        own = call.copy()
        torch.testing.assert_close(own.run(), expected, rtol=1e-12, atol=1e-12)
        assert own.residual is None or torch.equal(own.residual, total)
    assert 0.2 < torchs_ulps(False) < 3
    assert 0.2 < torchs_ulps(True) < 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_stocks_block_after_its_convolution(backend: Any) -> None:
    block = CausalBlock1D(24, 64).requires_grad_(False)
    block.block[2].weight.normal_(generator=torch.Generator().manual_seed(0))
    block.block[2].bias.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 24, 50, generator=torch.Generator().manual_seed(2))
    expected = block(x, torch.ones(2, 1, 50))
    conv, norm = block.block[0], block.block[2]
    out = nn.functional.conv1d(x, conv.weight, None, padding=2)[..., :50].mT.contiguous()
    y = ops.add_norm(
        out, norm.weight, norm.bias, None, conv.bias, eps=norm.eps, mish=True, backend=backend
    )
    torch.testing.assert_close(y.mT, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_x_may_lie_anyhow_but_for_its_channels(backend: Any) -> None:
    """A part of a longer sequence, as convolutions leave it; rows in another order; one for all."""
    for x_dtype in FLOATING:
        wide = a_call((3, 12, 80), x_dtype=x_dtype).x
        for x in (wide[:, :9], wide[1:, 3:, 4:68], wide[..., 5:42], wide.transpose(0, 1),
                  wide[:1].expand(2, -1, -1), wide[:, ::2], wide[..., 7:8]):  # fmt: skip
            call = a_call(x.shape, x_dtype=x_dtype)._replace(x=x)
            own, dense = call.copy()._replace(x=x), call.copy()
            dense = dense._replace(x=x.contiguous())
            assert torch.equal(own.run(backend=backend), dense.run(backend=backend))
            assert torch.equal(own.residual, dense.residual)


@pytest.mark.parametrize("dtype", FLOATING[1:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_computed_in_float_and_rounded_once(
    backend: Any, dtype: torch.dtype
) -> None:
    for shape in ((2, 100, 65), (1, 80, 256)):
        call = a_call(shape, x_dtype=dtype, dtype=torch.float32)
        expected = call.copy()._replace(x=call.x.float()).run(backend=backend)
        assert torch.equal(call.copy().run(backend=backend), expected)
        assert torch.equal(
            call.copy()._replace(dtype=dtype).run(backend=backend), expected.to(dtype)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_variance(backend: Any) -> None:
    """All of a row equal, or one channel: the bias is left. eps is what is divided by."""
    for shape in ((1, 4, 40), (2, 3, 1)):
        call = a_call(shape, PARTS["norm"])
        call = call._replace(x=call.x[..., :1].expand(shape).contiguous())
        torch.testing.assert_close(
            call.run(backend=backend), call.bias.expand(shape), rtol=1e-3, atol=1e-3
        )
    x = torch.tensor([[[1e-3, -1e-3]]])
    y = ops.add_norm(x, torch.ones(2), torch.zeros(2), eps=1e-6, backend=backend)
    torch.testing.assert_close(y, x / math.sqrt(2e-6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mean_far_from_zero_costs_no_more_than_it_must(backend: Any) -> None:
    """A variance as the difference of two squares would be lost at once."""
    call = a_call((1, 50, 256), PARTS["norm"])
    call = call._replace(x=call.x / 100 + 3000)
    check(call, call.run(backend=backend), None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mish_of_any_size(backend: Any) -> None:
    """Norms of two channels are -1 and 1: the weight makes of them what is wanted."""
    wanted = torch.cat([torch.linspace(0, 130, 1301), torch.logspace(-30, 38, 200)])
    x = torch.tensor([-1.0, 1.0]).expand(1, 1, 2)
    for size in wanted.tolist():
        weight = torch.full((2,), size)
        y = ops.add_norm(x, weight, torch.zeros(2), eps=0, mish=True, backend=backend)
        n = torch.tensor([-size, size], dtype=torch.float64)
        expected = n * torch.tanh(torch.log1p(n.clamp(max=50).exp()))
        torch.testing.assert_close(y[0, 0].double(), expected, rtol=5e-7, atol=1e-36)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mish", [False, True])
def test_nan_and_infinity_stay_in_their_row(backend: Any, bad: float, mish: bool) -> None:
    for channels in (19, 64):
        call = a_call((1, 6, channels), PARTS["all"]._replace(mish=mish))
        expected = call.copy().run(backend=backend)
        assert expected.isfinite().all()
        for name, place in itertools.product(("x", "residual"), range(channels)):
            own = call.copy()
            getattr(own, name)[0, 2, place] = bad
            y = own.run(backend=backend)
            assert y[0, 2].isnan().all()
            y[0, 2] = expected[0, 2]
            assert torch.equal(y, expected)


def overflowed(channels: int) -> tuple[Call, Call]:
    """A call whose x has infinities in float16 and a NaN, and the same with its largest numbers."""
    call = a_call((1, 5, channels), x_dtype=torch.float16, dtype=torch.float32)
    call.x[0, 1, ::7], call.x[0, 2, 3], call.x[0, 4, -1] = math.inf, -math.inf, math.nan
    largest = torch.finfo(torch.float16).max
    return call, call.copy()._replace(x=call.x.float().clamp(-largest, largest))


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinity_in_float16_is_its_largest_number(backend: Any) -> None:
    for channels in (19, 64):
        call, finite = overflowed(channels)
        y = call.run(backend=backend)
        assert torch.equal(y[:, :4], finite.run(backend=backend)[:, :4])
        assert y[:, :4].isfinite().all()
        assert y[:, 4].isnan().all()
        assert torch.equal(call.residual[:, :4], finite.residual[:, :4])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [19, 64])
def test_a_large_result_is_float16s_largest_number(backend: Any, channels: int) -> None:
    call = a_call((1, 3, channels), PARTS["norm"], dtype=torch.float16)
    call.weight[::3], call.x[0, 2, 0] = 1e6, math.nan
    y = call.run(backend=backend)
    assert y[0, 2].isnan().all()
    assert y[0, :2].isfinite().all()
    assert (y[0, :2, ::3].abs() == 65504).any()
    wide = call._replace(dtype=torch.float32).run(backend=backend)
    assert wide[:, :2].abs().amax() > 65504


@given(
    shape=some.tuples(some.integers(0, 3), some.integers(0, 9), some.integers(0, 300)),
    ahead=some.tuples(*[some.integers(0, 3)] * 6),
    parts=some.builds(Parts, *[some.booleans()] * 4),
    pair=some.sampled_from(PAIRS),
    backend=some.sampled_from(BACKENDS),
)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_any_shape_at_any_address(
    shape: tuple[int, int, int], ahead: tuple[int, ...], parts: Parts, pair: Any, backend: Any
) -> None:
    call = a_call(shape, parts, *pair)
    moved = Call(
        *(None if t is None else further(t, by) for t, by in zip(call[:6], ahead, strict=True)),
        *call[6:],
    )
    own = call.copy()
    y = moved.run(backend=backend)
    check(call, y, moved.residual)
    assert torch.equal(y, own.run(backend=backend))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 64, 65, 1000])
def test_the_same_bits_by_any_number_of_threads_and_for_a_row_alone(
    threads: Any, channels: int, pair: Any
) -> None:
    call = a_call((2, 50000 // channels, channels), PARTS["all"], *pair)
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        results.append(call.copy().run())
    assert all(torch.equal(y, results[0]) for y in results)
    for row in (0, 7, call.x.shape[1] - 1):
        one = call._replace(x=call.x[1:, row, None], residual=call.residual[1:, row, None].clone())
        assert torch.equal(one.run()[0, 0], results[0][1, row])


ZEROS = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": ZEROS.double()}, "x must be float32, .*, got Double"),
        ({"x": torch.zeros(3, 4)}, r"x must be \(R, T, C\), C at most 1024, got \[3, 4\]"),
        ({"x": torch.zeros(1, 1, 1025)}, r"x must be \(R, T, C\), C at most 1024, got \[1, 1, 10"),
        ({"x": torch.zeros(2, 4, 3).mT}, r"x must be channels last, got strides \[12, 1, 3\]"),
        ({"weight": torch.zeros(3)}, r"weight must be \(4,\), a number a channel, got \[3\]"),
        ({"weight": torch.zeros(4).half()}, "weight must be Float, got Half"),
        ({"bias": torch.zeros(1, 4)}, r"bias must be \(4,\), a number a channel, got \[1, 4\]"),
        ({"bias": torch.zeros(8)[::2]}, r"bias must be contiguous, got strides \[2\]"),
        ({"offset": torch.zeros(5)}, r"offset must be \(4,\), a number a channel, got \[5\]"),
        ({"offset": torch.zeros(4).double()}, "offset must be Float, got Double"),
        ({"shift": torch.zeros(())}, r"shift must be \(4,\), a number a channel, got \[\]"),
        ({"shift": torch.zeros(4).int()}, "shift must be Float, got Int"),
        ({"residual": ZEROS.half()}, "residual must be Float, got Half"),
        ({"residual": ZEROS[:, :2]}, "residual must be contiguous, got strides"),
        ({"residual": torch.zeros(1, 3, 4)}, r"residual must be \[2, 3, 4\] as x is, got \[1, 3"),
        ({"x": ZEROS, "residual": ZEROS}, "residual must be in memory of its own, got x's"),
        ({"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16, got Double"),
        ({"dtype": torch.int32}, "dtype must be float32, float16 or bfloat16, got Int"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(2, 3, 4), "weight": torch.zeros(4), "bias": torch.zeros(4)}
    residual = change.get("residual")
    before = None if residual is None else residual.clone()
    with pytest.raises(RuntimeError, match=f"chatterbox_fast::add_norm: {message}"):
        torch.ops.chatterbox_fast.add_norm(**{**arguments, **change}, eps=EPS)
    assert before is None or torch.equal(residual, before)


@pytest.mark.parametrize("parts", PARTS)
def test_opcheck(parts: str) -> None:
    for shape in ((2, 5, 24), (1, 0, 8)):
        call = a_call(shape, PARTS[parts], torch.bfloat16, torch.float32)
        rules = {"eps": EPS, "mish": call.mish, "dtype": call.dtype}
        torch.library.opcheck(torch.ops.chatterbox_fast.add_norm.default, call[:6], rules)


def test_torch_compile_keeps_it_in_one_graph() -> None:
    """The residual's sum is there after."""
    call = a_call((2, 6, 24))

    def twice(x: Tensor, residual: Tensor) -> Tensor:
        y = call._replace(x=x, residual=residual).run()
        return call._replace(x=y, residual=residual).run()

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        ours, expected = call.residual.clone(), call.residual.clone()
        assert torch.equal(compiled(call.x, ours), twice(call.x, expected))
        assert torch.equal(ours, expected)


def test_which_implementation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.choose("add_norm", CPU).backend == "extension"
    assert ops.add_norm_by("extension") is torch.ops.chatterbox_fast.add_norm.default
    assert ops.add_norm_by("reference") is reference.add_norm
    asked = []
    monkeypatch.setattr(ops, "add_norm_by", lambda b: asked.append(b) or reference.add_norm)
    call = a_call((1, 2, 4))
    call.copy().run()
    call.map(torch.Tensor.double).run()
    for name in Call._fields[:6]:
        own = call.copy()
        own = own._replace(**{name: getattr(own, name).requires_grad_() * 1})
        own.copy().run()
        with torch.no_grad():
            own.copy().run()
    assert asked == ["extension", "reference", *["reference", "extension"] * 6]


def test_gradients_are_torchs() -> None:
    """Of two calls, which add to one residual."""
    call = a_call((2, 7, 12))

    def gradients(run: Any) -> list[Tensor]:
        own = call.map(lambda t: t.clone().requires_grad_())
        run(own.map(lambda t: t * 1)).sin().sum().backward()
        return [t.grad for t in own[:6]]

    def twice(own: Call) -> Tensor:
        return own._replace(x=own.run()).run()

    ours = gradients(twice)

    def theirs(own: Call) -> Tensor:
        total, y = own.residual, own.x
        for _ in range(2):
            total = total + (y + own.offset)
            y = nn.functional.layer_norm(total, own.weight.shape, own.weight, own.bias, EPS)
            y = nn.functional.mish(y) + own.shift
        return y

    for one, other in zip(ours, gradients(theirs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.kernel
class TestOnAGpu:
    @pytest.mark.parametrize("pair", PAIRS, ids=str)
    @pytest.mark.parametrize("parts", PARTS)
    def test_it_is_torchs(self, parts: str, pair: Any) -> None:
        for shape in SHAPES:
            call = a_call(shape, PARTS[parts], *pair)
            own = call.map(torch.Tensor.cuda)
            y = own.run(backend="cuda")
            check(call, y.cpu(), None if own.residual is None else own.residual.cpu())
            moved = call.map(lambda t: further(t.cuda(), 1))
            y = moved.run(backend="cuda")  # in another order of sums
            check(call, y.cpu(), None if moved.residual is None else moved.residual.cpu())

    def test_rows_far_apart(self) -> None:
        call = a_call((2, 3, 64), x_dtype=torch.float16).map(torch.Tensor.cuda)
        far = torch.empty(2**31 + 3 * 64, dtype=torch.float16, device="cuda")
        x = far.as_strided(call.x.shape, (2**31, 64, 1)).copy_(call.x)
        dense = call.copy()
        assert torch.equal(call._replace(x=x).run(backend="cuda"), dense.run(backend="cuda"))
        assert torch.equal(call.residual, dense.residual)

    def test_places_beyond_32_bits(self) -> None:
        x = torch.zeros(2, 2**30 // 64 + 3, 64, dtype=torch.float16, device="cuda")
        x[-1, -1] = torch.arange(64)
        ones = torch.ones(64, device="cuda")
        y = ops.add_norm(x, ones, 0 * ones, eps=EPS, backend="cuda")
        expected = nn.functional.layer_norm(torch.arange(64.0), (64,))
        torch.testing.assert_close(y[-1, -1].float().cpu(), expected, rtol=1e-3, atol=1e-3)
        assert not y[:, :-1].any()

    def test_replayed_from_a_graph(self) -> None:
        call = a_call((1, 50, 64)).map(torch.Tensor.cuda)
        expected = call.copy()
        wanted = expected.run(backend="cuda")
        residual = call.residual.clone()
        call.copy().run(backend="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call.run(backend="cuda")
        for _ in range(2):
            call.residual.copy_(residual)
            graph.replay()
            assert torch.equal(y, wanted)
            assert torch.equal(call.residual, expected.residual)

    def test_an_argument_on_another_device_is_named(self) -> None:
        call = a_call((1, 2, 4)).map(torch.Tensor.cuda)
        for name in Call._fields[1:6]:
            own = call._replace(**{name: getattr(call, name).cpu()})
            with pytest.raises(RuntimeError, match=f"add_norm: {name} must be on cuda:0, got cpu"):
                own.run(torch.ops.chatterbox_fast.add_norm)
