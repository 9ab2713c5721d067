"""README's tables, rendered from the raw results: python -m bench.table [--check]

A table stands between ``<!-- table: FILE -->`` and ``<!-- end -->``, FILE relative to
bench/results.
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


def render(text: str) -> str:
    """`text` with every table in it made anew."""

    def table(match: re.Match[str]) -> str:
        raw = json.loads((RESULTS / match.group(2)).read_text())
        return f"{match.group(1)}{demo_table(raw)}\n{match.group(3)}"

    return _TABLE.sub(table, text)


def main(arguments: list[str]) -> int:
    """Rewrites README.md, or with --check says whether it is up to date."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    fresh = render(text)
    if "--check" in arguments:
        return int(fresh != text)
    readme.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
