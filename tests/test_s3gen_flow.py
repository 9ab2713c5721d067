"""The flow on the engine: float64, what makes it leave the work to stock, bad input, threads."""

from __future__ import annotations

import copy
import logging
import threading
import time
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from chatterbox.models.s3gen import decoder as stock_decoder
from s3gen_toolkit import Engine, relative, rough_s3gen, seeded, utterance
from torch import Tensor, nn

from chatterbox_fast.options import Options
from chatterbox_fast.s3gen import engine as engine_module
from chatterbox_fast.s3gen.engine import TABLES, Engines, FlowEngine
from chatterbox_fast.s3gen.support import why_flow_unsupported


@pytest.fixture(scope="module")
def _s3gen() -> Any:
    return rough_s3gen()


@pytest.fixture
def s3gen(_s3gen: Any) -> Any:
    """Fails the test that leaves it changed."""
    parameters = {name: (p, p._version) for name, p in _s3gen.named_parameters()}
    yield _s3gen
    assert {name: (p, p._version) for name, p in _s3gen.named_parameters()} == parameters
    assert "inference" not in vars(_s3gen.flow)
    assert why_flow_unsupported(_s3gen.flow) is None


def mel(s3gen: Any, arguments: dict[str, Any]) -> Tensor:
    found, _ = seeded(lambda: s3gen.flow.inference(**arguments)[0])
    return found


def test_error_is_stocks_or_less(s3gen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, in which stock runs but for a check of the mask's dtype."""
    noise = torch.randn(1, 80, 56)  # takes the place of what is drawn
    arguments = utterance(20, 8) | {"noised_mels": noise}
    floats = ("prompt_feat", "embedding", "noised_mels")
    exact = arguments | {name: arguments[name].double() for name in floats}
    double = copy.deepcopy(s3gen).double()
    monkeypatch.setattr(
        stock_decoder, "mask_to_bias", lambda mask, dtype: (1.0 - mask.to(dtype)) * -1e10
    )
    oracle = mel(double, exact)
    with Engine(double):
        assert relative(mel(double, exact), oracle) < 1e-13
    stocks = relative(mel(s3gen, arguments).double(), oracle)
    with Engine(s3gen):
        ours = relative(mel(s3gen, arguments).double(), oracle)
    assert ours <= 2 * stocks + torch.finfo(torch.float).eps
    assert stocks < 1e-5


def test_convolutions_may_have_no_bias(s3gen: Any) -> None:
    odd, arguments = copy.deepcopy(s3gen), utterance()
    estimator = odd.flow.decoder.estimator
    for block in (estimator.down_blocks[0][0].block1, estimator.mid_blocks[0][0].block2):
        block.block[0].bias = None
    expected = mel(odd, arguments)
    engine = Engine(odd)
    assert engine.rows()[0].runs == "engine, exact"
    with engine:
        assert relative(mel(odd, arguments), expected) < 1e-5


def test_every_input_reaches_the_mel(s3gen: Any) -> None:
    arguments = utterance()
    with Engine(s3gen):
        plain = mel(s3gen, arguments)
        assert plain.is_inference(), "as stock's"
        for name in ("prompt_feat", "embedding"):
            changed = mel(s3gen, arguments | {name: arguments[name] + 0.1})
            assert relative(changed, plain) > 1e-4, name
        for name in ("token", "prompt_token"):
            assert relative(mel(s3gen, arguments | {name: arguments[name].flip(1)}), plain) > 1e-2


def test_unequal_lengths_are_stocks(s3gen: Any) -> None:
    arguments = utterance(6, 5, rows=2) | {"token_len": torch.tensor([6, 4])}
    expected = mel(s3gen, arguments)
    with Engine(s3gen):
        assert torch.equal(mel(s3gen, arguments), expected)


def test_meanflow_of_an_estimator_without_is_stocks(s3gen: Any) -> None:
    arguments = utterance(6, 5) | {"meanflow": True, "noised_mels": torch.randn(1, 80, 12)}
    expected = mel(s3gen, arguments)
    assert relative(expected, mel(s3gen, arguments | {"meanflow": False})) > 1e-2
    with Engine(s3gen):
        assert torch.equal(mel(s3gen, arguments), expected)


@pytest.mark.parametrize("name", ["token", "prompt_token"])
@pytest.mark.parametrize("token", [6561, -1, 10**6])
def test_tokens_out_of_range(
    s3gen: Any, name: str, token: int, caplog: pytest.LogCaptureFixture
) -> None:
    arguments, good = utterance(), utterance()
    arguments[name][0, 3] = token
    with caplog.at_level(logging.CRITICAL), pytest.raises(IndexError):
        mel(s3gen, arguments)
    message = rf"chatterbox_fast: {name} must be in \[0, 6561\), got {token}$"
    with Engine(s3gen):
        with pytest.raises(IndexError, match=message):
            mel(s3gen, arguments)
        found = mel(s3gen, good)
    assert relative(found, mel(s3gen, good)) < 1e-5, "a failed call leaves nothing behind"


def test_lengths_that_do_not_fit(s3gen: Any) -> None:
    with Engine(s3gen):
        with pytest.raises(ValueError, match="must not both be empty"):
            mel(s3gen, utterance(0, 0))
        with pytest.raises(ValueError, match="at most the 14 frames of all tokens' mel, got 30"):
            mel(s3gen, utterance(3, 4, frames=30))
        assert mel(s3gen, utterance(0, 4)).shape == (1, 80, 0)


def test_a_prompts_bands(s3gen: Any) -> None:
    """One stands for all, as in stock; any other number is named."""
    arguments = utterance()
    one = arguments | {"prompt_feat": arguments["prompt_feat"][..., :1]}
    expected = mel(s3gen, one)
    with Engine(s3gen):
        assert relative(mel(s3gen, one), expected) < 1e-5
    for bands in (79, 81, 0):
        odd = arguments | {"prompt_feat": torch.zeros(1, 20, bands)}
        with pytest.raises(RuntimeError):
            mel(s3gen, odd)
        message = (
            rf"prompt_feat must have 80 bands, or one for all, got {bands}: \(1, 20, {bands}\)"
        )
        with Engine(s3gen), pytest.raises(ValueError, match=message):
            mel(s3gen, odd)


def test_extreme_inputs_stay_finite(s3gen: Any) -> None:
    arguments = utterance()
    arguments["prompt_feat"] *= 1e4
    expected = mel(s3gen, arguments)
    with Engine(s3gen):
        found = mel(s3gen, arguments)
    assert torch.isfinite(found).all()
    assert relative(found, expected) < 1e-5
    arguments["embedding"] = torch.zeros(1, 192)
    with Engine(s3gen):
        assert torch.isfinite(mel(s3gen, arguments)).all()


def test_what_changes_is_noticed() -> None:
    s3gen, arguments = rough_s3gen(), utterance()
    decoder = s3gen.flow.decoder

    def agrees() -> bool:
        expected = mel(s3gen, arguments)
        with engine:
            return relative(mel(s3gen, arguments), expected) < 1e-5

    engine = Engine(s3gen)
    assert agrees()
    before = mel(s3gen, arguments)
    with torch.no_grad():
        decoder.estimator.time_mlp.linear_1.bias += 1
    assert agrees()
    decoder.inference_cfg_rate = 0.2
    assert agrees()
    decoder.t_scheduler = "linear"
    assert agrees()
    s3gen.flow.spk_embed_affine_layer.bias.data = torch.ones(80)
    assert agrees()
    assert relative(mel(s3gen, arguments), before) > 1e-2, "the changes are seen at all"


def test_what_is_not_stocks_is_left_to_stock() -> None:
    s3gen = rough_s3gen()
    flow, estimator = s3gen.flow, s3gen.flow.decoder.estimator
    block, path = estimator.mid_blocks[0][1][0], "decoder.estimator.mid_blocks.0.1.0.norm1"

    def reason() -> str:
        found = why_flow_unsupported(flow)
        assert found is not None
        return found

    flow.train()
    assert reason() == "the module is in training mode"
    flow.eval()
    handle = block.norm1.register_forward_hook(lambda *_: None)
    assert reason() == f"{path} has a forward hook, which would not be called"
    handle.remove()
    block.norm1.forward = block.norm1.forward
    assert reason() == f"{path} has a forward of its own, which would not be called"
    del block.norm1.forward
    estimator.static_chunk_size = 50
    assert reason() == "decoder.estimator has static_chunk_size 50, not 0"
    estimator.static_chunk_size = 0
    block.attn1.scale = 1.0
    assert reason() == "attention scales by 1.0, not 0.125"
    block.attn1.scale = 0.125
    stock, estimator.final_proj = estimator.final_proj, nn.ConvTranspose2d(1, 1, 1)
    estimator.final_block, final = nn.Bilinear(1, 1, 1), estimator.final_block
    assert reason() == "decoder.estimator.final_block is a Bilinear"
    estimator.final_proj, estimator.final_block = stock, final
    flow.bfloat16()
    assert reason() == "its weights are torch.bfloat16; the exact engine takes float32"
    flow.float()
    assert why_flow_unsupported(flow) is None
    assert why_flow_unsupported(s3gen.mel2wav) is not None


def test_estimators_that_stock_does_not_have() -> None:
    flow = rough_s3gen().flow
    flow.token_mel_ratio = 4
    assert "has token_mel_ratio 4, not 2" in str(why_flow_unsupported(flow))
    flow.token_mel_ratio = 2
    middle = flow.decoder.estimator.mid_blocks
    flow.decoder.estimator.mid_blocks = nn.ModuleList()
    assert why_flow_unsupported(flow) == "the estimator has no transformer in the middle"
    flow.decoder.estimator.mid_blocks = middle
    middle[0][1] = nn.ModuleList()
    assert why_flow_unsupported(flow) == "the estimator has no transformer in the middle"


def test_a_larger_embedding_takes_more_tokens() -> None:
    """Stock asks the embedding, not vocab_size."""
    s3gen = rough_s3gen()
    more = nn.Embedding(6570, s3gen.flow.input_embedding.embedding_dim)
    s3gen.flow.input_embedding = more
    arguments = utterance()
    arguments["token"][0, 3] = 6569
    expected = mel(s3gen, arguments)
    with Engine(s3gen):
        assert relative(mel(s3gen, arguments), expected) < 1e-5
        arguments["token"][0, 3] = 6570
        with pytest.raises(IndexError, match=r"token must be in \[0, 6570\), got 6570"):
            mel(s3gen, arguments)


def test_training_runs_stock(s3gen: Any) -> None:
    arguments = utterance()
    s3gen.flow.train()
    try:
        expected = mel(s3gen, arguments)
        with Engine(s3gen):
            assert torch.equal(mel(s3gen, arguments), expected)
    finally:
        s3gen.flow.eval()


def test_autocast_runs_stock(s3gen: Any) -> None:
    engine = Engine(s3gen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert engine.rows()[0].why == "torch.autocast is on"
    assert engine.rows()[0].runs == "engine, exact"


def flow_engines() -> Engines[FlowEngine]:
    return Engines(FlowEngine, why_flow_unsupported, Options())


def test_a_kept_engine_goes_with_any_change() -> None:
    """Whatever `why_flow_unsupported` may object to is seen at the next call, also in turn."""
    flow = rough_s3gen().flow
    engines, attention = flow_engines(), flow.decoder.estimator.mid_blocks[0][1][0].attn1
    first = engines.of(flow)
    assert isinstance(first, FlowEngine)
    for scale in (1.0, 0.5, 2.0):
        attention.scale = scale
        assert engines.of(flow) == f"attention scales by {scale}, not 0.125"
    attention.scale = 0.125
    handle = attention.register_forward_hook(lambda *_: None)
    assert "hook" in str(engines.of(flow))
    handle.remove()
    attention.to_q.train()
    second = engines.of(flow)
    assert isinstance(second, FlowEngine)
    assert second is not first
    attention.to_q = torch.nn.Identity()
    assert "Identity" in str(engines.of(flow))


def test_a_new_engine_does_not_wait_for_the_memory_of_the_old() -> None:
    made: list[Any] = []

    def make(*_: Any) -> Any:
        assert all(engine() is None for engine in made)
        engine = mock.Mock()
        made.append(weakref.ref(engine))
        return engine

    module, engines = nn.Linear(1, 1), Engines(make, lambda _: None, Options())
    for number in range(2):
        module.number = number
        engines.of(module)
    assert len(made) == 2


def test_an_engine_goes_when_no_stream_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = mock.Mock()
    monkeypatch.setattr(engine_module, "settle_all", calls.settle_all)
    engines = Engines(lambda *_: calls.make(), lambda _: None, Options())
    module = nn.Linear(1, 1)
    engines.of(module)
    module.extra = 1
    engines.of(module)
    assert [name for name, *_ in calls.mock_calls] == ["make", "settle_all", "make"]


def test_threads_whose_first_calls_come_at_once_make_one_engine() -> None:
    made: list[Any] = []
    barrier = threading.Barrier(4)

    def make(*_: Any) -> Any:
        time.sleep(0.05)  # long enough for the others to come
        made.append(mock.Mock())
        return made[-1]

    module, engines = nn.Linear(1, 1), Engines(make, lambda _: None, Options())
    found: list[Any] = []

    def work() -> None:
        barrier.wait()
        found.append(engines.of(module))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made
    assert found == 4 * made


def test_a_kept_engine_goes_with_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(1, 1)
    engines = Engines(lambda *_: mock.Mock(), lambda _: None, Options())
    found = [engines.of(module)]
    for name, value in (("GRAPHS", "0"), ("BACKEND", "reference")):
        monkeypatch.setenv(f"CHATTERBOX_FAST_{name}", value)
        found.append(engines.of(module))
        assert engines.of(module) is found[-1]
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = not before  # a graph would keep the old kernels
        found.append(engines.of(module))
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert len(set(map(id, found))) == 4


def test_engines_are_kept_as_long_as_weights(s3gen: Any) -> None:
    engines = flow_engines()
    first = engines.of(s3gen.flow)
    assert isinstance(first, FlowEngine)
    assert engines.of(s3gen.flow) is first
    table = first.table(10)
    assert first.table(10) is table
    assert len(table.shifts) == len(table.steps) == 10
    for steps in range(1, TABLES + 1):
        first.table(steps)
    assert first.table(10) is not table
    assert len(first._tables) == TABLES
    other = copy.deepcopy(s3gen.flow)
    assert engines.of(other) is not first
    assert engines.of(s3gen.flow) is first


def test_threads_share_nothing_that_changes(s3gen: Any) -> None:
    cases = [
        utterance(tokens, 5, seed=tokens) | {"n_timesteps": 2 + tokens % 3}
        for tokens in range(4, 10)
    ]
    for case in cases:
        frames = 2 * (case["token"].shape[1] + 5)
        case["noised_mels"] = torch.randn(1, 80, frames)  # all of the noise: nothing is drawn
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        found[number] = s3gen.flow.inference(**cases[number])[0]

    with Engine(s3gen):
        expected = [s3gen.flow.inference(**case)[0] for case in cases]
        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(cases))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, each in enumerate(expected):
        assert torch.equal(found[number], each)
