"""The benches that are scripts: what they time, what they note of it, and their tables."""

from __future__ import annotations

import argparse
import functools
import json
import mmap
import os
from pathlib import Path
from typing import Any
from unittest import mock

import end_to_end
import pytest
import s3gen as s3gen_bench
import soundfile
import t3_decode
import table
import torch

from chatterbox_fast import patched, report
from chatterbox_fast.s3gen import site
from chatterbox_fast.s3gen.encoder import encode
from chatterbox_fast.testing import random_model, random_s3gen

# ---- T3


def test_the_decode_bench_measures_and_renders() -> None:
    """Every variant runs, and both sides are charged for the same bytes."""
    arguments = argparse.Namespace(
        device="cpu",
        size="tiny",
        positions=[40],
        steps=3,
        forced=3,
        only=["stock", "ours, exact"],
        without=[],
        json=None,
    )
    raw = t3_decode.run(arguments)
    assert not raw["failures"]
    assert [r["variant"] for r in raw["t3_decode"]] == [
        "stock", "stock, bf16", "stock, static cache, compiled", "ours, exact",
        "ours, exact, compiled",
    ]  # fmt: skip
    stock, ours = raw["t3_decode"][0], raw["t3_decode"][3]
    assert stock["bytes"] == pytest.approx(ours["bytes"], rel=1e-3)
    assert raw["divergence"]["ours, exact"] < 1e-8
    assert set(raw["prefill"]["median_ms"]) == {"stock", "stock, bf16", "ours, exact"}
    raw["prefill"]["median_ms"]["ours, exact"] = 123.4
    ours["median_us"] = stock["median_us"] / 3
    text = table.t3_decode_table(raw)
    assert len(text.splitlines()) == 2 + 5 + 2
    assert "| stock |" in text
    assert "1.00×" in text
    assert "3.00×" in text
    assert [line.split(" | ")[-1] for line in text.splitlines() if "ours, exact" in line] == [
        "123 ms |", "– |",
    ]  # fmt: skip


# ---- S3Gen


S3GEN = (
    "--size tiny --prompt 0.2 --timesteps 2 --rounds 2 --device cpu "
    "--variants stock exact --seconds "
)


def test_s3gens_stages_are_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed as ours gives what is timed as stock; the raw figures name their conditions."""
    monkeypatch.setattr(s3gen_bench, "random_s3gen", functools.cache(random_s3gen))
    made = mock.Mock(wraps=site.FlowEngine)
    monkeypatch.setattr(site, "FlowEngine", made)
    raw = s3gen_bench.run(s3gen_bench.parser().parse_args([*S3GEN.split(), "0.2", "0.4"]))
    assert made.call_count == 1, "one for all stages and lengths"
    assert raw["timesteps"] == 2
    assert set(raw["difference"]) == {"0.2", "0.4"}
    for found in raw["difference"].values():
        assert set(found) == {"stock", "exact"}
        assert set(found["exact"]) == set(s3gen_bench.STAGES)
        assert set(found["stock"].values()) == {0.0}
        assert all(0 < difference < 1e-4 for difference in found["exact"].values()), found
    kinds = [(each["seconds_of_audio"], each["stage"], each["variant"]) for each in raw["s3gen"]]
    assert kinds == [
        (seconds, stage, variant)
        for seconds in (0.2, 0.4)
        for stage in s3gen_bench.STAGES
        for variant in ("stock", "exact")
    ]
    assert all(0 < each["least_ms"] <= each["median_ms"] for each in raw["s3gen"])
    for each in raw["s3gen"]:
        each["median_ms"] = 3000 if each["variant"] == "stock" else 2000 * each["seconds_of_audio"]
    head, _, stock, ours, *_ = lines = table.s3gen_table(raw).splitlines()
    assert head == "| stage | variant | 0.2 s | 0.4 s |"
    assert stock == "| encoder | stock | 3.00 s (1.00×) | 3.00 s (1.00×) |"
    assert ours == "| encoder | exact | 400 ms (7.50×) | 800 ms (3.75×) |"
    assert len(lines) == 2 + 2 * len(s3gen_bench.STAGES) + 2
    assert "a prompt of 0.2 s and 2 Euler steps. " in lines[-1]
    monkeypatch.setattr(
        s3gen_bench, "encode", lambda weights, tokens: 1.01 * encode(weights, tokens)
    )
    line = [*S3GEN.split(), "0.2", "--stages", "encoder"]
    raw = s3gen_bench.run(s3gen_bench.parser().parse_args(line))
    assert raw["difference"]["0.2"]["exact"]["encoder"] > 5e-3, "other work is seen"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for has in (True, False):
        monkeypatch.setattr(s3gen_bench, "cpu_multiplies_bf16", lambda has=has: has)
        variants = s3gen_bench.parser().parse_args([]).variants
        assert variants == ["stock", "exact", "bf16"][: 2 + has]


def test_what_s3gens_variants_ran_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sites of a patched model as report() has them, and that a compiler has failed."""

    def no_compiler(*_: Any) -> Any:
        raise OSError("no compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=no_compiler))
    line = [*S3GEN.split(), "0.2", "--stages", "solver", "--json", str(tmp_path / "raw.json")]
    line += ["--variants", "stock", "exact", "exact, compiled"]
    raw = s3gen_bench.run(s3gen_bench.parser().parse_args(line))
    assert json.loads((tmp_path / "raw.json").read_text()) == raw
    model = random_model("vc", "tiny")
    with patched(model, precision="exact"):
        rows = [row._asdict() for row in report(model)]
    assert raw["ran"]["exact"] == [
        row for row in rows if row["site"] not in ("generate", "watermark")
    ]
    flow = next(row for row in raw["ran"]["exact, compiled"] if row["site"] == "s3gen.flow")
    assert flow["backend"] == "cpu, eager"
    assert "torch.compile failed: " in flow["why"]
    assert f"exact, compiled: {', '.join(flow.values())}\n" in capsys.readouterr().out


# ---- text to audio


def test_end_to_end_measures_what_it_says(
    voices: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []

    def model(*arguments: Any, **settings: Any) -> Any:
        models.append(random_model(*arguments, **settings))
        return models[-1]

    monkeypatch.setattr(end_to_end, "random_model", model)
    monkeypatch.setattr(end_to_end, "ten_seconds", lambda _: voices[0])
    line = "--size tiny --seconds 0.4 --variants stock exact int8 --device cpu --rounds 2"
    line += f" --json {tmp_path / 'raw.json'}"
    raw = end_to_end.run(end_to_end.parser().parse_args(line.split()))
    assert json.loads((tmp_path / "raw.json").read_text()) == raw
    assert "generate" not in vars(models[0]), "not patched any more"
    assert [each["variant"] for each in raw["end_to_end"]] == ["stock", "exact", "int8"]
    for each in raw["end_to_end"]:
        assert each["tokens"] in (10, 11)
        assert each["audio_seconds"] == pytest.approx(0.4, abs=0.05)
        assert each["real_time_factor"] == each["stages"]["total"] / each["audio_seconds"]
        assert all(seconds > 0 for seconds in each["stages"].values())
        assert each["peak_bytes"] is None or 1e8 < each["peak_bytes"] < 1e11
        each["peak_bytes"] = 2**30
        for stage in each["stages"]:
            each["stages"][stage] = 2.0 if each["variant"] == "stock" else 0.5
        each["real_time_factor"] = 0.25
    lines = table.end_to_end_table(raw).splitlines()
    assert lines[0] == "| variant | stage | 0.4 s |"
    assert "| stock | t3 | 2.00 s |" in lines
    assert "| exact | total | 500 ms (4.00×) |" in lines
    assert "| exact | peak memory of the whole process | 1.07 GB |" in lines
    assert "| int8 | real-time factor | 0.250 |" in lines
    assert "| published by others, RTX 4090: stock | total | – |" in lines
    raw["end_to_end"] = [each | {"seconds_of_audio": 10.0} for each in raw["end_to_end"]]
    published = "| published by others, RTX 4090: optimised | total | 1.4 s |"
    assert published in table.end_to_end_table(raw).splitlines()


def took(size: int) -> list[Any]:
    """Memory that nobody had, written to: an allocator may have some left."""
    memory = mmap.mmap(-1, size)
    return [torch.frombuffer(memory, dtype=torch.uint8).fill_(1)]


def test_a_peak_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a GiB that was there before is not in it, what comes after is; else nobody knows."""
    peak = end_to_end.Peak("cpu")
    assert peak.bytes() is None, "since when?"
    del took(2**29)[:]
    peak.start()
    if (before := peak.bytes()) is None:
        assert not os.access("/proc/self/clear_refs", os.W_OK), "a peak could be forgotten here"
    else:
        del took(2**28)[:]
        assert before + 2**27 < peak.bytes() < before + 2**28 + 2**26
    monkeypatch.setattr(end_to_end, "PROCESS", tmp_path / "none")
    peak.start()
    assert peak.bytes() is None


def test_the_voice_lasts_ten_seconds(tmp_path: Path) -> None:
    wave, rate = soundfile.read(end_to_end.ten_seconds(tmp_path))
    assert len(wave) == 10 * rate
    assert abs(wave[-rate:]).max() > 0.01
