"""patch(model, compile=True): prefill and decode step under torch.compile, in one graph each."""

from __future__ import annotations

import copy
import functools
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import engine_of, tokens_of
from torch._dynamo.utils import counters

from chatterbox_fast import patched, report
from chatterbox_fast.compiling import why_not_compiled
from chatterbox_fast.options import Options
from chatterbox_fast.t3 import runner
from chatterbox_fast.t3.backbone import EAGER
from chatterbox_fast.t3.decode_step import decode_step
from chatterbox_fast.t3.engine import Engines
from chatterbox_fast.t3.site import describe_t3
from chatterbox_fast.t3.state import DecodeState
from chatterbox_fast.testing import random_t3

TEXT = torch.tensor([[255, *range(3, 60), 0]])


@pytest.mark.parametrize("precision", ["exact", "int8"])
def test_tokens_are_the_eager_ones_and_nothing_falls_back(t3_cond: Any, precision: str) -> None:
    """A graph that breaks would: each function is compiled as one graph or runs eagerly."""
    t3 = random_t3("english", "tiny")
    settings = {"t3_cond": t3_cond, "text_tokens": TEXT, "max_new_tokens": 12, "seed": 3}
    torch._dynamo.reset()
    counters.clear()
    eager = tokens_of(t3, options={"precision": precision}, **settings)
    assert not counters["stats"]
    options = {"precision": precision, "compile": True}
    layers = engine_of(t3, **options).layers
    assert layers is not EAGER
    assert torch.equal(tokens_of(t3, options=options, **settings), eager)
    assert why_not_compiled(layers) is None
    assert counters["stats"]["calls_captured"] > 0
    # Other lengths, one row instead of two, a larger cache: the same graphs or few more.
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 6
    other = {**settings, "text_tokens": torch.tensor([[255, *[9] * 180, 0]]), "max_new_tokens": 50}
    expected = tokens_of(t3, options={"precision": precision}, **other)
    assert torch.equal(tokens_of(t3, options=options, **other), expected)
    assert counters["stats"]["unique_graphs"] <= graphs + 1
    assert why_not_compiled(layers) is None


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


def test_a_patched_models_t3_says_that_it_was_compiled(
    english: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it has spoken; by a compiler that costs nothing, for what is traced all the same."""
    given = mock.Mock(side_effect=lambda graph, _inputs: graph.forward)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=given))
    settings = {"t3_cond": english.conds.t3, "text_tokens": TEXT, "max_new_tokens": 6}
    expected = tokens_of(english.t3, seed=3, **settings)
    assert given.call_count == 0
    with patched(english, precision="exact", compile=True):
        torch.manual_seed(3)
        assert torch.equal(english.t3.inference(**settings), expected)
        row = next(row for row in report(english) if row.site == "t3.inference")
    assert row.backend == "cpu, compiled"
    assert "torch.compile failed" not in row.why
    assert given.call_count >= 2, "prefill, decode"


def test_a_whole_step_is_one_graph() -> None:
    """compile=True compiles one layer, for all; nothing in a step forbids to compile it whole.

    From the last token's embedding to the next one's, with the draw in between.
    """
    t3 = random_t3("english", "tiny")
    engine = engine_of(t3)
    torch._dynamo.reset()
    with torch.inference_mode():
        weights, state = engine.weights.decode, engine.slots.take(2, 60).state
        for cache in (state.k_cache, state.v_cache, state.embedding):
            cache.normal_()
        state.position.fill_(50)
        eager = DecodeState(**copy.deepcopy(vars(state)))
        whole = torch.compile(lambda: decode_step(weights, state, 60), fullgraph=True)
        for step in (functools.partial(decode_step, weights, eager, 60), whole):
            torch.manual_seed(1)
            step()
        assert torch.equal(state.tokens, eager.tokens)
        assert int(state.tokens[0, 0]) != 0
        for name, value in vars(state).items():
            if torch.is_tensor(value):
                expected = getattr(eager, name)
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4, msg=name)
