"""reference.cfg_sample against the very processors and the very draw that stock calls."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopPLogitsWarper,
)

from chatterbox_fast.ops import SamplingParams
from chatterbox_fast.reference import cfg_sample

VOCABULARY = 8194
GRID = [
    SamplingParams(),
    SamplingParams(cfg_weight=0.3, temperature=1.3),
    SamplingParams(cfg_weight=1.0, repetition_penalty=2.0),
    SamplingParams(repetition_penalty=0.6),
    SamplingParams(temperature=0.05),
    SamplingParams(temperature=3.0, min_p=0.0),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.01, min_p=0.0),
    SamplingParams(top_p=0.0),
    SamplingParams(min_p=1.0),
    SamplingParams(top_p=0.95, min_p=0.02, temperature=1.1, repetition_penalty=1.5),
]


def stock_draw(logits: Tensor, ids: Tensor, p: SamplingParams, generator: torch.Generator) -> int:
    """The body of stock's loop, T3.inference, from logits to token."""
    cond, uncond = logits[0:1], logits[1:2]
    cfg = torch.as_tensor(p.cfg_weight, dtype=cond.dtype)
    scores = cond + cfg * (cond - uncond)
    scores = RepetitionPenaltyLogitsProcessor(penalty=float(p.repetition_penalty))(ids, scores)
    if p.temperature != 1.0:
        scores = scores / p.temperature
    scores = MinPLogitsWarper(min_p=p.min_p)(ids, scores)
    scores = TopPLogitsWarper(top_p=p.top_p)(ids, scores)
    probs = torch.softmax(scores, dim=-1)
    return int(torch.multinomial(probs, num_samples=1, generator=generator))


def seen_of(ids: Tensor) -> Tensor:
    return torch.zeros(1, VOCABULARY, dtype=torch.bool).index_fill_(1, ids[0], True)


def our_draw(logits: Tensor, seen: Tensor, p: SamplingParams, generator: torch.Generator) -> int:
    params = p.pack(logits.dtype, logits.device)
    token, failed = cfg_sample(logits, seen, params, generator)
    assert token.shape == failed.shape == (1,)
    assert not failed.any()
    return int(token)


@pytest.mark.parametrize("params", GRID, ids=str)
def test_draws_are_stocks(params: SamplingParams) -> None:
    source = torch.Generator().manual_seed(11)
    ours, stocks = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    different = set()
    for _ in range(120):
        logits = torch.randn(2, VOCABULARY, generator=source) * 4.0
        # The likeliest ids are among those seen, so that the penalty matters.
        ids = torch.cat([logits.topk(20).indices[0], torch.randint(0, 8194, (40,))])[None]
        expected = stock_draw(logits, ids, params, stocks)
        assert our_draw(logits, seen_of(ids), params, ours) == expected
        different.add(expected)
    assert torch.equal(ours.get_state(), stocks.get_state())
    assert len(different) > 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_finite_logit(dtype: torch.dtype) -> None:
    logits = torch.full((2, VOCABULARY), -math.inf, dtype=dtype)
    logits[:, 77] = 1.0
    logits[1] = 0.0
    seen = torch.zeros(1, VOCABULARY, dtype=torch.bool)
    assert our_draw(logits, seen, SamplingParams(), torch.Generator()) == 77


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_cannot_be_drawn_from_are_flagged(bad: float) -> None:
    logits = torch.zeros(1, VOCABULARY)
    if bad == -math.inf:
        logits[:] = bad
    else:
        logits[0, 5] = bad
    seen = torch.zeros(1, VOCABULARY, dtype=torch.bool)
    _, failed = cfg_sample(logits, seen, SamplingParams(0.0).pack(logits.dtype, logits.device))
    assert failed.tolist() == [True]


def test_the_row_without_cfg_is_used_alone() -> None:
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 4
    seen, params = torch.zeros(1, VOCABULARY, dtype=torch.bool), SamplingParams(cfg_weight=0.0)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    one = our_draw(logits, seen, params, generators[0])
    two = our_draw(torch.cat([logits, logits + 1]), seen, params, generators[1])
    assert one == two


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
    ],
)
def test_parameters_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be finite and .*, got {value!r}"):
        SamplingParams(**{name: value})


def test_one_minus_top_p_is_rounded_from_double() -> None:
    packed = SamplingParams(top_p=0.9).pack(torch.float32, torch.device("cpu"))
    assert packed[0, 4] == torch.tensor(1 - 0.9, dtype=torch.float32)
    assert packed[0, 4] != 1 - torch.tensor(0.9)
