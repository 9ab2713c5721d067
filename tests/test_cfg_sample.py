"""cfg_sample: every implementation against the very processors and draw that stock calls."""

from __future__ import annotations

import copy
import math
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from toolkit import EMULATED
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chatterbox_fast import dispatch, ops, reference
from chatterbox_fast.reference import FAILED, FORCE, KEEP, STOPPED, SUPPRESS
from chatterbox_fast.rng import PhiloxStream
from chatterbox_fast.sampling import SamplingParams

VOCABULARY, TURBO_VOCABULARY, STOP = 8194, 6563, 6562
CPU = torch.device("cpu")
DEFAULT = SamplingParams()
TURBO = SamplingParams(0.0, 1.2, 0.8, 0.0, 0.95, 1000)
BACKENDS = ("cuda", "reference")
"""As options name them: "cuda" is the extension, on a CPU its CPU op."""


def stock_scores(logits: Tensor, ids: Tensor, p: SamplingParams, turbo: bool = False) -> Tensor:
    """The processors of T3.inference and of T3.inference_turbo, in their order."""
    scores = logits[0:1]
    if len(logits) == 2:
        cfg = torch.as_tensor(p.cfg_weight, dtype=scores.dtype)
        scores = scores + cfg * (scores - logits[1:2])
    penalise = RepetitionPenaltyLogitsProcessor(penalty=float(p.repetition_penalty))
    if not turbo:
        scores = penalise(ids, scores)
    scores = TemperatureLogitsWarper(float(p.temperature))(ids, scores)
    if p.top_k > 0:
        scores = TopKLogitsWarper(p.top_k)(ids, scores)
    scores = MinPLogitsWarper(min_p=p.min_p)(ids, scores)
    if p.top_p < 1 or not turbo:
        scores = TopPLogitsWarper(top_p=p.top_p)(ids, scores)
    return penalise(ids, scores) if turbo else scores


def stock_draw(scores: Tensor, generator: torch.Generator) -> int:
    probs = torch.softmax(scores, dim=-1)
    return int(torch.multinomial(probs, num_samples=1, generator=generator))


class Case:
    """One row: logits, ids seen, parameters; and what a call of the op leaves behind."""

    def __init__(self, logits: Tensor, ids: Tensor, p: SamplingParams, **rules: Any) -> None:
        self.logits, self.ids, self.p = logits, ids, p
        self.rules = {"stop_token": STOP, **rules}
        self.seen = torch.zeros(1, logits.shape[1], dtype=torch.bool).index_fill_(1, ids[0], True)
        self.flags = torch.zeros(1, dtype=torch.int32)

    def draw(self, backend: Any, **source: Any) -> int:
        params = self.p.pack(self.logits.dtype, CPU)
        arguments = (self.logits, self.seen, params, self.flags)
        token = ops.cfg_sample(*arguments, backend=backend, **self.rules, **source)
        assert token.shape == (1,)
        assert token.dtype == torch.long
        return int(token)


def random_case(source: random.Random, turbo: bool = False) -> Case:
    """Random logits, ids and parameters; the likeliest ids are among those seen."""
    generator = torch.Generator().manual_seed(source.getrandbits(48))
    vocabulary = TURBO_VOCABULARY if turbo else VOCABULARY
    logits = torch.randn(1 if turbo else 2, vocabulary, generator=generator)
    logits *= source.choice([1.0, 3.0, 6.0])
    often = logits[0].topk(10).indices
    ids = torch.cat([often, torch.randint(0, vocabulary, (30,), generator=generator)])[None]
    p = SamplingParams(
        cfg_weight=source.uniform(0, 1.5),
        repetition_penalty=source.choice([1.0, 1.2, 2.0, 0.7]),
        temperature=source.choice([1e-3, 0.02, 0.5, 0.8, 1.0, 1.5, 3.0]),
        min_p=source.choice([0.0, 0.02, 0.05, 0.3, 0.999, 1.0]),
        top_p=source.choice([1.0, 1.0, 0.9999, 0.95, 0.8, 0.3, 1e-6, 0.0]),
        top_k=source.choice([0, 0, 1, 50, 1000, vocabulary, 10**5]),
    )
    return Case(logits, ids, p, turbo=turbo)


@pytest.fixture
def by_exponential() -> Iterator[None]:
    """The CPU op calls exponential_, as with a torch whose numbers it cannot draw itself."""
    testing = torch.ops.chatterbox_fast_testing
    before = testing.draws_in_place()
    assert before or torch.__version__.startswith("2.6."), "stock's torch draws in another order"
    testing.draw_in_place(False)
    yield
    testing.draw_in_place(True)
    assert testing.draws_in_place() == before


@pytest.mark.usefixtures("by_exponential")
def test_draws_are_stocks_by_torchs_own_exponential() -> None:
    test_random_draws_are_stocks("cuda", 300, turbo=False)
    with torch.profiler.profile() as profile:
        test_one_generator_for_all_rows_is_multinomials("cuda")
    called = [event.name for event in profile.events()]
    assert called.count("aten::exponential_") == 2, "by multinomial, and by the op"


@pytest.mark.parametrize("turbo", [False, True])
@pytest.mark.parametrize(("backend", "draws"), [("cuda", 5000), ("reference", 500)])
def test_random_draws_are_stocks(backend: str, draws: int, turbo: bool) -> None:
    """Id for id, from one generator that both go through; 10,000 draws by the CPU op in all."""
    source = random.Random(turbo)
    ours, stocks = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    different = set()
    for number in range(draws):
        case = random_case(source, turbo)
        expected = stock_draw(stock_scores(case.logits, case.ids, case.p, turbo), stocks)
        got = case.draw(backend, generator=ours)
        assert got == expected, (number, case.p)
        assert case.seen[0, got]
        assert int(case.flags) == (STOPPED if got == STOP else 0)
        different.add(got)
    assert torch.equal(ours.get_state(), stocks.get_state())
    assert len(different) > draws / 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float64_row(backend: Any) -> None:
    case = random_case(random.Random(3))
    case.logits = case.logits.double()
    scores = stock_scores(case.logits, case.ids, case.p)
    expected = stock_draw(scores, torch.Generator().manual_seed(1))
    assert case.draw(backend, generator=torch.Generator().manual_seed(1)) == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(backend: Any, dtype: torch.dtype) -> None:
    logits = (torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    ids = torch.tensor([[3, 4]])
    for seed in range(20):
        one, two = (torch.Generator().manual_seed(seed) for _ in range(2))
        half, wide = Case(logits, ids, DEFAULT), Case(logits.float(), ids, DEFAULT)
        assert half.draw(backend, generator=one) == wide.draw("reference", generator=two)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("action", "at_top", "expected"),
    [(KEEP, True, STOP), (SUPPRESS, True, 7), (FORCE, False, STOP), (KEEP, False, 7)],
)
def test_the_stop_action(backend: Any, action: int, at_top: bool, expected: int) -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[:, 7], logits[:, STOP] = 50.0, 90.0 if at_top else -90.0
    case = Case(logits, torch.tensor([[1]]), DEFAULT)
    case.rules["stop_action"] = torch.tensor([action], dtype=torch.int32)
    assert case.draw(backend) == expected
    assert int(case.flags) == (STOPPED if expected == STOP else 0)


def test_the_stop_action_is_the_multilingual_analysers() -> None:
    """The wheel's AlignmentStreamAnalyzer writes -2**15 and 2**15 on the CFG logits."""
    scores = torch.randn(1, 50) * 5
    suppressed = scores.clone()
    suppressed[..., 9] = -(2**15)
    forced = -(2**15) * torch.ones_like(scores)
    forced[..., 9] = 2**15
    for action, expected in ((KEEP, scores), (SUPPRESS, suppressed), (FORCE, forced)):
        got = reference._act_on_stop(scores, torch.tensor([[action]]), 9)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_turbo_forgets_the_start_token(backend: Any) -> None:
    case = Case(torch.randn(1, TURBO_VOCABULARY), torch.tensor([[6561]]), TURBO, turbo=True)
    case.rules["forget"] = 6561
    token = case.draw(backend)
    assert case.seen[0].nonzero().flatten().tolist() == [token]


@pytest.mark.parametrize("backend", BACKENDS)
def test_turbos_penalty_may_raise_an_id_whose_probability_was_zero(backend: Any) -> None:
    """Stock leaves top-p out at 1, so that nothing is removed before the penalty."""
    logits = torch.full((1, TURBO_VOCABULARY), -50.0)
    logits[0, 5], logits[0, 6] = 50.0, 10.0
    p = SamplingParams(0.0, 10.0, 0.02, 0.0, 1.0)
    assert Case(logits, torch.tensor([[5]]), p, turbo=True).draw(backend) == 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_start_token_that_was_drawn_is_not_forgotten(backend: Any) -> None:
    logits = torch.full((1, TURBO_VOCABULARY), -50.0)
    logits[0, 6561] = 50.0
    case = Case(logits, torch.tensor([[6561]]), TURBO, turbo=True, forget=6561)
    assert case.draw(backend) == 6561
    assert case.seen[0].nonzero().flatten().tolist() == [6561]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("value", "penalty"), [(-30.0, 2.0), (30.0, 0.5)])
def test_a_penalty_that_leaves_the_range_of_floats(
    backend: Any, value: float, penalty: float
) -> None:
    logits = torch.full((1, 10), value)
    p = SamplingParams(0.0, penalty, 1e-37, 0.0, 1.0)
    case = Case(logits, torch.arange(10)[None], p, turbo=True, stop_token=0)
    assert case.draw(backend) == 0
    assert int(case.flags) == FAILED


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_finite_logit(backend: Any) -> None:
    logits = torch.full((2, VOCABULARY), -math.inf)
    logits[1] = 0.0
    logits[:, 77] = 1.0
    ours, stocks = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    edge = SamplingParams(top_p=0.0, min_p=1.0, top_k=1, temperature=1e-3)
    for p in (DEFAULT, edge, SamplingParams(0.5, 1.2, 0.8, 0.0, 0.95, 1000)):
        case = Case(logits, torch.tensor([[77]]), p)
        assert stock_draw(stock_scores(case.logits, case.ids, p), stocks) == 77
        assert case.draw(backend, generator=ours) == 77
    assert torch.equal(ours.get_state(), stocks.get_state())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_cannot_be_drawn_from_are_flagged(backend: Any, bad: float) -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 5] = bad
    if bad == -math.inf:
        logits[:] = bad
    case = Case(logits, torch.tensor([[3]]), SamplingParams(0.0))
    assert case.draw(backend) == 0
    assert int(case.flags) == FAILED
    assert case.seen[0].nonzero().flatten().tolist() == [3]


FLAGS_AFTER = {
    0: (FAILED, STOPPED, 0),
    FAILED: (FAILED, FAILED | STOPPED, FAILED),
    STOPPED: (STOPPED, STOPPED, STOPPED),
    STOPPED | FAILED: (STOPPED | FAILED, STOPPED | FAILED, STOPPED | FAILED),
}
"""Flags on entry -> after a row that cannot be drawn from, the stop token, another token."""


def rows_of_every_flag(vocabulary: int) -> tuple[Tensor, Tensor, list[int]]:
    """Logits of which NaN, 9 and 7 are drawn, flags on entry, flags after: a row for each pair."""
    ends = torch.zeros(3, vocabulary)
    ends[0, 5], ends[1, 9], ends[2, 7] = math.nan, 50.0, 50.0
    entry = torch.tensor(list(FLAGS_AFTER), dtype=torch.int32).repeat_interleave(3)
    return ends.repeat(4, 1), entry, [flag for after in FLAGS_AFTER.values() for flag in after]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_has_stopped_keeps_its_flags(backend: Any) -> None:
    """Each row by itself; tokens, mask and random state go on as without any flag."""
    logits, flags, after = rows_of_every_flag(300)
    params = SamplingParams(0.0).pack(torch.float32, CPU).repeat(12, 1)
    results = []
    for own in (flags, torch.zeros_like(flags)):
        seen = torch.zeros(12, 300, dtype=torch.bool)
        philox = torch.arange(24).view(12, 2) * 4
        token = ops.cfg_sample(
            logits, seen, params, own, stop_token=9, philox=philox, backend=backend
        )
        results.append((token.tolist(), seen.tolist(), philox.tolist()))
    assert flags.tolist() == after
    assert results[0] == results[1]
    assert results[0][0] == [0, 9, 7] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties(backend: Any) -> None:
    """Of equal ids top-k keeps all, top-p removes the higher first, min-p 1 keeps all."""
    logits = torch.full((1, 100), -20.0)
    logits[0, [10, 20, 30, 40]] = 1.0

    def drawn(p: SamplingParams) -> set[int]:
        source = torch.Generator().manual_seed(1)
        rules = {"stop_token": 99}
        cases = [Case(logits, torch.tensor([[0]]), p, **rules) for _ in range(80)]
        return {case.draw(backend, generator=source) for case in cases}

    assert drawn(SamplingParams(0, 1, 1, 0.0, 1.0, 2)) == {10, 20, 30, 40}
    assert drawn(SamplingParams(0, 1, 1, 1.0, 1.0, 0)) == {10, 20, 30, 40}
    assert drawn(SamplingParams(0, 1, 1, 0.0, 0.6, 0)) == {10, 20, 30}
    assert drawn(SamplingParams(0, 1, 1, 0.0, 0.4, 0)) == {10, 20}
    assert drawn(SamplingParams(0, 1, 1, 0.0, 0.0, 0)) == {10}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_rows_draw_from_their_own_generator(backend: Any, rows: int) -> None:
    source = torch.Generator().manual_seed(rows)
    logits = torch.randn(2 * rows, VOCABULARY, generator=source) * 3
    p = [SamplingParams(temperature=0.5 + row / rows) for row in range(rows)]
    seen = torch.rand(rows, VOCABULARY, generator=source) < 0.01
    generators = [torch.Generator().manual_seed(100 + row) for row in range(rows)]
    expected = []
    for row, generator in enumerate(copy_of(generators)):
        ids = seen[row].nonzero().T
        pair = torch.stack([logits[row], logits[rows + row]])
        expected.append(stock_draw(stock_scores(pair, ids, p[row]), generator))
    params = torch.cat([one.pack(torch.float32, CPU) for one in p])
    flags = torch.zeros(rows, dtype=torch.int32)
    before = seen.clone()
    arguments = (logits, seen, params, flags)
    rules = {"stop_token": STOP, "backend": backend}
    token = ops.cfg_sample(*arguments, generator=generators, **rules)
    assert token.tolist() == expected
    before[range(rows), expected] = True
    assert torch.equal(seen, before)
    forced = torch.zeros(rows, dtype=torch.int32)
    forced[-1] = FORCE
    token = ops.cfg_sample(*arguments, generator=generators, stop_action=forced, **rules)
    assert (token == STOP).tolist() == [False] * (rows - 1) + [True]
    assert flags.tolist() == [0] * (rows - 1) + [STOPPED]


def copy_of(generators: list[torch.Generator]) -> list[torch.Generator]:
    return [torch.Generator().set_state(g.get_state()) for g in generators]


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_generator_for_all_rows_is_multinomials(backend: Any) -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    seen, flags = torch.zeros(5, 300, dtype=torch.bool), torch.zeros(5, dtype=torch.int32)
    p = SamplingParams(0, 1.0, 1.0, 0.0, 1.0)
    params = p.pack(torch.float32, CPU).repeat(5, 1)
    ours, stocks = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    expected = torch.multinomial(logits.softmax(-1), 1, generator=stocks)[:, 0]
    token = ops.cfg_sample(
        logits, seen, params, flags, stop_token=9, generator=ours, backend=backend
    )
    assert torch.equal(token, expected)
    assert torch.equal(ours.get_state(), stocks.get_state())


# ---- torch's CUDA random numbers


def test_philox_is_torchs_recorded_stream() -> None:
    """torch.manual_seed(0); torch.rand(5, device="cuda"), as torch prints it on any GPU."""
    noise = reference.philox_exponential(torch.tensor([[0, 0]]), 5, 256)
    recorded = torch.tensor([[0.3990, 0.5167, 0.0249, 0.9401, 0.9459]])
    assert torch.allclose((-noise).exp(), recorded, atol=5e-5)


def test_philox_layout_of_a_launch_smaller_than_the_tensor() -> None:
    """30720 threads for 65536 elements (a GPU of 30 x 1024): lanes y and z of the same block."""
    philox = torch.tensor([[7, 8]])
    few = reference.philox_exponential(philox, 65536, 30720)
    many = reference.philox_exponential(philox, 65536, 65536)
    assert torch.equal(few[:, :30720], many[:, :30720])
    assert not torch.equal(few[:, 30720:], many[:, 30720:])
    assert reference.philox_threads(65536, 30 * 1024) == 30720
    assert reference.philox_threads(8194, 132 * 2048) == 8448
    assert reference.philox_increment(8194, 8448) == 4
    assert reference.philox_increment(65536, 8192) == 8


def test_every_backend_draws_the_same_from_philox_counters() -> None:
    source = random.Random(9)
    for number in range(200):
        case = random_case(source, turbo=bool(number % 2))
        state = torch.tensor([[source.getrandbits(62), 4 * source.getrandbits(20)]])
        results = []
        for backend in BACKENDS:
            own, philox = copy.deepcopy(case), state.clone()
            token = own.draw(backend, philox=philox)
            results.append((token, philox.tolist(), own.seen.sum().item(), own.flags.tolist()))
            assert philox[0, 1] == state[0, 1] + 4
        assert results[0] == results[1], case.p


@pytest.mark.parametrize("threads", [256, 2048, 8448])
def test_the_extension_draws_from_every_lane(threads: int) -> None:
    """As on a GPU whose launch has fewer threads than there are ids."""
    source = torch.Generator().manual_seed(threads)
    logits = torch.randn(40, VOCABULARY, generator=source)
    seen, flags = torch.zeros(40, VOCABULARY, dtype=torch.bool), torch.zeros(40, dtype=torch.int32)
    params = SamplingParams(0, 1.0, 1.0, 0.0, 1.0).pack(torch.float32, CPU).repeat(40, 1)
    philox = torch.randint(0, 2**40, (40, 2), generator=source) // 4 * 4
    noise = reference.philox_exponential(philox, VOCABULARY, threads)
    expected = reference.cfg_sample(
        logits, seen.clone(), params, flags.clone(), noise, stop_token=STOP
    )
    after = philox[:, 1] + reference.philox_increment(VOCABULARY, threads)
    token = torch.ops.chatterbox_fast.cfg_sample(
        logits, seen, params, flags, philox, stop_token=STOP, philox_threads=threads
    )
    assert torch.equal(token, expected)
    assert torch.equal(philox[:, 1], after)


class FakeGenerator:
    """A CUDA generator's seed and offset, on a machine without a GPU."""

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def initial_seed(self) -> int:
        return 2**64 - 1

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        self.offset = offset


def test_a_stream_ends_where_the_used_draws_leave_the_generator() -> None:
    generator: Any = FakeGenerator(40)
    stream = PhiloxStream(generator, CPU, VOCABULARY, 1000)
    assert stream.state.tolist() == [[-1, 40]]
    other = PhiloxStream(generator, CPU, VOCABULARY, 10)
    assert other.state[0, 1] == 40 + 4 * 1000, "requests draw from different numbers"
    other.close(10)
    assert generator.offset == 40 + 4 * 1010
    stream.close(7)
    assert generator.offset == 40 + 4 * 1010, "somebody else has drawn meanwhile"
    alone = PhiloxStream(generator, CPU, VOCABULARY, 1000)
    alone.close(7)
    assert generator.offset == 40 + 4 * 1017


def test_the_extension_gets_a_generator_or_counters_never_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passed = []

    class Op:
        @staticmethod
        def default(*arguments: Any, **_: Any) -> Tensor:
            passed.append(arguments[4:])
            return torch.zeros(1, dtype=torch.long)

    monkeypatch.setattr(torch.ops.chatterbox_fast, "cfg_sample", Op)
    philox, generator = torch.zeros(1, 2, dtype=torch.long), torch.Generator()
    Case(torch.zeros(1, 10), torch.tensor([[0]]), DEFAULT, stop_token=1).draw(
        "cuda", philox=philox, generator=generator
    )
    assert passed == [(philox, None, None)]


# ---- on a GPU

on_a_gpu = [pytest.mark.gpu, pytest.mark.kernel]


def gpu_case(source: random.Random, turbo: bool, vocabulary: int | None = None) -> Case:
    case = random_case(source, turbo)
    if vocabulary is not None:
        numbers = torch.Generator().manual_seed(source.getrandbits(40))
        case.logits = torch.randn(1 if turbo else 2, vocabulary, generator=numbers)
        case.seen = torch.zeros(1, vocabulary, dtype=torch.bool)
        case.ids = torch.tensor([[0]])
        case.seen[0, 0] = True
        case.rules["stop_token"] = min(case.rules["stop_token"], vocabulary - 1)
    for name in ("logits", "ids", "seen", "flags"):
        setattr(case, name, getattr(case, name).cuda())
    return case


@pytest.mark.parametrize("vocabulary", [None, 1, 300, 65536], ids=str)
@pytest.mark.parametrize("turbo", [False, True])
class TestOnAGpu:
    pytestmark = on_a_gpu

    def test_draws_are_stocks(self, turbo: bool, vocabulary: int | None) -> None:
        """Id for id, and the generator's offset after."""
        source, generator = random.Random(7), torch.Generator("cuda").manual_seed(11)
        different = 0
        draws = 20 if vocabulary else 5000
        for _ in range(draws // 10 if EMULATED else draws):
            case = gpu_case(source, turbo, vocabulary)
            stream = PhiloxStream(generator, case.logits.device, case.logits.shape[1], 5)
            params = case.p.pack(torch.float32, case.logits.device)
            arguments = (case.logits, case.seen.clone(), params, case.flags)
            token = ops.cfg_sample(*arguments, philox=stream.state, **case.rules)
            stream.close(0)
            scores = stock_scores(case.logits, case.ids, case.p, turbo)
            different += int(token) != stock_draw(scores, generator)
            assert int(stream.state[0, 1]) == generator.get_offset()
        assert different == 0


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("turbo", [False, True])
def test_rows_on_a_gpu_are_the_references(dtype: torch.dtype, turbo: bool) -> None:
    """64 rows of every action and parameter, some of which cannot be drawn from."""
    source, numbers = random.Random(4), torch.Generator().manual_seed(4)
    logits = (4 * torch.randn(128, 1000, generator=numbers)).to(dtype)
    logits[5, 3], logits[6] = math.nan, -math.inf
    packed = [random_case(source, turbo).p.pack(torch.float32, CPU) for _ in range(64)]
    given = {
        "logits": logits,
        "seen": torch.rand(64, 1000, generator=numbers) < 0.1,
        "params": torch.cat(packed),
        "flags": torch.randint(4, (64,), generator=numbers, dtype=torch.int32),
        "philox": torch.randint(2**40, (64, 2), generator=numbers) * 4,
        "stop_action": torch.randint(3, (64,), generator=numbers, dtype=torch.int32),
    }
    results = []
    for backend in ("cuda", "reference"):
        own = {name: tensor.clone().cuda() for name, tensor in given.items()}
        token = ops.cfg_sample(**own, stop_token=9, turbo=turbo, forget=17, backend=backend)
        changed = [own[name].tolist() for name in ("seen", "flags", "philox")]
        results.append((token.tolist(), *changed))
    assert results[0] == results[1]


@pytest.mark.gpu
@pytest.mark.kernel
def test_a_captured_graph_draws_on() -> None:
    """Replays read and advance the random state, the mask and the flags in device memory."""
    case = gpu_case(random.Random(3), False)
    params = DEFAULT.pack(torch.float32, case.logits.device)
    philox = torch.tensor([[5, 0]], device="cuda")
    eager_seen, eager_philox, flags = case.seen.clone(), philox.clone(), case.flags.clone()
    expected = [
        int(ops.cfg_sample(case.logits, eager_seen, params, flags, philox=eager_philox,
                           **case.rules))
        for _ in range(8)
    ]  # fmt: skip
    stream = torch.cuda.Stream()
    warm = (case.seen.clone(), params, flags.clone())
    with torch.cuda.stream(stream):
        ops.cfg_sample(case.logits, *warm, philox=philox.clone(), **case.rules)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token = ops.cfg_sample(case.logits, case.seen, params, flags, philox=philox, **case.rules)
    got = []
    for _ in range(8):
        graph.replay()
        got.append(int(token))
    assert got == expected
    assert torch.equal(case.seen, eager_seen)
    assert torch.equal(philox, eager_philox)


# ---- statistics


@pytest.mark.parametrize("by_counters", [False, True])
@pytest.mark.parametrize("turbo", [False, True])
def test_frequencies_and_support(turbo: bool, by_counters: bool) -> None:
    """Chi-squared over 20,000 draws; no id outside stock's support, none missing that is likely."""
    source = torch.Generator().manual_seed(12)
    logits = torch.randn(1 if turbo else 2, 400, generator=source) * 2
    ids = torch.tensor([[3, 5]])
    p = SamplingParams(0.5, 1.2, 1.0, 0.01, 0.97, 300 if turbo else 0)
    probs = stock_scores(logits, ids, p, turbo).softmax(-1)[0].double()
    draws = 20_000
    counts = torch.zeros(400, dtype=torch.double)
    philox = torch.tensor([[12, 0]])
    noise = {"philox": philox} if by_counters else {"generator": source}
    for _ in range(draws):
        case = Case(logits, ids, p, stop_token=399, turbo=turbo)
        counts[case.draw("cuda", **noise)] += 1
    assert ((counts > 0) <= (probs > 0)).all(), "an id that stock rules out was drawn"
    expected = probs * draws
    assert (counts[expected >= 64] > 0).all()
    likely = expected >= 8
    observed, wanted = counts[likely], expected[likely]
    chi_squared = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = int(likely.sum()) - 1
    assert abs(chi_squared - freedom) < 4 * math.sqrt(2 * freedom)


# ---- arguments


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cfg_weight", -0.1),
        ("repetition_penalty", 0.0),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("min_p", 1.1),
        ("min_p", -0.1),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("top_k", -1),
        ("top_k", 0.5),
        ("top_k", math.inf),
        ("temperature", 1e-50),
        ("repetition_penalty", 1e-50),
        ("cfg_weight", 1e300),
    ],
)
def test_parameters_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(
        ValueError, match=rf"{name} must be finite and .*, got {re.escape(repr(value))}"
    ):
        SamplingParams(**{name: value})


def test_numbers_next_to_zero_are_zero_to_the_kernels() -> None:
    packed = SamplingParams(cfg_weight=1e-50, min_p=1e-50, top_p=1e-50).pack(torch.float32, CPU)
    assert packed[0, [0, 3]].tolist() == [0.0, 0.0]
    assert packed[0, 4] == 1


def test_one_minus_top_p_is_rounded_from_double() -> None:
    packed = SamplingParams(top_p=0.9).pack(torch.float32, CPU)
    assert packed[0, 4] == torch.tensor(1 - 0.9, dtype=torch.float32)
    assert packed[0, 4] != 1 - torch.tensor(0.9)


@pytest.fixture
def arguments() -> dict[str, Any]:
    return {
        "logits": torch.zeros(4, 10),
        "seen": torch.zeros(2, 10, dtype=torch.bool),
        "params": DEFAULT.pack(torch.float32, CPU).repeat(2, 1),
        "flags": torch.zeros(2, dtype=torch.int32),
        "philox": torch.zeros(2, 2, dtype=torch.long),
        "stop_token": 9,
        "philox_threads": 256,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"logits": torch.zeros(3, 10)},
            r"logits must be \(2 or 4, 10\) as seen is, got \[3, 10\]",
        ),
        ({"logits": torch.zeros(4, 11)}, r"logits must be .*, got \[4, 11\]"),
        ({"logits": torch.zeros(4, 10).double()}, "logits must be float32, float16 or bfloat16"),
        ({"logits": torch.zeros(10, 4).T}, "logits must be contiguous, got strides"),
        ({"seen": torch.zeros(2, 10)}, "seen must be Bool, got Float"),
        ({"seen": torch.zeros(65, 10, dtype=torch.bool)}, "R at most 64"),
        ({"params": torch.zeros(2, 5)}, r"params must be \(2, 6\), got \[2, 5\]"),
        ({"params": torch.zeros(2, 6).double()}, "params must be Float, got Double"),
        ({"flags": torch.zeros(3, dtype=torch.int32)}, r"flags must be \(2,\), got \[3\]"),
        ({"flags": torch.zeros(2)}, "flags must be Int, got Float"),
        ({"philox": torch.zeros(2, 3, dtype=torch.long)}, r"philox must be \(2, 2\), got \[2, 3\]"),
        ({"philox": torch.zeros(2, 2)}, "philox must be Long, got Float"),
        ({"philox_threads": 100}, "philox_threads must be a positive multiple of 256"),
        ({"philox_threads": 2**32}, r"philox_threads must be .* below 2\^31.*, got 4294967296"),
        ({"seen": torch.zeros(10, 2, dtype=torch.bool).T}, "seen must be contiguous, got strides"),
        ({"params": torch.zeros(6, 2).T}, "params must be contiguous, got strides"),
        ({"flags": torch.zeros(4, dtype=torch.int32)[::2]}, "flags must be contiguous, got str"),
        ({"philox": torch.zeros(2, 2, dtype=torch.long).T}, "philox must be contiguous, got str"),
        (
            {"stop_action": torch.zeros(4, dtype=torch.int32)[::2]},
            "stop_action must be contiguous, got strides",
        ),
        ({"stop_action": torch.zeros(2)}, "stop_action must be Int, got Float"),
        ({"stop_action": torch.zeros(1, dtype=torch.int32)}, r"stop_action must be \(2,\)"),
        ({"stop_token": 10}, r"stop_token must be in \[0, 10\), got 10"),
        ({"forget": 10}, r"forget must be -1 or in \[0, 10\), got 10"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, change: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"chatterbox_fast::cfg_sample: .*{message}"):
        torch.ops.chatterbox_fast.cfg_sample(**{**arguments, **change})


def test_an_empty_batch_is_an_empty_result() -> None:
    token = ops.cfg_sample(
        torch.zeros(0, 10), torch.zeros(0, 10, dtype=torch.bool), torch.zeros(0, 6),
        torch.zeros(0, dtype=torch.int32), stop_token=1, generator=[],
    )  # fmt: skip
    assert token.shape == (0,)


def test_as_many_generators_as_rows() -> None:
    case = Case(torch.zeros(1, 10), torch.tensor([[0]]), DEFAULT, stop_token=1)
    with pytest.raises(RuntimeError, match="generator must be one or 1, got 2"):
        case.draw("auto", generator=[torch.Generator(), torch.Generator()])


# ---- the op as torch sees it


def test_the_extension_is_what_a_cpu_runs() -> None:
    assert dispatch.choose("cfg_sample", CPU).backend == "extension"
    assert dispatch.choose("cfg_sample", CPU, "reference") == ("reference", "asked for")
    assert dispatch.choose("cfg_sample", CPU, "auto", torch.float64).backend == "reference"


def test_opcheck(arguments: dict) -> None:
    torch.library.opcheck(torch.ops.chatterbox_fast.cfg_sample.default, (), arguments)
    arguments["stop_action"] = torch.zeros(2, dtype=torch.int32)
    torch.library.opcheck(torch.ops.chatterbox_fast.cfg_sample.default, (), arguments)


def test_compiles_as_one_graph(arguments: dict) -> None:
    def call(**kwargs: Any) -> Tensor:
        return torch.ops.chatterbox_fast.cfg_sample(**kwargs) + 1

    arguments["logits"] = torch.randn(4, 10)
    expected = call(**copy.deepcopy(arguments))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**copy.deepcopy(arguments)), expected)


def test_one_dispatched_op_and_one_allocation(arguments: dict) -> None:
    """No read on the host, no buffer beyond the token: what the dispatcher sees of a call."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen_ops = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen_ops.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.ops.chatterbox_fast.cfg_sample(**arguments)
    assert seen_ops == ["chatterbox_fast.cfg_sample.default"]
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.ops.chatterbox_fast.cfg_sample(**arguments)
    inside = [event.name for event in profile.events() if event.name != "[memory]"]
    assert inside == ["chatterbox_fast::cfg_sample", "aten::empty"]
