"""chatterbox-fast say | demo | doctor, and README's tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from chatterbox.tts import ChatterboxTTS

import chatterbox_fast
from chatterbox_fast import demo, ops, selftest
from chatterbox_fast.cli import main


def test_demo_compares_and_writes_what_it_says(
    tmp_path: Path, voices: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw.json"
    arguments = ["--size", "tiny", "--tokens", "9", "--seed", "4", "--device", "cpu"]
    arguments += ["--voice", str(voices[0])]
    assert main(["demo", *arguments, "--out", str(tmp_path), "--json", str(raw)]) == 0
    out = capsys.readouterr().out
    result = json.loads(raw.read_text())
    assert "tokens equal: 10 of 10" in out
    assert (result["token_count"], result["tokens_equal"]) == (10, 10)
    assert result["mel_difference"] <= 3e-5  # of values up to 5: rounding
    assert result["audio_difference"] <= 1e-5
    assert result["weights"] == "random, tiny"
    assert result["patched_t3"] == "engine, exact"
    for stages in (result["stock_seconds"], result["patched_seconds"]):
        assert tuple(stages) == demo.STAGES
        assert all(seconds > 0 for seconds in stages.values())
        assert sum(stages[s] for s in demo.STAGES[:-1]) <= stages["total"]
    for name in ("stock", "patched"):
        assert str(tmp_path / f"{name}.wav") in out
        samples, rate = soundfile.read(tmp_path / f"{name}.wav")
        assert (len(samples), rate) == (9 * 960, 24000)


def test_demo_fails_where_tokens_differ(
    tmp_path: Path,
    voices: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def greedy(
        logits: torch.Tensor, seen: torch.Tensor, *rest: torch.Tensor, **rules: object
    ) -> Any:
        assert rules["stop_token"] == 6562
        token = logits[: len(seen)].argmax(-1)
        flags = rest[1]
        flags.fill_(int(token == 6562))
        return token

    assert selftest.why_failed("cfg_sample", "extension", torch.device("cpu")) is None
    monkeypatch.setattr(ops, "cfg_sample_by", lambda _: greedy)
    arguments = ["--size", "tiny", "--tokens", "9", "--device", "cpu", "--out", str(tmp_path)]
    arguments += ["--voice", str(voices[0])]
    assert main(["demo", *arguments]) == 1
    assert "tokens equal: 10 of 10" not in capsys.readouterr().out
    # What is not exact promises other things.
    assert main(["demo", *arguments, "--precision", "int8"]) == 0
    out = capsys.readouterr().out
    assert "patched: engine, int8" in out
    assert "tokens equal: 10 of 10" not in out


def test_without_the_real_weights_random_ones_are_announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []
    no_weights(monkeypatch)
    monkeypatch.setattr(demo, "random_model", lambda *args, **_: made.append(args))
    _, weights = demo.load_model("cpu", 5)
    assert weights == "random, full"
    assert made == [("english", "full")]
    assert "RANDOM WEIGHTS" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["demo"], ["say", "Hello."]])
def test_a_missing_voice_is_named(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--voice", "/no/such.wav"]) == 1
    assert "--voice must be an audio file, got /no/such.wav" in capsys.readouterr().err


def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: str) -> None:
        raise FileNotFoundError(f"not cached for {device}")

    monkeypatch.setattr(ChatterboxTTS, "from_pretrained", fail)


def test_say_without_weights_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_weights(monkeypatch)
    assert main(["say", "Hello.", "--device", "cpu"]) == 1
    assert "chatterbox-fast: not cached" in capsys.readouterr().err


def test_demo_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--size", "tiny", "--tokens", "0"]) == 1
    assert "stop_after must be >= 1, got 0" in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in ("torch", "chatterbox-tts", "Perth", "extension: cuda", "cfg_sample"):
        assert name in out


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "chatterbox_fast", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == chatterbox_fast.__version__


def test_readmes_tables_are_the_raw_results() -> None:
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-m", "bench.table", "--check"], cwd=root, check=False)
    assert done.returncode == 0, "run: make tables"
    assert "<!-- table:" in (root / "README.md").read_text()
