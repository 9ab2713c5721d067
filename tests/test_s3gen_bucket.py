"""Utterances padded to a bucket: the same mel, nothing left behind, and what a capture may do."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from s3gen_toolkit import Engine, relative, rough_s3gen
from torch import Tensor

from chatterbox_fast.graph import CAPTURES, CaptureError
from chatterbox_fast.options import Options
from chatterbox_fast.recent import Recent
from chatterbox_fast.s3gen import bucket as buckets
from chatterbox_fast.s3gen import engine as engines
from chatterbox_fast.s3gen.bucket import Bucket, Flow, bucket_for
from chatterbox_fast.s3gen.encoder import encode
from chatterbox_fast.s3gen.engine import FlowEngine, VocoderEngine
from chatterbox_fast.s3gen.vocoder import decode

pytestmark = pytest.mark.usefixtures("_inference")


@pytest.fixture
def _inference() -> Any:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def flow() -> Any:
    return rough_s3gen().flow


def eagerly(step: Callable[[], None], *_: Any) -> Callable[[], None]:
    """Stands in for `graph.capture`: runs the step as often, and replays nothing."""
    for _ in range(3):
        step()
    return step


def a_bucket(engine: FlowEngine, tokens: int, n_timesteps: int) -> Bucket:
    flow = Flow(engine.encoder, engine.solver, engine.table(n_timesteps), engine.blocks)
    return Bucket(flow, tokens, eagerly)


def inputs(
    tokens: int, known: int, cut: int = 0, *, seed: int = 0, dtype: torch.dtype = torch.float
) -> tuple[Tensor, ...]:
    """Tokens, speaker, a prompt of `known` frames, and noise, `cut` frames less than all."""
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.double).to(dtype)

    ids = torch.randint(6561, (1, tokens), generator=source)
    return ids, normal(1, 80), normal(1, known, 80), normal(1, 2 * tokens - cut, 80)


CASES = [(16, 8, 0), (15, 8, 0), (9, 6, 6), (4, 0, 0), (1, 2, 0), (12, 18, 6)]


@pytest.mark.parametrize("meanflow", [False, True])
def test_a_padded_utterance_is_the_same(meanflow: bool) -> None:
    """In float64, where nothing but a mistake is left; one bucket after another's leavings."""
    flow = rough_s3gen(meanflow=meanflow).flow.double()
    engine = FlowEngine(flow, Options())
    bucket = a_bucket(engine, 16, 3)
    for case in CASES:
        own = inputs(*case, dtype=torch.double)
        expected = engine.mel(*own, 3)
        assert relative(bucket.mel(*own), expected) < 1e-13
    assert torch.isfinite(bucket._mel).all()


def test_in_float32_it_is_as_close_as_promised(flow: Any) -> None:
    engine = FlowEngine(flow, Options())
    bucket = a_bucket(engine, 16, 10)
    for case in CASES:
        own = inputs(*case)
        assert relative(bucket.mel(*own), engine.mel(*own, 10)) < 1e-5


def test_the_lookahead_sees_no_pads(flow: Any) -> None:
    """It reads three tokens further; a bias makes pads of the embedding other than zero."""
    engine = FlowEngine(flow, Options())
    ids = inputs(9, 0)[0]
    padded = torch.cat([ids, torch.full((1, 7), 5)], dim=1)
    expected = encode(engine.encoder, ids)
    found = encode(engine.encoder, padded, torch.tensor([9]))
    assert relative(found[:, :18], expected) < 1e-5
    assert torch.isfinite(found).all()
    assert relative(encode(engine.encoder, padded)[:, :18], expected) > 1e-3


def test_nothing_stays_of_a_broken_utterance(flow: Any) -> None:
    engine = FlowEngine(flow, Options())
    bucket = a_bucket(engine, 16, 2)
    good = inputs(7, 4)
    expected = bucket.mel(*good)
    for broken in range(1, 4):
        bad = list(inputs(16, 20, seed=9))
        bad[broken] = torch.full_like(bad[broken], torch.nan)
        assert bucket.mel(*bad).isnan().any()
        assert torch.equal(bucket.mel(*good), expected)


def test_a_mel_is_its_callers(flow: Any) -> None:
    """The next utterance is not written into it."""
    bucket = a_bucket(FlowEngine(flow, Options()), 16, 1)
    mel = bucket.mel(*inputs(7, 4))
    kept = mel.clone()
    bucket.mel(*inputs(9, 4))
    assert torch.equal(mel, kept)


def test_a_table_is_of_use_outside_of_inference_mode(flow: Any) -> None:
    table = FlowEngine(flow, Options()).table(2)
    assert not any(each.is_inference() for each in (*table.steps, *table.shifts[0]))


def test_buckets_are_few() -> None:
    sizes = [bucket_for(tokens) for tokens in (1, 64, 65, 500, buckets.LARGEST)]
    assert sizes == [64, 64, 128, 512, buckets.LARGEST]
    assert bucket_for(buckets.LARGEST + 1) is None
    assert buckets.LARGEST // buckets.GRANULE <= engines.BUCKETS, "mixed lengths evict nobody"


@pytest.fixture
def small(flow: Any, monkeypatch: pytest.MonkeyPatch) -> FlowEngine:
    """An engine that believes in graphs, with buckets of 8 tokens."""
    monkeypatch.setattr(buckets, "GRANULE", 8)
    monkeypatch.setattr(buckets, "LARGEST", 32)
    monkeypatch.setattr(engines, "capture", eagerly)
    engine = FlowEngine(copy.deepcopy(flow), Options())
    engine.eager_because = None
    return engine


def failing(failure: Exception, *sizes: int) -> Callable[..., Any]:
    """Stands in for `graph.capture`; fails for buckets of those sizes, or of any."""

    def capture(step: Any, *rest: Any) -> Callable[[], None]:
        if not sizes or step.__self__._tokens.shape[1] in sizes:
            raise failure
        return eagerly(step, *rest)

    return capture


def eager_mel(engine: FlowEngine, own: tuple[Tensor, ...], n_timesteps: int) -> Tensor:
    """By an engine that does not believe in graphs."""
    frames = own[3].shape[1]
    mu = encode(engine.encoder, own[0])[:, :frames]
    prompt = torch.nn.functional.pad(own[2], (0, 0, 0, frames - own[2].shape[1]))
    return engine.solve(mu, own[1], prompt, own[3], n_timesteps)


def test_a_bucket_is_captured_once_a_size(
    small: FlowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = []

    def capture(step: Callable[[], None], *rest: Any) -> Callable[[], None]:
        captured.append(rest)
        return eagerly(step)

    monkeypatch.setattr(engines, "capture", capture)
    for tokens in (3, 8, 9, 16, 3):
        own = inputs(tokens, 2)
        assert relative(small.mel(*own, 2), eager_mel(small, own, 2)) < 1e-5
    assert len(captured) == 2
    small.mel(*inputs(3, 2), 3)
    assert len(captured) == 3, "another number of steps"
    small.mel(*inputs(33, 2), 2)
    two_rows = (torch.cat([each, each]) for each in inputs(3, 2))
    assert small.mel(*two_rows, 2).shape == (2, 6, 80)
    assert len(captured) == 3, "too long, or a batch: eagerly"
    small._buckets = Recent(2)
    for steps in (1, 2, 3):
        small.mel(*inputs(3, 2), steps)
    assert len(small._buckets) == 2


def test_after_failed_captures_it_runs_eagerly(
    small: FlowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = inputs(5, 2)
    small.mel(*inputs(12, 2), 2)
    failure = CaptureError("the capture failed: it was raining")
    capture = mock.Mock(wraps=failing(failure))
    monkeypatch.setattr(engines, "capture", capture)
    for number in range(1, CAPTURES + 2):
        assert torch.equal(small.mel(*own, 2), eager_mel(small, own, 2))
        assert len(small._buckets) == 0, "nobody will use their memory"
        assert capture.call_count == min(number, CAPTURES)
        assert (small.eager_because is None) == (number < CAPTURES)
    assert small.eager_because == "the capture failed: it was raining"


def test_a_capture_that_failed_once_is_tried_again(
    small: FlowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = inputs(5, 2)
    with monkeypatch.context() as patch:
        patch.setattr(engines, "capture", failing(CaptureError("the capture failed")))
        small.mel(*own, 2)
    assert len(small._buckets) == 0
    small.mel(*own, 2)
    assert len(small._buckets) == 1


def test_failures_between_which_a_capture_succeeds_are_not_for_good(
    small: FlowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(CAPTURES):
        with monkeypatch.context() as patch:
            patch.setattr(engines, "capture", failing(CaptureError("the capture failed")))
            small.mel(*inputs(5, 2), 2)
        small.mel(*inputs(5, 2), 2)
        assert len(small._buckets) == 1
        small._buckets.clear()
    assert small.eager_because is None


def test_a_size_without_room_runs_eagerly_and_lets_the_others_be(
    small: FlowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = mock.Mock(wraps=failing(torch.OutOfMemoryError("no room"), 32))
    monkeypatch.setattr(engines, "capture", capture)
    large, little = inputs(30, 2), inputs(5, 2)
    small.mel(*little, 2)
    assert torch.equal(small.mel(*large, 2), eager_mel(small, large, 2))
    assert capture.call_count == 3, "once beside the other, once alone"
    assert len(small._buckets) == 0
    for _ in range(2):
        small.mel(*little, 2)
        assert torch.equal(small.mel(*large, 2), eager_mel(small, large, 2))
    assert capture.call_count == 4, "it is not tried again, and evicts nobody"
    assert len(small._buckets) == 1
    assert small.eager_because is None, "other sizes have room"
    assert small.without_room == "no memory for a graph of 32 tokens in 2 steps"
    with mock.patch.object(FlowEngine, "without_room", "no memory"):
        assert "no memory" in Engine(rough_s3gen()).rows()[0].why, "a report says so"
    small.mel(*large, 3)
    assert capture.call_count == 6, "another number of steps is tried"


def test_others_make_room(small: FlowEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    small.mel(*inputs(5, 2), 2)
    freed: list[int] = []

    def capture(step: Callable[[], None], *_: Any) -> Callable[[], None]:
        if not freed:
            raise torch.OutOfMemoryError("no room")
        return eagerly(step)

    half_made: list[Any] = []
    monkeypatch.setattr(engines, "capture", capture)
    plain = engines.Bucket.__init__

    def watched(self: Any, *rest: Any) -> None:
        half_made.append(weakref.ref(self))
        plain(self, *rest)

    monkeypatch.setattr(engines.Bucket, "__init__", watched)
    clear = small._buckets.clear

    def cleared() -> None:
        assert half_made[0]() is None, "its buffers are freed by then"
        freed.append(len(small._buckets))
        clear()

    monkeypatch.setattr(small._buckets, "clear", cleared)
    small.mel(*inputs(12, 2), 2)
    assert freed == [1]
    assert len(small._buckets) == 1


def test_a_pool_goes_with_its_graphs(small: FlowEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes none again whose graphs are all gone."""
    small.mel(*inputs(5, 2), 2)
    pools: list[Any] = []

    def capture(step: Callable[[], None], _: Any, pool: Any) -> Callable[[], None]:
        pools.append(pool)
        if len(pools) == 1:
            raise torch.OutOfMemoryError("no room")
        return eagerly(step)

    monkeypatch.setattr(engines, "capture", capture)
    small._pool = (0, 1)
    monkeypatch.setattr(small, "_new_pool", lambda: (0, 2))
    small.mel(*inputs(12, 2), 2)
    assert pools == [(0, 1), (0, 2)]


def test_a_bucket_is_made_once_all_before_it_is_done(
    small: FlowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is forgotten in its favour may still run; its table is there for other streams."""
    calls = mock.Mock()
    calls.capture.side_effect = eagerly
    monkeypatch.setattr(engines, "settle", calls.settle)
    monkeypatch.setattr(engines, "capture", calls.capture)
    small.mel(*inputs(5, 2), 2)
    assert [name for name, *_ in calls.mock_calls] == ["settle", "settle", "capture"]


def test_the_engines_device_waits_for_the_one_before(
    small: FlowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the stream of that device, whichever is current."""
    streams = mock.Mock()
    monkeypatch.setattr(torch.cuda, "current_stream", streams)
    small._done = mock.Mock(name="event")
    small.mel(*inputs(5, 2), 2)
    streams.assert_called_once_with(small.device)
    streams.return_value.wait_event.assert_called_once_with(small._done)


def test_the_next_one_waits_for_the_end_of_this(
    small: FlowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = mock.Mock()  # a bucket on a GPU
    monkeypatch.setattr(torch.cuda, "current_stream", calls.stream)
    monkeypatch.setattr(small, "device", torch.device("cuda"))
    small._buckets.get((8, 2), lambda: calls.bucket)
    assert small.mel(*inputs(5, 2), 2) is calls.bucket.mel.return_value
    calls.stream.assert_called_once_with(small.device)
    assert calls.mock_calls[0][0] == "bucket.mel"
    assert small._done is calls.stream.return_value.record_event.return_value
    small._done = None
    calls.bucket.mel.side_effect = torch.OutOfMemoryError("no room for a copy")
    with pytest.raises(torch.OutOfMemoryError):
        small.mel(*inputs(5, 2), 2)
    assert small._done is not None, "its graph runs all the same"


def test_threads_take_turns(small: FlowEngine) -> None:
    cases = [inputs(tokens, 2, seed=tokens) for tokens in (3, 6, 8, 11, 16, 7)]
    expected = [small.mel(*case, 2) for case in cases]
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        with torch.inference_mode():
            for _ in range(3):
                found[number] = small.mel(*cases[number], 2)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, each in enumerate(expected):
        assert torch.equal(found[number], each)


@pytest.mark.gpu
def test_a_graph_is_what_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    flow = rough_s3gen().flow.cuda()
    engine = FlowEngine(flow, Options.of(precision="exact"))
    assert engine.eager_because is None
    for tokens, known, cut in ((70, 40, 0), (30, 8, 6), (64, 0, 0), (70, 40, 0)):
        own = tuple(each.cuda() for each in inputs(tokens, known, cut))
        found = engine.mel(*own, 10)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "eager_because", "to compare")
            expected = engine.mel(*own, 10)
        assert relative(found, expected) < 1e-5
    assert len(engine._buckets) == 2
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.mel(*own, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_without_cudnn_it_is_the_same() -> None:
    """Its convolutions leave their output in another order than cuDNN's."""
    s3gen = rough_s3gen()
    case = inputs(9, 4)
    expected = FlowEngine(s3gen.flow, Options()).mel(*case, 2)
    mel = torch.randn(1, 3, 80, generator=torch.Generator().manual_seed(1))
    excitation = 0.1 * torch.randn(1, 1, 3 * 480, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        wave = decode(VocoderEngine(s3gen.mel2wav, Options()).weights, mel, excitation)
        s3gen.cuda()
        with torch.backends.cudnn.flags(enabled=False):
            engine = FlowEngine(s3gen.flow, Options.of(precision="exact"))
            found = engine.mel(*(each.cuda() for each in case), 2)
            assert engine.eager_because is None
            weights = VocoderEngine(s3gen.mel2wav, Options.of(precision="exact")).weights
            ours = decode(weights, mel.cuda(), excitation.cuda())
    assert relative(found.cpu(), expected) < 1e-5
    assert relative(ours.cpu(), wave) < 1e-4


@pytest.mark.gpu
def test_utterances_on_streams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their graphs share memory: one starts when the other's is done, whoever waits for it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    flow = rough_s3gen().flow.cuda()
    cases = [inputs(tokens, 8, seed=tokens) for tokens in (30, 70, 33, 66)]

    def mel(engine: FlowEngine, case: tuple[Tensor, ...]) -> Tensor:
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            return engine.mel(*(each.cuda() for each in case), 2)

    alone = FlowEngine(flow, Options.of(precision="exact"))
    in_turn = []
    for case in cases:
        found = mel(alone, case)
        torch.cuda.synchronize()
        in_turn.append(found.cpu())
    together = FlowEngine(flow, Options.of(precision="exact"))
    with ThreadPoolExecutor(4) as threads:
        at_once = list(threads.map(lambda case: mel(together, case), cases * 2))
    torch.cuda.synchronize()
    for got, expected in zip(at_once, in_turn * 2, strict=True):
        assert relative(got.cpu(), expected) < 1e-5
