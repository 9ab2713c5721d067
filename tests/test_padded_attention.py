"""padded_attention: every implementation against a float64 oracle, with torch's own attention in
the same dtype as the measure, and against diffusers' Attention as stock calls it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from chatterbox.models.s3gen.decoder import mask_to_bias
from chatterbox.models.s3gen.utils.mask import add_optional_chunk_mask
from diffusers.models.attention_processor import Attention
from hypothesis import given, settings
from hypothesis import strategies as some
from toolkit import ulp
from torch import Tensor

from chatterbox_fast import dispatch, ops, reference

CPU = torch.device("cpu")
FLOATING = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("cuda", "reference")
"""As options name them: "cuda" is the extension, on a CPU its CPU op."""
DIM = 64


class Call(NamedTuple):
    """The arguments of one call of the op."""

    qkv: Tensor
    lengths: Tensor
    heads: int

    def valid(self) -> list[int]:
        """How many positions of each row are."""
        return [min(max(n, 0), self.qkv.shape[1]) for n in self.lengths.tolist()]

    def parts(self, row: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """q, k and v ``(H, N, 64)`` of a row's valid positions."""
        own = self.qkv[row, : self.valid()[row]].to("cpu", dtype)
        return own.view(-1, 3, self.heads, DIM).permute(1, 2, 0, 3).unbind()

    def by(self, function: Any, **more: Any) -> Tensor:
        out: Tensor = function(self.qkv, self.lengths, self.heads, **more)
        return out


def random_call(
    positions: int, lengths: Sequence[int], *,
    heads: int = 2, dtype: torch.dtype = torch.float32, spread: float = 1.0, seed: int = 0,
    device: str = "cpu",
) -> Call:  # fmt: skip
    """Pads are NaN, but for every third, which is infinite. `spread`: of the scores."""
    source = torch.Generator().manual_seed(seed + positions)
    qkv = torch.randn(len(lengths), positions, 3, heads, DIM, generator=source)
    qkv[:, :, 0] *= spread
    for row, length in enumerate(lengths):
        qkv[row, max(length, 0) :] = math.nan
        qkv[row, max(length, 0) :: 3] = math.inf
    given = torch.tensor(list(lengths), dtype=torch.int32, device=device)
    return Call(qkv.flatten(2).to(device, dtype), given, heads)


def oracle(call: Call, row: int) -> Tensor:
    """``(H, N, 64)`` in float64, written out."""
    q, k, v = call.parts(row, torch.float64)
    return (q @ k.transpose(1, 2) / math.sqrt(DIM)).softmax(-1) @ v


def by_torch(call: Call, row: int) -> Tensor:
    """``(H, N, 64)`` by torch's attention, in the dtype of the call."""
    q, k, v = call.parts(row, call.qkv.dtype)
    return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]


def check(call: Call, run: Callable[[Call], Tensor]) -> Tensor:
    """Runs it: pads are 0, the error at most twice torch's plus a unit in the last place."""
    out = run(call)
    rows, positions, _ = call.qkv.shape
    assert out.shape == (rows, positions, call.heads * DIM)
    assert out.dtype == call.qkv.dtype
    own = stocks = unit = 0.0
    for row, length in enumerate(call.valid()):
        assert not out[row, length:].any()
        if length == 0:
            continue
        got = out[row, :length].cpu().view(length, call.heads, DIM).transpose(0, 1)
        assert got.isfinite().all()
        expected = oracle(call, row)
        own = max(own, float((got.double() - expected).abs().max()))
        stocks = max(stocks, float((by_torch(call, row).double() - expected).abs().max()))
        unit = max(unit, ulp(expected, call.qkv.dtype))
    assert own <= 2 * stocks + unit, f"{own} against {stocks} and {unit}"
    return out


CASES: tuple[tuple[int, list[int], int], ...] = (
    (1, [1], 1),
    (5, [5, 3, 0, 1], 2),
    (64, [64, 63], 1),
    (130, [65, 130, 33, -4], 2),
    (200, [129, 900], 3),
    (20, [9, 9, 20, 25, 9, 0, 0], 2),
    (7, [0, 0], 2),
    (0, [0, 4], 2),
    (9, [], 2),
)
"""Positions, lengths and heads: about the sizes of tiles, and outside of what there is."""


def by(backend: Any) -> Callable[[Call], Tensor]:
    return lambda call: call.by(ops.padded_attention, backend=backend)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results(case: Any, backend: Any, dtype: torch.dtype) -> None:
    positions, lengths, heads = case
    check(random_call(positions, lengths, heads=heads, dtype=dtype), by(backend))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("backend", BACKENDS)
def test_stocks_size(backend: Any, dtype: torch.dtype) -> None:
    """Two rows of guidance and eight heads."""
    for positions, length in ((512, 500), (1024, 1000)):
        check(random_call(positions, [length] * 2, heads=8, dtype=dtype), by(backend))


@pytest.mark.parametrize("spread", [30.0, 1000.0])
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_far_apart(backend: Any, dtype: torch.dtype, spread: float) -> None:
    check(random_call(150, [140, 70], dtype=dtype, spread=spread), by(backend))


def far_below_zero(dtype: torch.dtype) -> Call:
    """Every score is about -200, whose exponential no float holds."""
    call = random_call(150, [140, 70], dtype=dtype)
    parts = call.qkv.view(2, 150, 3, 2, DIM)
    parts[:, :, 0, :, -1], parts[:, :, 1, :, -1] = 40, -40
    return call


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_far_below_zero(backend: Any, dtype: torch.dtype) -> None:
    check(far_below_zero(dtype), by(backend))


@given(
    positions=some.integers(0, 150),
    lengths=some.lists(some.integers(-3, 160), max_size=3),
    heads=some.integers(1, 3),
    dtype=some.sampled_from(FLOATING),
    backend=some.sampled_from(BACKENDS),
)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_any_shape(
    positions: int, lengths: list[int], heads: int, dtype: torch.dtype, backend: Any
) -> None:
    check(random_call(positions, lengths, heads=heads, dtype=dtype), by(backend))


def stock_attention(heads: int) -> Attention:
    """diffusers' layer as the flow's blocks make it, whose last projection changes nothing."""
    torch.manual_seed(0)
    attention = Attention(query_dim=heads * DIM, heads=heads, dim_head=DIM, bias=False)
    with torch.no_grad():
        attention.to_out[0].weight.copy_(torch.eye(heads * DIM))
        attention.to_out[0].bias.zero_()
    return attention.eval()


@pytest.mark.parametrize("lengths", [[90, 90], [90, 37]])
def test_it_is_diffusers_attention_with_stocks_mask(lengths: list[int]) -> None:
    """A row that fills the bucket, and one that does not: stock's float mask is -1e10 there."""
    heads, positions = 8, 90
    attention = stock_attention(heads)
    x = torch.randn(2, positions, heads * DIM, generator=torch.Generator().manual_seed(1))
    valid = torch.arange(positions) < torch.tensor(lengths)[:, None]
    mask = add_optional_chunk_mask(x, valid[:, None], False, False, 0, 0, -1)
    with torch.no_grad():
        stock = attention(x, attention_mask=mask_to_bias(mask == 1, x.dtype))
        layers = (attention.to_q, attention.to_k, attention.to_v)
        qkv = torch.cat([layer(x) for layer in layers], dim=-1)
    call = Call(qkv, torch.tensor(lengths, dtype=torch.int32), heads)
    for backend in BACKENDS:
        out = call.by(ops.padded_attention, backend=backend)
        for row, length in enumerate(lengths):
            expected = oracle(call, row).transpose(0, 1).flatten(1)
            error, theirs = (float((y[row, :length] - expected).abs().max()) for y in (out, stock))
            assert error <= 2 * theirs + ulp(expected, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_exact(backend: Any) -> None:
    call = random_call(70, [70, 51])
    call = call._replace(qkv=call.qkv.double())
    out = call.by(ops.padded_attention, backend=backend)
    for row, length in enumerate(call.valid()):
        expected = oracle(call, row).transpose(0, 1).flatten(1)
        assert (out[row, :length] - expected).abs().max() < 1e-14
        assert not out[row, length:].any()


@pytest.mark.parametrize("dtype", FLOATING)
def test_the_same_bits_by_any_number_of_threads_and_rows(threads: Any, dtype: torch.dtype) -> None:
    call = random_call(300, [290, 130, 300], heads=3, dtype=dtype)
    results = []
    for count in (1, 2, 2, 1):
        threads(count)
        results.append(by("cuda")(call))
    assert all(torch.equal(y, results[0]) for y in results)
    alone = Call(call.qkv[1:2], call.lengths[1:2], call.heads)
    assert torch.equal(by("cuda")(alone)[0], results[0][1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stays_in_its_row_and_head(backend: Any, bad: float, dtype: torch.dtype) -> None:
    nan_stays_in_its_row_and_head(bad, dtype, by(backend))


def nan_stays_in_its_row_and_head(
    bad: float, dtype: torch.dtype, run: Callable[[Call], Tensor]
) -> None:
    """Of a query in its output, of a value in its element, of a key everywhere."""
    call = random_call(100, [100, 80, 99], dtype=dtype)
    clean = run(call).view(3, 100, 2, DIM)
    qkv = call.qkv.view(3, 100, 3, 2, DIM)
    qkv[0, 40, 0, 1, 5] = math.nan
    qkv[1, 70, 2, 0, 9] = bad
    qkv[2, 98, 1, 1, 3] = math.nan
    out = run(call).view(3, 100, 2, DIM)
    finite = torch.ones(3, 100, 2, DIM, dtype=torch.bool)
    finite[0, 40, 1] = False
    finite[1, :80, 0, 9] = False
    finite[2, :99, 1] = False
    assert torch.equal(out.isfinite(), finite)
    assert torch.equal(out[finite], clean[finite])


def test_a_gradient_is_the_references() -> None:
    call = random_call(9, [9, 4])
    qkv = call.qkv.nan_to_num(1.0, 1.0).requires_grad_()
    call._replace(qkv=qkv).by(ops.padded_attention).sum().backward()
    assert qkv.grad is not None
    assert qkv.grad[:, :4].any()
    assert not qkv.grad[1, 4:].any()


def test_the_op_itself_keeps_nothing_for_a_gradient() -> None:
    call = random_call(9, [9, 4])
    call.qkv.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        torch.ops.chatterbox_fast.padded_attention(*call)
    assert kept == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 384)}, r"qkv must be \(R, T, 3 \* 2 \* 64\), got \[2, 384\]"),
        ({"qkv": torch.zeros(2, 6, 383)}, r"qkv must be \(R, T, 3 \* 2 \* 64\), got \[2, 6, 383\]"),
        ({"qkv": torch.zeros(2, 6, 576)}, r"qkv must be \(R, T, 3 \* 2 \* 64\), got \[2, 6, 576\]"),
        ({"heads": 1}, r"qkv must be \(R, T, 3 \* 1 \* 64\), got \[2, 6, 384\]"),
        ({"heads": 0, "qkv": torch.zeros(2, 6, 0)}, "heads must be at least 1, got 0"),
        ({"heads": 2**60}, r"qkv must be \(R, T, 3 \* 1152921504606846976 \* 64\), got"),
        ({"qkv": torch.zeros(2, 6, 384).double()}, "qkv must be float32, .*, got Double"),
        ({"qkv": torch.zeros(6, 2, 384).transpose(0, 1)}, "qkv must be contiguous, got strides"),
        ({"qkv": torch.zeros(4609)[1:].view(2, 6, 384)}, "qkv must be aligned to 16 bytes, got"),
        ({"lengths": torch.zeros(2).long()}, "lengths must be Int, got Long"),
        ({"lengths": torch.zeros(4).int()[::2]}, r"lengths must be contiguous, got strides \[2\]"),
        ({"lengths": torch.zeros(1).int()}, r"lengths must be \(2,\) as qkv has rows, got \[1\]"),
        ({"lengths": torch.zeros(2, 1).int()}, r"lengths must be \(2,\) .*, got \[2, 1\]"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"qkv": torch.zeros(2, 6, 384), "lengths": torch.zeros(2).int(), "heads": 2}
    with pytest.raises(RuntimeError, match=f"chatterbox_fast::padded_attention: {message}"):
        torch.ops.chatterbox_fast.padded_attention(**{**arguments, **change})


@pytest.mark.parametrize("dtype", FLOATING)
def test_opcheck(dtype: torch.dtype) -> None:
    call = random_call(9, [9, 4], dtype=dtype)
    torch.library.opcheck(torch.ops.chatterbox_fast.padded_attention.default, tuple(call))


def test_it_is_in_a_full_graph() -> None:
    call = random_call(20, [20, 7])
    compiled = torch.compile(ops.padded_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(call.by(compiled), by("cuda")(call))


def test_the_reference_reads_nothing_on_the_host() -> None:
    call = random_call(20, [20, 7])
    fake = torch._subclasses.FakeTensorMode()
    with fake:
        on_fake = call._replace(qkv=torch.empty(2, 20, 384), lengths=torch.empty(2).int())
        assert on_fake.by(reference.padded_attention).shape == (2, 20, 128)


def test_which_implementation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.choose("padded_attention", CPU).backend == "extension"
    own = torch.ops.chatterbox_fast.padded_attention.default
    assert ops.padded_attention_by("extension") is own
    assert ops.padded_attention_by("reference") is reference.padded_attention
    asked = []
    in_torch = reference.padded_attention
    monkeypatch.setattr(ops, "padded_attention_by", lambda b: asked.append(b) or in_torch)
    call = random_call(5, [5])
    wide = call._replace(qkv=call.qkv.double())
    with_gradient = call._replace(qkv=call.qkv.requires_grad_())
    for each in (random_call(5, [5]), wide, with_gradient):
        each.by(ops.padded_attention)
    with torch.no_grad():
        with_gradient.by(ops.padded_attention)
    assert asked == ["extension", "reference", "reference", "extension"]


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", FLOATING)
class TestOnAGpu:
    def test_results(self, dtype: torch.dtype) -> None:
        for positions, lengths, heads in (*CASES, (1024, [1000] * 2, 8), (4000, [3900], 8)):
            call = random_call(positions, lengths, heads=heads, dtype=dtype, device="cuda")
            check(call, by("cuda"))

    def test_a_graph_serves_every_length(self, dtype: torch.dtype) -> None:
        call = random_call(300, [300, 300], heads=8, dtype=dtype, device="cuda")
        by("cuda")(call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = by("cuda")(call)
        for lengths in ([300, 300], [1, 65], [0, 299]):
            call.lengths.copy_(torch.tensor(lengths))
            graph.replay()
            check(call, lambda _: out)
            assert torch.equal(out, by("cuda")(call))


@pytest.mark.gpu
@pytest.mark.kernel
def test_lengths_on_another_device_are_named() -> None:
    call = random_call(9, [4], device="cuda")._replace(lengths=torch.zeros(1).int())
    with pytest.raises(RuntimeError, match="lengths must be on cuda:0, got cpu"):
        by("cuda")(call)
