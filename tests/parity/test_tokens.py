"""T3's tokens: the engine against stock's own loop, from the same generator state.

Equal means every token and the generator's state after. No mismatch is excused.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from chatterbox.models.t3.t3 import T3
from conftest import tokens_of
from torch import Tensor

from chatterbox_fast.testing import random_t3

TEXTS = (
    [255, 40, 41, 0],
    [255, *range(3, 60), 0],
    [255, *([7, 2, 9] * 60), 0],
)
EXACT = {"precision": "exact"}
DEFAULTS = {
    "cfg_weight": 0.5,
    "temperature": 0.8,
    "top_p": 1.0,
    "min_p": 0.05,
    "repetition_penalty": 1.2,
}
SETTINGS = (
    {},
    {"cfg_weight": 0.3},
    {"cfg_weight": 1.0},
    {"temperature": 0.35},
    {"temperature": 1.0},
    {"temperature": 1.7},
    {"top_p": 0.9},
    {"top_p": 0.2},
    {"top_p": 0.0},
    {"min_p": 0.0},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"repetition_penalty": 1.0},
    {"repetition_penalty": 2.0},
    {"repetition_penalty": 0.5},
    {"cfg_weight": 0.7, "temperature": 0.6, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.5},
)


def stock_tokens(t3: Any, cond: Any, text: list[int], seed: int, **settings: Any) -> Tensor:
    rows = torch.tensor([text, text])
    torch.manual_seed(seed)
    return T3.inference(t3, t3_cond=copy.copy(cond), text_tokens=rows, **settings)


def our_tokens(t3: Any, cond: Any, text: list[int], seed: int, **settings: Any) -> Tensor:
    rows = torch.tensor([text, text])
    return tokens_of(t3, t3_cond=cond, text_tokens=rows, seed=seed, options=EXACT, **settings)


def assert_equal_runs(t3: Any, cond: Any, text: list[int], seed: int, **settings: Any) -> Tensor:
    expected = stock_tokens(t3, cond, text, seed, **settings)
    expected_state = torch.get_rng_state()
    got = our_tokens(t3, cond, text, seed, **settings)
    assert got.tolist() == expected.tolist()
    assert torch.equal(torch.get_rng_state(), expected_state)
    return got


@functools.cache
def t3_of(size: Any) -> Any:
    return random_t3("english", size)


@pytest.mark.parametrize(
    ("size", "change"),
    [*(("tiny", change) for change in SETTINGS), ("reduced", {}), ("reduced", SETTINGS[-1])],
    ids=str,
)
def test_tokens_and_generator_state_are_stocks(size: Any, t3_cond: Any, change: dict) -> None:
    t3 = t3_of(size)
    for seed, text in enumerate(TEXTS):
        tokens = assert_equal_runs(
            t3, t3_cond, text, seed, max_new_tokens=20, **{**DEFAULTS, **change}
        )
        assert tokens.shape == (1, 20)


def test_the_settings_matter(t3: Any, t3_cond: Any) -> None:
    """Otherwise equality over the settings would show nothing."""

    def run(seed: int = 1, **change: float) -> list[int]:
        settings = {**DEFAULTS, **change}
        return our_tokens(t3, t3_cond, TEXTS[1], seed, max_new_tokens=20, **settings)[0].tolist()

    plain = run()
    assert run(seed=2) != plain
    for name in DEFAULTS:
        changes = [change for change in SETTINGS if set(change) == {name}]
        assert any(run(**change) != plain for change in changes), name


def test_a_stop_token_in_mid_run(t3_cond: Any) -> None:
    t3 = random_t3("english", "tiny", stop_after=17)
    tokens = assert_equal_runs(t3, t3_cond, TEXTS[0], 3, max_new_tokens=40, **DEFAULTS)
    assert tokens.shape == (1, 18)
    assert tokens[0, -1] == t3.hp.stop_speech_token


def test_across_a_growth_of_the_cache(t3_cond: Any) -> None:
    """256 slots are not enough for this text and these tokens."""
    t3 = random_t3("english", "tiny")
    assert_equal_runs(t3, t3_cond, TEXTS[2], 4, max_new_tokens=80, **DEFAULTS)


def test_initial_speech_tokens(t3_cond: Any) -> None:
    t3 = random_t3("english", "tiny")
    rows = torch.tensor([[6561, 5, 9], [6561, 5, 9]])
    settings = {"max_new_tokens": 10, **DEFAULTS}
    tokens = assert_equal_runs(t3, t3_cond, TEXTS[0], 5, initial_speech_tokens=rows, **settings)
    one = our_tokens(t3, t3_cond, TEXTS[0], 5, initial_speech_tokens=rows[0], **settings)
    assert torch.equal(one, tokens)


def test_float64_weights(t3_cond: Any) -> None:
    t3 = random_t3("english", "tiny").double()
    cond = copy.copy(t3_cond).to(dtype=torch.float64)
    assert_equal_runs(t3, cond, TEXTS[0], 6, max_new_tokens=20, **DEFAULTS)


def test_without_cfg_the_tokens_are_those_of_the_conditional_row(t3: Any, t3_cond: Any) -> None:
    """Stock's generate() crashes at cfg_weight=0; its T3 with two rows shows what is meant."""
    settings = {**DEFAULTS, "cfg_weight": 0.0}
    for seed, text in enumerate(TEXTS):
        assert_equal_runs(t3, t3_cond, text, seed, max_new_tokens=20, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("change", SETTINGS, ids=str)
def test_tokens_on_a_gpu(t3: Any, t3_cond: Any, change: dict) -> None:
    on_gpu, cond = copy.deepcopy(t3).cuda(), copy.deepcopy(t3_cond).to(device="cuda")
    settings = {"max_new_tokens": 20, **DEFAULTS, **change}
    for seed, text in enumerate(TEXTS):
        expected = stock_tokens(on_gpu, cond, text, seed, **settings)
        expected_state = torch.cuda.get_rng_state()
        assert our_tokens(on_gpu, cond, text, seed, **settings).tolist() == expected.tolist()
        assert torch.equal(torch.cuda.get_rng_state(), expected_state)


@pytest.mark.full_size
def test_200_tokens_at_full_size(t3_cond: Any) -> None:
    t3 = random_t3("english", "full")
    tokens = assert_equal_runs(t3, t3_cond, TEXTS[1], 7, max_new_tokens=200, **DEFAULTS)
    print(f"\n{tokens.shape[1]} of {tokens.shape[1]} tokens equal, {len(set(tokens[0].tolist()))} "
          "different ones")  # fmt: skip
