"""README's tables and their picture, rendered from the raw results: python -m bench.table [--check]

A table stands between ``<!-- table: FILE -->`` and ``<!-- end -->``, FILE relative to
bench/results: a `chatterbox-fast demo --json` file, one of bench/t3_decode.py, bench/s3gen.py or
bench/end_to_end.py, or one of ``pytest bench --benchmark-json``. The last three are drawn too, as
FILE.png.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def demo_table(raw: dict[str, Any]) -> str:
    """The markdown table of one `chatterbox-fast demo --json` file, with its conditions."""
    stock, ours = raw["stock_seconds"], raw["patched_seconds"]
    count, audio = raw["token_count"], raw["audio_seconds"]

    def row(name: str, a: float, b: float, gain: float, unit: str = "") -> str:
        return f"| {name} | {a:.2f}{unit} | {b:.2f}{unit} | {gain:.2f}× |"

    rows = ["| stage | stock | patched | ratio |", "|---|---|---|---|"]
    rows += [row(name, a, ours[name], a / ours[name], " s") for name, a in stock.items()]
    gain = stock["t3"] / ours["t3"]
    rows.append(row("T3 tokens/s", count / stock["t3"], count / ours["t3"], gain))
    gain = stock["total"] / ours["total"]
    rows.append(row("real-time factor", stock["total"] / audio, ours["total"] / audio, gain))
    machine = raw["machine"]
    return "\n".join(
        [
            *rows,
            "",
            f"Tokens equal: {raw['tokens_equal']} of {count}; largest difference of the mel "
            f"{raw['mel_difference']:.1e}, of the audio {raw['audio_difference']:.1e}. "
            f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
            f"weights: {raw['weights']}, {audio:.2f} s of audio, one process, {raw['when'][:10]}, "
            f"commit {raw['commit']}.",
        ]
    )  # fmt: skip


OURS = ("extension", "triton")
"""What of an op's implementations is ours; its specification, `reference`, is in no table."""


def bench_table(raw: dict[str, Any]) -> str:
    """The markdown table of a pytest-benchmark file: a row for each case.

    Stock, the fastest of the other baselines, ours by CUDA or C++, and by Triton on a GPU.
    """
    cases = by_case(raw)
    columns = [name for name in OURS if any(name in medians for medians in cases.values())]
    names = ["case", "stock", "fastest other baseline", *columns, "stock / ours"]
    rows = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for case, medians in cases.items():
        ours = [medians.get(name) for name in columns]
        cells = [case, _time(medians["stock"]), _fastest_other(medians), *map(_time, ours)]
        best = min((one["median_us"] for one in ours if one is not None), default=None)
        cells.append("–" if best is None else f"{medians['stock']['median_us'] / best:.2f}×")
        rows.append(f"| {' | '.join(cells)} |")
    machine, commit = raw["machine_info"]["measured"], raw["commit_info"]
    dirty = "+" if commit["dirty"] else ""
    infos = [benchmark["extra_info"] for benchmark in raw["benchmarks"]]
    timing = "; ".join(dict.fromkeys(info["timing"] for info in infos))
    conditions = (
        f"Medians, and from the 20th to the 80th percentile. {machine['device']}, "
        f"{machine['threads']} threads, torch {machine['torch']}, {timing}, "
        f"{raw['datetime'][:10]}, commit {commit['id'][:7]}{dirty}."
    )
    return "\n".join([*rows, "", conditions])


def _time(info: dict[str, Any] | None) -> str:
    """Median and spread; in a CUDA graph too, where it was captured."""
    if info is None:
        return "–"
    graph = info.get("graph_us")
    return (
        f"{info['median_us']:.0f} µs ({info['p20_us']:.0f} – {info['p80_us']:.0f})"
        + ("" if graph is None else f"; {graph:.1f} µs in a graph")
    )  # fmt: skip


def _fastest_other(medians: dict[str, dict[str, Any]]) -> str:
    others = {
        name: info
        for name, info in medians.items()
        if name not in ("stock", "reference", *OURS)
    }  # fmt: skip
    if not others:
        return "–"
    name, info = min(others.items(), key=lambda pair: pair[1]["median_us"])
    return f"{info['median_us']:.0f} µs, {name.replace('_', ' ')}"


def t3_decode_table(raw: dict[str, Any]) -> str:
    """The markdown table of a bench/t3_decode.py file: a row for each variant."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for result in raw["t3_decode"]:
        found.setdefault(result["variant"], {})[result["positions"]] = result
    lengths = sorted(found["stock"])
    divergence, prefill = raw["divergence"], raw["prefill"]["median_ms"]
    rows = [
        "| variant | "
        + " | ".join(f"tokens/s at {length}" for length in lengths)
        + " | against stock | ops a step | share of read bandwidth | KL to stock | prefill |",
        "|---" * (len(lengths) + 6) + "|",
    ]
    for variant, results in found.items():
        speeds = [1e6 / results[length]["median_us"] for length in lengths]
        first, stock = results[lengths[0]], found["stock"][lengths[0]]
        gain, kl = stock["median_us"] / first["median_us"], divergence.get(variant)
        cells = [
            variant,
            *(f"{speed:.1f}" for speed in speeds),
            f"{gain:.2f}×",
            "–" if first["dispatched"] is None else str(first["dispatched"]),
            f"{first['share_of_read_bandwidth']:.0%}",
            "–" if kl is None else f"{kl:.1e}",
            _clock(prefill[variant] / 1e3) if variant in prefill else "–",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    machine = raw["machine"]
    return "\n".join(
        [
            *rows,
            "",
            f"Medians; the ratio, ops and bandwidth at {lengths[0]} cached positions. KL: mean "
            "divergence from float32 stock in nats over a few forced tokens, at an entropy of "
            f"{divergence['entropy']:.1f}. Prefill: {raw['prefill']['text_tokens']} tokens of text "
            "and a voice that was met before. "
            f"{machine['device']}, {machine['threads']} threads, "
            f"torch {machine['torch']}, weights: {raw['weights']}, {raw['when'][:10]}, "
            f"commit {raw['commit']}.",
            *(f"Does not run here: {name} ({why})." for name, why in raw["failures"].items()),
        ]
    )


def s3gen_table(raw: dict[str, Any]) -> str:
    """The markdown table of a bench/s3gen.py file: a row for each stage and variant."""
    found: dict[tuple[str, str], dict[float, float]] = {}
    for result in raw["s3gen"]:
        key = result["stage"], result["variant"]
        found.setdefault(key, {})[result["seconds_of_audio"]] = result["median_ms"]
    lengths = sorted({result["seconds_of_audio"] for result in raw["s3gen"]})
    rows = [
        "| stage | variant | " + " | ".join(f"{length:g} s" for length in lengths) + " |",
        "|---" * (len(lengths) + 2) + "|",
    ]
    for (stage, variant), medians in found.items():
        stock = found[stage, "stock"]
        cells = [
            f"{_clock(medians[length] / 1e3)} ({stock[length] / medians[length]:.2f}×)"
            for length in lengths
        ]
        rows.append(f"| {stage} | {variant} | {' | '.join(cells)} |")
    machine, prompt = raw["machine"], raw["s3gen"][0]["prompt_seconds"]
    conditions = (
        f"Medians for so much audio, with a prompt of {prompt:g} s and {raw['timesteps']} Euler "
        f"steps. {machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"weights: {raw['weights']}, {raw['when'][:10]}, commit {raw['commit']}."
    )
    return "\n".join([*rows, "", conditions])


PUBLISHED = {
    "published by others, RTX 4090: stock": {5: 2.5, 10: 4.5, 15: 6.8},
    "published by others, RTX 4090: optimised": {5: 0.8, 10: 1.4, 15: 2.1},
}
"""Seconds for so much audio, of another machine: beside ours, never divided by ours."""


def end_to_end_table(raw: dict[str, Any]) -> str:
    """The markdown table of a bench/end_to_end.py file: a row for each variant and stage."""
    found: dict[str, dict[float, dict[str, Any]]] = {}
    for result in raw["end_to_end"]:
        found.setdefault(result["variant"], {})[result["seconds_of_audio"]] = result
    lengths = sorted({result["seconds_of_audio"] for result in raw["end_to_end"]})
    rows = [
        "| variant | stage | " + " | ".join(f"{length:g} s" for length in lengths) + " |",
        "|---" * (len(lengths) + 2) + "|",
    ]
    for variant, results in found.items():
        for stage in results[lengths[0]]["stages"]:
            cells = [_seconds(results[x], found["stock"][x], stage) for x in lengths]
            rows.append(f"| {variant} | {stage} | {' | '.join(cells)} |")
        factors = [f"{results[length]['real_time_factor']:.3f}" for length in lengths]
        rows.append(f"| {variant} | real-time factor | {' | '.join(factors)} |")
        if results[lengths[0]]["peak_bytes"] is not None:
            peaks = [f"{results[length]['peak_bytes'] / 1e9:.2f} GB" for length in lengths]
            name = f"peak memory of {raw['peak_bytes_of']}"
            rows.append(f"| {variant} | {name} | {' | '.join(peaks)} |")
    for name, seconds in PUBLISHED.items():
        cells = [f"{seconds[x]:.1f} s" if x in seconds else "–" for x in lengths]
        rows.append(f"| {name} | total | {' | '.join(cells)} |")
    machine, rounds = raw["machine"], raw["end_to_end"][0]["rounds"]
    counted = "one of each" if rounds == 1 else f"medians of {rounds}"
    conditions = (
        "Text to so much audio with a voice prompt of 10 s, stock and patched in turn in one "
        f"process, after a first utterance each; {counted}. {machine['device']}, "
        f"{machine['threads']} threads, torch {machine['torch']}, weights: {raw['weights']}, "
        f"{raw['when'][:10]}, commit {raw['commit']}."
    )
    return "\n".join([*rows, "", conditions])


def _seconds(result: dict[str, Any], stock: dict[str, Any], stage: str) -> str:
    own, stocks = result["stages"][stage], stock["stages"][stage]
    return _clock(own) + (f" ({stocks / own:.2f}×)" if result is not stock and own else "")


def _clock(seconds: float) -> str:
    """Seconds, or below one three figures of milliseconds."""
    milliseconds = f"{1e3 * seconds:#.3g}".rstrip(".")
    return f"{seconds:.2f} s" if "e" in milliseconds or seconds >= 1 else f"{milliseconds} ms"


def by_case(raw: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Op, case and device -> implementation -> what `timing.measure` noted."""
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for benchmark in raw["benchmarks"]:
        info = benchmark["extra_info"]
        cases.setdefault(benchmark["group"], {})[info["implementation"]] = info
    return cases


def draw_stages(raw: dict[str, Any], path: Path) -> None:
    """A bar for each variant, made of its stages, for every length."""
    from matplotlib import pyplot

    results = raw["end_to_end"]
    figure, axes = pyplot.subplots(figsize=(1 + 0.9 * len(results), 3.5))
    names = [f"{r['variant']}\n{r['seconds_of_audio']:g} s" for r in results]
    below = [0.0] * len(results)
    for stage in (stage for stage in results[0]["stages"] if stage != "total"):
        heights = [result["stages"][stage] for result in results]
        axes.bar(names, heights, bottom=below, label=stage)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    axes.set_ylabel("seconds")
    axes.tick_params(axis="x", labelsize=7)
    axes.legend(fontsize=7)
    _save(figure, path)


def draw(raw: dict[str, Any], path: Path) -> None:
    """How many times stock's speed ours has, a bar for each case, on a logarithmic axis."""
    from matplotlib import pyplot

    gains = {
        case: medians["stock"]["median_us"] / medians["extension"]["median_us"]
        for case, medians in by_case(raw).items()
        if "extension" in medians
    }
    figure, axis = pyplot.subplots(figsize=(7, 1 + 0.18 * len(gains)))
    axis.barh(list(gains), list(gains.values()))
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlabel("stock's median / ours")
    axis.tick_params(axis="y", labelsize=6)
    axis.invert_yaxis()
    _save(figure, path)


def draw_s3gen(raw: dict[str, Any], path: Path) -> None:
    """A bar for each stage, length and variant."""
    from matplotlib import pyplot

    results = raw["s3gen"]
    stages = list(dict.fromkeys(result["stage"] for result in results))
    figure, axes = pyplot.subplots(1, len(stages), figsize=(3.2 * len(stages), 3))
    for axis, stage in zip(axes, stages, strict=True):
        own = [result for result in results if result["stage"] == stage]
        names = [f"{r['variant']}\n{r['seconds_of_audio']:g} s" for r in own]
        axis.bar(names, [result["median_ms"] / 1e3 for result in own])
        axis.set_title(stage, fontsize=8)
        axis.tick_params(axis="x", labelrotation=60, labelsize=6)
    axes[0].set_ylabel("median, s")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Without matplotlib's version, with which the file would change."""
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})


KINDS = {
    "benchmarks": bench_table,
    "t3_decode": t3_decode_table,
    "s3gen": s3gen_table,
    "end_to_end": end_to_end_table,
}
"""What marks a file of a kind -> its table; a demo's has none."""
PICTURES = {"benchmarks": draw, "s3gen": draw_s3gen, "end_to_end": draw_stages}
PAGES = ("README.md", "OPTIMIZATION_GUIDE.md")


def render(text: str) -> str:
    """`text` with every table in it made anew."""

    def table(match: re.Match[str]) -> str:
        raw = json.loads((RESULTS / match.group(2)).read_text())
        made = next((make for key, make in KINDS.items() if key in raw), demo_table)(raw)
        return f"{match.group(1)}{made}\n{match.group(3)}"

    return _TABLE.sub(table, text)


def main(arguments: list[str]) -> int:
    """Rewrites the tables and pictures, or with --check says whether the pages are up to date."""
    stale = False
    for page in PAGES:
        text = (ROOT / page).read_text()
        fresh = render(text)
        stale |= fresh != text
        if "--check" in arguments:
            continue
        (ROOT / page).write_text(fresh)
        for name in (match.group(2) for match in _TABLE.finditer(text)):
            raw = json.loads((RESULTS / name).read_text())
            for key, picture in PICTURES.items():
                if key in raw:
                    picture(raw, RESULTS / f"{name}.png")
    return int("--check" in arguments and stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
