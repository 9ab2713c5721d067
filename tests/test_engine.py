"""What an engine keeps between requests: weights, buffers, voices; and how requests share it."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import engine_of, tokens_of
from torch import Tensor

from chatterbox_fast import patched, report
from chatterbox_fast.graph import CAPTURES
from chatterbox_fast.options import Options
from chatterbox_fast.t3 import engine as engine_module
from chatterbox_fast.t3 import poll, runner
from chatterbox_fast.t3.decode_step import decode_step
from chatterbox_fast.t3.engine import Engine, Engines
from chatterbox_fast.t3.pool import Slot
from chatterbox_fast.t3.prefill import prefix_length
from chatterbox_fast.t3.state import DecodeState
from chatterbox_fast.testing import random_model, random_t3

TEXT = torch.tensor([[255, 40, 41, 42, 0]])


@pytest.fixture(scope="module")
def tiny() -> Any:
    return random_t3("english", "tiny")


# ---- Weights that change


def test_weights_that_change_are_seen(t3_cond: Any) -> None:
    settings = {"t3_cond": t3_cond, "text_tokens": TEXT, "max_new_tokens": 8, "seed": 4}
    other = random_t3("english", "tiny", seed=1)
    for precision in ("exact", "bf16", "int8"):
        t3 = random_t3("english", "tiny")
        options = {"precision": precision}
        first = tokens_of(t3, options=options, **settings)
        engine = engine_of(t3, **options)
        assert engine_of(t3, **options) is engine
        t3.load_state_dict(other.state_dict())
        assert engine_of(t3, **options) is not engine
        expected = tokens_of(other, options=options, **settings)
        assert torch.equal(tokens_of(t3, options=options, **settings), expected)
        assert not torch.equal(expected, first)


def test_what_a_graph_would_keep_of_torchs_settings_makes_a_new_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    t3, settled = random_t3("english", "tiny"), mock.Mock()
    monkeypatch.setattr(engine_module, "settle_all", settled)
    engine = engine_of(t3)
    assert engine_of(t3) is engine
    settled.assert_not_called()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32)
    assert engine_of(t3) is not engine
    settled.assert_called_once_with(t3.device)  # somebody's stream may still need the old one


def test_no_weight_comes_to_lie_where_another_was() -> None:
    """Else what is exchanged twice between two requests would look as if it never was."""
    t3 = random_t3("english", "tiny")
    weight = t3.tfmr.norm.weight
    engine, address = engine_of(t3), weight.data_ptr()
    assert engine_of(t3) is engine
    weight.data = torch.empty(0)
    others = [torch.rand(1024) for _ in range(2000)]
    assert address not in {each.data_ptr() for each in others}
    weight.data = others[-1]
    assert engine_of(t3) is not engine


def test_an_engine_does_not_keep_its_t3_alive(t3_cond: Any) -> None:
    t3 = random_t3("english", "tiny")
    engines = Engines(Options())
    with torch.inference_mode():
        engines.of(t3).voice(t3, t3_cond)
    gone = weakref.ref(t3)
    del t3
    gc.collect()
    assert gone() is None


def test_an_engines_memory_is_freed_with_it(tiny: Any, t3_cond: Any) -> None:
    """Without waiting for the garbage collector: no cycle."""
    engine = Engine(tiny, Options())
    with torch.inference_mode():
        engine.voice(tiny, t3_cond)
    engine.slots.give_back(engine.slots.take(2, 40))
    gone = weakref.ref(engine)
    gc.disable()
    try:
        del engine
        assert gone() is None
    finally:
        gc.enable()


def test_a_long_request_makes_its_buffers_once(tiny: Any, t3_cond: Any) -> None:
    """On a GPU each costs a graph."""
    engine, made = Engine(tiny, Options()), []
    stock = engine.slots._make
    engine.slots._make = lambda *size: made.append(size) or stock(*size)
    for _ in range(2):
        runner.inference(tiny, engine, t3_cond=t3_cond, text_tokens=TEXT, max_new_tokens=500)
    assert made == [(2, 256), (2, 512), (2, 1024)]


def test_out_of_memory_frees_the_caches_and_says_so(
    tiny: Any, t3_cond: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"t3_cond": t3_cond, "text_tokens": TEXT, "max_new_tokens": 6, "seed": 3}
    expected = tokens_of(tiny, **settings)
    engine = engine_of(tiny)
    assert len(engine.slots) > 0

    alive: list[Any] = []
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to 2.00 GiB"),
        RuntimeError("CUDA error: out of memory\nno room for 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling for 2.00 GiB"),
    ):

        def full(_: Any, state: Any, *__: Any, error: Exception = error) -> None:
            alive.append(weakref.ref(state))
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(runner, "prefill", full)
            with pytest.raises(torch.OutOfMemoryError, match=r"(?s)out of memory on cpu.*2.00 GiB"):
                tokens_of(tiny, **settings)
        error.__traceback__ = None
        assert alive[-1]() is None, "the error must not keep the request's buffers"
        assert len(engine.slots) == 0
        assert len(engine._voices) == 0
        assert torch.equal(tokens_of(tiny, **settings), expected)
    assert torch.equal(tokens_of(tiny, **settings), expected)


# ---- Polling late


class Stream:
    """Stands for rng.PhiloxStream, which needs a CUDA generator."""

    def __init__(self) -> None:
        self.used = -1

    def close(self, used: int) -> None:
        self.used = used


class Copy:
    """Stands for poll.FlagCopy, which needs pinned memory and CUDA's events."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self._value: int | None = None

    def take(self, flags: Tensor) -> None:
        self._value = int(flags)

    def read(self) -> int:
        value, self._value = self._value, None
        assert value is not None, "each copy is read once"
        return value


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Stream]:
    """Makes a CPU poll as a GPU does, every `steps`, drawing from counters as a GPU does."""
    stream = Stream()

    def open_stream(state: DecodeState, *_: Any) -> Stream:
        assert state.philox is not None
        state.philox.copy_(torch.tensor([[7, 40]]))
        return stream

    monkeypatch.setattr(Copy, "made", 0)
    monkeypatch.setattr(poll, "FlagCopy", Copy)
    monkeypatch.setattr(runner, "_philox_stream", open_stream)
    monkeypatch.setattr(Engine, "draws_on_device", property(lambda _: True))

    def start(steps: int) -> Stream:
        monkeypatch.setattr(poll, "POLL_EVERY", steps)
        return stream

    return start


@pytest.mark.parametrize("limit", [17, 18, 19, 40])
def test_polling_late_changes_nothing(
    t3_cond: Any, late: Callable[[int], Stream], limit: int
) -> None:
    t3 = random_t3("english", "tiny", stop_after=17)
    settings = {"t3_cond": t3_cond, "text_tokens": TEXT, "max_new_tokens": limit}
    stream = late(1)
    expected = tokens_of(t3, **settings)
    assert expected.shape == (1, min(limit, 18))
    assert stream.used == min(limit, 18)
    for steps in (2, 4, 9):
        late(steps)
        stream.used = -1
        assert torch.equal(tokens_of(t3, **settings), expected)
        assert stream.used == min(limit, 18)
    assert Copy.made == 2, "the buffers of the next request are those of the last"


def test_polling_late_outlives_a_growth_of_the_cache(
    t3_cond: Any, late: Callable[[int], Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that is on its way is read, and no step is run that a GPU's host need not run."""
    t3 = random_t3("english", "tiny", stop_after=17)
    words = 256 - 19 - prefix_length(t3, t3_cond) - 4  # it grows after the 20th token
    long = torch.tensor([[255, *[9] * words, 0]])
    late(3)
    steps = watched_steps(monkeypatch)
    drawn = tokens_of(t3, t3_cond=t3_cond, text_tokens=long, max_new_tokens=40)
    assert drawn.shape == (1, 18)
    assert steps == [256] * 19 + [512], "21 drawn: what was copied at 18 is read at 21"


def watched_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The capacities that decode steps run with from now on."""
    steps: list[int] = []

    def watched(weights: Any, state: DecodeState, *rest: Any) -> None:
        steps.append(state.capacity)
        decode_step(weights, state, *rest)

    monkeypatch.setattr("chatterbox_fast.t3.engine.decode_step", watched)
    return steps


def test_a_failure_after_the_stop_token_does_not_matter(
    t3_cond: Any, late: Callable[[int], Stream]
) -> None:
    t3 = random_t3("english", "tiny", stop_after=9)
    t3_cond.cond_prompt_speech_tokens = None  # the prompt has speech positions too
    settings = {"t3_cond": t3_cond, "text_tokens": TEXT, "max_new_tokens": 30}
    late(6)
    expected = tokens_of(t3, **settings)
    with torch.no_grad():
        t3.speech_pos_emb.emb.weight[10:] = float("nan")
    assert torch.equal(tokens_of(t3, **settings), expected)
    with torch.no_grad():
        t3.speech_pos_emb.emb.weight[5:] = float("nan")
    with pytest.raises(RuntimeError, match="have a NaN or no finite value"):
        tokens_of(t3, **settings)
    with pytest.raises(RuntimeError, match="logits for token 7 or one before"):
        tokens_of(t3, **{**settings, "max_new_tokens": 7})


# ---- Requests at once


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("precision", ["exact", "bf16", "int8"])
def test_requests_at_once_equal_requests_in_turn(
    tiny: Any, t3_cond: Any, count: int, precision: str
) -> None:
    """Each with its own text, seed, voice, parameters and batch; some outgrow their cache."""
    engine = engine_of(tiny, precision=precision)

    def request(number: int) -> Tensor:
        cond = copy.copy(t3_cond)
        cond.emotion_adv = torch.full((1, 1, 1), 0.2 + number / 10)
        return runner.inference(
            tiny,
            engine,
            t3_cond=cond,
            text_tokens=torch.tensor([[255, *range(3, 10 + 28 * number), 0]]),
            max_new_tokens=20 + number,
            temperature=0.5 + number / 10,
            cfg_weight=0.5 * (number % 2),
            generator=torch.Generator().manual_seed(number),
        )

    in_turn = [request(number) for number in range(count)]
    with ThreadPoolExecutor(count) as threads:
        at_once = list(threads.map(request, range(count)))
    assert len({tuple(tokens[0].tolist()[:9]) for tokens in in_turn}) == count
    for number, (got, expected) in enumerate(zip(at_once, in_turn, strict=True)):
        assert torch.equal(got, expected), number


# ---- On a GPU


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize("precision", ["exact", "bf16", "fp16", "int8"])
def test_the_captured_step_equals_the_eager_one(
    t3_cond: Any, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Also across a growth of the cache and two requests on the same graph."""
    t3, cond = random_t3("english", "tiny").cuda(), copy.deepcopy(t3_cond).to(device="cuda")
    results = {}
    for graphs in ("1", "0"):
        monkeypatch.setenv("CHATTERBOX_FAST_GRAPHS", graphs)
        engine = Engine(t3, Options.of(precision=precision))
        assert (engine.eager_because is None) == (graphs == "1")
        results[graphs] = [
            runner.inference(
                t3, engine, t3_cond=cond, text_tokens=TEXT.cuda(), max_new_tokens=300,
                temperature=temperature, generator=torch.Generator("cuda").manual_seed(5),
            ).tolist()
            for temperature in (0.8, 1.5)
        ]  # fmt: skip
    assert results["1"] == results["0"]
    assert results["1"][0] != results["1"][1]


@pytest.mark.gpu
@pytest.mark.parametrize("failures", [1, CAPTURES])
def test_a_capture_that_fails_is_tried_again(
    t3_cond: Any, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """A wait within it ends a capture; one of somebody else's need not be there the next time."""
    t3, cond = random_t3("english", "tiny").cuda(), copy.deepcopy(t3_cond).to(device="cuda")
    left = failures

    def disturbed(weights: Any, state: DecodeState, *rest: Any) -> None:
        nonlocal left
        decode_step(weights, state, *rest)
        if left and torch.cuda.is_current_stream_capturing():
            left -= 1
            torch.cuda.current_stream().synchronize()

    def request() -> tuple[Engine, list[int]]:
        engine = Engine(t3, Options())
        tokens = runner.inference(
            t3, engine, t3_cond=cond, text_tokens=TEXT.cuda(), max_new_tokens=12,
            generator=torch.Generator("cuda").manual_seed(5),
        )  # fmt: skip
        return engine, tokens.tolist()

    _, expected = request()
    monkeypatch.setattr(engine_module, "decode_step", disturbed)
    engine, tokens = request()
    assert (left, tokens) == (0, expected)
    if failures < CAPTURES:
        assert engine.eager_because is None
    else:
        assert str(engine.eager_because).startswith("the capture failed: ")


@pytest.mark.gpu
def test_decoding_on_a_gpu_does_not_wait(t3_cond: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and polls: torch's sync debug mode raises where the stream is waited for.

    Nor is anything allocated. Torch's mode does not count the wait for an event, which is a poll's.
    """
    t3 = random_t3("english", "tiny", stop_after=30).cuda()
    cond, engine = copy.deepcopy(t3_cond).to(device="cuda"), Engine(t3, Options())

    def request() -> Tensor:
        return runner.inference(t3, engine, t3_cond=cond, text_tokens=TEXT.cuda())

    expected = request().shape  # it makes what the next one finds
    drawn: list[int] = []
    stock = runner._decode

    def watched(*arguments: Any) -> int:
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            drawn.append(stock(*arguments))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        return drawn[0]

    monkeypatch.setattr(runner, "_decode", watched)
    assert request().shape == expected == (1, 31)
    assert 31 <= drawn[0] <= 31 + 2 * poll.POLL_EVERY, "the poll has seen the stop token"


@pytest.mark.gpu
def test_requests_on_streams_of_their_own(t3_cond: Any) -> None:
    """Whoever comes second finds what the first one's stream has still to make."""
    t3, cond = random_t3("english", "tiny").cuda(), copy.deepcopy(t3_cond).to(device="cuda")

    def request(engine: Engine, number: int) -> list[int]:
        with torch.cuda.stream(torch.cuda.Stream()):
            tokens = runner.inference(
                t3, engine, t3_cond=cond, text_tokens=TEXT.cuda(), max_new_tokens=12 + number,
                generator=torch.Generator("cuda").manual_seed(number),
            )  # fmt: skip
            return tokens[0].tolist()

    alone = Engine(t3, Options())
    in_turn = [request(alone, number) for number in range(8)]
    assert len({tuple(tokens[:9]) for tokens in in_turn}) == 8
    together = Engine(t3, Options())
    with ThreadPoolExecutor(8) as threads:
        at_once = list(threads.map(lambda number: request(together, number), range(8)))
    assert at_once == in_turn


@pytest.mark.gpu
def test_after_an_allocation_that_failed_the_next_request_is_served(
    t3_cond: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mid-request, where the cache grows: there is no block left that would be large enough."""
    t3, cond = random_t3("english", "tiny").cuda(), copy.deepcopy(t3_cond).to(device="cuda")
    engine = Engine(t3, Options())

    def request(tokens: int) -> list[int]:
        spoken = runner.inference(
            t3, engine, t3_cond=cond, text_tokens=TEXT.cuda(), max_new_tokens=tokens,
            generator=torch.Generator("cuda").manual_seed(3),
        )  # fmt: skip
        return spoken[0].tolist()

    expected, blocks = request(20), []
    make = engine.slots._make

    def without_room(rows: int, capacity: int) -> Slot:
        torch.cuda.empty_cache()
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
        with suppress(torch.OutOfMemoryError):
            while True:
                blocks.append(torch.empty(2**19, device="cuda"))  # 2 MiB: half of the new keys
        return make(rows, capacity)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(engine.slots, "_make", without_room)
            with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
                request(300)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        blocks.clear()
    assert request(20) == expected
    assert request(300)[:20] == expected


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
def test_originals_wait_on_the_host_and_come_back(training: bool) -> None:
    """Also of a T3 that is not the engine's any more when it is unpatched."""
    model = random_model("english", "tiny")
    model.t3.cuda()
    before = {name: value.clone() for name, value in model.t3.state_dict().items()}
    devices = {name: value.device for name, value in before.items()}
    with patched(model, precision="bf16"):
        weights = next(row for row in report(model) if row.site == "  weights")
        assert "the originals wait on the host" in weights.why
        assert model.t3.tfmr.layers[0].self_attn.q_proj.weight.is_cpu
        x = torch.zeros(1, 3, model.t3.dim, device="cuda")
        model.t3.tfmr(inputs_embeds=x)  # who calls the module itself finds its weights at home
        assert model.t3.tfmr.layers[0].self_attn.q_proj.weight.is_cuda
    with patched(model, precision="bf16"):
        assert model.t3.tfmr.layers[0].self_attn.q_proj.weight.is_cpu
        model.t3.train(training)
    for name, value in model.t3.state_dict().items():
        assert value.device == devices[name], name
        assert torch.equal(value, before[name]), name


def test_a_new_engine_does_not_wait_for_the_memory_of_the_old(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does one that could not be made leave it behind; the next request makes one."""
    engines = Engines(Options())
    gone = weakref.ref(engines.of(tiny))

    def full(*_: Any) -> None:
        assert gone() is None
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to 2.00 GiB")

    with torch.no_grad():
        tiny.speech_head.weight[0] += 0.0
    with monkeypatch.context() as patch:
        patch.setattr("chatterbox_fast.t3.weights.pack", full)
        with pytest.raises(torch.OutOfMemoryError, match=r"out of memory on cpu.*2.00 GiB"):
            engines.of(tiny)
    assert engines.of(tiny) is engines.of(tiny)


def test_a_request_that_no_cache_holds_costs_no_work(
    tiny: Any, t3_cond: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "voice", lambda *_: pytest.fail("conditioned"))
    monkeypatch.setattr(runner, "text_embeds", lambda *_: pytest.fail("embedded"))
    monkeypatch.setattr(runner, "CAPACITIES", (100,))
    start = prefix_length(tiny, t3_cond) + TEXT.shape[1] + 7 + 1
    with pytest.raises(ValueError, match=f"at most {100 - start} after {start} positions"):
        tokens_of(
            tiny, t3_cond=t3_cond, text_tokens=TEXT, max_new_tokens=101 - start,
            initial_speech_tokens=torch.zeros(1, 7, dtype=torch.long),
        )  # fmt: skip


@pytest.mark.parametrize("wrong", [TEXT.float(), TEXT.bool(), TEXT.tolist(), "text"])
def test_tokens_that_are_no_ints_are_named(tiny: Any, wrong: Any) -> None:
    with pytest.raises(TypeError, match="text_tokens must be a tensor of ints, got (a|torch)"):
        runner.check_text(tiny, wrong)
    with pytest.raises(TypeError, match="initial_speech_tokens must be a tensor of ints, got"):
        runner.check_initial_speech_tokens(tiny, wrong)


@pytest.mark.parametrize("wrong", [torch.tensor(2.9), 2.9, torch.tensor([2, 3]), "2"])
def test_a_token_count_that_is_no_int_is_named(tiny: Any, wrong: Any) -> None:
    with pytest.raises(TypeError, match="max_new_tokens must be an int, got"):
        runner.check_max_new_tokens(tiny, wrong)
    assert runner.check_max_new_tokens(tiny, torch.tensor(2)) == 2  # type: ignore[arg-type]


def test_a_request_that_no_cache_holds_is_refused() -> None:
    """All that precedes the tokens counts."""
    runner.check_length(4000, 4192)
    with pytest.raises(
        ValueError, match="max_new_tokens must be at most 4192 after 4000 positions"
    ):
        runner.check_length(4000, 4193)
