"""Stock against patched, in one process: what `chatterbox-fast demo` and `make demo` run."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from .options import Precision
from .overrides import Override, apply_all, undo_all
from .patch import patched, report
from .precision import cpu_multiplies_bf16
from .testing import random_model
from .watermark import require_perth

EXACT = "engine, exact"
"""What a report says of T3 where it draws stock's own tokens."""
STAGES = ("voice", "t3", "s3gen flow", "vocoder", "watermark", "total")


@dataclass
class Run:
    """One utterance: the seconds each stage took, and what came out of it."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    outputs: dict[str, Any] = field(default_factory=dict)
    wav: Tensor = field(default_factory=lambda: torch.zeros(1, 0))

    @property
    def tokens(self) -> list[int]:
        """The speech tokens T3 returned, the stop token included."""
        drawn: list[int] = self.outputs["t3"][0].tolist()
        return drawn

    @property
    def mel(self) -> Tensor:
        """The mel spectrogram ``(1, 80, frames)`` that the vocoder got."""
        mel: Tensor = self.outputs["s3gen flow"]
        return mel


def compare(
    model: Any, text: str, voice: str | Path, seed: int, precision: Precision = "auto"
) -> tuple[Run, Run, str]:
    """The same utterance by stock and by the patched model, with the same seed; what T3 ran as.

    Each speaks it twice, in turn; the first time is not measured, so that neither side pays for
    first calls.
    """
    for _ in range(2):
        stock = speak(model, lambda: _after_seed(model, text, voice, seed))
        with patched(model, progress=True, precision=precision):
            fast = speak(model, lambda: model.generate(text, audio_prompt_path=voice, seed=seed))
            runs = next(row.runs for row in report(model) if row.site == "t3.inference")
    return stock, fast, runs


def _after_seed(model: Any, text: str, voice: str | Path, seed: int) -> Tensor:
    torch.manual_seed(seed)
    wav: Tensor = model.generate(text, audio_prompt_path=voice)
    return wav


def speak(model: Any, call: Callable[[], Tensor]) -> Run:
    """The utterance that `call` has `model` make, and the time that each stage of it takes."""
    run = Run()
    with _measured(model, run):
        start = now(model.device)
        run.wav = call()
        run.seconds["total"] = now(model.device) - start
    return run


@contextmanager
def _measured(model: Any, run: Run) -> Iterator[None]:
    """Notes when each stage of `model` begins and ends, and what it returns."""
    sites = {
        "voice": (model, "prepare_conditionals"),
        "t3": (model.t3, "inference"),
        "s3gen flow": (model.s3gen, "flow_inference"),
        "vocoder": (model.s3gen, "hift_inference"),
        "watermark": (model.watermarker, "apply_watermark"),
    }
    overrides = [
        Override(owner, name, MethodType(_timed(model, run, stage, getattr(owner, name)), owner))
        for stage, (owner, name) in sites.items()
    ]
    apply_all(overrides)
    try:
        yield
    finally:
        undo_all(overrides)


def _timed(model: Any, run: Run, stage: str, method: MethodType) -> Callable[..., Any]:
    @functools.wraps(method)
    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = now(model.device)
        run.outputs[stage] = method.__func__(self, *args, **kwargs)
        run.seconds[stage] += now(model.device) - start
        return run.outputs[stage]

    return timed


def now(device: Any) -> float:
    """Seconds, once `device` has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Result:
    """What a comparison showed, with its conditions."""

    when: str
    commit: str
    machine: dict[str, str]
    weights: str
    patched_t3: str
    text: str
    seed: int
    audio_seconds: float
    token_count: int
    tokens_equal: int
    mel_difference: float
    audio_difference: float
    stock_seconds: dict[str, float]
    patched_seconds: dict[str, float]

    @classmethod
    def of(
        cls, model: Any, weights: str, text: str, seed: int, runs: tuple[Run, Run, str]
    ) -> Result:
        """Compares what `compare` gave."""
        stock, fast, patched_t3 = runs
        same_length = len(stock.tokens) == len(fast.tokens)
        return cls(
            when=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            commit=commit_id(),
            machine=describe_machine(model.device),
            weights=weights,
            patched_t3=patched_t3,
            text=text,
            seed=seed,
            audio_seconds=fast.wav.shape[-1] / model.sr,
            token_count=max(len(stock.tokens), len(fast.tokens)),
            tokens_equal=sum(a == b for a, b in zip(stock.tokens, fast.tokens, strict=False)),
            mel_difference=_largest(stock.mel, fast.mel) if same_length else float("inf"),
            audio_difference=_largest(stock.wav, fast.wav) if same_length else float("inf"),
            stock_seconds=stock.seconds,
            patched_seconds=fast.seconds,
        )

    def is_as_promised(self) -> bool:
        """Whether the tokens are stock's; other precisions than exact promise no such thing."""
        return self.tokens_equal == self.token_count or self.patched_t3 not in ("stock", EXACT)

    def table(self) -> str:
        """The comparison as text."""
        lines = [f"{'stage':<12}{'stock':>10}{'patched':>10}{'ratio':>8}"]
        for stage in STAGES:
            a, b = self.stock_seconds[stage], self.patched_seconds[stage]
            lines.append(f"{stage:<12}{a:>8.2f} s{b:>8.2f} s{_ratio(a, b):>8}")
        per_second = [self.token_count / s["t3"] for s in self._both()]
        factor = [s["total"] / self.audio_seconds for s in self._both()]
        lines += [
            f"{'tokens/s':<12}{per_second[0]:>10.2f}{per_second[1]:>10.2f}"
            f"{_ratio(per_second[1], per_second[0]):>8}",
            f"{'real time':<12}{factor[0]:>10.2f}{factor[1]:>10.2f}{_ratio(*factor):>8}",
            f"tokens equal: {self.tokens_equal} of {self.token_count}; largest difference: "
            f"mel {self.mel_difference:.1e}, audio {self.audio_difference:.1e}",
        ]
        return "\n".join(lines)

    def _both(self) -> tuple[dict[str, float], dict[str, float]]:
        return self.stock_seconds, self.patched_seconds

    def json(self) -> str:
        """All fields, for bench/results."""
        return json.dumps(asdict(self), indent=2) + "\n"


def _largest(a: Tensor, b: Tensor) -> float:
    return float("inf") if a.shape != b.shape else float((a - b).abs().max())


def _ratio(slow: float, fast: float) -> str:
    return f"{slow / fast:.2f}x" if fast > 0 else "-"


def commit_id() -> str:
    """The checkout's commit, "+" where it has changes; "unknown" outside a checkout."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("CHATTERBOX_FAST_COMMIT", "unknown")


def describe_machine(device: Any) -> dict[str, str]:
    """Device, processor, cores, Python and torch: what a figure needs beside it."""
    kind = torch.device(device).type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else _processor()
    return {
        "device": name,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def _processor() -> str:
    """The CPU's name and what torch makes use of: one name stands for several generations."""
    bf16 = ", bfloat16" if cpu_multiplies_bf16() else ""
    return f"{_processor_name()} ({torch.backends.cpu.get_cpu_capability()}{bf16})"


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def load_model(device: str, tokens: int, size: str | None = None) -> tuple[Any, str]:
    """Stock's English model and where its weights come from.

    The real weights where they are cached or can be downloaded; otherwise, or where `size` asks
    for it, random ones that stop after `tokens` tokens.
    """
    require_perth()
    if size is None:
        try:
            from chatterbox.tts import ChatterboxTTS

            return ChatterboxTTS.from_pretrained(device), "real"
        except OSError as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            print(
                "\n" + "!" * 78 + "\n!! The real weights are not cached and cannot be downloaded:\n"
                f"!!   {type(error).__name__}: {reason}\n"
                "!! This run uses RANDOM WEIGHTS: the same architecture, the same work, but noise\n"
                "!! instead of speech.\n" + "!" * 78 + "\n",
                file=sys.stderr,
            )
    chosen: Any = size or "full"
    return random_model("english", chosen, device=device, stop_after=tokens), f"random, {chosen}"


def run_demo(
    text: str,
    voice: str | Path,
    seed: int,
    device: str,
    out: Path,
    *,
    tokens: int,
    size: str | None = None,
    precision: Precision = "auto",
    json_path: Path | None = None,
) -> Result:
    """Speaks `text` twice, prints the table, writes two WAVs and, where asked, the raw figures."""
    import soundfile

    model, weights = load_model(device, tokens, size)
    stock, fast, _ = runs = compare(model, text, voice, seed, precision)
    result = Result.of(model, weights, text, seed, runs)
    out.mkdir(parents=True, exist_ok=True)
    print(f"\n{result.machine['device']}, torch {result.machine['torch']}, weights: {weights}")
    print(f"{result.audio_seconds:.2f} s of audio, seed {seed}, patched: {result.patched_t3}")
    print(f"\n{result.table()}\n")
    for name, run in (("stock", stock), ("patched", fast)):
        path = out / f"{name}.wav"
        soundfile.write(path, run.wav[0].numpy(), model.sr)
        print(path)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(result.json())
        print(json_path)
    return result
