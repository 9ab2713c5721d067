"""Stock's get_resampler, served by ours on one patched object."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import soundfile
import torch
import torchaudio
from chatterbox.models.s3gen import s3gen as stock
from torch import Tensor

from chatterbox_fast import patched, report
from chatterbox_fast.audio import stock as ours
from chatterbox_fast.testing import VOICE_PROMPT, random_model


@pytest.fixture
def prompt() -> Tensor:
    samples, rate = soundfile.read(VOICE_PROMPT, dtype="float32")
    return torchaudio.functional.resample(torch.from_numpy(samples)[None], rate, 22050)


def resampled(s3gen: Any, waveform: Tensor, rate: int) -> list[Tensor]:
    """What embed_ref hands to the mel extractor and to the tokenizer."""
    seen: list[Tensor] = []

    def watch(module: Any, arguments: tuple[Tensor, ...]) -> None:
        del module
        seen.append(arguments[0])

    mel = s3gen.mel_extractor
    hook = s3gen.tokenizer.register_forward_pre_hook(watch)
    s3gen.mel_extractor = lambda wav: (seen.append(wav), mel(wav))[1]
    try:
        s3gen.embed_ref(waveform, rate)
    finally:
        s3gen.mel_extractor = mel
        hook.remove()
    return seen


def row(model: Any, site: str) -> Any:
    return next(row for row in report(model) if row.site == site)


@pytest.mark.parametrize("rate", [22050, 24000, 44100, 16000])
def test_it_is_stocks_to_rounding(english: Any, prompt: Tensor, rate: int) -> None:
    """Also of rates that need one resampler alone."""
    waveform = prompt[:, :6000]
    expected = resampled(english.s3gen, waveform, rate)
    stock.get_resampler.cache_clear()
    with patched(english, precision="bf16"):
        assert row(english, "s3gen.embed_ref").runs == "own resampler"
        assert row(english, "  resample").backend == "extension"
        own = resampled(english.s3gen, waveform, rate)
    assert stock.get_resampler.cache_info().currsize == 0, "stock's was not called"
    assert len(own) == len(expected) == 2
    for y, theirs in zip(own, expected, strict=True):
        assert y.shape == theirs.shape
        assert y.dtype == theirs.dtype
        # stock rounds the places of a filter's taps to float32
        assert (y - theirs).abs().max() <= 4e-6 * theirs.abs().max()


def test_a_voice_is_stocks_to_rounding(english: Any, prompt: Tensor) -> None:
    expected = english.s3gen.embed_ref(prompt, 22050)
    with patched(english, precision="bf16"):
        own = english.s3gen.embed_ref(prompt, 22050)
    assert own.keys() == expected.keys()
    assert torch.equal(own["prompt_token"], expected["prompt_token"])
    for name in ("prompt_feat", "embedding"):
        assert not torch.equal(own[name], expected[name]), "another resampler made it"
        torch.testing.assert_close(own[name], expected[name], rtol=1e-3, atol=1e-4)


def test_exact_keeps_stocks_bits(english: Any, prompt: Tensor) -> None:
    expected = resampled(english.s3gen, prompt, 22050)
    with patched(english):
        assert row(english, "s3gen.embed_ref").runs == "stock's resampler"
        assert row(english, "s3gen.embed_ref").why == "exact keeps stock's bits"
        own = resampled(english.s3gen, prompt, 22050)
    assert all(torch.equal(y, theirs) for y, theirs in zip(own, expected, strict=True))


def test_nothing_but_the_object_is_touched(english: Any, prompt: Tensor) -> None:
    other = random_model("vc", "tiny")
    names, class_names = dict(vars(stock)), dict(vars(type(english.s3gen)))
    with patched(english, precision="bf16"):
        resampled(english.s3gen, prompt, 22050)
        assert dict(vars(stock)) == names
        assert dict(vars(type(english.s3gen))) == class_names
        assert "embed_ref" not in vars(other.s3gen)
        assert inspect.signature(english.s3gen.embed_ref) == inspect.signature(
            other.s3gen.embed_ref
        )
    assert "embed_ref" not in vars(english.s3gen)


def test_names_of_stocks_module_are_looked_up_when_called(
    english: Any, prompt: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with patched(english, precision="bf16"):
        monkeypatch.setattr(stock, "S3GEN_SR", 16000)
        first, second = resampled(english.s3gen, prompt, 22050)
    assert torch.equal(first, second)


def test_a_resampler_that_somebody_replaced_is_used(
    english: Any, prompt: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def mine(src_sr: int, dst_sr: int, device: Any) -> Any:
        asked.append(dst_sr)
        return torchaudio.transforms.Resample(src_sr, dst_sr).to(device)

    with patched(english, precision="bf16"):
        monkeypatch.setattr(stock, "get_resampler", mine)
        english.s3gen.embed_ref(prompt, 22050)
    assert asked == [24000, 16000]
    with patched(english, precision="bf16"):
        assert "embed_ref" not in vars(english.s3gen)
        assert row(english, "s3gen.embed_ref").why == "get_resampler() is replaced"


def test_what_is_not_stocks_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    embed_ref = stock.S3Token2Mel.embed_ref
    assert ours.why_not_served(embed_ref) is None
    assert "plain function" in str(ours.why_not_served(functools.wraps(embed_ref)(lambda: 0)))
    assert "plain function" in str(ours.why_not_served(functools.partial(embed_ref)))
    assert "does not call" in str(ours.why_not_served(lambda self: self))

    @functools.lru_cache
    def wider(src_sr: int, dst_sr: int, device: Any) -> Any:
        return torchaudio.transforms.Resample(src_sr, dst_sr, lowpass_filter_width=64).to(device)

    wider.__module__ = stock.__name__
    monkeypatch.setattr(stock, "get_resampler", wider)
    assert "default resampler" in str(ours.why_not_served(embed_ref))


def test_what_ours_refuses_is_stocks() -> None:
    """A filter bank that is too large for us, and stock's own errors."""
    made: list[Any] = []
    for rates in ((480001, 480000), (-5, 3), ("a", 3)):
        stocks = ours._resampler(lambda *a: made.append(a), "auto", *rates, "cpu")
        assert stocks is None
        assert made[-1] == (*rates, "cpu")
    assert ours._resampler(made.append, "reference", 3, 2, "cpu").backend == "reference"
    assert len(made) == 3
