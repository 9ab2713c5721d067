"""skinny_linear: every implementation against a float64 oracle, with stock torch's own error as the
measure: F.linear in float32, for int8 weights torch's dynamic int8."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as some
from toolkit import ulp
from torch import Tensor

from chatterbox_fast import dispatch, ops, reference

CPU = torch.device("cpu")
FLOATING = (torch.float32, torch.float16, torch.bfloat16)
WEIGHTS = (*FLOATING, torch.int8)
BACKENDS = ("cuda", "reference")
"""As options name them: "cuda" is the extension, on a CPU its CPU op."""
T3 = ((1024, 3072), (1024, 1024), (1024, 8192), (4096, 1024), (1024, 8194), (1024, 6563))
"""K, N of a decode step: qkv, o, gate and up, down, the head of English and of Turbo."""
UGLY = (*((k, n) for k in (1, 7, 17, 100, 1000) for n in (1, 2, 3)), (17, 8194))


class Call(NamedTuple):
    """The arguments of one call."""

    x: Tensor
    weight: Tensor
    scale: Tensor | None

    def oracle(self) -> Tensor:
        y = self.x.double() @ self.weight.double().T
        return y if self.scale is None else y * self.scale.double()

    def by_float(self) -> Tensor:
        """Stock torch in float32, on the widened weights."""
        y = F.linear(self.x.float(), self.weight.float())
        return (y if self.scale is None else y * self.scale).to(self.x.dtype)

    def by_dynamic_int8(self) -> Tensor:
        """Stock torch's own int8 as its module calls it, which rounds x to 7 bits."""
        assert self.scale is not None
        zeros = torch.zeros(len(self.scale), dtype=torch.long)
        quantised = torch._make_per_channel_quantized_tensor(
            self.weight, self.scale.double(), zeros, 0
        )
        packed = torch.ops.quantized.linear_prepack(quantised, None)
        return torch.ops.quantized.linear_dynamic(self.x.float(), packed, True).to(self.x.dtype)


def random_call(
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = "cpu",
) -> Call:
    """`shape`: M, K, N."""
    rows, inputs, outputs = shape
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=source).to(dtype)
    if weight_dtype == torch.int8:
        weight = torch.randint(-128, 128, (outputs, inputs), generator=source, dtype=torch.int8)
        scale = torch.rand(outputs, generator=source) / 1000 + 1e-4
        return Call(x.to(device), weight.to(device), scale.to(device))
    weight = torch.randn(outputs, inputs, generator=source) / 32
    return Call(x.to(device), weight.to(device, weight_dtype), None)


def some_calls(
    shape: tuple[int, int, int], dtype: torch.dtype, weight_dtype: torch.dtype, device: str = "cpu"
) -> list[Call]:
    """The error of one output depends on luck: calls enough for 32 outputs."""
    seeds = range(1 + 32 // (shape[0] * shape[2]))
    return [random_call(shape, dtype, weight_dtype, seed, device) for seed in seeds]


def whole_call(shape: tuple[int, int, int], dtype: torch.dtype, weight_dtype: torch.dtype) -> Call:
    """Small whole numbers: in float32 every sum is exact, in whatever order."""
    rows, inputs, outputs = shape
    source = torch.Generator().manual_seed(inputs)
    x = torch.randint(-4, 5, (rows, inputs), generator=source).to(dtype)
    weight = torch.randint(-8, 9, (outputs, inputs), generator=source).to(weight_dtype)
    scale = 2.0 ** torch.randint(-3, 4, (outputs,), generator=source)
    return Call(x, weight, scale if weight_dtype == torch.int8 else None)


RUN = 256
"""Inputs that share a scale where the CPU op rounds x for an int8 weight."""


def off_by_rounding(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """How far from exact the CPU op's int8 may be: each x is half a step off at most."""
    padding = -x.shape[1] % RUN
    runs = F.pad(x.double(), (0, padding)).view(len(x), -1, RUN)
    sizes = F.pad(weight.double().abs(), (0, padding)).view(len(weight), -1, RUN).sum(dim=-1)
    steps = runs.abs().amax(dim=-1) / 16383
    return steps @ sizes.T * scale / 2


def check_rounded(call: Call, y: Tensor) -> None:
    """An int8 product of the CPU op: off by its rounding of x, and by that of float sums."""
    assert call.scale is not None
    expected = call.oracle()
    assert y.shape == expected.shape
    assert y.dtype == call.x.dtype
    off = off_by_rounding(call.x, call.weight, call.scale)
    size = call.x.double().abs() @ call.weight.double().abs().T * call.scale
    floats = 4 * torch.finfo(torch.float32).eps * size
    kind = torch.finfo(call.x.dtype)
    rounding = kind.eps * expected.abs().clamp_min(kind.smallest_normal)
    assert ((y - expected).abs() <= 1.01 * off + floats + rounding).all()


def check_error(calls: list[tuple[Call, Tensor]], stock: Any = Call.by_float) -> None:
    """Against float64 at most twice stock's error, plus one ulp, over all calls."""
    own = theirs = unit = 0.0
    for call, y in calls:
        expected = call.oracle()
        assert y.shape == expected.shape
        assert y.dtype == call.x.dtype
        own = max(own, float((y.double() - expected).abs().max()))
        theirs = max(theirs, float((stock(call).double() - expected).abs().max()))
        unit = max(unit, ulp(expected, call.x.dtype))
    assert own <= 2 * theirs + unit, f"{own} against {theirs} and {unit}"


def check_by(backend: str, calls: list[tuple[Call, Tensor]]) -> None:
    """The CPU op rounds x for an int8 weight; nothing else rounds it."""
    if calls[0][0].scale is None or backend != "cuda":
        check_error(calls)
        return
    for call, y in calls:
        check_rounded(call, y)


# ---- results


@pytest.mark.parametrize("weight_dtype", WEIGHTS)
@pytest.mark.parametrize("shape", T3, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decode_step(backend: Any, shape: tuple[int, int], weight_dtype: torch.dtype) -> None:
    calls = [random_call((rows, *shape), torch.float32, weight_dtype) for rows in (1, 2)]
    results = [(call, ops.skinny_linear(*call, backend=backend)) for call in calls]
    check_by(backend, results)


@pytest.mark.parametrize("weight_dtype", WEIGHTS)
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ugly_shapes(
    threads: Any, backend: Any, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    threads(1)  # these are small
    for shape in UGLY:
        for rows in (1, 2, 3, 8):
            calls = some_calls((rows, *shape), dtype, weight_dtype)
            results = [(call, ops.skinny_linear(*call, backend=backend)) for call in calls]
            check_by(backend, results)


@pytest.mark.parametrize("weight_dtype", FLOATING)
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_product_is_lost(
    threads: Any, backend: Any, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    """Whole numbers are summed exactly."""
    threads(1)
    for inputs in (1, 7, 8, 15, 16, 17, 33, 1000):
        for rows in range(9):
            call = whole_call((rows, inputs, 5), dtype, weight_dtype)
            y = ops.skinny_linear(*call, backend=backend)
            assert torch.equal(y, call.oracle().to(dtype))


@pytest.mark.parametrize("weight_dtype", FLOATING)
def test_no_product_of_a_wide_layer_is_lost(threads: Any, weight_dtype: torch.dtype) -> None:
    """The CPU op takes several outputs of such a one at once."""
    threads(1)
    for inputs in (2048, 2049, 2064, 2085, 2500, 4100):
        for outputs in (1, 3, 4, 5, 11):
            for rows in (1, 2, 3):
                call = whole_call((rows, inputs, outputs), torch.float32, weight_dtype)
                y = torch.ops.chatterbox_fast.skinny_linear(*call)
                assert torch.equal(y, call.oracle().float())


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_not_rounded_to_the_dtype_of_x(backend: Any, dtype: torch.dtype) -> None:
    x, weight = torch.tensor([[1, -1]], dtype=dtype), torch.tensor([[1 + 2.0**-20, 1]])
    assert ops.skinny_linear(x, weight, backend=backend) == 2.0**-20


def test_int8_is_closer_than_an_x_in_bfloat16() -> None:
    for shape in ((2, 1024, 3072), (2, 4096, 1024)):
        call = random_call(shape, weight_dtype=torch.int8)
        expected = call.oracle()
        rounded = call._replace(x=call.x.bfloat16()).oracle()
        own = torch.ops.chatterbox_fast.skinny_linear(*call)
        assert (own - expected).abs().max() < (rounded - expected).abs().max() / 4
        stock = (call.by_dynamic_int8() - expected).abs().max()
        assert (own - expected).abs().max() < stock / 20, "torch's own int8 rounds to 7 bits"


def test_an_outlier_costs_its_neighbours_alone() -> None:
    """What is not in its run is rounded as if it were not there."""
    call = random_call((2, 1024, 64), weight_dtype=torch.int8)
    call.x.mul_(0.01)
    call.x[:, 300] = 1024
    call.weight[:, 256:512] = 0  # the outlier's run
    y = torch.ops.chatterbox_fast.skinny_linear(*call)
    check_rounded(call, y)
    without = call._replace(x=call.x.index_fill(1, torch.tensor([300]), 0.0))
    assert torch.equal(torch.ops.chatterbox_fast.skinny_linear(*without), y)


@pytest.mark.parametrize("size", [1e-34, 3e-35, 1e-36, 1e-38, 1e-42])
def test_tiny_inputs_of_int8_stay_finite(size: float) -> None:
    """Steps too small to be counted in a float are not; what is lost then is less than 1e-38."""
    call = random_call((2, 130, 5), weight_dtype=torch.int8)
    call.x.div_(call.x.abs().max()).mul_(size)
    y = torch.ops.chatterbox_fast.skinny_linear(*call)
    weights = call.weight.double().abs().sum(dim=1) * call.scale
    off = (size / 16383 + torch.finfo(torch.float32).tiny) * weights
    assert ((y - call.oracle()).abs() <= off).all()


@given(
    shape=some.tuples(some.integers(1, 8), some.integers(1, 2100), some.integers(1, 40)),
    dtype=some.sampled_from(FLOATING),
    weight_dtype=some.sampled_from(WEIGHTS),
)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_any_shape_and_dtype(
    shape: tuple[int, int, int], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    """Exactly where weights are floating."""
    call = whole_call(shape, dtype, weight_dtype)
    y = torch.ops.chatterbox_fast.skinny_linear(*call)
    expected = call.oracle()
    if call.scale is None:
        assert torch.equal(y, expected.to(dtype))
        return
    check_rounded(call, y)


@pytest.mark.parametrize("weight_dtype", WEIGHTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 16, 5), (2, 16, 0), (0, 0, 0), (2, 0, 5)], ids=str)
def test_empty(backend: Any, shape: tuple[int, int, int], weight_dtype: torch.dtype) -> None:
    """Without inputs all outputs are 0."""
    call = random_call(shape, torch.bfloat16, weight_dtype)
    y = ops.skinny_linear(*call, backend=backend)
    assert torch.equal(y, torch.zeros(shape[0], shape[2], dtype=torch.bfloat16))


@pytest.mark.parametrize("value", [127, -128])
@pytest.mark.parametrize("x", [1.0, -3.7, 1e-30, 1e30])
def test_extreme_int8_weights_do_not_overflow(x: float, value: int) -> None:
    inputs = 8192
    weight = torch.full((3, inputs), value, dtype=torch.int8)
    call = Call(torch.full((2, inputs), x), weight, torch.ones(3))
    y = torch.ops.chatterbox_fast.skinny_linear(*call)
    torch.testing.assert_close(y, call.oracle().float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("weight_dtype", WEIGHTS)
def test_nan_and_infinity_stay_in_their_row(
    backend: Any, bad: float, weight_dtype: torch.dtype
) -> None:
    for inputs, where in ((100, 0), (100, 16), (100, 99), (2060, 700), (2060, 2059)):
        call = random_call((3, inputs, 5), torch.float32, weight_dtype)
        clean = ops.skinny_linear(*call, backend=backend)
        call.x[1, where] = bad
        finite = torch.ones(3, 5, dtype=torch.bool)
        finite[1] = False
        if weight_dtype != torch.int8:
            call.weight[2, where] = bad
            finite[:, 2] = False
        y = ops.skinny_linear(*call, backend=backend)
        assert torch.equal(y.isfinite(), finite)
        assert torch.equal(y[finite], clean[finite])


@pytest.mark.parametrize("weight_dtype", WEIGHTS)
@pytest.mark.parametrize(
    "shape", [(1, 1024, 6563), (2, 1024, 6563), (3, 1024, 6563), (2, 4096, 1023)]
)
def test_the_same_bits_by_any_number_of_threads(
    threads: Any, shape: tuple[int, int, int], weight_dtype: torch.dtype
) -> None:
    """Also where several outputs are taken at once, which wide layers do: their sums differ."""
    call = random_call(shape, torch.float32, weight_dtype)
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        results.append(torch.ops.chatterbox_fast.skinny_linear(*call))
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("inputs", [1000, 2500])
@pytest.mark.parametrize("weight_dtype", WEIGHTS)
def test_a_row_does_not_depend_on_the_others(weight_dtype: torch.dtype, inputs: int) -> None:
    call = random_call((8, inputs, 33), torch.float32, weight_dtype)
    y = torch.ops.chatterbox_fast.skinny_linear(*call)
    for row in range(8):
        alone = call._replace(x=call.x[row : row + 1])
        assert torch.equal(torch.ops.chatterbox_fast.skinny_linear(*alone), y[row : row + 1])


# ---- arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(9, 6)}, r"x must be \(M, 6\) as weight has, M at most 8, got \[9, 6\]"),
        ({"x": torch.zeros(2, 5)}, r"x must be \(M, 6\) as weight has, .*, got \[2, 5\]"),
        ({"x": torch.zeros(6)}, r"x must be \(M, 6\) as weight has, .*, got \[6\]"),
        ({"x": torch.zeros(2, 6).double()}, "x must be float32, float16 or bfloat16, got Double"),
        ({"x": torch.zeros(2, 6).int()}, "x must be float32, float16 or bfloat16, got Int"),
        ({"x": torch.zeros(6, 2).T}, r"x must be contiguous, got strides \[1, 2\]"),
        (
            {"weight": torch.zeros(4, 6).double()},
            "weight must be float32, float16, bfloat16 or int8, got Double",
        ),
        ({"weight": torch.zeros(4, 6, dtype=torch.uint8)}, "weight must be .* int8, got Byte"),
        ({"weight": torch.zeros(6)}, r"weight must be \(N, K\), got \[6\]"),
        ({"weight": torch.zeros(1, 4, 6)}, r"weight must be \(N, K\), got \[1, 4, 6\]"),
        ({"weight": torch.zeros(6, 4).T}, r"weight must be contiguous, got strides \[1, 4\]"),
        (
            {"weight": torch.zeros(4, 6, dtype=torch.int8)},
            "scale must be given for an int8 weight, got None",
        ),
        ({"scale": torch.zeros(4)}, "scale must be None for a floating weight, got a tensor"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(2, 6), "weight": torch.zeros(4, 6), "scale": None}
    with pytest.raises(RuntimeError, match=f"chatterbox_fast::skinny_linear: {message}"):
        torch.ops.chatterbox_fast.skinny_linear(**{**arguments, **change})


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.zeros(4).double(), "scale must be Float, got Double"),
        (torch.zeros(5), r"scale must be \(4,\), got \[5\]"),
        (torch.zeros(4, 1), r"scale must be \(4,\), got \[4, 1\]"),
        (torch.zeros(8)[::2], r"scale must be contiguous, got strides \[2\]"),
    ],
)
def test_a_bad_scale_is_named(scale: Tensor, message: str) -> None:
    weight = torch.zeros(4, 6, dtype=torch.int8)
    with pytest.raises(RuntimeError, match=f"chatterbox_fast::skinny_linear: {message}"):
        torch.ops.chatterbox_fast.skinny_linear(torch.zeros(2, 6), weight, scale)


# ---- the op as torch sees it


def test_the_extension_is_what_a_cpu_runs() -> None:
    assert dispatch.choose("skinny_linear", CPU).backend == "extension"
    op = torch.ops.chatterbox_fast.skinny_linear.default
    assert ops.skinny_linear_by("extension") is op
    assert ops.skinny_linear_by("reference") is reference.skinny_linear


def test_float64_is_the_references() -> None:
    x, weight = torch.randn(2, 50).double(), torch.randn(7, 50).double()
    assert torch.equal(ops.skinny_linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("weight_dtype", WEIGHTS)
def test_opcheck(weight_dtype: torch.dtype) -> None:
    call = random_call((2, 33, 5), torch.bfloat16, weight_dtype)
    torch.library.opcheck(torch.ops.chatterbox_fast.skinny_linear.default, tuple(call))


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.int8])
def test_compiles_as_one_graph(weight_dtype: torch.dtype) -> None:
    def function(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
        return torch.ops.chatterbox_fast.skinny_linear(x + 1, weight, scale) * 2

    call = random_call((2, 64, 5), torch.float32, weight_dtype)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*call), function(*call))


@pytest.mark.parametrize("weight_dtype", WEIGHTS)
def test_weights_are_not_copied(weight_dtype: torch.dtype) -> None:
    """What a call allocates is its result."""
    call = random_call((2, 1024, 1024), torch.float32, weight_dtype)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        y = torch.ops.chatterbox_fast.skinny_linear(*call)
    inside = [event.name for event in profile.events()]
    assert [name for name in inside if "empty" in name or "copy" in name] == ["aten::empty"]
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert allocated <= y.numel() * 4 + 4096


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize("weight_dtype", WEIGHTS)
@pytest.mark.parametrize("dtype", FLOATING)
class TestOnAGpu:
    def test_results(self, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
        for shape in [*T3, *UGLY]:
            for rows in (1, 2, 3, 8):
                calls = some_calls((rows, *shape), dtype, weight_dtype, "cuda")
                check_error([(call, ops.skinny_linear(*call, backend="cuda")) for call in calls])

    def test_misaligned(self, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
        call = random_call((2, 1024, 33), dtype, weight_dtype, device="cuda")
        aligned = ops.skinny_linear(*call, backend="cuda")
        moved = call._replace(x=one_further(call.x), weight=one_further(call.weight))
        check_error([(moved, ops.skinny_linear(*moved, backend="cuda"))])
        assert torch.equal(ops.skinny_linear(*call, backend="cuda"), aligned)

    def test_a_captured_graph_is_replayed(
        self, dtype: torch.dtype, weight_dtype: torch.dtype
    ) -> None:
        call = random_call((2, 1024, 1024), dtype, weight_dtype, device="cuda")
        ops.skinny_linear(*call, backend="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.skinny_linear(*call, backend="cuda")
        for seed in (1, 2):
            call.x.copy_(random_call((2, 1024, 1024), dtype, weight_dtype, seed).x)
            graph.replay()
            assert torch.equal(y, ops.skinny_linear(*call, backend="cuda"))


@pytest.mark.gpu
@pytest.mark.kernel
def test_a_weight_on_another_device_is_named() -> None:
    with pytest.raises(RuntimeError, match="skinny_linear: weight must be on cuda:0, got cpu"):
        ops.skinny_linear(torch.zeros(2, 6, device="cuda:0"), torch.zeros(4, 6), backend="cuda")


def one_further(tensor: Tensor) -> Tensor:
    """A contiguous copy whose address is no multiple of 16 bytes."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return flat[1:].view_as(tensor).copy_(tensor)
