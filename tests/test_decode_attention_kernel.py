"""decode_attention's CUDA source: run on the CPU thread by thread, and compiled by nvcc."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_cuda import build
from test_decode_attention import (
    DIM,
    FLOATING,
    LONG_CAPACITIES,
    Call,
    check,
    check_seeds,
    of_capacity,
    random_call,
    with_other_neighbours,
)
from toolkit import ARCHS, KERNELS, compile_kernels
from torch import Tensor

DRIVER = build.HERE / "decode_attention.cpp"
DTYPES = {dtype: number for number, dtype in enumerate(FLOATING)}
PARTIAL = DIM + 2
SHARE = 64
"""Slots that a split has at least."""


def by_kernel(splits: int = 1, **run: Any) -> Any:
    """A function that calls the kernel, which is to leave its arrivals as they were."""

    def run_it(call: Call) -> Tensor:
        rows, _, heads, _ = call.qkv.shape
        caches = (call.k_cache, call.v_cache)
        out = torch.full((rows, heads * DIM), -99.0, dtype=call.qkv.dtype)
        sizes = [rows, heads, caches[0].shape[2], len(call.position), len(list_of(call)), splits,
                 DTYPES[call.qkv.dtype], DTYPES[caches[0].dtype], call.cos is not None,
                 *(stride for cache in caches for stride in cache.stride()[:2])]  # fmt: skip
        none = torch.zeros(0)
        arrivals = np.zeros(rows * heads, np.uint32)
        arrays = [np.array(sizes, np.int64)]
        arrays += [bits_of(tensor).numpy() for tensor in (call.qkv, *map(whole, caches))]
        arrays += [
            (none if tensor is None else tensor).numpy()
            for tensor in (call.position, call.flags, call.cos, call.sin, call.watched,
                           call.probabilities)
        ]  # fmt: skip
        partials = np.full((rows * heads, splits, PARTIAL), np.nan, np.float32)
        arrays += [bits_of(out).numpy(), partials, arrivals]
        assert build.run(DRIVER, arrays, **run) == build.Outcome()
        assert not arrivals.any()
        return out

    return run_it


def list_of(call: Call) -> list[Any]:
    return [] if call.watched is None else call.watched.tolist()


def whole(cache: Tensor) -> Tensor:
    """All of the memory that a cache is a view of, from its first element on."""
    assert cache.storage_offset() == 0
    return torch.empty(0, dtype=cache.dtype).set_(cache.untyped_storage())


def bits_of(tensor: Tensor) -> Tensor:
    """The same memory, of a type that numpy has."""
    return tensor.view(torch.int16) if tensor.element_size() == 2 else tensor


@pytest.mark.parametrize("cache_dtype", FLOATING)
@pytest.mark.parametrize(("position", "splits"), [(0, 16), (63, 16), (249, 4), (499, 8), (999, 16)])
def test_a_decode_step(position: int, splits: int, cache_dtype: torch.dtype) -> None:
    """Of fewer heads than T3's, each of which is a block of its own."""
    call = random_call(1024, [position], rows=2, heads=3, cache_dtype=cache_dtype)
    check(call, by_kernel(splits, order="shuffled"))


@pytest.mark.parametrize("cache_dtype", FLOATING)
@pytest.mark.parametrize("capacity", LONG_CAPACITIES)
def test_a_long_prefix(capacity: int, cache_dtype: torch.dtype) -> None:
    """In as many splits as the two rows of T3 and a single head are given."""
    call = random_call(capacity, [capacity - 1], rows=1, cache_dtype=cache_dtype, watched=[(0, 1)])
    for splits in (count(2, capacity), count(1, capacity, heads=1)):
        check(call, by_kernel(splits))


@pytest.mark.parametrize("cache_dtype", FLOATING)
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("rope", [True, False])
def test_rows_at_positions_of_their_own(
    rope: bool, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    for capacity, positions in ((1, [0]), (7, [6, 0, 3]), (300, [299, 0, 1, 33, 128, 127, 200])):
        call = random_call(capacity, positions, dtype=dtype, cache_dtype=cache_dtype, rope=rope)
        check(call, by_kernel(3))


@pytest.mark.parametrize("cache_dtype", FLOATING)
@pytest.mark.parametrize("splits", [1, 2, 3, 7, 64])
def test_every_length(splits: int, cache_dtype: torch.dtype) -> None:
    """Around what a warp, a block and a split take at a time."""
    positions = sorted({
        near + off for near in (0, 16, 32, 64, 128, 192, 256, 512) for off in (-2, -1, 0, 1)
    } & set(range(520)))  # fmt: skip

    def make(seed: int) -> Call:
        return random_call(
            520, positions, heads=1, cache_dtype=cache_dtype, watched=[(9, 0)], seed=seed
        )

    check_seeds(make, by_kernel(splits), seeds=4)


def test_64_rows() -> None:
    check(random_call(40, list(range(40)) + list(range(24)), heads=3), by_kernel())


@pytest.mark.parametrize("outside", [20, 21, -1, 2**40, -(2**62)])
@pytest.mark.parametrize("splits", [1, 3])
def test_a_position_outside_is_flagged(splits: int, outside: int) -> None:
    watched = [(0, 1), (1, 0), (2, 1)]
    every = random_call(20, [outside], rows=3, watched=watched)
    one = random_call(20, [4, outside, 19], watched=watched)
    for call in (every, one):
        call.flags[:] = 4  # of others: kept
        check(call, by_kernel(splits))


@pytest.mark.parametrize("order", build.ORDERS)
@pytest.mark.parametrize("splits", [1, 4])
def test_watched_rows_and_heads(splits: int, order: Any) -> None:
    """In any order, and one of them twice."""
    watched = [(2, 1), (0, 3), (0, 0), (2, 1), (1, 2)]
    for positions in ([0, 76, 299], [130]):
        call = random_call(300, positions, rows=3, heads=4, watched=watched)
        after = check(call, by_kernel(splits, order=order, seed=3))
        assert after.probabilities is not None
        assert torch.equal(after.probabilities[0], after.probabilities[3])


@pytest.mark.parametrize("cache_dtype", FLOATING)
def test_caches_that_are_views(cache_dtype: torch.dtype) -> None:
    call = random_call(12, [11], rows=2, heads=3, cache_dtype=cache_dtype)
    slots = torch.randn(2, 3, 20, DIM).to(cache_dtype)[:, :, :12]
    turned = torch.randn(3, 2, 16, DIM).to(cache_dtype).transpose(0, 1)[:, :, :12]
    check(replace(call, k_cache=slots, v_cache=turned), by_kernel(2))


@pytest.mark.parametrize("cache_dtype", FLOATING)
@pytest.mark.parametrize("splits", [1, 3])
def test_what_lies_behind_the_position_is_not_read(splits: int, cache_dtype: torch.dtype) -> None:
    call = random_call(200, [70, 0, 198], watched=[(0, 0), (1, 1)], cache_dtype=cache_dtype)
    for row, slot in enumerate(call.slots()):
        call.k_cache[row, :, slot + 1 :] = float("nan")
        call.v_cache[row, :, slot + 1 :] = float("nan")
    check(call, by_kernel(splits))


@pytest.mark.parametrize("spread", [30.0, 1000.0])
def test_scores_far_apart(spread: float) -> None:
    call = random_call(500, [499, 250], spread=spread, watched=[(0, 0), (1, 1)])
    check(call, by_kernel(8))


def test_a_score_of_minus_infinity_has_no_weight() -> None:
    """Also where a whole split has no other."""
    call = random_call(300, [299], rows=1, heads=1, rope=False)
    call.qkv[0, 0, :, 0] = 1.0
    short = replace(call, k_cache=call.k_cache[:, :, 150:], v_cache=call.v_cache[:, :, 150:])
    expected = by_kernel()(replace(short.copy(), position=torch.tensor([149])))
    call.k_cache[0, 0, :150, 0] = -float("inf")
    for splits in (1, 2, 5):
        torch.testing.assert_close(by_kernel(splits)(call), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("splits", [1, 3])
def test_nan_stays_in_its_row_and_head(splits: int) -> None:
    call = random_call(150, [149], rows=3, heads=2)
    clean = by_kernel(splits)(call.copy()).view(3, 2, DIM)
    call.k_cache[1, 1, 40, 5] = float("nan")
    call.v_cache[2, 0, 40, 5] = float("inf")
    out = by_kernel(splits)(call).view(3, 2, DIM)
    finite = torch.ones(3, 2, DIM, dtype=torch.bool)
    finite[1, 1] = False
    finite[2, 0, 5] = False
    assert torch.equal(out.isfinite(), finite)
    assert torch.equal(out[finite], clean[finite])


@pytest.mark.parametrize("cache_dtype", FLOATING)
def test_the_same_bits_in_every_order(cache_dtype: torch.dtype) -> None:
    call = random_call(600, [599, 250], cache_dtype=cache_dtype, watched=[(0, 1)])
    results = []
    for order, seed in itertools.product(build.ORDERS, (3, 4)):
        own = call.copy()
        results.append([by_kernel(8, order=order, seed=seed)(own), own.k_cache, own.probabilities])
    for later in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(later, results[0], strict=True))


@pytest.mark.parametrize(("rows", "heads"), [(0, 2), (2, 0)])
def test_empty(rows: int, heads: int) -> None:
    assert by_kernel()(random_call(5, [3], rows=rows, heads=heads)).shape == (rows, heads * DIM)


def count(rows: int, capacity: int, heads: int = 16) -> int:
    """Splits that a GPU of 132 multiprocessors is given."""
    sizes = np.array([-1, rows * heads, capacity, 132], np.int64)
    assert build.run(DRIVER, [sizes]) == build.Outcome()
    return int(sizes[0])


@pytest.mark.parametrize("position", [63, 300])
def test_capacity_does_not_matter(position: int) -> None:
    """Though the number of splits follows from it."""
    call = random_call(1024, [position], rows=2, heads=3)
    expected = by_kernel(count(2, 1024, heads=3))(call.copy())
    for capacity in (position + 1, 400, 1000):
        own = of_capacity(call, capacity)
        assert torch.equal(by_kernel(count(2, capacity, heads=3))(own), expected)


def test_neighbours_do_not_matter() -> None:
    call = random_call(200, [150], rows=2, heads=3)
    expected = by_kernel(3)(call.copy()).view(2, 3, DIM)
    for row, head in ((0, 0), (1, 2)):
        out = by_kernel(3)(with_other_neighbours(call, row, head)).view(2, 3, DIM)
        assert (out == expected).all(-1).nonzero().tolist() == [[row, head]]


def test_split_counts() -> None:
    """Four blocks for each multiprocessor, where the capacity has shares enough."""

    assert [count(2, capacity) for capacity in (1, 64, 65, 256, 512, 1024, 8192)] == [
        1, 1, 2, 4, 8, 16, 17,
    ]  # fmt: skip
    assert [count(rows, 1024) for rows in (1, 2, 8, 32, 64)] == [16, 16, 5, 2, 1]
    assert count(1, 8192, heads=1) == 64


# ---- sanitizers

SMALL: list[tuple[int, int, dict[str, Any]]] = [
    (3, 0, {"positions": [130, 65, 200], "watched": [(0, 1), (2, 0)]}),
    (2, 0, {"positions": [1, 20, 0], "watched": [(0, 1), (2, 0)]}),
    (1, 9, {"positions": [70], "rows": 3, "rope": False}),
]
"""Splits, slots between a head's cache and the next one's, and a call: a position a row, as T3's
Llama has it, with all that is optional; and one for all, as its GPT-2 has it, with nothing."""


@pytest.mark.parametrize("order", build.ORDERS)
@pytest.mark.parametrize("cache_dtype", FLOATING)
@pytest.mark.parametrize("dtype", FLOATING)
def test_address_and_undefined_behaviour_sanitizers(
    dtype: torch.dtype, cache_dtype: torch.dtype, order: Any
) -> None:
    """Each array ends where its last element does."""
    for splits, apart, how in SMALL:
        capacity = max(how["positions"]) + 1

        def make(seed: int, capacity: int = capacity, apart: int = apart, how: Any = how) -> Call:
            call = random_call(
                capacity + apart, dtype=dtype, cache_dtype=cache_dtype, seed=seed, **how
            )
            k_cache, v_cache = call.k_cache[:, :, :capacity], call.v_cache[:, :, :capacity]
            cos, sin = (None if t is None else t[:capacity] for t in (call.cos, call.sin))
            return replace(call, k_cache=k_cache, v_cache=v_cache, cos=cos, sin=sin)

        check_seeds(make, by_kernel(splits, variant="asan", order=order, seed=3), seeds=4)


@pytest.mark.parametrize("cache_dtype", FLOATING)
def test_thread_sanitizer(cache_dtype: torch.dtype) -> None:
    """Three splits of a row, which hand over to the last one, and a row that fails."""

    def make(seed: int) -> Call:
        return random_call(
            140, [139, 70, 140], heads=1, cache_dtype=cache_dtype, watched=[(0, 0), (2, 0)],
            seed=seed,
        )  # fmt: skip

    check_seeds(make, by_kernel(3, variant="tsan", order="shuffled", seed=3), seeds=4)


# ---- nvcc


@pytest.mark.parametrize("arch", ARCHS)
def test_nvcc_compiles_it_without_a_warning(arch: str, tmp_path: Path) -> None:
    """Nothing is spilled, the caches are read 16 bytes at a time, and sums are fused."""
    entries, ptx = compile_kernels(KERNELS / "decode_attention.cu", arch, tmp_path)
    assert len(entries) == len(FLOATING) ** 2
    bodies = ptx.split(".entry ")[1:]
    for body in bodies:
        loads = len(re.findall(r"ld\.global\.v4", body))
        of_floats = re.search(r"(?<!hal)fEEv", body.partition("(")[0])  # not __half
        of_a_block = 8 if of_floats else 16  # keys, at a time
        assert loads == 2 * SHARE // of_a_block, "keys and values of a share"
        assert "fma.rn.f32" in body
        assert "membar" in body or "fence" in body
    for entry in entries if arch in ("89", "90") else ():
        assert entry.spilled == 0
        assert entry.registers <= 128, "four blocks a multiprocessor"
        assert entry.shared <= 4 * (DIM + 16 * PARTIAL) + 16
