"""OptimizedChatterboxTTS: stock's class with switches, each of which takes something away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import perth
import pytest
import torch
from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS
from chatterbox.tts import ChatterboxTTS
from conftest import same_audio
from safetensors.torch import save_file

import chatterbox_fast
from chatterbox_fast import OptimizedChatterboxTTS
from chatterbox_fast.testing import random_model, write_tokenizer
from chatterbox_fast.watermark import NoWatermark, why_perth_cannot_load

TEXT = "Hello there."


def of(stock: Any, **switches: bool) -> OptimizedChatterboxTTS:
    modules = (stock.t3, stock.s3gen, stock.ve, stock.tokenizer, stock.device)
    return OptimizedChatterboxTTS(*modules, conds=stock.conds, **switches)


def rows(model: Any) -> dict[str, str]:
    return {row.site: row.runs for row in chatterbox_fast.report(model)}


def test_it_is_stock_and_patched(english: Any) -> None:
    expected = english.generate
    torch.manual_seed(8)
    expected = expected(TEXT)
    model = of(english)
    assert isinstance(model, ChatterboxTTS)
    assert rows(model)["t3.inference"] == "engine, exact"
    assert same_audio(model.generate(TEXT, seed=8), expected)
    chatterbox_fast.unpatch(model)
    torch.manual_seed(8)
    assert torch.equal(model.generate(TEXT), expected)


def test_each_switch_takes_something_away(english: Any) -> None:
    model = of(english)
    options = model._chatterbox_fast.options
    assert (options.compile, options.precision, options.watermark) == (False, "auto", True)
    assert rows(model)["watermark"] == "Perth (stock)"
    chatterbox_fast.unpatch(model)
    model = of(english, enable_compilation=True, use_mixed_precision=False, enable_watermark=False)
    options = model._chatterbox_fast.options
    assert (options.compile, options.precision, options.watermark) == (True, "exact", False)
    assert isinstance(model.watermarker, NoWatermark)
    chatterbox_fast.unpatch(model)


def test_verbose_says_how_long_it_took(english: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = of(english)
    capsys.readouterr()
    model.generate(TEXT, seed=1)
    silent = capsys.readouterr().out
    model.generate(TEXT, verbose=True, seed=1)
    verbose = capsys.readouterr().out
    chatterbox_fast.unpatch(model)
    assert silent == ""
    assert "0.48 s of audio in" in verbose


def test_from_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock's loader on real files, with a T3 of two layers."""
    small = {**LLAMA_CONFIGS["Llama_520M"], "num_hidden_layers": 2, "intermediate_size": 512}
    monkeypatch.setitem(LLAMA_CONFIGS, "Llama_520M", small)
    stock = random_model("english", "tiny")
    save_file(stock.ve.state_dict(), tmp_path / "ve.safetensors")
    save_file(stock.t3.state_dict(), tmp_path / "t3_cfg.safetensors")
    save_file(stock.s3gen.state_dict(), tmp_path / "s3gen.safetensors")
    write_tokenizer(tmp_path / "tokenizer.json")
    model = OptimizedChatterboxTTS.from_local(tmp_path, "cpu", enable_watermark=False)
    assert rows(model)["watermark"] == "none"
    assert torch.equal(model.t3.speech_head.weight, stock.t3.speech_head.weight)


def test_an_environment_without_pkg_resources_is_named_at_import(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert why_perth_cannot_load() is None
    found = {"perth": object(), "pkg_resources": None}
    monkeypatch.setattr("importlib.util.find_spec", found.get)
    assert 'pip install "setuptools<81"' in (why_perth_cannot_load() or "")


def test_perth_that_did_not_load_has_a_remedy(
    english: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perth, "PerthImplicitWatermarker", None)
    remedy = r'pip install "setuptools<81"'
    with pytest.raises(RuntimeError, match=remedy):
        of(english)
    with pytest.raises(RuntimeError, match=remedy):
        OptimizedChatterboxTTS.from_pretrained("cpu")
    with pytest.raises(RuntimeError, match=remedy):
        random_model("english", "tiny")
