"""S3Gen on a GPU: exact is stock's, half precision no further off than stock's own, graphs agree.

Not yet run on a GPU, but on an emulated one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from s3gen_toolkit import Engine, relative, rough_s3gen, utterance
from torch import Tensor

from chatterbox_fast.compiling import why_not_compiled
from chatterbox_fast.options import Options
from chatterbox_fast.s3gen.engine import FlowEngine

pytestmark = pytest.mark.gpu

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def _as_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without TF32, for inference."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def s3gen() -> Any:
    return rough_s3gen().cuda()


def mel_of(s3gen: Any, tokens: int, prompt: int, n_timesteps: int = 10) -> Tensor:
    """By whatever `s3gen` runs on; the noise of every frame is given."""
    own = utterance(tokens, prompt)
    noise = torch.Generator().manual_seed(4)
    own["noised_mels"] = torch.randn(1, 80, 2 * (tokens + prompt), generator=noise)
    given = {k: each.cuda() if isinstance(each, Tensor) else each for k, each in own.items()}
    mel: Tensor = s3gen.flow.inference(**given, n_timesteps=n_timesteps)[0]
    return mel.float()


def distance(found: Tensor, expected: Tensor) -> float:
    """Mean difference of two log-mels."""
    return float((found - expected).abs().mean())


def test_exact_is_stocks(s3gen: Any) -> None:
    expected = mel_of(s3gen, 12, 8)
    engine = Engine(s3gen, precision="exact")
    with engine:
        found = mel_of(s3gen, 12, 8)
    assert engine.rows()[0][1:3] == ("engine, exact", "cuda, CUDA graph")
    assert relative(found, expected) <= 1e-5


@pytest.mark.parametrize("precision", HALVES)
def test_half_precision_is_no_further_off_than_stocks(
    s3gen: Any, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Than stock's under autocast in it."""
    # As autocast does it, but in two operations: the emulated GPU's CPU has none that is both.
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, dim: softmax(x.float(), dim))
    expected = mel_of(s3gen, 24, 8)
    with torch.autocast("cuda", dtype=HALVES[precision]):
        stocks = distance(mel_of(s3gen, 24, 8), expected)
    engine = Engine(s3gen, precision=precision)
    with engine:
        ours = distance(mel_of(s3gen, 24, 8), expected)
    assert engine.rows()[0][1:3] == (f"engine, {precision}", "cuda, CUDA graph")
    assert 0 < ours <= stocks


def inputs(tokens: int, known: int) -> tuple[Tensor, ...]:
    """Tokens, speaker, prompt and noise, as `FlowEngine.mel` takes them."""
    source = torch.Generator().manual_seed(tokens)
    ids = torch.randint(6561, (1, tokens), generator=source).cuda()
    shapes = (1, 80), (1, known, 80), (1, 2 * tokens, 80)
    return ids, *(torch.randn(shape, generator=source).cuda() for shape in shapes)


def both(
    engine: FlowEngine, own: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """The mel by a graph, and eagerly."""
    captured = engine.mel(*own, 2)
    assert engine.eager_because is None
    with monkeypatch.context() as patch:
        patch.setattr(engine, "eager_because", "to compare")
        return captured, engine.mel(*own, 2)


def test_a_graph_in_bf16_is_what_runs_eagerly(s3gen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pad that was seen would be seen, and what is rounded elsewhere is no more than that."""
    exact = FlowEngine(s3gen.flow, Options.of(precision="exact"))
    engine = FlowEngine(s3gen.flow, Options.of(precision="bf16"))
    for tokens, known in ((70, 40), (9, 4)):
        own = inputs(tokens, known)
        captured, eager = both(engine, own, monkeypatch)
        oracle = exact.mel(*own, 2)
        assert relative(captured, oracle) <= 2 * relative(eager, oracle)
        assert relative(captured, eager) < torch.finfo(torch.bfloat16).eps
    assert len(engine._buckets) == 2
    assert engine.without_room is None


def test_what_is_compiled_is_captured(s3gen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As traced, which takes seconds; inductor's kernels are torch's to test."""
    torch._dynamo.reset()
    traced = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", traced)
    plain = FlowEngine(s3gen.flow, Options.of(precision="exact"))
    engine = FlowEngine(s3gen.flow, Options.of(precision="exact", compile=True))
    for tokens, known in ((9, 4), (30, 8)):
        own = inputs(tokens, known)
        captured, eager = both(engine, own, monkeypatch)
        assert relative(captured, eager) < 1e-5
        assert relative(captured, plain.mel(*own, 2)) < 1e-5
    assert why_not_compiled(engine.blocks) is None
    assert len(engine._buckets) == 1
    assert engine.without_room is None
