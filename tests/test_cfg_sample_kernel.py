"""cfg_sample's CUDA source: run on the CPU thread by thread, and compiled by nvcc for every GPU."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_cuda import build
from test_cfg_sample import STOP, VOCABULARY, random_case, rows_of_every_flag
from toolkit import ARCHS, KERNELS, compile_kernels
from torch import Tensor

from chatterbox_fast import ops, reference
from chatterbox_fast.sampling import SamplingParams

DRIVER = build.HERE / "cfg_sample.cpp"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
CPU = torch.device("cpu")


@dataclass
class Call:
    """One call of the op, by the kernel and by the reference."""

    logits: Tensor  # (R or 2R, V)
    seen: Tensor
    params: Tensor
    philox: Tensor
    stop_action: Tensor | None = None
    turbo: bool = False
    stop_token: int = 0
    forget: int = -1
    few_threads: bool = False
    philox_threads: int = 2**16
    flags: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.flags = torch.zeros(len(self.seen), dtype=torch.int32)

    @property
    def threads(self) -> int:
        return reference.philox_threads(self.seen.shape[1], self.philox_threads)

    def by_kernel(self, **run: Any) -> tuple[Any, build.Outcome]:
        rows, vocabulary = self.seen.shape
        guided = len(self.logits) == 2 * rows
        sizes = [
            *(rows, vocabulary, guided, self.turbo, self.stop_token, self.forget, self.threads),
            *(self.few_threads, DTYPES[self.logits.dtype], self.stop_action is not None),
        ]
        bits = self.logits.view(torch.int16) if self.logits.element_size() == 2 else self.logits
        action = self.stop_action if self.stop_action is not None else torch.zeros(1)
        arrays = [np.array(sizes, np.int64)]
        arrays += [
            tensor.clone().numpy()
            for tensor in (bits, self.seen, self.params, self.flags, self.philox, action)
        ]
        arrays.append(np.full(rows, -1, np.int64))
        outcome = build.run(DRIVER, arrays, **run)
        _, _, seen, _, flags, philox, _, token = arrays
        return (token.tolist(), seen.tolist(), flags.tolist(), philox.tolist()), outcome

    def by_reference(self) -> Any:
        vocabulary = self.seen.shape[1]
        seen, flags, philox = self.seen.clone(), self.flags.clone(), self.philox.clone()
        noise = reference.philox_exponential(philox, vocabulary, self.threads)
        token = reference.cfg_sample(
            self.logits, seen, self.params, flags, noise, stop_token=self.stop_token,
            stop_action=self.stop_action, turbo=self.turbo, forget=self.forget,
        )  # fmt: skip
        philox[:, 1] += reference.philox_increment(vocabulary, self.threads)
        return token.tolist(), seen.tolist(), flags.tolist(), philox.tolist()

    def check(self, **run: Any) -> None:
        got, outcome = self.by_kernel(**run)
        assert outcome == build.Outcome()
        assert got == self.by_reference()


def real_call(number: int) -> Call:
    """Stock's shapes, and parameters of every kind."""
    source = random.Random(number)
    case = random_case(source, turbo=bool(number % 2))
    philox = torch.tensor([[source.getrandbits(62), 4 * source.getrandbits(20)]])
    action = torch.tensor([source.choice([0, 0, 1, 2])], dtype=torch.int32)
    return Call(
        case.logits, case.seen, case.p.pack(torch.float32, CPU), philox, action,
        bool(number % 2), STOP, source.choice([-1, 6561]),
    )  # fmt: skip


def small_call(p: SamplingParams, rows: int = 2, turbo: bool = False) -> Call:
    """301 ids, which five items of 64 threads hold."""
    source = torch.Generator().manual_seed(rows)
    logits = torch.randn(2 * rows, 301, generator=source) * 3
    seen = torch.rand(rows, 301, generator=source) < 0.1
    philox = torch.randint(0, 2**40, (rows, 2), generator=source) // 4 * 4
    params = p.pack(torch.float32, CPU).repeat(rows, 1)
    return Call(logits, seen, params, philox, None, turbo, 300, -1, few_threads=True)


@pytest.mark.parametrize("start", range(0, 100, 25))
def test_real_shapes_in_every_order(start: int) -> None:
    for number in range(start, start + 25):
        order: Any = ("ascending", "descending", "shuffled")[number % 3]
        real_call(number).check(order=order, seed=number)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Half-precision logits are full of ties."""
    for number in range(12):
        call = real_call(number)
        call.logits = call.logits.to(dtype)
        call.check(order="shuffled", seed=number)


@pytest.mark.parametrize("vocabulary", [1, 2, 31, 512, 8704, 8705, 65536])
@pytest.mark.parametrize("spread", [3, 0])
def test_odd_vocabularies(vocabulary: int, spread: float) -> None:
    source = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(6, vocabulary, generator=source) * spread
    seen = torch.rand(3, vocabulary, generator=source) < 0.3
    params = torch.cat([
        SamplingParams().pack(torch.float32, CPU),
        SamplingParams(0.3, 1.5, 1.2, 0.0, 0.9, 0).pack(torch.float32, CPU),
        SamplingParams(0.0, 0.7, 2.0, 0.0, 0.7, 40).pack(torch.float32, CPU),
    ])  # fmt: skip
    philox = torch.tensor([[1, 0], [-5, 8], [2**62, 4096]])
    Call(logits, seen, params, philox).check()


def test_every_lane_of_the_random_numbers() -> None:
    """As on a GPU whose launch has fewer threads than there are ids."""
    for number in range(10):
        call = real_call(number)
        call.params[0, 3:] = torch.tensor([0.0, 0.0, 0.0])
        call.philox_threads = 1024
        call.check()


def test_rows_that_cannot_be_drawn_from() -> None:
    logits = torch.randn(4, VOCABULARY)
    logits[0, 17], logits[1, 8000], logits[2] = float("nan"), float("inf"), -float("inf")
    seen = torch.zeros(4, VOCABULARY, dtype=torch.bool)
    params = SamplingParams(0.0).pack(torch.float32, CPU).repeat(4, 1)
    call = Call(logits, seen, params, torch.zeros(4, 2, dtype=torch.long))
    call.check()
    assert call.by_kernel()[0][2] == [reference.FAILED] * 3 + [0]


def test_a_row_that_turbos_penalty_makes_infinite() -> None:
    logits, seen = torch.zeros(1, 301), torch.zeros(1, 301, dtype=torch.bool)
    logits[:, 5], seen[:, 5] = 3e38, True
    params = SamplingParams(0.0, 0.5, 1.0, 0.0, 1.0, 0).pack(torch.float32, CPU)
    philox = torch.zeros(1, 2, dtype=torch.long)
    call = Call(logits, seen, params, philox, turbo=True, few_threads=True)
    call.check()
    assert call.by_kernel()[0][2] == [reference.FAILED]


def test_a_row_that_has_stopped_keeps_its_flags() -> None:
    logits, flags, after = rows_of_every_flag(301)
    params = SamplingParams(0.0).pack(torch.float32, CPU).repeat(12, 1)
    philox = torch.arange(24).view(12, 2) * 4
    seen = torch.zeros(12, 301, dtype=torch.bool)
    call = Call(logits, seen, params, philox, stop_token=9, few_threads=True)
    call.flags = flags
    call.check()
    assert call.by_kernel()[0][2] == after


def test_what_is_forgotten_may_be_drawn_again() -> None:
    logits = torch.full((1, 301), -50.0)
    logits[:, 7] = 50.0
    params = SamplingParams(0.0).pack(torch.float32, CPU)
    seen, philox = torch.zeros(1, 301, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.long)
    call = Call(logits, seen, params, philox, forget=7, few_threads=True)
    call.check()
    token, seen_after, *_ = call.by_kernel()[0]
    assert token == [7]
    assert seen_after[0][7]


TIED = (
    SamplingParams(0, 1, 1, 0.0, 1.0, 2),
    SamplingParams(0, 1, 1, 0.0, 1.0, 5),
    SamplingParams(0, 1, 1, 1.0, 1.0, 0),
    SamplingParams(0, 1, 1, 0.0, 0.6, 0),
    SamplingParams(0, 1, 1, 0.0, 0.4, 3),
    SamplingParams(0, 1, 1, 0.0, 0.0, 0),
)


@pytest.mark.parametrize("p", TIED, ids=str)
def test_ties(p: SamplingParams) -> None:
    logits = torch.full((64, 301), -20.0)
    logits[:, [10, 20, 30, 40]] = 1.0
    logits[:, [50, 60]] = torch.tensor([0.0, -0.0])
    seen = torch.zeros(64, 301, dtype=torch.bool)
    params = p.pack(torch.float32, CPU).repeat(64, 1)
    philox = torch.arange(64)[:, None] * torch.tensor([1, 4])
    Call(logits, seen, params, philox, few_threads=True).check()


DISTRIBUTIONS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "peaked": lambda source: 6 * torch.randn(VOCABULARY, generator=source),
    "flat": lambda source: torch.randn(VOCABULARY, generator=source),
    "all equal": lambda _: torch.zeros(VOCABULARY),
    "neighbouring floats": lambda source: torch.randint(3, (VOCABULARY,), generator=source) * 2e-7,
    "close together, far below one": lambda source: (
        1e-4 * torch.randn(VOCABULARY, generator=source).index_fill(0, torch.tensor([77]), 1e5)
    ),
    "wide": lambda source: 3000 * torch.randn(VOCABULARY, generator=source),
    "half of them ruled out": lambda source: torch.where(
        torch.rand(VOCABULARY, generator=source) < 0.5,
        -32768.0,
        torch.randn(VOCABULARY, generator=source),
    ),
    "256 finite": lambda source: first_finite(256, source),
    "257 finite": lambda source: first_finite(257, source),
}
CUTS = torch.tensor([  # min_p, 1 - top_p, top_k
    [0.0, 0.0997, 0], [0.0, 0.0, 1000], [0.0, 0.05, 1000], [0.05, 0.2003, 0], [0.0, 1e-6, 0],
    [0.0, 1 - 1e-6, 0], [1.0, 0.3, 0], [0.3, 0.1, 40], [0.0, 0.0, 1], [0.0, 0.5, 8193],
])  # fmt: skip


def first_finite(count: int, source: torch.Generator) -> Tensor:
    logits = torch.randn(VOCABULARY, generator=source)
    return torch.where(torch.arange(VOCABULARY) < count, logits, -torch.inf)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_cut_is_between_the_right_two_ids(name: str) -> None:
    """Turbo's penalty rules out all others: the lowest that must stay is drawn, were it only for
    the next below it that must go, in each of some rows."""
    scores = DISTRIBUTIONS[name](torch.Generator().manual_seed(5))
    scores = scores - scores.max() - 1  # negative, so that the penalty multiplies them
    kept = scores.double().expand(len(CUTS), -1)
    for keep, column in (("top_k", 2), ("min_p", 0), ("top_p", 1)):
        kept = getattr(reference, f"_keep_{keep}")(kept, CUTS[:, column, None].double())
    order = torch.argsort(scores, descending=True, stable=True)  # of equal ids the lower stays
    places = kept[:, order].isfinite()
    lowest = places.long().cumsum(-1).argmax(-1)
    pair = torch.stack([lowest, (lowest + 1).clamp(max=VOCABULARY - 1)], dim=-1)
    seen = torch.ones(len(CUTS), VOCABULARY, dtype=torch.bool)
    seen.scatter_(1, order[pair], False)
    turns = 4
    params = torch.cat([torch.tensor([0.0, 1e4, 1.0]).expand(len(CUTS), 3), CUTS], dim=1)
    philox = torch.arange(turns * len(CUTS))[:, None] * torch.tensor([1, 4])
    call = Call(
        scores.expand(turns * len(CUTS), -1).contiguous(), seen.repeat(turns, 1),
        params.repeat(turns, 1), philox, turbo=True, stop_token=STOP,
    )  # fmt: skip
    (token, *_), outcome = call.by_kernel(order="shuffled", seed=1)
    assert outcome == build.Outcome()
    assert token == order[lowest].repeat(turns).tolist()
    by_cpu_op = ops.cfg_sample(
        call.logits, call.seen, call.params, call.flags,
        philox=call.philox, turbo=True, stop_token=STOP, backend="cuda",
    )  # fmt: skip
    assert by_cpu_op.tolist() == token


VARIED = (
    (SamplingParams(), False),
    (SamplingParams(0.7, 1.5, 1.1, 0.02, 0.8, 50), False),
    (SamplingParams(0.0, 1.5, 0.8, 0.0, 0.95, 100), True),
)


@pytest.mark.parametrize("order", build.ORDERS)
@pytest.mark.parametrize(("p", "turbo"), VARIED, ids=str)
def test_address_and_undefined_behaviour_sanitizers(p: Any, turbo: bool, order: Any) -> None:
    small_call(p, turbo=turbo).check(variant="asan", order=order, seed=3)


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitizers_where_too_many_are_alike_to_be_ranked(variant: Any) -> None:
    for p, _ in VARIED[1:]:
        call = small_call(p)
        call.logits.zero_()
        call.check(variant=variant, order="shuffled")


def test_address_sanitizer_at_stocks_size() -> None:
    for number in range(2):
        real_call(number).check(variant="asan", order="shuffled", seed=number)


@pytest.mark.parametrize(("p", "turbo"), VARIED, ids=str)
def test_thread_sanitizer(p: Any, turbo: bool) -> None:
    small_call(p, turbo=turbo).check(variant="tsan", order="shuffled", seed=3)


# ---- nvcc


@pytest.mark.parametrize("arch", ARCHS)
def test_nvcc_compiles_it_without_a_warning(arch: str, tmp_path: Path) -> None:
    """Registers, spills and shared memory are bounded."""
    entries, ptx = compile_kernels(KERNELS / "cfg_sample.cu", arch, tmp_path)
    assert len(entries) == 6
    assert "atom.shared.add.u32" in ptx, "top-k's counts: adds of 64 bits spin in shared memory"
    if arch not in ("89", "90"):
        return
    for entry in entries:
        assert entry.registers <= 128, "512 threads share 65536 registers"
        by_count, by_mass = 256 * (8 + 2 * 4) + 32, 256 * (8 + 2 * 8) + 40
        assert entry.shared == 8 * 32 + by_count + by_mass, "scratch and the two selections"
        most = 112 if "Li17E" in entry.name else 0
        assert entry.spilled <= most, "masses that the compiler keeps from pass to pass"
