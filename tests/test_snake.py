"""snake: every implementation against stock's module in float64, with stock's own error in float32
as the measure."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from chatterbox.models.s3gen import hifigan
from chatterbox.models.s3gen.transformer import activation
from hypothesis import given, settings
from hypothesis import strategies as some
from toolkit import ulp
from torch import Tensor

from chatterbox_fast import dispatch, ops, reference

CPU = torch.device("cpu")
FLOATING = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("cuda", "reference")
"""As options name them: "cuda" is the extension, on a CPU its CPU op."""
SHAPES = (
    (1, 400, 256), (1, 900, 128), (1, 1100, 64), (2, 300, 512), (1, 2, 1032), (3, 5, 4100),
    (1, 3, 2056), (2, 7, 65), (3, 9, 1), (40000, 1), (1, 1000, 3), (5,), (1,), (2, 3, 5, 24),
    (1, 3, 1025), (4, 1, 9), (2, 0, 8), (0, 4, 8), (3, 0), (0,),
)  # fmt: skip
"""The engine's, shortened; odd ones; empty ones."""


def trained(channels: int, seed: int = 0) -> Tensor:
    """Frequencies as training leaves them: of any size and sign, some tiny."""
    alpha = torch.randn(channels, generator=torch.Generator().manual_seed(seed)) * 3
    alpha[1::5] *= 1e-4
    alpha[3::7] = 0
    return alpha


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Mostly a few units, here and there up to 1e4."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 4
    x.flatten()[2::11] *= 600
    return x.clamp(-1e4, 1e4).to(dtype)


def inverse_of(alpha: Tensor) -> Tensor:
    """As stock's forward() computes it."""
    return 1.0 / (alpha + 1e-9)


def stock(x: Tensor, alpha: Tensor, module: Any = hifigan.Snake) -> Tensor:
    """Stock's module on channels last, in x's dtype."""
    snake = module(len(alpha)).to(x.dtype)
    snake.alpha.data.copy_(alpha)
    rows = x.reshape(1, math.prod(x.shape[:-1]), len(alpha))
    return snake(rows.transpose(1, 2)).detach().transpose(1, 2).reshape(x.shape)


def held(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`, in float16 to finite numbers."""
    largest = torch.finfo(torch.float16).max
    return (wide.clamp(-largest, largest) if dtype == torch.float16 else wide).to(dtype)


def summed(x: Tensor, residual: Tensor | None, offset: Tensor | None) -> Tensor:
    """What Snake is taken of: in float32, and of half precision not rounded."""
    total = x.float() if offset is None else x.float() + offset
    return total if residual is None else residual.float() + total


def spacing(y: Tensor, dtype: torch.dtype) -> Tensor:
    """An ulp of each number, in `dtype`; of normal ones."""
    least = torch.finfo(dtype).smallest_normal
    return torch.finfo(dtype).eps * torch.exp2(torch.frexp(y.double().abs().clamp(least))[1] - 1.0)


def spacing_of_terms(x: Tensor, oracle: Tensor) -> Tensor:
    """A float32's ulp of the larger term of each sum."""
    return spacing(torch.maximum(x.double().abs(), (oracle - x).abs()), torch.float32)


@functools.cache
def stocks_ulps() -> float:
    """By how many of those ulps stock is off in float32, at most, in many numbers."""
    x, alpha = noise((4000, 65)), trained(65)
    oracle = stock(x.double(), alpha.double())
    error = (stock(x, alpha).double() - oracle).abs() / spacing_of_terms(x, oracle)
    return float(error.max())


def check_stocks(y: Tensor, x: Tensor, alpha: Tensor) -> None:
    """Each number to twice stock's error in float32 and one ulp; in half precision half an ulp of
    the result instead, which is what rounding costs."""
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    oracle = stock(x.double(), alpha.double())
    ulps, fine = spacing_of_terms(x, oracle), x.dtype == torch.float32
    rounding = ulps if fine else 0.5 * spacing(oracle, x.dtype)
    assert ((y.double() - oracle).abs() <= 2 * stocks_ulps() * ulps + rounding).all()


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_stocks(shape: tuple[int, ...], backend: Any, dtype: torch.dtype) -> None:
    x, alpha = noise(shape, dtype), trained(shape[-1])
    before = x.clone()
    y = ops.snake(x, alpha, inverse_of(alpha), backend=backend)
    check_stocks(y, x, alpha)
    assert torch.equal(x, before)


def test_the_oracle_is_what_it_seems() -> None:
    """Both of stock's modules are the reference in float64."""
    x, alpha = noise((2, 60, 33)).double(), trained(33).double()
    expected = reference.snake(x, alpha, inverse_of(alpha))
    for module in (hifigan.Snake, activation.Snake):
        error = (stock(x, alpha, module) - expected).abs()
        assert (error <= 1e-8 * spacing_of_terms(x, expected)).all()
    assert torch.equal(ops.snake(x, alpha, inverse_of(alpha)), expected)
    assert (expected - x).abs().amax() > 1
    assert 0.5 < stocks_ulps() < 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_computed_in_float_and_rounded_once(
    backend: Any, dtype: torch.dtype
) -> None:
    """Also where halves are not normal, where there are none so large, and between two of them."""
    x = noise((2, 200, 65), dtype)
    x[0, :, ::4] *= 1e-6
    alpha = trained(65)
    for inverse in (inverse_of(alpha), torch.full((65,), 1e-6), torch.full((65,), 6e4)):
        y = ops.snake(x, alpha, inverse, backend=backend)
        wide = ops.snake(x.float(), alpha, inverse, backend=backend)
        assert torch.equal(y, held(wide, dtype))
    assert wide.abs().max() > 65504


SUMS = ((True, True), (True, False), (False, True))
"""Whether there is a residual, an offset."""


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sums", SUMS)
def test_of_a_sum(sums: tuple[bool, bool], backend: Any, dtype: torch.dtype) -> None:
    """The same bits as of the sum in float32, which the residual has after, rounded."""
    for shape in SHAPES:
        x, alpha = noise(shape, dtype), trained(shape[-1])
        residual = noise(shape, dtype, seed=1) if sums[0] else None
        offset = noise(shape[-1:], seed=2) if sums[1] else None
        own = None if residual is None else residual.clone()
        y = ops.snake(x, alpha, inverse_of(alpha), own, offset, backend=backend)
        total = summed(x, residual, offset)
        wide = ops.snake(total, alpha, inverse_of(alpha), backend=backend)
        assert torch.equal(y, held(wide, dtype))
        assert own is None or torch.equal(own, held(total, dtype))
        assert torch.equal(x, noise(shape, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_is_what_stocks_block_adds(backend: Any) -> None:
    """From a convolution's output without its bias to the activation after it."""
    block = hifigan.ResBlock(24, 3, [1, 3]).requires_grad_(False)
    for parameter in block.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    x = noise((1, 24, 40)) / 10
    inner = block.activations2[0](block.convs1[0](block.activations1[0](x)))
    conv, snake = block.convs2[0], block.activations1[1]
    expected = snake(conv(inner) + x)
    out = torch.nn.functional.conv1d(inner, conv.weight, None, padding=1)
    own = x.mT.contiguous()
    y = ops.snake(
        out.mT.contiguous(), snake.alpha, inverse_of(snake.alpha), own, conv.bias, backend=backend
    )
    torch.testing.assert_close(own.mT, conv(inner) + x)
    torch.testing.assert_close(y.mT, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [19, 64])
def test_nothing_becomes_infinite_in_float16(backend: Any, channels: int) -> None:
    """Not x, not the sum, not the result; NaN stays."""
    alpha, inverse = torch.full((channels,), 0.7), torch.full((channels,), 1e6)
    x, residual = (torch.full((5, channels), 6e4, dtype=torch.float16) for _ in range(2))
    x[1], x[2], residual[2], x[3, 3] = math.inf, -math.inf, -6e4, math.nan
    offset = torch.full((channels,), 5.0)
    y = ops.snake(x, alpha, inverse, residual, offset, backend=backend)
    for found in (y, residual):
        assert found[3, 3].isnan()
        found[3, 3] = 0
        assert found.isfinite().all()
    assert residual[0, 0] == residual[1, 0] == -residual[2, 0] == 65504
    assert ops.snake(x[:2], alpha, inverse, backend=backend).isfinite().all()


def offset_overflows(channels: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """A call whose sum is held although it has no residual, and the result."""
    x = torch.full((2, channels), -65504, dtype=torch.float16)
    alpha, inverse = torch.full((channels,), 0.013), torch.full((channels,), 1000.0)
    call = x, alpha, inverse, None, torch.full((channels,), -90.0)
    return call, held(reference.snake(x.float(), alpha, inverse), torch.float16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [19, 64])
def test_a_sum_with_an_offset_alone_is_held(backend: Any, channels: int) -> None:
    call, expected = offset_overflows(channels)
    torch.testing.assert_close(ops.snake(*call, backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_is_read_and_written_as_it_is(dtype: torch.dtype) -> None:
    """Subnormal ones among them. NaN is NaN; infinity, too, as its sine is, but in float16."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[:, None]
    alpha, inverse = torch.ones(1), torch.zeros(1)
    y = ops.snake(x, alpha, inverse)
    assert torch.equal(y[x.isfinite()], x[x.isfinite()])
    assert y[x.isnan()].isnan().all()
    infinite = y[x.isinf()]
    if dtype == torch.float16:
        assert infinite.tolist() == [-65504, 65504]
    else:
        assert infinite.isnan().all()


def test_subnormal_halves_survive_flushed_floats(threads: Any) -> None:
    threads(1)
    x = torch.arange(1, 1025).to(torch.int16).view(torch.float16)[:, None]
    assert torch.set_flush_denormal(True)
    try:
        y = ops.snake(x, torch.ones(1), torch.zeros(1))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(y.view(torch.int16), x.view(torch.int16))


def ties(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments whose results lie half an ulp above 1 and above the next number, exactly."""
    eps = torch.finfo(dtype).eps
    x = torch.tensor([[1.0, 1.0 + eps]])
    return x.to(dtype), 2.0**-12 / x[0], torch.full((2,), eps / 2 * 2.0**24)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_are_rounded_to_even(backend: Any, dtype: torch.dtype) -> None:
    x, alpha, inverse = ties(dtype)
    eps = torch.finfo(dtype).eps
    exact = ops.snake(x.float(), alpha, inverse, backend=backend)
    assert exact.tolist() == [[1 + eps / 2, 1 + 3 * eps / 2]]
    y = ops.snake(x, alpha, inverse, backend=backend)
    assert y.tolist() == [[1, 1 + 2 * eps]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4, 1e6, 1e8])
def test_the_sine_of_large_arguments_is_accurate(backend: Any, scale: float) -> None:
    """A large `inverse` leaves x behind, and a frequency of 1 adds no rounding."""
    x = noise((20000, 1), seed=2) / 1e4 * scale
    alpha, inverse = torch.ones(1), torch.full((1,), 2.0**60)
    oracle = x.double() + torch.sin(x.double()).square() * 2.0**60
    theirs = x + torch.sin(x).square() * inverse
    y = ops.snake(x, alpha, inverse, backend=backend)
    error, measure = (float((own - oracle).abs().max()) for own in (y, theirs))
    assert error <= 2 * measure + ulp(oracle, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e10, 1e16, 1e20, 2e38])
def test_x_outgrows_its_sine(backend: Any, size: float) -> None:
    """Nothing is left of it but its bound."""
    x = torch.linspace(0.1, 1, 501)[:, None] * size
    x = torch.cat((x, -x))
    assert torch.equal(ops.snake(x, torch.ones(1), torch.ones(1), backend=backend), x)
    alpha, inverse = torch.full((1,), 0.5), torch.full((1,), size / 4)
    y = ops.snake(x, alpha, inverse, backend=backend).double()
    assert (y >= x.double()).all()
    assert (y <= (x.double() + size / 4) + 1e-6 * size).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_where_they_are(backend: Any, bad: float) -> None:
    """Every lane of a vector and what is behind the last one."""
    alpha = trained(19)
    x = noise((7, 19))
    expected = ops.snake(x, alpha, inverse_of(alpha), backend=backend)
    assert expected.isfinite().all()
    for place in range(x.numel()):
        own = x.clone()
        own.flatten()[place] = bad
        y = ops.snake(own, alpha, inverse_of(alpha), backend=backend)
        assert y.flatten()[place].isnan()
        y.flatten()[place] = expected.flatten()[place]
        assert torch.equal(y, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frequencies_without_an_inverse(backend: Any) -> None:
    """At -1e-9 stock divides by zero; what overflows is infinite or NaN, where stock's is."""
    alpha = torch.tensor([-1e-9, 0.0, -0.0, 1e-38, 3e38])
    x = torch.tensor([0.0, -0.0, 1.0, -3.0, 1e20, -3e38])[:, None].expand(-1, 5).contiguous()
    y, expected = (ops.snake(x, alpha, inverse_of(alpha), backend=backend), stock(x, alpha))
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert y.isnan().any()
    assert y.isinf().any()
    finite = expected.isfinite()
    torch.testing.assert_close(y[finite], expected[finite], rtol=1e-6, atol=0)


@given(
    shape=some.lists(some.integers(0, 12), max_size=3),
    channels=some.integers(0, 600),
    ahead=some.tuples(*[some.integers(0, 3)] * 5),
    sums=some.sampled_from(((False, False), *SUMS)),
    dtype=some.sampled_from(FLOATING),
    backend=some.sampled_from(BACKENDS),
)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_any_shape_at_any_address(
    shape: list[int], channels: int, ahead: tuple[int, ...], sums: tuple[bool, bool],
    dtype: torch.dtype, backend: Any,
) -> None:  # fmt: skip
    x, alpha = noise((*shape, channels), dtype), trained(channels)
    residual = noise((*shape, channels), dtype, seed=1) if sums[0] else None
    offset = noise((channels,), seed=2) if sums[1] else None
    own = x, alpha, inverse_of(alpha), residual, offset
    moved = [None if t is None else further(t, by) for t, by in zip(own, ahead, strict=True)]
    y = ops.snake(*moved, backend=backend)
    if not any(sums):
        check_stocks(y, x, alpha)
    assert torch.equal(y, ops.snake(*own, backend=backend))
    assert residual is None or torch.equal(moved[3], residual)


def further(tensor: Tensor, by: int) -> Tensor:
    """A contiguous copy that starts `by` elements behind an address that torch aligned."""
    flat = torch.empty(tensor.numel() + by, dtype=tensor.dtype, device=tensor.device)
    return flat[by:].view_as(tensor).copy_(tensor)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("channels", [1, 3, 64, 65, 1500])
def test_the_same_bits_by_any_number_of_threads_and_for_a_row_alone(
    threads: Any, channels: int, dtype: torch.dtype
) -> None:
    x, alpha = noise((200000 // channels, channels), dtype), trained(channels)
    residual = noise(x.shape, dtype, seed=1)
    for sums in (False, True):
        results, residuals = [], []
        for count in (1, 2, 3, 1):
            threads(count)
            rest = (residual.clone(), alpha) if sums else ()
            results.append(ops.snake(x, alpha, inverse_of(alpha), *rest))
            residuals.append(rest[0] if sums else x)
        assert all(torch.equal(y, results[0]) for y in results)
        assert all(torch.equal(own, residuals[0]) for own in residuals)
        for row in (0, 7, len(x) - 1):
            rest = (residual[row].clone(), alpha) if sums else ()
            alone = ops.snake(x[row].clone(), alpha, inverse_of(alpha), *rest)
            assert torch.equal(alone, results[0][row])


ZEROS = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4).double()}, "x must be float32, .*, got Double"),
        ({"x": torch.zeros(2, 4).int()}, "x must be float32, .*, got Int"),
        ({"x": torch.zeros(())}, r"x must be \(\.\.\., C\), got \[\]"),
        ({"x": torch.zeros(4, 2).T}, r"x must be contiguous, got strides \[1, 2\]"),
        ({"x": torch.zeros(2, 4)[:, :3]}, r"x must be contiguous, got strides \[4, 1\]"),
        ({"alpha": torch.zeros(3)}, r"alpha must be \(4,\), a number a channel, got \[3\]"),
        ({"alpha": torch.zeros(())}, r"alpha must be \(4,\), a number a channel, got \[\]"),
        ({"alpha": torch.zeros(1, 4)}, r"alpha must be \(4,\), a number a channel, got \[1, 4\]"),
        ({"alpha": torch.zeros(4).half()}, "alpha must be Float, got Half"),
        ({"alpha": torch.zeros(8)[::2]}, r"alpha must be contiguous, got strides \[2\]"),
        ({"inverse": torch.zeros(5)}, r"inverse must be \(4,\), a number a channel, got \[5\]"),
        ({"inverse": torch.zeros(4).double()}, "inverse must be Float, got Double"),
        ({"inverse": torch.zeros(8)[::2]}, r"inverse must be contiguous, got strides \[2\]"),
        ({"offset": torch.zeros(5)}, r"offset must be \(4,\), a number a channel, got \[5\]"),
        ({"offset": torch.zeros(4).half()}, "offset must be Float, got Half"),
        ({"residual": torch.zeros(2, 4).half()}, "residual must be Float, got Half"),
        ({"residual": torch.zeros(2, 3)}, r"residual must be \[2, 4\] as x is, got \[2, 3\]"),
        ({"residual": torch.zeros(4, 2).T}, r"residual must be contiguous, got strides \[1, 2\]"),
        ({"x": ZEROS, "residual": ZEROS}, "residual must be in memory of its own, got x's"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(2, 4), "alpha": torch.zeros(4), "inverse": torch.zeros(4)}
    with pytest.raises(RuntimeError, match=f"chatterbox_fast::snake: {message}"):
        torch.ops.chatterbox_fast.snake(**{**arguments, **change})


@pytest.mark.parametrize("shape", [(2, 33, 8), (5,), (2, 0, 3)], ids=str)
def test_opcheck(shape: tuple[int, ...]) -> None:
    arguments = noise(shape, torch.bfloat16), trained(shape[-1]), torch.ones(shape[-1])
    torch.library.opcheck(torch.ops.chatterbox_fast.snake.default, arguments)
    sums = noise(shape, torch.bfloat16, seed=1), torch.ones(shape[-1])
    torch.library.opcheck(torch.ops.chatterbox_fast.snake.default, (*arguments, *sums))


def test_torch_compile_keeps_it_in_one_graph() -> None:
    alpha = trained(24)
    inverse = inverse_of(alpha)

    def twice(x: Tensor, residual: Tensor) -> Tensor:
        y = ops.snake(2 * x, alpha, inverse, residual)
        return ops.snake(y, alpha, inverse, residual, alpha)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for rows in (4, 9):
        x = noise((1, rows, 24))
        ours, expected = x.clone(), x.clone()
        assert torch.equal(compiled(x, ours), twice(x, expected))
        assert torch.equal(ours, expected)


def test_which_implementation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.choose("snake", CPU).backend == "extension"
    assert ops.snake_by("extension") is torch.ops.chatterbox_fast.snake.default
    assert ops.snake_by("reference") is reference.snake
    asked = []
    monkeypatch.setattr(ops, "snake_by", lambda b: asked.append(b) or reference.snake)
    x, alpha = noise((3, 4)), trained(4)
    ops.snake(x, alpha, alpha)
    ops.snake(x.double(), alpha.double(), alpha.double())
    for number in range(5):
        arguments = [x.clone(), alpha.clone(), alpha.clone(), x.clone(), alpha.clone()]
        arguments[number] = arguments[number].requires_grad_() * 1
        ops.snake(*arguments)
        with torch.no_grad():
            ops.snake(*arguments)
    assert asked == ["extension", "reference", *["reference", "extension"] * 5]


def test_gradients_are_stocks() -> None:
    x, module = noise((2, 30, 8)).clamp(-9, 9), hifigan.Snake(8)
    module.alpha.data.uniform_(0.1, 3, generator=torch.Generator().manual_seed(1))
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    module(theirs.transpose(1, 2)).sum().backward()
    expected, module.alpha.grad = module.alpha.grad, None
    ops.snake(ours, module.alpha, inverse_of(module.alpha)).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(module.alpha.grad, expected)


@pytest.mark.gpu
@pytest.mark.kernel
class TestOnAGpu:
    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_it_is_stocks(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        x, alpha = noise(shape, dtype), trained(shape[-1])
        own = [t.cuda() for t in (x, alpha, inverse_of(alpha))]
        y = ops.snake(*own, backend="cuda")
        check_stocks(y.cpu(), x, alpha)
        moved = ops.snake(further(own[0], 1), *own[1:], backend="cuda")
        assert torch.equal(moved, y)
        residual, offset = noise(shape, dtype, seed=1), noise(shape[-1:], seed=2)
        sums = residual.cuda()
        y = ops.snake(*own, sums, offset.cuda(), backend="cuda")
        total = summed(x, residual, offset)
        wide = ops.snake(total.cuda(), *own[1:], backend="cuda")
        assert torch.equal(y.cpu(), held(wide.cpu(), dtype))
        assert torch.equal(sums.cpu(), held(total, dtype))

    def test_places_beyond_32_bits(self) -> None:
        x = torch.zeros(2**31 // 64 + 3, 64, dtype=torch.float16, device="cuda")
        x[-1] = 1.5
        alpha = torch.ones(64, device="cuda")
        y = ops.snake(x, alpha, alpha, backend="cuda")
        expected = 1.5 + math.sin(1.5) ** 2
        assert (y[-1].double() - expected).abs().max() < 1e-3
        assert not y[:-1].any()

    def test_replayed_from_a_graph(self) -> None:
        x, alpha = noise((1, 500, 64)).cuda(), trained(64).cuda()
        inverse = inverse_of(alpha)
        expected = ops.snake(2 * x, alpha, inverse, backend="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.snake(x, alpha, inverse, backend="cuda")
        x *= 2
        graph.replay()
        assert torch.equal(y, expected)

    def test_an_argument_on_another_device_is_named(self) -> None:
        x, alpha = torch.zeros(2, 4, device="cuda:0"), torch.zeros(4, device="cuda:0")
        for arguments, name in (
            ((x, alpha.cpu(), alpha), "alpha"),
            ((x, alpha, alpha.cpu()), "inverse"),
            ((x, alpha, alpha, x.cpu()), "residual"),
            ((x, alpha, alpha, None, alpha.cpu()), "offset"),
        ):
            with pytest.raises(RuntimeError, match=f"snake: {name} must be on cuda:0, got cpu"):
                torch.ops.chatterbox_fast.snake(*arguments)
