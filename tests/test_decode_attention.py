"""decode_attention: every implementation against a float64 oracle, with the error of what it
replaces as the measure: transformers' rotation and F.scaled_dot_product_attention, in float32."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import engine_of
from hypothesis import given, settings
from hypothesis import strategies as some
from toolkit import ulp
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from chatterbox_fast import dispatch, ops, reference

CPU = torch.device("cpu")
FLOATING = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("cuda", "reference")
"""As options name them: "cuda" is the extension, on a CPU its CPU op."""
DIM = 64
LONG_CAPACITIES = (2048, 4096, 8192)
"""What an engine allocates for requests that outgrow 1024 slots."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call."""

    qkv: Tensor
    k_cache: Tensor
    v_cache: Tensor
    position: Tensor
    flags: Tensor
    cos: Tensor | None = None
    sin: Tensor | None = None
    watched: Tensor | None = None
    probabilities: Tensor | None = None

    @property
    def arguments(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]

    def copy(self) -> Call:
        """With storage of its own, in the layout it has."""
        return Call(*(None if tensor is None else own_copy(tensor) for tensor in self.arguments))

    def slots(self) -> list[int]:
        """Each row's position; -1 where it is outside."""
        capacity = self.k_cache.shape[2]
        every = self.position.expand(len(self.qkv)).tolist()
        return [slot if 0 <= slot < capacity else -1 for slot in every]

    def rotated(self, row: int, slot: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """q and k ``(H, D)`` of a row, rotated by transformers in `dtype`."""
        q, k, _ = self.qkv[row].to(dtype)
        if self.cos is None or self.sin is None:
            return q, k
        cos, sin = (table[slot][None].to(dtype) for table in (self.cos, self.sin))
        q, k = apply_rotary_pos_emb(q[None, :, None], k[None, :, None], cos, sin)
        return q[0, :, 0], k[0, :, 0]


def own_copy(tensor: Tensor) -> Tensor:
    size, stride = tensor.shape, tensor.stride()
    return torch.empty_strided(size, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def random_call(
    capacity: int,
    positions: Sequence[int],
    *,
    rows: int | None = None,
    heads: int = 2,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype = torch.float32,
    rope: bool = True,
    watched: Sequence[tuple[int, int]] = (),
    spread: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
) -> Call:
    """`positions`: one for each row, or one for all `rows`. `spread`: of the scores."""
    source = torch.Generator().manual_seed(seed)

    def draw(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=source).to(device, of)

    rows = len(positions) if rows is None else rows
    qkv = draw(rows, 3, heads, DIM)
    qkv[:, 0] *= spread
    angles = draw(capacity + 3, DIM // 2).repeat(1, 2)
    pairs = torch.tensor(watched, dtype=torch.int32, device=device).view(-1, 2)
    return Call(
        qkv.to(dtype),
        draw(rows, heads, capacity, DIM, of=cache_dtype),
        draw(rows, heads, capacity, DIM, of=cache_dtype),
        torch.tensor(positions, dtype=torch.long, device=device),
        torch.zeros(len(positions), dtype=torch.int32, device=device),
        angles.cos() if rope else None,
        angles.sin() if rope else None,
        pairs if watched else None,
        draw(len(watched), capacity) if watched else None,
    )


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Written out, in the dtype of q ``(H, D)``: output ``(H, D)``, probabilities ``(H, S)``."""
    weights = ((k @ q[..., None])[..., 0] / DIM**0.5).softmax(-1)
    return (weights[:, None] @ v)[:, 0], weights


def stock_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What stock calls, in float32."""
    return F.scaled_dot_product_attention(q[None, :, None], k[None], v[None])[0, :, 0]


class Errors:
    """The largest error so far, stock's, and a unit in the last place."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.own, self.stocks, self.unit = dtype, 0.0, 0.0, 0.0

    def add(self, got: Tensor, stock: Tensor, expected: Tensor) -> None:
        assert got.isfinite().all()
        self.own = max(self.own, float((got.double() - expected).abs().max()))
        self.stocks = max(self.stocks, float((stock.double() - expected).abs().max()))
        self.unit = max(self.unit, ulp(expected, self.dtype))

    def check(self) -> None:
        found = f"{self.own} against {self.stocks} and {self.unit}"
        assert self.own <= 2 * self.stocks + self.unit, found


Run = Callable[[Call], Tensor]


def by_backend(backend: Any) -> Run:
    return lambda call: ops.decode_attention(*call.arguments, backend=backend)


def check(call: Call, run: Run) -> Call:
    """Runs a copy of `call` and compares all that it returns and writes; returns the copy."""
    errors, of_weights = Errors(call.qkv.dtype), Errors(torch.float32)
    after = compare(call, run, errors, of_weights)
    errors.check()
    of_weights.check()
    return after


def check_seeds(make: Callable[[int], Call], run: Run, seeds: int = 8) -> None:
    """`check` of what `make` draws from several seeds, the largest errors of all of them compared.

    For calls of few values, of which stock's error may be 0 by luck.
    """
    calls = [make(seed) for seed in range(seeds)]
    errors, of_weights = Errors(calls[0].qkv.dtype), Errors(torch.float32)
    for call in calls:
        compare(call, run, errors, of_weights)
    errors.check()
    of_weights.check()


def compare(call: Call, run: Run, errors: Errors, of_weights: Errors) -> Call:
    """Runs a copy of `call`, which it returns; errors of rounding are added to those given."""
    before, call = call, call.copy()
    rows, _, heads, _ = call.qkv.shape
    out = run(call)
    assert out.dtype == call.qkv.dtype
    assert out.shape == (rows, heads * DIM)
    check_appended(before, call)
    for row, slot in enumerate(call.slots()):
        own = out[row].view(heads, DIM)
        watched = watched_by(call, row)
        if slot < 0:
            assert not own.any()
            assert all(not weights.any() for _, weights in watched)
            continue
        k, v = (cache[row, :, : slot + 1] for cache in (call.k_cache, call.v_cache))
        expected, weights = attention(
            call.rotated(row, slot, torch.float64)[0], k.double(), v.double()
        )
        q, _ = call.rotated(row, slot, torch.float32)
        errors.add(own, stock_attention(q, k.float(), v.float()).to(out.dtype), expected)
        for head, got in watched:
            of_stock = attention(q, k.float(), v.float())[1][head]
            of_weights.add(got[: slot + 1], of_stock, weights[head])
            assert not got[slot + 1 :].any()
    return call


def watched_by(call: Call, row: int) -> list[tuple[int, Tensor]]:
    """The heads watched in a row, and what was seen."""
    if call.watched is None or call.probabilities is None:
        return []
    pairs = zip(call.watched.tolist(), call.probabilities, strict=True)
    return [(head, seen) for (watched_row, head), seen in pairs if watched_row == row]


def check_appended(before: Call, after: Call) -> None:
    """k, rotated in float32, and v are in their slot, and nothing else was written."""
    expected = before.copy()
    for row, slot in enumerate(before.slots()):
        if slot < 0:
            expected.flags[row % len(expected.flags)] |= reference.FAILED
            continue
        expected.k_cache[row, :, slot] = before.rotated(row, slot, torch.float32)[1]
        expected.v_cache[row, :, slot] = before.qkv[row, 2]
    names = [field.name for field in fields(Call) if field.name != "probabilities"]
    for name in names:
        was, now = getattr(expected, name), getattr(after, name)
        assert (was is None) == (now is None)
        if was is not None:
            torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True, msg=name)


# ---- results


@pytest.mark.parametrize("cache_dtype", FLOATING)
@pytest.mark.parametrize("position", [0, 1, 99, 499, 1023])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decode_step(backend: Any, position: int, cache_dtype: torch.dtype) -> None:
    call = random_call(1024, [position], rows=2, heads=16, cache_dtype=cache_dtype)
    check(call, by_backend(backend))


@pytest.mark.parametrize("cache_dtype", FLOATING)
@pytest.mark.parametrize("capacity", LONG_CAPACITIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_prefix(backend: Any, capacity: int, cache_dtype: torch.dtype) -> None:
    """To its last slot."""
    call = random_call(capacity, [capacity - 1], rows=1, cache_dtype=cache_dtype, watched=[(0, 1)])
    check(call, by_backend(backend))


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_a_narrow_cache_is_read_as_it_is(cache_dtype: torch.dtype) -> None:
    """Subnormal ones, infinities and NaN among them: of one position, attention is its value."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(cache_dtype).float()
    call = random_call(1, [0], heads=len(values) // DIM, cache_dtype=cache_dtype, rope=False)
    call.qkv[0, 2] = values.view(-1, DIM)
    call.qkv[0, :2] = 0
    out = torch.ops.chatterbox_fast.decode_attention(*call.arguments)
    torch.testing.assert_close(out[0], values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("cache_dtype", FLOATING)
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_at_positions_of_their_own(
    threads: Any, backend: Any, rope: bool, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    threads(1)  # these are small
    for capacity, positions in ((1, [0]), (7, [6, 0, 3]), (300, [299, 0, 1, 33, 128, 127, 200])):
        call = random_call(capacity, positions, dtype=dtype, cache_dtype=cache_dtype, rope=rope)
        check(call, by_backend(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_64_rows(threads: Any, backend: Any) -> None:
    threads(1)
    check(random_call(40, list(range(40)) + list(range(24)), heads=3), by_backend(backend))


@pytest.mark.parametrize("cache_dtype", FLOATING)
def test_every_length(threads: Any, cache_dtype: torch.dtype) -> None:
    threads(1)
    for start in (0, 64):
        positions = list(range(start, start + 64))
        check(random_call(130, positions, cache_dtype=cache_dtype), by_backend("cuda"))


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("position", [0, 127, 128, 300, 999])
def test_any_split_count(splits: int, position: int) -> None:
    call = random_call(1000, [position], rows=1, watched=[(0, 1)])
    op = torch.ops.chatterbox_fast.decode_attention
    check(call, lambda call: op(*call.arguments, splits=splits))


@pytest.mark.parametrize("outside", [20, 21, -1, -20, 2**40, -(2**62)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_position_outside_is_flagged(backend: Any, outside: int) -> None:
    watched = [(0, 1), (1, 0), (2, 1)]
    every = random_call(20, [outside], rows=3, watched=watched)
    one = random_call(20, [4, outside, 19], watched=watched)
    for call in (every, one):
        call.flags[:] = 4  # of others: kept
        after = check(call, by_backend(backend))
        bits = [4 | reference.FAILED * (slot == outside) for slot in call.position.tolist()]
        assert after.flags.tolist() == bits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cache_dtype", FLOATING)
def test_watched_rows_and_heads(backend: Any, cache_dtype: torch.dtype) -> None:
    """In any order, and one of them twice."""
    watched = [(2, 1), (0, 3), (0, 0), (2, 1), (1, 2)]
    for positions in ([0, 76, 299], [130]):
        call = random_call(
            300, positions, rows=3, heads=4, watched=watched, cache_dtype=cache_dtype
        )
        after = check(call, by_backend(backend))
        assert after.probabilities is not None
        assert torch.equal(after.probabilities[0], after.probabilities[3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_watched(backend: Any) -> None:
    call = random_call(9, [4], rows=2)
    none = replace(call, watched=torch.zeros(0, 2).int(), probabilities=torch.zeros(0, 9))
    check(none, by_backend(backend))


@pytest.mark.parametrize("cache_dtype", FLOATING)
@pytest.mark.parametrize("backend", BACKENDS)
def test_caches_that_are_views(backend: Any, cache_dtype: torch.dtype) -> None:
    """Of a layer, of its first slots; rows and heads the other way round."""
    call = random_call(12, [11], rows=2, heads=3, cache_dtype=cache_dtype)
    whole = torch.randn(2, 3, 2, 3, 20, DIM).to(cache_dtype)
    layer = whole[1, 2, :, :, :12]
    layers = replace(call, k_cache=layer, v_cache=whole[0, 1, :, :, 3:15])
    turned = replace(call, k_cache=whole[0, :, :, 1, :12].transpose(0, 1)[:, :2])
    turned = replace(turned, qkv=call.qkv[:, :, :2].contiguous(), v_cache=layer[:, :2])
    for views in (layers, turned):
        check(views, by_backend(backend))
    rest = whole.clone()
    ops.decode_attention(*layers.arguments, backend=backend)
    changed = (whole != rest).any(-1)
    expected = torch.zeros_like(changed)
    expected[1, 2, :, :, 11] = expected[0, 1, :, :, 14] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("bad", [1e4, float("nan"), float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_behind_the_position_does_not_matter(backend: Any, bad: float) -> None:
    if backend == "reference" and not math.isfinite(bad):
        pytest.skip("the reference multiplies it by 0")
    call = random_call(200, [70, 0, 198], watched=[(0, 0), (1, 1)])
    spoilt = call.copy()
    for row, slot in enumerate(call.slots()):
        spoilt.k_cache[row, :, slot + 1 :] = bad
        spoilt.v_cache[row, :, slot + 1 :] = -bad
    assert torch.equal(by_backend(backend)(spoilt), by_backend(backend)(call))
    assert spoilt.probabilities is not None
    assert call.probabilities is not None
    assert torch.equal(spoilt.probabilities, call.probabilities)


@pytest.mark.parametrize("spread", [30.0, 1000.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_far_apart(backend: Any, spread: float) -> None:
    call = random_call(500, [499, 250], spread=spread, watched=[(0, 0), (1, 1)])
    check(call, by_backend(backend))


def test_a_score_of_minus_infinity_has_no_weight() -> None:
    """Also where a whole slice has no other."""
    call = random_call(600, [599], rows=1, heads=1, rope=False, watched=[(0, 0)])
    call.qkv[0, 0, :, 0] = 1.0
    call.k_cache[0, 0, :300, 0] = -math.inf
    short = replace(
        call, k_cache=call.k_cache[:, :, 300:], v_cache=call.v_cache[:, :, 300:],
        position=torch.tensor([299]), watched=None, probabilities=None,
    )  # fmt: skip
    for splits in (1, 2, 4, 64):
        out = torch.ops.chatterbox_fast.decode_attention(*call.arguments, splits=splits)
        torch.testing.assert_close(out, by_backend("cuda")(short), rtol=1e-5, atol=1e-6)
        assert call.probabilities is not None
        assert not call.probabilities[0, :300].any()


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row_and_head(backend: Any, where: str) -> None:
    call = random_call(150, [149], rows=3, heads=2)
    clean = by_backend(backend)(call.copy()).view(3, 2, DIM)
    if where == "q":
        call.qkv[1, 0, 1, 5] = math.nan
    else:
        {"k": call.k_cache, "v": call.v_cache}[where][1, 1, 40, 5] = math.nan
    out = by_backend(backend)(call).view(3, 2, DIM)
    finite = torch.ones(3, 2, DIM, dtype=torch.bool)
    finite[1, 1] = False
    if where == "v":
        finite[1, 1] = torch.arange(DIM) != 5
    assert torch.equal(out.isfinite(), finite)
    assert torch.equal(out[finite], clean[finite])


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_and_values_are_read_as_they_are_stored(backend: Any) -> None:
    """At position 0 the output is v, rounded to the cache's dtype."""
    call = random_call(4, [0], rows=2, cache_dtype=torch.bfloat16)
    out = by_backend(backend)(call)
    assert torch.equal(out, call.qkv[:, 2].bfloat16().float().flatten(1))


@given(
    capacity=some.integers(1, 300),
    rows=some.integers(1, 6),
    heads=some.integers(1, 4),
    types=some.tuples(some.sampled_from(FLOATING), some.sampled_from(FLOATING)),
    rope=some.booleans(),
    splits=some.integers(0, 64),
    data=some.data(),
)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_any_call(
    capacity: int,
    rows: int,
    heads: int,
    types: tuple[torch.dtype, torch.dtype],
    rope: bool,
    splits: int,
    data: Any,
) -> None:
    count = data.draw(some.sampled_from([1, rows]))
    slots = some.integers(-2, capacity + 1)
    positions = data.draw(some.lists(slots, min_size=count, max_size=count))
    pair = some.tuples(some.integers(0, rows - 1), some.integers(0, heads - 1))
    watched = data.draw(some.lists(pair, max_size=4))

    def make(seed: int) -> Call:
        return random_call(
            capacity, positions, rows=rows, heads=heads, dtype=types[0], cache_dtype=types[1],
            rope=rope, watched=watched, seed=seed,
        )  # fmt: skip

    op = torch.ops.chatterbox_fast.decode_attention
    check_seeds(make, lambda call: op(*call.arguments, splits=splits))


@pytest.mark.parametrize(("rows", "heads"), [(0, 2), (2, 0), (0, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: Any, rows: int, heads: int) -> None:
    for count in {1, rows}:
        call = random_call(5, [3] * count, rows=rows, heads=heads)
        assert by_backend(backend)(call).shape == (rows, heads * DIM)


# ---- the same bits


@pytest.mark.parametrize("cache_dtype", FLOATING)
def test_neither_the_run_nor_the_number_of_threads_matters(
    threads: Any, cache_dtype: torch.dtype
) -> None:
    for rows, position in ((2, 999), (1, 400)):
        call = random_call(
            1024, [position], rows=rows, heads=16, cache_dtype=cache_dtype, watched=[(0, 5)]
        )
        results = []
        for count in (1, 2, 3, 2):
            threads(count)
            own = call.copy()
            results.append((by_backend("cuda")(own), own.k_cache, own.probabilities))
        for later, first in itertools.product(results[1:], results[:1]):
            assert all(torch.equal(a, b) for a, b in zip(later, first, strict=True))


def of_capacity(call: Call, capacity: int) -> Call:
    """The same in smaller caches of its own."""
    k_cache, v_cache = (cache[:, :, :capacity].clone() for cache in (call.k_cache, call.v_cache))
    return replace(call, k_cache=k_cache, v_cache=v_cache)


def with_other_neighbours(call: Call, row: int, head: int) -> Call:
    """The same row and head among others."""
    rows, _, heads, _ = call.qkv.shape
    slots, positions = call.k_cache.shape[2], call.position.tolist()
    other = random_call(slots, positions, rows=rows, heads=heads, seed=1)
    other.qkv[row, :, head] = call.qkv[row, :, head]
    other.k_cache[row, head] = call.k_cache[row, head]
    other.v_cache[row, head] = call.v_cache[row, head]
    return replace(other, cos=call.cos, sin=call.sin)


def test_capacity_does_not_matter() -> None:
    call = random_call(1024, [300], rows=2, heads=16)
    expected = by_backend("cuda")(call.copy())
    for capacity in (301, 400, 1000):
        assert torch.equal(by_backend("cuda")(of_capacity(call, capacity)), expected)


def test_neighbours_do_not_matter() -> None:
    call = random_call(400, [300], rows=3, heads=4)
    expected = by_backend("cuda")(call.copy()).view(3, 4, DIM)
    for row, head in ((0, 0), (1, 2), (2, 3)):
        out = by_backend("cuda")(with_other_neighbours(call, row, head)).view(3, 4, DIM)
        same = (out == expected).all(-1)
        assert same.nonzero().tolist() == [[row, head]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_caches_that_lie_between_each_other(backend: Any) -> None:
    """Row by row, or head by head."""
    call = random_call(12, [11], rows=2, heads=3)
    by_row, by_head = torch.randn(2, 2, 3, 12, DIM), torch.randn(2, 3, 2, 12, DIM)
    check(replace(call, k_cache=by_row[:, 0], v_cache=by_row[:, 1]), by_backend(backend))
    check(replace(call, k_cache=by_head[:, :, 0], v_cache=by_head[:, :, 1]), by_backend(backend))


def test_strides_of_one_do_not_matter() -> None:
    """A capacity, a row and a head of 1 have no neighbour to be apart from."""
    call = random_call(1, [0], rows=2, heads=3)
    turned = [torch.randn(2, 3, DIM, 1).mT for _ in "kv"]
    check(replace(call, k_cache=turned[0], v_cache=turned[1]), by_backend("cuda"))
    call = random_call(5, [3], rows=1, heads=1)
    odd = [torch.randn(5 * DIM).as_strided((1, 1, 5, DIM), (1, 3, DIM, 1)) for _ in "kv"]
    check(replace(call, k_cache=odd[0], v_cache=odd[1]), by_backend("cuda"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_it(backend: Any) -> None:
    call = random_call(100, [77, 3], watched=[(0, 0), (1, 1)])
    expected = call.copy()
    out = by_backend(backend)(expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(by_backend(backend)(call), out)
    assert call.probabilities is not None
    assert expected.probabilities is not None
    assert torch.equal(call.probabilities, expected.probabilities)


# ---- arguments


def arguments(**changed: Any) -> list[Any]:
    call = Call(
        torch.zeros(2, 3, 4, DIM),
        torch.zeros(2, 4, 5, DIM),
        torch.zeros(2, 4, 5, DIM),
        torch.zeros(2, dtype=torch.long),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(5, DIM),
        torch.zeros(5, DIM),
        torch.zeros(1, 2, dtype=torch.int32),
        torch.zeros(1, 5),
    )
    return replace(call, **changed).arguments


ODD = torch.zeros(2, 4, 5 * DIM + 1)[:, :, :-1].view(2, 4, 5, DIM)
MOVED = torch.zeros(2 * 4 * 5 * DIM + 1)[1:].view(2, 4, 5, DIM)
SHAPE = (2, 4, 5, DIM)
CACHE, LONG, BETWEEN = torch.zeros(SHAPE), torch.zeros(2 * 4 * 5 * DIM + DIM), torch.zeros(6000)
BAD = [
    (
        {"qkv": torch.zeros(65, 3, 4, DIM)},
        r"qkv must be \(B, 3, H, 64\), B at most 64, .* got .65, 3",
    ),
    ({"qkv": torch.zeros(1).expand(2, 3, 1025, DIM)}, "qkv must be .*, H at most 1024, got .2, 3"),
    ({"qkv": torch.zeros(2, 3, 4, 32)}, r"qkv must be \(B, 3, H, 64\), .*, got .2, 3, 4, 32"),
    ({"qkv": torch.zeros(2, 4, 4, DIM)}, r"qkv must be \(B, 3, H, 64\), .*, got .2, 4, 4, 64"),
    ({"qkv": torch.zeros(2, 3, DIM)}, r"qkv must be \(B, 3, H, 64\), .*, got .2, 3, 64"),
    ({"qkv": torch.zeros(2, 3, 4, DIM).double()}, "qkv must be float32, float16 or bfloat16, got"),
    ({"qkv": torch.zeros(2, 4, 3, DIM).transpose(1, 2)}, "qkv must be contiguous, got strides"),
    ({"k_cache": torch.zeros(1, 4, 5, DIM)}, r"k_cache must be \(2, 4, C, 64\) as qkv has, .* got"),
    ({"k_cache": torch.zeros(2, 3, 5, DIM)}, r"k_cache must be \(2, 4, C, 64\) as qkv has, .* got"),
    ({"k_cache": torch.zeros(2, 4, 0, DIM)}, r"k_cache must be .*, C in \[1, 16777216\], got"),
    (
        {"k_cache": torch.zeros(1).expand(2, 4, 2**24 + 1, DIM)},
        r"k_cache must be .*, C in \[1, 16777216\], got .2, 4, 16777217, 64",
    ),
    ({"k_cache": torch.zeros(2, 4, 5, DIM).int()}, "k_cache must be float32, float16 or bfloat16"),
    ({"k_cache": torch.zeros(2, 4, 5, 2 * DIM)[..., :DIM]}, "k_cache must be contiguous in its"),
    ({"k_cache": torch.zeros(2, 4, DIM, 5).mT}, "k_cache must be contiguous in its last two"),
    ({"k_cache": ODD}, "k_cache must be .* aligned to 16 bytes in every row and head, got strides"),
    ({"k_cache": MOVED}, "k_cache must be .* aligned to 16 bytes in every row and head, got"),
    (
        {"k_cache": torch.zeros(1, 4, 5, DIM).expand(2, -1, -1, -1)},
        "k_cache must be of rows and heads of its own, got strides",
    ),
    (
        {"k_cache": torch.zeros(5000).as_strided(SHAPE, (20 * DIM, 4 * DIM, DIM, 1))},
        "k_cache must be of rows and heads of its own, got strides .1280, 256",
    ),
    (
        {"v_cache": torch.zeros(5000).as_strided(SHAPE, (15 * DIM, 5 * DIM, DIM, 1))},
        "v_cache must be of rows and heads of its own, got strides .960, 320",
    ),
    (
        {"v_cache": torch.zeros(5000).as_strided(SHAPE, (5 * DIM, 9 * DIM, DIM, 1))},
        "v_cache must be of rows and heads of its own, got strides .320, 576",
    ),
    (
        {"k_cache": CACHE, "v_cache": CACHE},
        "v_cache must be of memory of its own, got some of k_cache's",
    ),
    (
        {"k_cache": LONG[DIM:].view(SHAPE), "v_cache": LONG[:-DIM].view(SHAPE)},
        "v_cache must be of memory of its own, got some of k_cache's",
    ),
    (
        {
            "k_cache": BETWEEN.as_strided(SHAPE, (40 * DIM, 10 * DIM, DIM, 1)),
            "v_cache": BETWEEN.as_strided(SHAPE, (40 * DIM, 10 * DIM, DIM, 1), 4 * DIM),
        },
        "v_cache must be of memory of its own, got some of k_cache's",
    ),
    ({"v_cache": torch.zeros(2, 4, 6, DIM)}, r"v_cache must be .*2, 4, 5, 64.* as k_cache is, got"),
    ({"v_cache": torch.zeros(2, 4, 5, DIM).half()}, "v_cache must be .* as k_cache is, got"),
    ({"v_cache": ODD}, "v_cache must be .* aligned to 16 bytes in every row and head, got strides"),
    ({"position": torch.zeros(2)}, "position must be .*, got"),
    ({"position": torch.zeros(3, dtype=torch.long)}, r"position must be \(1,\) or \(2,\), got"),
    ({"position": torch.zeros(4, dtype=torch.long)[::2]}, "position must be contiguous, got"),
    ({"flags": torch.zeros(1, dtype=torch.int32)}, r"flags must be .*2.* as position is, got .*1"),
    ({"flags": torch.zeros(2, dtype=torch.long)}, "flags must be .*, got"),
    ({"sin": None}, "sin must be given, as cos is, got None"),
    ({"cos": None}, "sin must be None, as cos is, got a tensor"),
    ({"cos": torch.zeros(4, DIM)}, r"cos must be \(5 or more, 64\), got"),
    ({"sin": torch.zeros(5, 32)}, r"sin must be \(5 or more, 64\), got"),
    ({"sin": torch.zeros(5, DIM).double()}, "sin must be .*, got"),
    ({"cos": torch.zeros(DIM, 5).T}, "cos must be contiguous, got strides"),
    ({"watched": None}, "probabilities must be None, as watched is, got a tensor"),
    ({"probabilities": None}, "probabilities must be given, as watched is, got None"),
    (
        {"watched": torch.zeros(1, 3, dtype=torch.int32)},
        r"watched must be \(W, 2\), W at most 429496729, got",
    ),
    ({"watched": torch.zeros(1, 2, dtype=torch.long)}, "watched must be .*, got"),
    ({"probabilities": torch.zeros(2, 5)}, r"probabilities must be \(1, 5\), got"),
    ({"probabilities": torch.zeros(1, 5).half()}, "probabilities must be .*, got"),
]
"""What every kernel refuses."""


@pytest.mark.parametrize(("changed", "message"), BAD)
def test_bad_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"chatterbox_fast::decode_attention: {message}"):
        torch.ops.chatterbox_fast.decode_attention(*arguments(**changed))


def test_bad_scratch_and_splits_are_named() -> None:
    op = torch.ops.chatterbox_fast.decode_attention
    with pytest.raises(RuntimeError, match=r"splits must be in \[0, 64\], got 65"):
        op(*arguments(), splits=65)
    with pytest.raises(RuntimeError, match="arrivals must be of 8 or more, got"):
        op(*arguments(), torch.zeros(7, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="arrivals must be Int, got Long"):
        op(*arguments(), torch.zeros(8, dtype=torch.long))


@pytest.mark.parametrize("pair", [(2, 0), (0, 4), (-1, 0), (0, -1)])
def test_a_cpu_names_a_pair_that_there_is_not(pair: tuple[int, int]) -> None:
    watched = torch.tensor([pair], dtype=torch.int32)
    message = r"watched must be of rows in \[0, 2\) and heads in \[0, 4\), got"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.chatterbox_fast.decode_attention(*arguments(watched=watched))


@pytest.mark.parametrize("pair", [(2, 0), (0, 4), (-1, 0), (0, -1)])
def test_the_reference_leaves_what_a_pair_that_there_is_not_would_get(pair: Any) -> None:
    """As the GPU's kernels do: it may not look at a value either."""
    call = random_call(9, [4, 9], heads=4, watched=[(0, 1), pair, (1, 3)])
    assert call.probabilities is not None
    before = call.probabilities[1].clone()
    by_backend("reference")(call)
    assert torch.equal(call.probabilities[1], before)
    assert call.probabilities[0].sum() == pytest.approx(1)
    assert not call.probabilities[2].any(), "its row failed"


# ---- the op as torch sees it


def test_the_extension_is_what_a_cpu_runs() -> None:
    assert dispatch.choose("decode_attention", CPU).backend == "extension"
    op = torch.ops.chatterbox_fast.decode_attention.default
    assert ops.decode_attention_by("extension") is op


def test_float64_is_the_references() -> None:
    call = random_call(20, [13], rows=2)
    wide = Call(*(t.double() if t is not None and t.is_floating_point() else t
                  for t in call.arguments))  # fmt: skip
    out = ops.decode_attention(*wide.arguments)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), by_backend("cuda")(call), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("watched", [(), ((0, 1), (1, 0))])
def test_opcheck(watched: Any) -> None:
    call = random_call(9, [4], rows=2, cache_dtype=torch.bfloat16, watched=watched)
    arrivals = torch.zeros(4, dtype=torch.int32)
    op = torch.ops.chatterbox_fast.decode_attention.default
    torch.library.opcheck(op, (*call.arguments, arrivals))


def test_compiles_as_one_graph() -> None:
    def function(*arguments: Any) -> Tensor:
        return torch.ops.chatterbox_fast.decode_attention(arguments[0] + 1, *arguments[1:]) * 2

    call = random_call(9, [4, 9], watched=[(0, 1)])
    own, compiled = call.copy(), torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*own.arguments), function(*call.arguments))
    for name in ("k_cache", "v_cache", "flags", "probabilities"):
        assert torch.equal(getattr(own, name), getattr(call, name))


def test_nothing_of_the_caches_size_is_allocated() -> None:
    call = random_call(1024, [1000], rows=2, heads=16)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        out = torch.ops.chatterbox_fast.decode_attention(*call.arguments)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert allocated <= out.nbytes + 4096


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize("cache_dtype", FLOATING)
@pytest.mark.parametrize("dtype", FLOATING)
class TestOnAGpu:
    def test_results(self, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
        of_two = ((2, position) for position in (0, 1, 250, 1000, 1023, 1024))
        for rows, position in ((1, 63), *of_two, (32, 1000), (64, 77)):
            call = random_call(
                1024, [position], rows=rows, heads=16, dtype=dtype, cache_dtype=cache_dtype,
                watched=[(0, 3), (rows - 1, 9)], device="cuda",
            )  # fmt: skip
            check(call, by_backend("cuda"))

    def test_a_long_prefix(self, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
        """In as many splits as this device gives two heads, and as an H200 gives T3's 32."""
        op = torch.ops.chatterbox_fast.decode_attention
        for capacity in LONG_CAPACITIES:
            call = random_call(
                capacity, [capacity - 1], rows=1, dtype=dtype, cache_dtype=cache_dtype,
                watched=[(0, 1)], device="cuda",
            )  # fmt: skip
            for splits in (0, 17):
                check(call, lambda call, n=splits: op(*call.arguments, splits=n))

    def test_every_split_count(self, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
        def make(seed: int) -> Call:
            return random_call(
                600, [599, 0, 600, 64, 321], dtype=dtype, cache_dtype=cache_dtype,
                watched=[(0, 1), (2, 0)], device="cuda", seed=seed,
            )  # fmt: skip

        op = torch.ops.chatterbox_fast.decode_attention
        for splits in (1, 2, 3, 10, 64):
            check_seeds(make, lambda call, n=splits: op(*call.arguments, splits=n))

    def test_a_graph_follows_the_position(
        self, dtype: torch.dtype, cache_dtype: torch.dtype
    ) -> None:
        """With arrivals of its own and with the caller's; runs repeat to the bit."""
        call = random_call(
            1024, [0], rows=2, heads=16, dtype=dtype, cache_dtype=cache_dtype, device="cuda"
        )
        for arrivals in (None, torch.zeros(32, dtype=torch.int32, device="cuda")):
            by_backend("cuda")(call)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = ops.decode_attention(*call.arguments, arrivals, backend="cuda")
            for position in (3, 250, 1000, 1023, 1024, 250):
                call.position.fill_(position)
                graph.replay()
                own = call.copy()
                assert torch.equal(out, by_backend("cuda")(own))
                assert torch.equal(own.k_cache, call.k_cache)
            assert call.flags.tolist() == [reference.FAILED]
            call.flags.zero_()
            assert arrivals is None or not arrivals.any()


@pytest.mark.gpu
@pytest.mark.kernel
def test_a_cache_on_another_device_is_named() -> None:
    call = replace(random_call(9, [4], device="cuda"), v_cache=torch.zeros(1, 2, 9, DIM))
    with pytest.raises(RuntimeError, match="v_cache must be on cuda:0 as qkv is, got cpu"):
        by_backend("cuda")(call)


# ---- rotation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rope_is_transformers(dtype: torch.dtype) -> None:
    q = torch.randn(2, 16, 9, DIM, dtype=dtype)
    angles = torch.randn(9, DIM // 2, dtype=dtype).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected, _ = apply_rotary_pos_emb(q, q, cos[None], sin[None])
    assert torch.equal(reference.apply_rope(q, cos, sin), expected)


def test_the_rotary_table_is_stocks(t3: Any) -> None:
    cos, sin = engine_of(t3).rotary(600)
    for position in (0, 1, 255, 599):
        index = torch.tensor([[position]])
        expected_cos, expected_sin = t3.tfmr.rotary_emb(torch.zeros(1), index)
        assert torch.equal(cos[position], expected_cos[0, 0])
        assert torch.equal(sin[position], expected_sin[0, 0])
