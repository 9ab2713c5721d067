"""The emulator that runs CUDA kernels on the CPU: it is right, and it sees planted bugs.

Which means sees which bug: a missing barrier gives a wrong result in every order and a TSan
report; a shared access out of bounds an ASan or UBSan report; a shuffle taken for a memory fence,
blocks that write to the same place, and blocks that hand over without a fence a TSan report only;
meetings that cannot happen an error.
"""

from __future__ import annotations

import math
import platform
import re
import shutil

import numpy as np
import pytest
import torch
from host_cuda import build
from host_cuda.build import Order, Outcome, Variant

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None,
    reason="the emulator needs g++ on x86-64",
)

ORDERS: list[tuple[Order, int]] = [
    ("ascending", 0), ("descending", 0), ("shuffled", 1), ("shuffled", 2), ("shuffled", 3),
]  # fmt: skip
in_every_order = pytest.mark.parametrize(("order", "seed"), ORDERS)

BUGS = ["none", "missing barrier", "past static array", "past dynamic array", "shuffle as fence",
        "blocks share row"]  # fmt: skip
MISUSES = {
    "exit before barrier": r"__syncthreads at .*planted\.cuh:\d+: .* thread 5, which has exited",
    "two barriers": r"thread 0 of block 0 waits for thread 1, which is at __syncthreads at",
    "barrier against shuffle": r"__shfl_sync \(mask 0xffffffff\) .* thread 0, .*__syncthreads",
    "shuffle against vote": r"__ballot_sync .* waits for thread 1, which is at __shfl_sync",
    "outside mask": r"__syncwarp \(mask 0x0000ffff\) .*: thread \d+ of block 0 is not in the mask",
    "reads outside mask": r"thread 15 of block 0 reads lane 16, which is not in the mask",
    "shuffle with exited": r"__shfl_xor_sync .* waits for thread 7, which has exited",
}


def normalise(
    bug: str, variant: Variant = "plain", order: Order = "ascending", seed: int = 0
) -> tuple[Outcome, bool]:
    """The outcome, and whether the result is right."""
    rows = np.random.default_rng(0).random((3, 101), np.float32)
    normalised = np.zeros_like(rows)
    arguments = np.array([BUGS.index(bug), *rows.shape], np.int64)
    driver = build.HERE / "planted.cpp"
    outcome = build.run(driver, [arguments, rows, normalised], variant, order, seed)
    expected = rows / rows.sum(1, keepdims=True, dtype=np.float64)
    return outcome, np.allclose(normalised, expected, rtol=1e-6, atol=0)


@in_every_order
@pytest.mark.parametrize("variant", ["plain", "asan", "tsan"])
def test_a_correct_kernel_is_right_and_unreported(
    variant: Variant, order: Order, seed: int
) -> None:
    assert normalise("none", variant, order, seed) == (Outcome(), True)


@in_every_order
def test_a_missing_barrier_gives_a_wrong_result(order: Order, seed: int) -> None:
    assert normalise("missing barrier", "plain", order, seed) == (Outcome(), False)


@pytest.mark.parametrize(
    ("bug", "variant", "report"),
    [
        ("missing barrier", "tsan", "data race"),
        ("past static array", "asan", "index 2 out of bounds for type 'float [2]'"),
        ("past dynamic array", "asan", "AddressSanitizer: use-after-poison"),
        ("shuffle as fence", "tsan", "data race"),
        ("blocks share row", "tsan", "data race"),
    ],
)
def test_a_planted_bug_is_reported(bug: str, variant: Variant, report: str) -> None:
    outcome, _ = normalise(bug, variant)
    assert report in outcome.report
    assert "planted.cuh:" in outcome.report


@in_every_order
def test_only_tsan_sees_a_shuffle_taken_for_a_fence(order: Order, seed: int) -> None:
    assert normalise("shuffle as fence", "plain", order, seed) == (Outcome(), True)


HANDED_OVER = ["none", "missing fence before", "missing fence after", "missing barrier"]


def add_up(bug: str, variant: Variant, order: Order, seed: int) -> Outcome:
    """The outcome of a sum over blocks, which is right in any case: they run one after another."""
    numbers = np.arange(3 * 64, dtype=np.float32)
    arguments = np.array([HANDED_OVER.index(bug), 3, 0], np.int64)
    arrays = [arguments, numbers, np.zeros_like(numbers), np.zeros(1, np.uint32)]
    arrays.append(total := np.zeros(1, np.float32))
    outcome = build.run(build.HERE / "planted.cpp", arrays, variant, order, seed)
    assert total == numbers.sum() or outcome.report
    return outcome


@in_every_order
@pytest.mark.parametrize("variant", ["plain", "asan", "tsan"])
def test_a_fence_hands_over_from_block_to_block(variant: Variant, order: Order, seed: int) -> None:
    assert add_up("none", variant, order, seed) == Outcome()


@in_every_order
@pytest.mark.parametrize("bug", HANDED_OVER[1:])
def test_only_tsan_sees_that_nothing_was_handed_over(bug: str, order: Order, seed: int) -> None:
    assert add_up(bug, "plain", order, seed) == Outcome()
    report = add_up(bug, "tsan", order, seed).report
    assert "data race" in report
    assert "planted.cuh:" in report


@pytest.mark.parametrize("variant", ["plain", "asan"])
@pytest.mark.parametrize("kind", MISUSES)
def test_a_meeting_that_cannot_happen_is_an_error(kind: str, variant: Variant) -> None:
    arguments = np.array([-1 - list(MISUSES).index(kind)], np.int64)
    for order, seed in ORDERS:
        outcome = build.run(build.HERE / "planted.cpp", [arguments], variant, order, seed)
        assert re.search(MISUSES[kind], outcome.error), outcome
        assert not outcome.report
    assert normalise("none") == (Outcome(), True), "the next launch starts clean"


@pytest.mark.parametrize(
    ("rows", "width", "error"),
    [(0, 8, "a grid of 0 blocks of 64"), (1, 12_225, "more than 48 KB of shared memory")],
)
def test_a_launch_that_a_gpu_would_refuse_is_an_error(rows: int, width: int, error: str) -> None:
    arguments = np.array([0, rows, width], np.int64)
    values = np.ones((1, width), np.float32)
    outcome = build.run(build.HERE / "planted.cpp", [arguments, values, values.copy()])
    assert outcome == Outcome(error=error)


@in_every_order
def test_every_wrapper_does_what_cuda_documents(order: Order, seed: int) -> None:
    results = np.zeros((64, 22), np.uint64)
    counters, signed = np.zeros(2, np.uint32), np.zeros(1, np.int32)
    wide, bits = np.zeros(1, np.uint64), np.arange(65536, dtype=np.uint16)
    from_half, from_brain = np.zeros(65536, np.float32), np.zeros(65536, np.float32)
    floats = floats_to_round()
    halves, brains = np.zeros(floats.size, np.float16), np.zeros(floats.size, np.uint16)
    arrays = [results, counters, signed, wide, bits, from_half, from_brain]
    arrays += [floats, halves, brains, same := np.zeros_like(floats)]
    assert build.run(build.HERE / "wrappers.cpp", arrays, "plain", order, seed) == Outcome()

    for thread in range(64):
        np.testing.assert_array_equal(results[thread], np.array(expected_of(thread), np.uint64))
    assert counters.tolist() == [128, 63]
    assert signed == -64
    assert wide == 64 * 2**40 + sum(range(64))
    np.testing.assert_array_equal(from_half, bits.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(from_brain.view(np.uint32), bits.astype(np.uint32) << 16)
    with np.errstate(over="ignore"):
        expected = floats.astype(np.float16)
    np.testing.assert_array_equal(halves, expected)
    assert (np.signbit(halves) == np.signbit(expected))[~np.isnan(floats)].all()
    back = torch.from_numpy(brains.view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(
        back, torch.from_numpy(floats).bfloat16(), rtol=0, atol=0, equal_nan=True
    )
    np.testing.assert_array_equal(same, floats)


@in_every_order
@pytest.mark.parametrize("variant", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensor_cores_do_what_ptx_documents(
    dtype: torch.dtype, variant: Variant, order: Order, seed: int
) -> None:
    """Layouts as PTX's tables of mma.m16n8k16 and ldmatrix have them, lane by lane."""
    random = np.random.default_rng(0)
    matrices = random.integers(0, 2**16, (4, 8, 8), np.uint16)
    a, b, c = (random.integers(-9, 10, shape) for shape in ((16, 16), (16, 8), (16, 8)))
    halves, floats = bits_in(dtype, 0.1 * np.arange(64)), 0.1 * np.arange(64, dtype=np.float32)
    rows, columns = np.arange(32) // 4, np.arange(32) % 4 * 2
    operands = np.zeros((32, 6, 2), np.uint16)
    sums, expected_sums = np.zeros((2, 32, 4), np.float32)
    fragments, expected = np.zeros((2, 32, 2, 4, 2), np.uint16)
    for i in range(2):  # of the two elements of a register
        for half in range(2):
            operands[:, half, i] = bits_in(dtype, a[rows + 8 * half, columns + i])
            operands[:, 2 + half, i] = bits_in(dtype, a[rows + 8 * half, columns + 8 + i])
            operands[:, 4 + half, i] = bits_in(dtype, b[columns + 8 * half + i, rows])
            sums[:, 2 * half + i] = c[rows + 8 * half, columns + i]
            expected_sums[:, 2 * half + i] = (a @ b + c)[rows + 8 * half, columns + i]
        for matrix in range(4):
            expected[:, 0, matrix, i] = matrices[matrix, rows, columns + i]
            expected[:, 1, matrix, i] = matrices[matrix, columns + i, rows]
    number = np.array([1 if dtype == torch.float16 else 2], np.int64)
    pairs = np.zeros(64, np.uint16)
    arrays = [number, matrices, operands, floats, fragments, sums, pairs]
    driver = build.HERE / "tensor_cores.cpp"
    assert build.run(driver, arrays, variant, order, seed) == Outcome()
    np.testing.assert_array_equal(fragments, expected)
    np.testing.assert_array_equal(sums, expected_sums)
    np.testing.assert_array_equal(pairs, halves)


def bits_in(dtype: torch.dtype, values: np.ndarray) -> np.ndarray:
    """The bit patterns of numbers in a type of two bytes."""
    return torch.from_numpy(values).float().to(dtype).view(torch.int16).numpy().view(np.uint16)


def floats_to_round() -> np.ndarray:
    """Every half, the middle between neighbours, and what is next to it on both sides; of bfloat16
    a sample of the same."""
    words = np.arange(65536, dtype=np.uint16)
    halves = words.view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        middles = (halves + (words + np.uint16(1)).view(np.float16).astype(np.float32)) / 2
    brains = words.astype(np.uint32) << 16 | 0x8000
    around = [np.nextafter(middles, np.float32(sign * np.inf)) for sign in (-1, 1)]
    near = np.concatenate([middles, *around])
    sampled = np.concatenate([brains + off for off in (np.uint32(0), 1, -1)])[::3]
    return np.concatenate([near, sampled.astype(np.uint32).view(np.float32)])


def expected_of(thread: int) -> list[int]:
    """What `every_wrapper` of wrappers.cuh writes for one of its threads."""
    lane, warp = thread % 32, thread // 32 * 32
    half_warp = range(lane // 16 * 16, lane // 16 * 16 + 16)
    votes = [i for i in range(32) if (warp + i) % 3 == 0]
    x, partner = 1.5, warp + (lane ^ 9)
    shuffled = [
        warp + 5,
        thread - 3 if lane >= 3 else thread,
        2**40 + (thread + 3 if lane < 29 else thread),
        float_bits(x + partner),
    ]
    arithmetic = [
        thread.bit_count(), 32 - thread.bit_length(), (thread & -thread).bit_length(), thread,
        float_bits(math.exp(-x)), float_bits(math.log(x)), float_bits(2.0),
    ]  # fmt: skip
    return [
        1, 0, sum(1 << i for i in votes), sum(1 << i for i in votes if i in half_warp),
        *shuffled, sum(range(64)), *arithmetic, 64, 1, 0, float_bits(x), float_bits(thread - 32),
        float_bits(-(2.0**-46)),
    ]  # fmt: skip


def float_bits(x: float) -> int:
    return int(np.float32(x).view(np.uint32))
