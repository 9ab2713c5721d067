"""Text to audio, stage by stage: stock and patched, in turn, in one process.

    python bench/end_to_end.py [--size full] [--seconds 5 10 15] [--json FILE]

Random weights that stop after as many tokens as the audio needs, a voice prompt of ten seconds
(the example voice, repeated), one seed. Every utterance is spoken twice, of which the second is
measured, so that nobody pays for first calls; variants take turns.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import soundfile
import torch
from chatterbox_fast.assets import VOICE_PROMPT
from timing import conditions, save
from torch import Tensor

from chatterbox_fast import patched
from chatterbox_fast.demo import STAGES, Run, speak
from chatterbox_fast.testing import random_model

PROCESS = Path("/proc/self")
TOKENS_PER_SECOND = 25
TEXT = (
    "The harbour was quiet when the last boat came in, and nobody asked where it had been; "
    "by morning the story had changed three times, and each was told as if it were the first."
)
VARIANTS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "exact": {"precision": "exact"},
    "bf16": {"precision": "bf16"},
    "bf16, compiled": {"precision": "bf16", "compile": True},
    "int8": {"precision": "int8"},
}


def around(model: Any, variant: str) -> AbstractContextManager[Any]:
    """The model as `variant` has it."""
    options = VARIANTS[variant]
    return nullcontext() if options is None else patched(model, **options)


class Peak:
    """The most memory that is taken at once, where somebody tells.

    Attributes:
        of: whose memory it is.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device, self._known = torch.device(device), False
        self.of = "torch on the GPU" if self._device.type == "cuda" else "the whole process"

    def start(self) -> None:
        """Forgets what was; a process's peak is forgotten on Linux alone."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        self._known = False
        with suppress(OSError):
            (PROCESS / "clear_refs").write_text("5")
            self._known = True

    def bytes(self) -> int | None:
        """Since the start; None where what was before could not be forgotten."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        status = (PROCESS / "status").read_text() if self._known else ""
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        return 1024 * int(found.group(1)) if found else None


def measure(model: Any, variant: str, voice: Path, peak: Peak) -> tuple[Run, int | None]:
    """One utterance, and the most memory that was taken meanwhile."""

    def utterance() -> Tensor:
        torch.manual_seed(0)
        wave: Tensor = model.generate(TEXT, audio_prompt_path=voice)
        return wave

    with around(model, variant):
        utterance()
        peak.start()
        run = speak(model, utterance)
        return run, peak.bytes()


def ten_seconds(folder: Path) -> Path:
    """The example voice, repeated until it lasts ten seconds."""
    wave, rate = soundfile.read(VOICE_PROMPT)
    path = folder / "voice.wav"
    repeated = torch.from_numpy(wave).repeat(-(-10 * rate // len(wave)))
    soundfile.write(path, repeated[: 10 * rate].numpy(), rate)
    return path


def summary(variant: str, seconds: float, runs: list[tuple[Run, int | None]]) -> dict[str, Any]:
    """The medians of all rounds, and their highest peak."""
    audio = runs[0][0].wav.shape[-1] / 24000
    stages = {stage: statistics.median(run.seconds[stage] for run, _ in runs) for stage in STAGES}
    return {
        "variant": variant,
        "seconds_of_audio": seconds,
        "audio_seconds": audio,
        "tokens": len(runs[0][0].tokens),
        "stages": stages,
        "real_time_factor": stages["total"] / audio,
        "peak_bytes": max((peak for _, peak in runs if peak is not None), default=None),
        "rounds": len(runs),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All variants at all lengths."""
    peak = Peak(arguments.device)
    raw: dict[str, Any] = {
        **conditions(arguments.device, arguments.size),
        "peak_bytes_of": peak.of,
        "end_to_end": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        voice = ten_seconds(Path(folder))
        for seconds in arguments.seconds:
            tokens = round(seconds * TOKENS_PER_SECOND)
            model = random_model(
                "english", arguments.size, device=arguments.device, stop_after=tokens
            )
            found: dict[str, list[tuple[Run, int | None]]] = {}
            for _ in range(arguments.rounds):
                for variant in arguments.variants:
                    found.setdefault(variant, []).append(measure(model, variant, voice, peak))
            for variant, runs in found.items():
                raw["end_to_end"].append(summary(variant, seconds, runs))
                print(json.dumps(raw["end_to_end"][-1]), flush=True)
            save(arguments.json, raw)
            del model
    return raw


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="full")
    parser.add_argument("--seconds", type=float, nargs="+", default=[5, 10, 15])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    return parser


def main() -> None:
    run(parser().parse_args())


if __name__ == "__main__":
    main()
