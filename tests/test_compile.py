"""patch(model, compile=True): prefill and decode step under torch.compile, in one graph each."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import engine_of, tokens_of
from torch._dynamo.utils import counters

from chatterbox_fast.options import Options
from chatterbox_fast.t3 import runner
from chatterbox_fast.t3.backbone import EAGER
from chatterbox_fast.t3.decode_step import step_logits
from chatterbox_fast.t3.engine import Engines
from chatterbox_fast.t3.site import describe_t3
from chatterbox_fast.testing import random_t3

TEXT = torch.tensor([[255, *range(3, 60), 0]])


@pytest.mark.parametrize("precision", ["exact", "int8"])
def test_tokens_are_the_eager_ones_and_no_graph_breaks(t3_cond: Any, precision: str) -> None:
    t3 = random_t3("english", "tiny")
    settings = {"t3_cond": t3_cond, "text_tokens": TEXT, "max_new_tokens": 12, "seed": 3}
    torch._dynamo.reset()
    counters.clear()
    eager = tokens_of(t3, options={"precision": precision}, **settings)
    assert not counters["stats"]
    options = {"precision": precision, "compile": True}
    assert engine_of(t3, **options).layers is not EAGER
    assert torch.equal(tokens_of(t3, options=options, **settings), eager)
    assert counters["stats"]["calls_captured"] > 0
    assert not counters["graph_break"]
    # Other lengths, one row instead of two, a larger cache: the same graphs or few more.
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 6
    other = {**settings, "text_tokens": torch.tensor([[255, *[9] * 180, 0]]), "max_new_tokens": 50}
    expected = tokens_of(t3, options={"precision": precision}, **other)
    assert torch.equal(tokens_of(t3, options=options, **other), expected)
    assert counters["stats"]["unique_graphs"] <= graphs + 1
    assert not counters["graph_break"]


def test_a_compiler_that_fails_is_not_asked_again(
    t3_cond: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = mock.Mock(side_effect=OSError("no compiler"))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=asked))
    t3, engines = random_t3("english", "tiny"), Engines(Options(compile=True))
    settings = {"t3_cond": t3_cond, "text_tokens": TEXT, "max_new_tokens": 4}
    expected = tokens_of(t3, seed=3, **settings)
    assert describe_t3(t3, engines)[0].backend == "cpu, compiled"
    for _ in range(2):
        torch.manual_seed(3)
        assert torch.equal(runner.inference(t3, engines.of(t3), **settings), expected)
        assert asked.call_count == 2, "once a function: prefill, decode"
    row = describe_t3(t3, engines)[0]
    assert row.backend == "cpu, eager"
    assert "torch.compile failed: " in row.why
    assert "no compiler" in row.why


def test_a_whole_step_is_one_graph(t3_cond: Any) -> None:
    """compile=True compiles one layer, for all; nothing in a step forbids to compile it whole."""
    t3 = random_t3("english", "tiny")
    engine = engine_of(t3)
    torch._dynamo.reset()
    with torch.inference_mode():
        engine.voice(t3, t3_cond)
        weights, state = engine.weights.decode, engine.slots.take(2, 60).state
        whole = torch.compile(lambda: step_logits(weights, state, 60), fullgraph=True)
        state.embedding.normal_()
        state.position.fill_(50)
        expected = step_logits(weights, state, 60)
        state.position.fill_(50)
        torch.testing.assert_close(whole(), expected, rtol=1e-4, atol=1e-4)
        assert int(state.position) == 51
