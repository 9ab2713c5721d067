"""generate() of every Chatterbox class, patched against stock: seeded or not, alone or at once."""

from __future__ import annotations

import inspect
import threading
from pathlib import Path
from typing import Any

import numpy
import pytest
import soundfile
import torch
from torch import Tensor

from chatterbox_fast import patched
from chatterbox_fast.t3.prefill import prefix_embeds
from chatterbox_fast.testing import VOICE_PROMPT, random_model

TEXT = "Hello there, my friend."


@pytest.fixture(scope="module")
def other_voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped prompt a third higher and faster: another voice to every encoder."""
    samples, rate = soundfile.read(VOICE_PROMPT)
    path = tmp_path_factory.mktemp("voice") / "other.wav"
    soundfile.write(path, numpy.tile(samples, 2), int(rate * 1.3))
    return path


def after_seed(model: Any, seed: int, **arguments: Any) -> Tensor:
    torch.manual_seed(seed)
    return model.generate(**arguments)


ARGUMENTS = {
    "english": {"text": TEXT},
    "multilingual": {"text": TEXT, "language_id": "en"},
    "turbo": {"text": TEXT},
    "nano": {"text": TEXT},
    "vc": {"audio": VOICE_PROMPT},
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_seeded_and_unseeded_equal_stock(kind: Any, other_voice: Path) -> None:
    try:
        model = random_model(kind, "tiny", stop_after=12)
    except ValueError as error:
        pytest.skip(str(error))
    voice = "target_voice_path" if kind == "vc" else "audio_prompt_path"
    arguments = {**ARGUMENTS[kind], voice: VOICE_PROMPT}
    expected = after_seed(model, 21, **arguments)
    state = torch.get_rng_state()
    with patched(model):
        # Without a seed: torch's global generators, used exactly as stock uses them.
        assert torch.equal(after_seed(model, 21, **arguments), expected)
        assert torch.equal(torch.get_rng_state(), state)
        # With one: the same, and the global generators are left alone.
        torch.manual_seed(5)
        before = torch.get_rng_state()
        assert torch.equal(model.generate(**arguments, seed=21), expected)
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.equal(model.generate(**arguments, seed=22)[:, :9000], expected[:, :9000])
        # The voice stays on the model, as in stock; another one is another result.
        assert torch.equal(model.generate(**ARGUMENTS[kind], seed=21), expected)
        arguments[voice] = other_voice
        assert not torch.equal(model.generate(**arguments, seed=21)[:, :9000], expected[:, :9000])


def test_signature_is_stocks_and_a_seed(english: Any) -> None:
    stock = inspect.signature(english.generate)
    with patched(english):
        ours = inspect.signature(english.generate)
        *same, seed = ours.parameters.values()
        assert same == list(stock.parameters.values())
        assert (seed.name, seed.default, seed.kind) == ("seed", None, seed.KEYWORD_ONLY)
        assert english.generate.__doc__ == type(english).generate.__doc__
        with pytest.raises(TypeError, match="unexpected keyword argument 'sede'"):
            english.generate(TEXT, sede=3)
        # Positional, in stock's order: text, repetition_penalty, min_p, top_p.
        by_position = english.generate(TEXT, 1.3, 0.1, 0.9, seed=1)
        by_name = english.generate(TEXT, repetition_penalty=1.3, min_p=0.1, top_p=0.9, seed=1)
        assert torch.equal(by_position, by_name)


def test_parameters_reach_the_sampler(english: Any) -> None:
    with patched(english):
        plain = english.generate(TEXT, seed=1)
        for change in ({"temperature": 2.0}, {"cfg_weight": 1.0}, {"top_p": 0.1}):
            changed = english.generate(TEXT, seed=1, **change)
            assert not torch.equal(changed[:, :9000], plain[:, :9000]), change
        assert torch.equal(english.generate(TEXT, seed=1), plain)


def test_exaggeration_belongs_to_its_request(english: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def watched(t3: Any, t3_cond: Any, *rest: Any) -> Tensor:
        used.append(float(t3_cond.emotion_adv))
        return prefix_embeds(t3, t3_cond, *rest)

    monkeypatch.setattr("chatterbox_fast.t3.runner.prefix_embeds", watched)
    with patched(english):
        for exaggeration in (0.5, 1.25, 0.5):
            english.generate(TEXT, exaggeration=exaggeration, seed=9)
    assert used == [0.5, 1.25, 0.5]
    assert float(english.conds.t3.emotion_adv) == 0.5


def test_cfg_weight_zero_works(english: Any) -> None:
    """Stock crashes: it appends a start token of two rows to a text of one."""
    with pytest.raises(RuntimeError, match="size"):
        english.generate(TEXT, cfg_weight=0.0)
    with patched(english):
        wav = english.generate(TEXT, cfg_weight=0.0, seed=1)
        assert wav.shape == (1, 12 * 960)
        assert wav.isfinite().all()


def test_without_a_watermark(english: Any) -> None:
    with patched(english):
        marked = english.generate(TEXT, seed=2)
    with patched(english, watermark=False):
        plain = english.generate(TEXT, seed=2)
    assert 0 < (marked - plain).abs().max() < 0.1
    watermarker = english.watermarker
    assert watermarker.get_watermark(marked[0].numpy(), sample_rate=english.sr) > 0.9
    assert watermarker.get_watermark(plain[0].numpy(), sample_rate=english.sr) < 0.5


def test_requests_at_once_keep_their_voice_and_seed(english: Any, other_voice: Path) -> None:
    voices = [VOICE_PROMPT, other_voice]
    requests = [
        {"text": TEXT, "audio_prompt_path": voices[n % 2], "seed": n, "exaggeration": 0.3 + n / 10}
        for n in range(4)
    ]
    with patched(english):
        alone = [english.generate(**request) for request in requests]
        results: dict[int, Tensor] = {}

        def speak(number: int) -> None:
            results[number] = english.generate(**requests[number])

        threads = [threading.Thread(target=speak, args=(n,)) for n in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({tuple(wav[0, :4000].tolist()) for wav in alone}) == len(alone)
    for number, expected in enumerate(alone):
        assert torch.equal(results[number], expected), number


def test_bad_input_raises_and_the_model_stays_usable(english: Any, tmp_path: Path) -> None:
    with patched(english):
        expected = english.generate(TEXT, seed=1)
        for change, error in (
            ({"seed": 1.5}, TypeError),
            ({"temperature": 0.0}, ValueError),
            ({"top_p": 2.0}, ValueError),
            ({"text": "word " * 600}, ValueError),
            ({"audio_prompt_path": tmp_path / "missing.wav"}, FileNotFoundError),
        ):
            with pytest.raises(error):
                english.generate(**{"text": TEXT, **change})
        assert torch.equal(english.generate(TEXT, seed=1), expected)


def test_a_model_without_a_voice_says_so(english: Any) -> None:
    english.conds = None
    with patched(english), pytest.raises(AssertionError, match="prepare_conditionals"):
        english.generate(TEXT)


def test_subclasses_with_keywords_are_patched(english: Any) -> None:
    class Louder(type(english)):
        def generate(self, text: str, gain: float = 1.0, **stock: Any) -> Tensor:
            return super().generate(text, **stock) * gain

    plain = after_seed(english, 3, text=TEXT, temperature=0.9)
    louder = object.__new__(Louder)
    vars(louder).update(vars(english))
    with patched(louder):
        assert list(inspect.signature(louder.generate).parameters) == [
            "text",
            "gain",
            "seed",
            "stock",
        ]
        wav = louder.generate(TEXT, gain=2.0, temperature=0.9, seed=3)
    assert torch.equal(wav, plain * 2.0)
