"""generate() of every Chatterbox class, patched against stock: seeded or not, alone or at once."""

from __future__ import annotations

import copy
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import same_audio
from torch import Tensor

from chatterbox_fast import patched, report
from chatterbox_fast.t3.engine import Engine
from chatterbox_fast.testing import VOICE_PROMPT, random_model

TEXT = "Hello there, my friend."


def after_seed(model: Any, seed: int, **arguments: Any) -> Tensor:
    torch.manual_seed(seed)
    return model.generate(**arguments)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "english": {"text": TEXT},
    "multilingual": {"text": TEXT, "language_id": "en"},
    "turbo": {"text": TEXT},
    "nano": {"text": TEXT},
    "vc": {},
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_seeded_and_unseeded_equal_stock(
    kind: Any, voices: tuple[Path, Path], long_voices: tuple[Path, Path]
) -> None:
    try:
        model = random_model(kind, "tiny", stop_after=12)
    except ValueError as error:
        pytest.skip(str(error))
    voice = "target_voice_path" if kind == "vc" else "audio_prompt_path"
    own_voice, other_voice = long_voices if kind in ("turbo", "nano") else voices
    given = ARGUMENTS[kind] or {"audio": own_voice}
    arguments = {**given, voice: own_voice}
    expected = after_seed(model, 21, **arguments)
    state = torch.get_rng_state()
    with patched(model):
        # Without a seed: torch's global generators, used exactly as stock uses them.
        assert same_audio(after_seed(model, 21, **arguments), expected)
        assert torch.equal(torch.get_rng_state(), state)
        # With one: the same, and the global generators are left alone.
        torch.manual_seed(5)
        before = torch.get_rng_state()
        assert same_audio(model.generate(**arguments, seed=21), expected)
        assert torch.equal(torch.get_rng_state(), before)
        assert not same_audio(model.generate(**arguments, seed=22)[:, :9000], expected[:, :9000])
        # The voice stays on the model, as in stock; another one is another result.
        assert same_audio(model.generate(**given, seed=21), expected)
        arguments[voice] = other_voice
        assert not same_audio(model.generate(**arguments, seed=21)[:, :9000], expected[:, :9000])


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
        assert same_audio(by_position, by_name)


def test_parameters_reach_the_sampler(english: Any) -> None:
    with patched(english):
        plain = english.generate(TEXT, seed=1)
        for change in ({"temperature": 2.0}, {"cfg_weight": 1.0}, {"top_p": 0.1}):
            changed = english.generate(TEXT, seed=1, **change)
            assert not same_audio(changed[:, :9000], plain[:, :9000]), change
        assert same_audio(english.generate(TEXT, seed=1), plain)


def test_exaggeration_belongs_to_its_request(english: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    stock = Engine.voice

    def watched(self: Engine, t3: Any, t3_cond: Any, key: bytes) -> Any:
        used.append(float(t3_cond.emotion_adv))
        return stock(self, t3, t3_cond, key)

    monkeypatch.setattr(Engine, "voice", watched)
    with patched(english):
        for exaggeration in (0.5, 1.25, 0.5):
            english.generate(TEXT, exaggeration=exaggeration, seed=9)
    assert used == [0.5, 1.25, 0.5]


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


@pytest.mark.parametrize(("precision", "counts"), [("exact", (2,)), ("bf16", (2, 8))])
def test_requests_at_once_keep_their_voice_and_seed(
    english: Any, voices: tuple[Path, Path], precision: str, counts: tuple[int, ...]
) -> None:
    requests = [
        {"text": TEXT, "audio_prompt_path": voices[n % 2], "seed": n, "exaggeration": 0.3 + n / 10}
        for n in range(max(counts))
    ]
    with patched(english, precision=precision):
        alone = [english.generate(**request) for request in requests]
        at_once = []
        for count in counts:
            with ThreadPoolExecutor(count) as threads:
                speak = lambda request: english.generate(**request)  # noqa: E731
                at_once.append(list(threads.map(speak, requests[:count])))
    assert len({tuple(wav[0, :4000].tolist()) for wav in alone}) == len(alone)
    for results in at_once:
        for number, wav in enumerate(results):
            assert same_audio(wav, alone[number]), (len(results), number)


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
        assert same_audio(english.generate(TEXT, seed=1), expected)


def test_a_model_without_a_voice_says_so(english: Any) -> None:
    english.conds = None
    with patched(english), pytest.raises(AssertionError, match="prepare_conditionals"):
        english.generate(TEXT)


def as_subclass(english: Any, **methods: Any) -> Any:
    model = object.__new__(type("Custom", (type(english),), methods))
    vars(model).update(vars(english))
    return model


def test_subclasses_are_called_as_they_are(english: Any, voices: tuple[Path, Path]) -> None:
    stock, other_voice = type(english), voices[1]
    expected = after_seed(english, 3, text=TEXT, temperature=0.9)
    voiced = after_seed(copy.copy(english), 3, text=TEXT, audio_prompt_path=other_voice)

    def keywords(self: Any, text: str, gain: float = 1.0, **rest: Any) -> Tensor:
        return stock.generate(self, text, **rest) * gain

    with patched(as_subclass(english, generate=keywords)) as model:
        assert list(inspect.signature(model.generate).parameters) == [
            "text",
            "gain",
            "seed",
            "rest",
        ]
        assert same_audio(model.generate(TEXT, gain=2.0, temperature=0.9, seed=3), expected * 2)

    def anything(self: Any, *args: Any, **rest: Any) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return stock.generate(self, *args, **rest)

    with patched(as_subclass(english, generate=anything)) as model:
        assert same_audio(model.generate(TEXT, temperature=0.9, seed=3), expected)
        assert same_audio(model.generate(text=TEXT, temperature=0.9, seed=3), expected)
        assert model.calls == 2

    def required_voice(self: Any, text: str, audio_prompt_path: Path) -> Tensor:
        return stock.generate(self, text, audio_prompt_path=audio_prompt_path)

    with patched(as_subclass(english, generate=required_voice)) as model:
        before = model.conds
        assert same_audio(model.generate(TEXT, other_voice, seed=3), voiced)
        assert model.conds is not before, "the voice stays, as in stock"


def test_subclasses_with_a_seed_or_a_recursion(english: Any) -> None:
    stock = type(english)
    expected = after_seed(english, 3, text=TEXT)

    def own_seed(self: Any, text: str, seed: int = 0) -> Tensor:
        assert seed == 3
        return stock.generate(self, text)

    with patched(as_subclass(english, generate=own_seed)) as model:
        assert same_audio(model.generate(TEXT, seed=3), expected)

    def in_parts(self: Any, text: str) -> Tensor:
        if "|" not in text:
            return stock.generate(self, text)
        return torch.cat([self.generate(part) for part in text.split("|")], dim=1)

    torch.manual_seed(3)
    recursive = as_subclass(english, generate=in_parts)
    both = recursive.generate(f"{TEXT}|{TEXT}")
    with patched(recursive) as model:
        state = torch.get_rng_state()
        assert same_audio(model.generate(f"{TEXT}|{TEXT}", seed=3), both)
        assert torch.equal(torch.get_rng_state(), state)

    def in_pieces(self: Any, text: str) -> Any:
        yield stock.generate(self, text)

    with patched(as_subclass(english, generate=in_pieces)) as model:
        assert report(model)[0].why == "generate() is a generator or a coroutine"


def test_a_method_on_the_instance_is_called(english: Any, voices: tuple[Path, Path]) -> None:
    """A function that somebody put on the instance works on that instance alone."""
    used: list[Path] = []
    other_voice = voices[1]

    def prepare(path: Path, **options: Any) -> None:
        used.append(path)
        type(english).prepare_conditionals(english, path, **options)

    expected = after_seed(copy.copy(english), 3, text=TEXT, audio_prompt_path=other_voice)
    english.prepare_conditionals = prepare
    try:
        with patched(english):
            wav = english.generate(TEXT, audio_prompt_path=other_voice, seed=3)
    finally:
        del english.prepare_conditionals
    assert used == [other_voice]
    assert same_audio(wav, expected)


def test_a_request_writes_into_nobodys_voice(english: Any) -> None:
    """Stock casts the prompt's tokens to float in the shared dictionary, and embeds them there."""
    conds = english.conds
    conds.t3.cond_prompt_speech_emb = None
    gen, t3 = dict(conds.gen), dict(vars(conds.t3))
    with patched(english):
        english.t3.train()  # stock's own loop, which stores the embedding
        english.generate(TEXT, seed=1)
        english.t3.eval()
    assert english.conds is conds
    assert all(conds.gen[name] is value for name, value in gen.items())
    assert all(getattr(conds.t3, name) is value for name, value in t3.items())


def test_the_exaggeration_stays_as_in_stock(english: Any) -> None:
    with patched(english):
        english.generate(TEXT, exaggeration=1.25, seed=1)
    assert float(english.conds.t3.emotion_adv) == 1.25


def test_multilingual_requests_at_once(voices: tuple[Path, Path]) -> None:
    """Stock keeps a request's state on the module: alone it mixes requests up, or crashes."""
    model = random_model("multilingual", "tiny", stop_after=10)
    model.prepare_conditionals(voices[0])
    texts = ["Hello.", "Hello there, my good old friend."]
    arguments = {"language_id": "en"}
    with patched(model):
        alone = [model.generate(text, seed=n, **arguments) for n, text in enumerate(texts)]
        results: dict[int, Tensor] = {}

        def speak(number: int) -> None:
            results[number] = model.generate(texts[number], seed=number, **arguments)

        threads = [threading.Thread(target=speak, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, expected in enumerate(alone):
        assert same_audio(results[number], expected), number


@pytest.mark.gpu
def test_seeds_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = random_model("english", "tiny", stop_after=12, device="cuda")
    arguments = {"text": TEXT, "audio_prompt_path": VOICE_PROMPT}
    expected = after_seed(model, 21, **arguments)
    with patched(model, precision="exact"):
        cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state()
        for _ in range(2):  # the second one finds what the first has left, its flags too
            got = model.generate(**arguments, seed=21)
            assert torch.equal(torch.get_rng_state(), cpu)
            assert torch.equal(torch.cuda.get_rng_state(), cuda)
            # The same tokens and noise; the convolutions of two runs may differ in rounding.
            assert got.shape == expected.shape
            assert (got - expected).abs().max() < 1e-3
