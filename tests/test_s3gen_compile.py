"""patch(model, compile=True) of S3Gen: no graph break, one graph for all blocks and lengths."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch
from s3gen_toolkit import Engine, relative, seeded, utterance
from torch._dynamo.utils import counters

from chatterbox_fast.compiling import why_not_compiled
from chatterbox_fast.options import Options
from chatterbox_fast.s3gen import engine as engine_module
from chatterbox_fast.s3gen import flow as flow_module
from chatterbox_fast.s3gen.engine import FlowEngine, VocoderEngine
from chatterbox_fast.s3gen.flow import EAGER, Given, estimate
from chatterbox_fast.s3gen.layers import Linear, Norm, each_layer, without_onednn
from chatterbox_fast.s3gen.vocoder import ResBlock, decode

COMPILED = Options(compile=True)


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    counters.clear()
    with torch.inference_mode():
        yield


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def inputs(frames: int) -> tuple[torch.Tensor, ...]:
    source = torch.Generator().manual_seed(frames)
    mu, prompt, noise = (torch.randn(1, frames, 80, generator=source) for _ in range(3))
    return mu, noise[:, 0], prompt, noise


def test_the_solvers_blocks(s3gen: Any) -> None:
    engine, plain = FlowEngine(s3gen.flow, COMPILED), FlowEngine(s3gen.flow, Options())
    assert engine.blocks is not EAGER
    for frames in (20, 26, 41):
        own = inputs(frames)
        assert relative(engine.solve(*own, 3), plain.solve(*own, 3)) < 1e-5
    assert not counters["graph_break"]
    assert why_not_compiled(engine.blocks) is None
    # Transformers are alike; residual blocks differ in width: from the middle's, and from two.
    assert 0 < (made := graphs()) <= 4
    for frames in (33, 58):
        own = inputs(frames)
        assert relative(engine.solve(*own, 2), plain.solve(*own, 2)) < 1e-5
    assert graphs() == made, "one for any length"


def test_what_is_compiled_is_plain_torch(s3gen: Any) -> None:
    """And what is not keeps the kernel."""
    engine = FlowEngine(s3gen.flow, COMPILED)

    def found(layers: Any) -> set[Any]:
        seen = []
        each_layer(layers, lambda layer: seen.append(layer) or layer, (Norm, Linear))
        return {each.by if isinstance(each, Norm) else each.onednn for each in seen}

    solver = engine.solver
    for compiled in (solver.down.transformers, solver.middle, solver.up):
        assert found(compiled) == {"reference", False}
    for eager in ((solver.down.resnet.act1, solver.down.resnet.act2), (solver.final_act,)):
        assert found(eager) == {"extension"}
    assert found(engine.encoder.before.layers) == {"extension", True}


def failing_compiler(_module: Any, _inputs: Any) -> Any:
    raise OSError("/bin/false exited with 1\nand a long story")


def test_a_compiler_that_fails_is_not_asked_again(
    s3gen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short vocoder: tracing the whole one takes minutes."""
    asked = mock.Mock(side_effect=failing_compiler)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=asked))
    monkeypatch.setattr(engine_module, "decode", lambda _, _mel, source: 2 * source.squeeze(1))
    engine, arguments = Engine(s3gen, compile=True), utterance(4, 3)
    flow, _, _, _, vocoder, *_ = engine.rows()
    assert (flow.backend, vocoder.backend) == ("cpu, compiled", "cpu, compiled")
    expected, _ = seeded(lambda: s3gen.flow.inference(**arguments)[0])
    with engine:
        for _ in range(2):
            found, _ = seeded(lambda: s3gen.flow.inference(**arguments)[0])
            assert relative(found, expected) < 1e-5
            assert asked.call_count == 2, "once a function: transformers, residual blocks"
        wave, source = s3gen.mel2wav.inference(torch.randn(1, 80, 3))
        assert torch.equal(wave, 2 * source[:, 0])
    flow, _, _, _, vocoder, *_ = engine.rows()
    for row in (flow, vocoder):
        assert row.backend == "cpu, eager"
        assert "torch.compile failed: " in row.why
        assert "raised: OSError: /bin/false exited with 1" in row.why
        assert "story" not in row.why


def test_padded_rows_are_compiled_too(s3gen: Any) -> None:
    engine = FlowEngine(s3gen.flow, COMPILED)
    block = engine.solver.middle[0].transformers[0]
    x = torch.randn(2, 12, block.qkv.weight.shape[1])
    lengths = torch.tensor([9, 12], dtype=torch.int32)
    part = torch.randn_like(x)
    (own, found), (xs, expected) = (
        (x, blocks.transformer(block, x, part, lengths))
        for blocks, x in ((engine.blocks, x.clone()), (EAGER, x.clone()))
    )
    for ours, theirs in ((own, xs), (found, expected)):
        assert relative(ours[0, :9], theirs[0, :9]) < 1e-5
        assert relative(ours[1], theirs[1]) < 1e-5
    assert why_not_compiled(engine.blocks) is None
    assert not counters["graph_break"]


def short(block: ResBlock, layers: int = 1) -> ResBlock:
    """The last convolution has its bias, as that of a whole block."""
    *others, (snake1, conv1, snake2, _) = block.layers[:layers]
    return ResBlock((*others, (snake1, conv1, snake2, block.layers[-1][3])))


def test_the_vocoder(s3gen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as ever; what inductor makes of it takes minutes, so it is run as traced.

    One layer of one block a stage, and once two of two: tracing all 72 takes minutes, too.
    """
    compile = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile)
    engine = VocoderEngine(s3gen.mel2wav, COMPILED)
    assert engine.decode is not decode
    stages = tuple(
        stage._replace(
            source_block=short(stage.source_block),
            blocks=tuple(short(block, count) for block in stage.blocks[:count]),
        )
        for stage, count in zip(engine.weights.stages, (2, 1, 1), strict=True)
    )
    weights = engine.weights._replace(stages=stages)
    for frames in (5, 9):
        mel = torch.randn(1, frames, 80)
        excitation = 0.2 * torch.randn(1, 1, 480 * frames)
        found = engine.decode(weights, mel, excitation)
        assert relative(found, decode(weights, mel, excitation)) < 1e-4
    assert why_not_compiled([engine.decode]) is None
    assert not counters["graph_break"]
    assert graphs() == 1


def test_a_whole_step_is_one_graph(s3gen: Any) -> None:
    """compile=True compiles a block, for all; nothing in a step forbids to compile it whole."""
    weights = without_onednn(FlowEngine(s3gen.flow, COMPILED).solver)
    table = flow_module.time_table(s3gen.flow.decoder, 2)
    whole = torch.compile(estimate, fullgraph=True, dynamic=True, backend="eager")
    for frames in (14, 23):
        mu, speaker, prompt, noise = inputs(frames)
        given: Given = flow_module.condition(weights, mu, speaker, prompt)
        found = whole(weights, given, noise, table.shifts[0])
        assert relative(found, estimate(weights, given, noise, table.shifts[0])) < 1e-5
    assert not counters["graph_break"]
    assert graphs() <= 2
