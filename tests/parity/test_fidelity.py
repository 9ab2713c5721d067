"""Precisions other than exact: no further from stock in float32 than stock itself is in them."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from chatterbox.models.t3.t3 import T3
from conftest import engine_of, tokens_of
from torch import Tensor, nn

from chatterbox_fast.fidelity import (
    divergence,
    draw_probabilities,
    engine_logits,
    entropy,
    stock_logits,
)
from chatterbox_fast.testing import random_t3

TEXT = torch.tensor([[255, *range(3, 60), 0]])
WEIGHT_SEEDS = (0, 1, 2)


class Forced:
    """A T3 of stock's width, tokens that stock drew, and the probabilities that it drew from."""

    def __init__(self, seed: int, cond: Any, device: str = "cpu") -> None:
        self.t3 = random_t3("english", "reduced", seed=seed).to(device)
        self.cond = copy.deepcopy(cond).to(device=device)
        self.text = TEXT.to(device)
        torch.manual_seed(seed)
        self.tokens = T3.inference(
            self.t3, t3_cond=copy.copy(self.cond), text_tokens=self.text.expand(2, -1),
            max_new_tokens=32,
        )[0]  # fmt: skip
        self.exact = self.stock(self.t3)

    def stock(self, t3: Any) -> Tensor:
        return draw_probabilities(stock_logits(t3, self.cond, self.text, self.tokens))

    def ours(self, precision: str) -> Tensor:
        engine = engine_of(self.t3, precision=precision)
        assert engine.precise.precision == precision
        logits = engine_logits(self.t3, engine, self.cond, self.text, self.tokens)
        return draw_probabilities(logits)


@pytest.fixture(scope="module", params=WEIGHT_SEEDS)
def forced(request: pytest.FixtureRequest, whole_voice: Any) -> Forced:
    return Forced(request.param, whole_voice)


def test_the_measure_is_right(forced: Forced) -> None:
    """Spread as trained logits are; stock's tokens are likely in it; exact is no other."""
    assert 2.0 < entropy(forced.exact) < 4.5
    drawn = forced.exact.gather(1, forced.tokens[:, None])
    assert drawn.log().mean() > -2 * entropy(forced.exact)
    assert divergence(forced.exact, forced.exact) == 0.0
    assert divergence(forced.exact, forced.exact.roll(1, dims=0)) > 1.0
    assert divergence(forced.exact, forced.ours("exact")) < 1e-8


def test_bf16_is_no_further_than_stock_in_bf16(forced: Forced) -> None:
    stock = divergence(forced.exact, forced.stock(copy.deepcopy(forced.t3).bfloat16()))
    ours = divergence(forced.exact, forced.ours("bf16"))
    assert 0 < ours <= stock


def test_int8_is_no_further_than_torchs_own_dynamic_int8(forced: Forced) -> None:
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(forced.t3), {nn.Linear})
    quantised.speech_head = forced.t3.speech_head  # stock asks it for its weight's device
    stock = divergence(forced.exact, forced.stock(quantised))
    ours = divergence(forced.exact, forced.ours("int8"))
    assert divergence(forced.exact, forced.ours("bf16")) < ours <= stock


def test_precisions_differ_and_repeat(forced: Forced) -> None:
    settings = {"t3_cond": forced.cond, "text_tokens": TEXT, "max_new_tokens": 12, "seed": 2}
    probabilities = [forced.ours(precision) for precision in ("exact", "bf16", "int8")]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(probabilities, 2))
    for precision in ("bf16", "int8"):
        options = {"precision": precision}
        first = tokens_of(forced.t3, options=options, **settings)
        assert torch.equal(tokens_of(forced.t3, options=options, **settings), first)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", WEIGHT_SEEDS)
def test_on_a_gpu(seed: int, t3_cond: Any) -> None:
    forced = Forced(seed, t3_cond, "cuda")
    divergences = {
        precision: divergence(forced.exact, forced.ours(precision))
        for precision in ("exact", "bf16", "fp16", "int8")
    }
    stock = {
        precision: divergence(forced.exact, forced.stock(copy.deepcopy(forced.t3).to(dtype)))
        for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
    }
    assert divergences["exact"] < 1e-8
    assert 0 < divergences["bf16"] <= stock["bf16"]
    assert 0 < divergences["fp16"] <= stock["fp16"]
    same = copy.copy(forced)  # the same tokens and rounded weights, on the CPU
    same.t3, same.cond = copy.deepcopy(forced.t3).cpu(), copy.deepcopy(forced.cond).to(device="cpu")
    same.text, same.tokens = forced.text.cpu(), forced.tokens.cpu()
    on_cpu = same.ours("int8").to("cuda")
    assert 0 < divergences["int8"] <= divergence(forced.exact, on_cpu) + stock["bf16"]
