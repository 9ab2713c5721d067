"""Fixtures: random models with a voice, built once a session, and a way to leave no trace."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["TQDM_DISABLE"] = "1"

import pytest
import soundfile
import torch

warnings.filterwarnings("ignore", message="chatterbox_fast: CUDA kernels not built")

from s3gen_toolkit import rough_s3gen

from chatterbox_fast.options import Options
from chatterbox_fast.t3 import runner
from chatterbox_fast.t3.engine import Engine, Engines
from chatterbox_fast.testing import VOICE_PROMPT, random_model, random_t3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests need a GPU; full-size ones run only where `-m full_size` asks for them."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        asked = "full_size" in (item.config.getoption("-m") or "")
        if item.get_closest_marker("full_size") and not asked:
            item.add_marker(pytest.mark.skip(reason="minutes long: make test-full-size"))


@pytest.fixture
def threads() -> Iterator[Any]:
    """torch.set_num_threads, put back after."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def _english(voices: tuple[Path, Path]) -> Any:
    model = random_model("english", "tiny", stop_after=12)
    model.prepare_conditionals(voices[0])
    return model


@pytest.fixture
def english(_english: Any) -> Iterator[Any]:
    """A tiny English model with a voice, unpatched. Fails the test that leaves it changed."""
    model, conds = _english, _english.conds
    dictionaries = instance_dictionaries(model)
    yield model
    model.conds = conds
    assert instance_dictionaries(model) == dictionaries, "the test left the shared model changed"


@pytest.fixture(scope="session")
def t3() -> Any:
    """A T3 of stock's width with four layers, which hardly ever stops by itself."""
    return random_t3("english", "reduced")


@pytest.fixture(scope="session")
def whole_voice(_english: Any) -> Any:
    """T3's conditioning of the whole shipped voice prompt, by stock."""
    model = copy.copy(_english)
    model.prepare_conditionals(VOICE_PROMPT)
    return model.conds.t3


@pytest.fixture
def t3_cond(whole_voice: Any) -> Any:
    """The same as a test's own."""
    return copy.copy(whole_voice)


@pytest.fixture(scope="module")
def s3gen() -> Any:
    """A small S3Gen, for the tests of one module to patch."""
    return rough_s3gen()


@pytest.fixture(scope="module")
def meanflow() -> Any:
    return rough_s3gen(meanflow=True)


@pytest.fixture(scope="session")
def voices(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two voices of two seconds: with longer ones S3Gen is most of every test's time."""
    return two_voices(tmp_path_factory.mktemp("voices"), seconds=2)


@pytest.fixture(scope="session")
def long_voices(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two voices of more than five seconds, which Turbo asks for."""
    return two_voices(tmp_path_factory.mktemp("long_voices"), seconds=5.2)


def two_voices(folder: Path, seconds: float) -> tuple[Path, Path]:
    """The shipped prompt's beginning, and a third higher and faster: two to every encoder."""
    samples, rate = soundfile.read(VOICE_PROMPT)
    paths = folder / "voice.wav", folder / "other.wav"
    for path, speed in zip(paths, (1.0, 1.3), strict=True):
        faster = int(rate * speed)
        soundfile.write(path, samples[: int(seconds * faster)], faster)
    return paths


def instance_dictionaries(model: Any) -> dict[str, dict[str, int]]:
    """The instance dictionaries that patch() may touch: attribute -> identity of its value."""
    owners = {
        "model": model,
        "t3": getattr(model, "t3", None),
        "s3gen": model.s3gen,
        "flow": model.s3gen.flow,
        "vocoder": model.s3gen.mel2wav,
    }
    # patched_model and compiled are what stock's own T3.inference leaves behind.
    own = {"patched_model", "compiled"}
    return {
        name: {k: id(v) for k, v in vars(owner).items() if k not in own}
        for name, owner in owners.items()
        if owner is not None
    }


def same_audio(ours: torch.Tensor, stocks: torch.Tensor) -> bool:
    """Whether two waveforms are one but for rounding: S3Gen's engine adds in another order.

    A tenth of what `exact` promises; another seed is a thousand times as far off.
    """
    return ours.shape == stocks.shape and bool((ours - stocks).abs().max() <= 1e-5)


_engines: WeakKeyDictionary[Any, dict[Options, Engines]] = WeakKeyDictionary()


def engine_of(t3: Any, **options: Any) -> Engine:
    """The engine that patch() would make for a T3, kept as long as it."""
    chosen = Options.of(**options)
    return _engines.setdefault(t3, {}).setdefault(chosen, Engines(chosen)).of(t3)


def tokens_of(
    t3: Any, *, options: dict[str, Any] | None = None, seed: int | None = None, **arguments: Any
) -> torch.Tensor:
    """The tokens of T3's engine, from torch's global generator, seeded before where asked."""
    if seed is not None:
        torch.manual_seed(seed)
    return runner.inference(t3, engine_of(t3, **(options or {})), **arguments)
