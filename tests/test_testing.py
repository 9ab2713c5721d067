"""The random models that everything else is tested on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import librosa
import pytest
import torch
from chatterbox.models.t3 import T3
from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS
from chatterbox.models.tokenizers import EnTokenizer
from conftest import engine_of, tokens_of

from chatterbox_fast import ops
from chatterbox_fast.testing import (
    VOICE_PROMPT,
    random_model,
    random_s3gen,
    random_t3,
    write_tokenizer,
)

TEXT = torch.tensor([[255, 40, 41, 42, 0]])


def test_global_generators_and_configurations_are_left_alone() -> None:
    state, configs = torch.get_rng_state(), {k: dict(v) for k, v in LLAMA_CONFIGS.items()}
    random_t3("english", "tiny", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert configs == LLAMA_CONFIGS


def test_a_seed_names_a_model() -> None:
    one, same, other = (random_t3("english", "tiny", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.speech_head.weight, same.speech_head.weight)
    assert not torch.equal(one.speech_head.weight, other.speech_head.weight)


@pytest.mark.parametrize("stop_after", [1, 5, 30])
def test_it_stops_where_it_is_told_to(t3_cond: Any, stop_after: int) -> None:
    t3 = random_t3("english", "tiny", stop_after=stop_after)
    tokens = tokens_of(t3, t3_cond=t3_cond, text_tokens=TEXT, max_new_tokens=100)[0]
    assert len(tokens) == stop_after + 1
    assert tokens[-1] == t3.hp.stop_speech_token
    assert (tokens[:-1] < t3.hp.start_speech_token).all(), "no other special token"


@pytest.mark.parametrize("size", ["tiny", "reduced"])
def test_logits_spread_as_trained_ones_do(
    t3_cond: Any, size: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    entropies = []

    t3 = random_t3("english", size)
    draw = ops.cfg_sample_by(engine_of(t3).sampler)

    def watched(logits: Any, seen: Any, params: Any, flags: Any, **rules: Any) -> Any:
        guided = logits[:1] + params[0, 0] * (logits[:1] - logits[1:])
        p = (guided / params[0, 2]).softmax(-1)
        entropies.append(float(-(p * p.clamp_min(1e-30).log()).sum()))
        return draw(logits, seen, params, flags, **rules)

    monkeypatch.setattr(ops, "cfg_sample_by", lambda _: watched)
    torch.manual_seed(1)
    tokens_of(t3, t3_cond=t3_cond, text_tokens=TEXT, max_new_tokens=30)
    assert 2.0 < sum(entropies) / len(entropies) < 4.5


def test_full_size_is_stocks_architecture() -> None:
    with torch.device("meta"):
        stock = T3()
    ours = random_t3("english", "full")
    shapes = {k: v.shape for k, v in ours.state_dict().items()}
    assert shapes == {k: v.shape for k, v in stock.state_dict().items()}


def test_reduced_s3gen_keeps_the_widths() -> None:
    full, tiny = random_s3gen("full"), random_s3gen("tiny")
    expected = {k: v.shape for k, v in full.state_dict().items()}
    shapes = {k: v.shape for k, v in tiny.state_dict().items()}
    assert len(shapes) < len(expected)
    assert all(expected[name] == shape for name, shape in shapes.items())


def test_the_tokenizer_is_one_that_stock_loads(tmp_path: Path) -> None:
    tokenizer = EnTokenizer(str(write_tokenizer(tmp_path / "tokenizer.json")))
    ids = tokenizer.text_to_tokens("Real time, at last.")
    assert ids.shape == (1, len("Real time, at last."))
    assert tokenizer.decode(ids[0]) == "Real time, at last."
    vocabulary = tokenizer.tokenizer.get_vocab()
    assert [vocabulary[t] for t in ("[STOP]", "[SPACE]", "[START]")] == [0, 2, 255]


def test_the_voice_prompt() -> None:
    samples, rate = librosa.load(VOICE_PROMPT, sr=None)
    assert rate == 22050
    assert 6.5 < len(samples) / rate < 7.5
    assert abs(samples).max() > 0.2
    assert VOICE_PROMPT.stat().st_size < 200_000


def test_bad_names_are_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of english, .*, got 'klingon'"):
        random_model("klingon", "tiny")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size must be one of full, .*, got 'huge'"):
        random_model("english", "huge")  # type: ignore[arg-type]
