"""chatterbox-fast say | demo | doctor"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import torch

from . import __version__, dispatch
from ._ext import build_info
from .assets import VOICE_PROMPT
from .options import Options, Precision

SENTENCE = "Real time at last."
DEMO_TOKENS = 60


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `chatterbox-fast` command; returns its exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
    except (OSError, RuntimeError, TypeError, ValueError, ModuleNotFoundError) as error:
        print(f"chatterbox-fast: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chatterbox-fast", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")

    say = commands.add_parser("say", help="speak a text with the real weights")
    say.add_argument("text")
    say.add_argument("-o", "--out", type=Path, default=Path("speech.wav"))
    _speech_arguments(say)
    say.set_defaults(run=_say)

    demo = commands.add_parser("demo", help="stock against patched, side by side")
    demo.add_argument("--text", default=SENTENCE)
    demo.add_argument("--out", type=Path, default=Path("demo_out"), help="folder of the WAVs")
    demo.add_argument("--size", choices=["full", "reduced", "tiny"], help="use random weights")
    demo.add_argument(
        "--tokens", type=int, default=DEMO_TOKENS, help="length of speech from random weights"
    )
    demo.add_argument(
        "--precision", choices=get_args(Precision), default="auto", help="as patch() takes it"
    )
    demo.add_argument("--json", type=Path, help="write the raw figures here")
    _speech_arguments(demo)
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser("doctor", help="what is installed, and which kernels are built")
    doctor.set_defaults(run=_doctor)
    return parser


def _speech_arguments(command: argparse.ArgumentParser) -> None:
    best = "cuda" if torch.cuda.is_available() else "cpu"
    command.add_argument("--voice", type=Path, default=VOICE_PROMPT, help="audio of the voice")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default=best)


def _readable(voice: Path) -> Path:
    if not voice.is_file():
        raise FileNotFoundError(f"--voice must be an audio file, got {voice}")
    return voice


def _say(arguments: argparse.Namespace) -> int:
    import soundfile

    from .optimized import OptimizedChatterboxTTS

    voice = _readable(arguments.voice)
    model: Any = OptimizedChatterboxTTS.from_pretrained(arguments.device)
    wav = model.generate(arguments.text, audio_prompt_path=voice, seed=arguments.seed, verbose=True)
    soundfile.write(arguments.out, wav[0].numpy(), model.sr)
    print(arguments.out)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import run_demo

    result = run_demo(
        arguments.text,
        _readable(arguments.voice),
        arguments.seed,
        arguments.device,
        arguments.out,
        tokens=arguments.tokens,
        size=arguments.size,
        precision=arguments.precision,
        json_path=arguments.json,
    )
    return 0 if result.is_as_promised() else 1


def _doctor(_: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [
        ("chatterbox-fast", __version__),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda})"),
        ("device", torch.cuda.get_device_name() if device.type == "cuda" else "cpu"),
        *((name, _installed(name)) for name in ("chatterbox-tts", "transformers", "triton")),
        ("Perth", _perth()),
        *((f"extension: {name}", str(value)) for name, value in build_info().items()),
    ]
    for op in dispatch.OPS:
        choice = dispatch.choose(op, device, Options().backend)
        rows.append((op, f"{choice.backend} ({choice.reason})"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _perth() -> str:
    from .watermark import require_perth

    try:
        require_perth()
    except (ImportError, RuntimeError) as error:
        return str(error)
    return "loads"
