"""Voices: computed once, found again by their values, refused where they do not fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import engine_of, tokens_of
from torch import Tensor

from chatterbox_fast import patched
from chatterbox_fast.options import Options
from chatterbox_fast.overrides import bound
from chatterbox_fast.t3 import prefill
from chatterbox_fast.t3.engine import Engine, Engines
from chatterbox_fast.t3.prefill import MOST_VOICES
from chatterbox_fast.t3.site import make_t3_inference
from chatterbox_fast.t3.support import why_unsupported
from chatterbox_fast.testing import random_t3

TEXT = torch.tensor([[255, 40, 41, 42, 0]])


@pytest.fixture(scope="module")
def tiny() -> Any:
    return random_t3("english", "tiny")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Calls of voice_prefix from now on."""
    calls: list[int] = []
    stock = prefill.voice_prefix

    def watched(*arguments: Any) -> Any:
        calls.append(1)
        return stock(*arguments)

    monkeypatch.setattr("chatterbox_fast.t3.engine.voice_prefix", watched)
    return calls


def test_a_voice_is_computed_once(t3_cond: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    t3 = random_t3("english", "tiny")
    calls = counted(monkeypatch)
    settings = {"text_tokens": TEXT, "max_new_tokens": 6, "seed": 3}
    first = tokens_of(t3, t3_cond=t3_cond, **settings)
    assert torch.equal(tokens_of(t3, t3_cond=copy.deepcopy(t3_cond), **settings), first)
    tokens_of(t3, t3_cond=t3_cond, **{**settings, "cfg_weight": 0.0})
    assert len(calls) == 1, "found by its values, for one row and for both rows of CFG"
    engine, kept = engine_of(t3), voice_of(t3, t3_cond)
    for name in ("speaker_emb", "emotion_adv"):
        other = copy.copy(t3_cond)
        vars(other)[name] = getattr(other, name) + 0.3
        assert not torch.equal(voice_of(t3, other), kept), name
    other = copy.copy(t3_cond)
    other.cond_prompt_speech_tokens = other.cond_prompt_speech_tokens.flip(-1)
    assert not torch.equal(voice_of(t3, other), kept)
    assert len(calls) == 4
    assert engine_of(t3) is engine


def voice_of(t3: Any, cond: Any) -> Tensor:
    """The keys that a voice leaves in the cache."""
    with torch.inference_mode():
        return engine_of(t3).voice(t3, cond).k


def test_a_voice_changed_in_place_is_another_voice(tiny: Any, t3_cond: Any) -> None:
    cond = copy.deepcopy(t3_cond)
    first = voice_of(tiny, cond)
    cond.emotion_adv += 0.3
    assert not torch.equal(voice_of(tiny, cond), first)


def test_few_voices_are_kept(tiny: Any, t3_cond: Any) -> None:
    engine = Engine(tiny, Options())

    def speak(number: int) -> Any:
        cond = copy.copy(t3_cond)
        cond.emotion_adv = torch.full((1, 1, 1), number / 10)
        with torch.inference_mode():
            return engine.voice(tiny, cond)

    first, second = speak(0), speak(1)
    for number in range(2, MOST_VOICES):
        speak(number)
    assert speak(0) is first  # and now the last spoken with
    last = speak(MOST_VOICES)
    assert len(engine._voices) == MOST_VOICES
    assert speak(0) is first
    assert speak(MOST_VOICES) is last
    assert speak(1) is not second, "the one that was spoken with longest ago went"
    engine.clear()
    assert len(engine._voices) == 0


def test_a_voice_that_does_not_fit_is_named_before_any_work(
    tiny: Any, t3_cond: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [
        ({"speaker_emb": torch.full_like(t3_cond.speaker_emb, float("nan"))}, "be finite, got NaN"),
        ({"speaker_emb": t3_cond.speaker_emb[:, :9]}, r"speaker_emb must be of 256 values"),
        ({"speaker_emb": None}, "speaker_emb must be a tensor for this model, got None"),
        ({"emotion_adv": None}, "emotion_adv must be a tensor for this model, got None"),
        ({"emotion_adv": torch.ones(1).long()}, "must be torch.float32, got torch.int64"),
        ({"speaker_emb": t3_cond.speaker_emb.half()}, "must be torch.float32, got torch.float16"),
        ({"cond_prompt_speech_tokens": torch.ones(2, 5).long()}, "must be .1, n., got"),
        ({"cond_prompt_speech_tokens": torch.ones(1, 5)}, "must be of an integer dtype, got"),
        ({"emotion_adv": 0.5}, "emotion_adv must be a tensor for this model, got 0.5"),
        ({"emotion_adv": torch.ones(2)}, "emotion_adv must be of 1 values, got"),
        ({"speaker_emb": t3_cond.speaker_emb.to("meta")}, "must be on cpu as T3 is, got meta"),
        ({"cond_prompt_speech_tokens": torch.tensor([[9000]])}, "0, 8194.*, got 9000 to 9000"),
        ({"cond_prompt_speech_tokens": torch.ones(1, 5000).long()}, "must be at most 4100 long"),
        ({"cond_prompt_speech_tokens": [1, 2]}, "must be a tensor for this model, got .1, 2"),
        ({"cond_prompt_speech_tokens": torch.ones(0).long()}, r"must be .1, n., got \(0,\)"),
        ({"cond_prompt_speech_emb": torch.ones(5, 1024)}, r"_emb must be .1, n, 1024., got \(5, 1"),
        ({"cond_prompt_speech_emb": torch.ones(2, 5, 1024)}, r"be .1, n, 1024., got \(2, 5, 1024"),
        ({"cond_prompt_speech_emb": torch.ones(1, 5, 8)}, r"be .1, n, 1024., got \(1, 5, 8\)"),
        ({"cond_prompt_speech_tokens": None, "cond_prompt_speech_emb": torch.ones(1, 5, 1024)},
         "_emb must be None without cond_prompt_speech_tokens, got"),
        ({"clap_emb": torch.ones(1, 5)}, "clap_emb must be None, as in stock, got a Tensor"),
    ]  # fmt: skip
    tokens_of(tiny, t3_cond=t3_cond, text_tokens=TEXT, max_new_tokens=2)  # the voice is kept now
    monkeypatch.setattr(Engine, "voice", lambda *_: pytest.fail("conditioned"))
    state = torch.get_rng_state()
    for change, message in changes:
        cond = copy.copy(t3_cond)
        vars(cond).update(change)
        with pytest.raises(ValueError, match=message):
            tokens_of(tiny, t3_cond=cond, text_tokens=TEXT, max_new_tokens=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_callers_conditioning_is_not_written_to(tiny: Any, t3_cond: Any) -> None:
    cond = copy.copy(t3_cond)
    cond.cond_prompt_speech_emb = None
    tokens_of(tiny, t3_cond=cond, text_tokens=TEXT, max_new_tokens=2)
    assert cond.cond_prompt_speech_emb is None


def test_the_length_of_a_voice_is_known_before(tiny: Any, t3_cond: Any) -> None:
    tokens, embedded = torch.ones(1, 9).long(), torch.ones(1, 3, 1024)
    for given, made, length in ((tokens, None, 34), (tokens, embedded, 34), (None, None, 2)):
        cond = copy.copy(t3_cond)
        cond.cond_prompt_speech_tokens, cond.cond_prompt_speech_emb = given, made
        assert prefill.prefix_length(tiny, cond) == length
        assert tiny.prepare_conditioning(copy.copy(cond)).shape[1] == length
        assert voice_of(tiny, cond).shape[3] == length


class Loud(torch.nn.Module):
    """Has no weights."""

    def forward(self, x: Tensor) -> Tensor:
        return 30 * x.flip(-1)


def exchanged(t3: Any) -> None:
    """Another module around the same weights."""
    t3.cond_enc.spkr_enc = torch.nn.Sequential(t3.cond_enc.spkr_enc, Loud())


def written_to(t3: Any) -> None:
    with torch.no_grad():
        t3.cond_enc.perceiver.pre_attention_query.mul_(2.0)


def hooked(t3: Any) -> None:
    t3.cond_enc.register_forward_hook(lambda _module, _given, made: made.flip(1))


def replaced(t3: Any) -> None:
    stock = t3.prepare_conditioning
    t3.prepare_conditioning = lambda cond: stock(cond).flip(1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (exchanged, None),
        (written_to, None),
        (hooked, "a T3CondEnc has a forward hook, which would not be called for a known voice"),
        (replaced, "T3 has a prepare_conditioning of its own, which would not be called"),
    ],
)
def test_what_makes_a_voice_may_change_after_its_first_use(
    t3_cond: Any, change: Any, reason: str | None
) -> None:
    """It is stock's result with the change, although the voice was there already."""
    t3 = random_t3("english", "tiny")
    engines = Engines(Options(precision="exact"))
    t3.inference = bound(make_t3_inference(type(t3).inference, engines=engines), t3)
    settings = {"text_tokens": TEXT.repeat(2, 1), "max_new_tokens": 8}

    def spoken(by: Any) -> Any:
        torch.manual_seed(3)
        return by.inference(t3_cond=copy.copy(t3_cond), **settings).tolist()

    first = spoken(t3)
    assert spoken(t3) == first
    change(t3)
    ours = spoken(t3)
    del t3.inference
    assert ours == spoken(t3) != first
    assert why_unsupported(t3) == reason


def test_conds_that_are_no_conditionals_are_named(english: Any) -> None:
    """VC keeps a plain dictionary, which is easily taken for a voice."""
    english.conds = dict(english.conds.gen)
    with patched(english), pytest.raises(TypeError, match="model.conds must be Cond.*, got a dict"):
        english.generate("Hello there.")
