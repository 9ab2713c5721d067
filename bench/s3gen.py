"""S3Gen's stages, tokens to audio: stock and ours, in turn.

    python bench/s3gen.py [--size full] [--seconds 2 5 10 20] [--prompt 10] [--json FILE]

Random weights, random tokens, a random voice of `--prompt` seconds. Encoder and
solver get what stock's stage before them leaves, the vocoder a random mel; every stage draws what
it draws in a request. Stages: encoder (tokens to
what the flow is conditioned on), solver (all Euler steps), flow (both, as a request runs them: on a
GPU in one CUDA graph), vocoder (F0, source, waveform), total (`S3Gen.inference`). "stock, compiled"
is stock with torch.compile around the estimator and the vocoder's decode. What each variant ran on
in the end, as report() tells it, is noted as "ran".
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from timing import conditions, save
from torch import Tensor

from chatterbox_fast.demo import now
from chatterbox_fast.options import Options
from chatterbox_fast.overrides import Change, Override, apply_all, undo_all
from chatterbox_fast.precision import cpu_multiplies_bf16
from chatterbox_fast.s3gen import runner
from chatterbox_fast.s3gen.encoder import encode
from chatterbox_fast.site import Row, Site
from chatterbox_fast.sites import sites_of
from chatterbox_fast.testing import random_s3gen

STAGES = ("encoder", "solver", "flow", "vocoder", "total")
VARIANTS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "stock, compiled": None,
    "exact": {"precision": "exact"},
    "exact, compiled": {"precision": "exact", "compile": True},
    "bf16": {"precision": "bf16"},
    "bf16, compiled": {"precision": "bf16", "compile": True},
}
"""What patch() is given; None is stock."""
TOKENS_PER_SECOND, FRAMES_PER_TOKEN = 25, 2
Call = Callable[[], Any]


@dataclass
class Result:
    """One stage of one variant at one length."""

    stage: str
    variant: str
    seconds_of_audio: float
    prompt_seconds: float
    median_ms: float
    least_ms: float
    rounds: int

    def __str__(self) -> str:
        return (
            f"{self.stage}, {self.variant} @ {self.seconds_of_audio:g} s + "
            f"{self.prompt_seconds:g} s: median {self.median_ms:.1f} ms, least {self.least_ms:.1f}"
        )


class Utterance:
    """Random tokens and a random voice, and what stock's stages make of them."""

    def __init__(self, s3gen: Any, tokens: int, prompt: int, n_timesteps: int) -> None:
        self.s3gen, self.n_timesteps = s3gen, n_timesteps
        device, flow = next(s3gen.flow.parameters()).device, s3gen.flow
        source = torch.Generator().manual_seed(tokens)

        def ids(count: int) -> Tensor:
            return torch.randint(flow.vocab_size, (1, count), generator=source).to(device)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source).to(device)

        self.tokens, self.known = ids(tokens), FRAMES_PER_TOKEN * prompt
        self.voice = {
            "prompt_token": ids(prompt),
            "prompt_token_len": torch.tensor([prompt], device=device),
            "prompt_feat": normal(1, self.known, flow.output_size),
            "prompt_feat_len": None,
            "embedding": normal(1, 192),
        }
        self.all_tokens = torch.cat([self.voice["prompt_token"], self.tokens], dim=1)
        self.lengths = torch.tensor([tokens + prompt], device=device)
        self.speaker = normal(1, flow.output_size)
        self.mel = normal(1, flow.output_size, FRAMES_PER_TOKEN * tokens)
        with torch.inference_mode():
            self.mu = self.stock_encoder()
        self.prompt = torch.zeros_like(self.mu)
        self.prompt[:, : self.known] = self.voice["prompt_feat"]
        self.mask = self.mu.new_ones(1, 1, self.mu.shape[1])

    def stock_encoder(self) -> Tensor:
        flow = self.s3gen.flow
        hidden, _ = flow.encoder(flow.input_embedding(self.all_tokens), self.lengths)
        mu: Tensor = flow.encoder_proj(hidden)
        return mu

    def stock_solver(self) -> Tensor:
        mel, _ = self.s3gen.flow.decoder(
            mu=self.mu.transpose(1, 2).contiguous(),
            mask=self.mask,
            spks=self.speaker,
            cond=self.prompt.transpose(1, 2),
            n_timesteps=self.n_timesteps,
        )
        return mel.transpose(1, 2)  # type: ignore[no-any-return]

    def stock_vocoder(self) -> Tensor:
        wave: Tensor = self.s3gen.mel2wav.inference(self.mel)[0]
        return wave

    def flow(self) -> Tensor:
        mel, _ = self.s3gen.flow.inference(
            token=self.tokens,
            token_len=self.lengths - self.voice["prompt_token_len"],
            finalize=True,
            n_timesteps=self.n_timesteps,
            **self.voice,
        )
        return mel  # type: ignore[no-any-return]

    def total(self) -> Tensor:
        wave, _ = self.s3gen.inference(
            self.tokens, ref_dict=dict(self.voice), n_cfm_timesteps=self.n_timesteps
        )
        return wave  # type: ignore[no-any-return]

    def calls(self, variant: Variant) -> dict[str, Call]:
        """Stage -> the call, for when `variant` is around."""
        stages = {"flow": self.flow, "total": self.total}
        if not variant.sites:
            return {
                "encoder": self.stock_encoder,
                "solver": self.stock_solver,
                "vocoder": self.stock_vocoder,
                **stages,
            }
        flow, vocoder = variant.engine("s3gen.flow"), variant.engine("s3gen.vocoder")

        def solver() -> Tensor:
            noise = self.mu.new_empty(self.mu.mT.shape).normal_().mT.contiguous()
            mel: Tensor = flow.solve(self.mu, self.speaker, self.prompt, noise, self.n_timesteps)
            return mel

        def vocode() -> Tensor:
            mel = runner.read_mel(vocoder, {"speech_feat": self.mel})
            assert mel is not None
            nothing = mel.new_zeros(1, 1, 0)
            return runner.vocoder_inference(
                vocoder, mel, nothing, generator=None, phase_generator=None
            )[0]

        return {
            "encoder": lambda: encode(flow.encoder, self.all_tokens),
            "solver": solver,
            "vocoder": vocode,
            **stages,
        }


class Variant:
    """S3Gen as a variant has it, with what is packed, captured or compiled kept for all lengths.

    Attributes:
        sites: those of S3Gen that patch() replaces; none in stock.
    """

    def __init__(self, s3gen: Any, name: str) -> None:
        self.name, self.sites, self.changes = name, list[Site](), list[Change]()
        if (options := VARIANTS[name]) is not None:
            model = SimpleNamespace(s3gen=s3gen)
            sites = [
                site for site in sites_of(model, Options.of(**options)) if site.owner is not model
            ]
            self.sites = [site for site in sites if site.why_not() is None]
            self.changes = [change for site in self.sites for change in site.changes()]
        elif name != "stock":
            estimator, vocoder = s3gen.flow.decoder.estimator, s3gen.mel2wav
            self.changes = [
                Override(estimator, "forward", torch.compile(estimator.forward)),
                Override(vocoder, "decode", torch.compile(vocoder.decode)),
            ]

    def engine(self, name: str) -> Any:
        """The engine behind a site: a stage that is timed alone is a part of what runs there.

        Raises:
            RuntimeError: stock runs there.
        """
        site = next(site for site in self.sites if site.name == name)
        found = site.make.keywords["engines"].of(site.owner)  # type: ignore[attr-defined]
        if isinstance(found, str):
            raise RuntimeError(f"{name} is left to stock: {found}")
        return found

    def ran(self) -> list[Row]:
        """What report() says of S3Gen after the calls so far."""
        if not self.sites:
            return [Row("s3gen", self.name, "torch", "")]
        with self.around():
            return [row for site in self.sites for row in site.describe()]

    @contextmanager
    def around(self) -> Iterator[None]:
        """The variant, for the time of a call."""
        apply_all(self.changes)
        try:
            with torch.inference_mode():
                yield
        finally:
            undo_all(self.changes)


class Bench:
    """All variants of one utterance."""

    def __init__(self, utterance: Utterance, variants: list[Variant]) -> None:
        self.device = utterance.mu.device
        self.variants = {each.name: each for each in variants}
        self.calls = {each.name: utterance.calls(each) for each in variants}

    def output(self, variant: str, stage: str) -> Tensor:
        """After the same seed each time."""
        torch.manual_seed(0)
        with self.variants[variant].around():
            found: Tensor = self.calls[variant][stage]()
        return found

    def measure(self, stage: str, rounds: int) -> dict[str, list[float]]:
        """Milliseconds, variants in turn: what disturbs one disturbs the other."""
        samples: dict[str, list[float]] = {}
        for _ in range(rounds):
            for name, variant in self.variants.items():
                with variant.around():
                    start = now(self.device)
                    self.calls[name][stage]()
                    elapsed = now(self.device) - start
                samples.setdefault(name, []).append(1e3 * elapsed)
        return samples


class Notes:
    """The raw figures, saved after each: a compiler takes minutes, and the time may be up."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._path, self._prompt = arguments.json, arguments.prompt
        self.raw: dict[str, Any] = {
            **conditions(arguments.device, arguments.size),
            "timesteps": arguments.timesteps,
            "ran": {},
            "difference": {},
            "s3gen": [],
        }

    def difference(self, stage: str, variant: str, seconds: float, relative: float) -> None:
        """Of a stage's output from stock's."""
        found = self.raw["difference"].setdefault(f"{seconds:g}", {})
        found.setdefault(variant, {})[stage] = relative
        save(self._path, self.raw)

    def times(self, stage: str, variant: str, seconds: float, times: list[float]) -> None:
        """Of a stage's calls, in milliseconds."""
        result = Result(
            stage, variant, seconds, self._prompt,
            statistics.median(times), min(times), len(times),
        )  # fmt: skip
        print(result, flush=True)
        self.raw["s3gen"].append(asdict(result))
        save(self._path, self.raw)

    def ran(self, variant: Variant) -> None:
        """What `variant` has run on; printed where it is news."""
        rows = [row._asdict() for row in variant.ran()]
        if self.raw["ran"].get(variant.name) != rows:
            print(
                *(f"{variant.name}: {', '.join(row.values())}" for row in rows),
                sep="\n",
                flush=True,
            )
        self.raw["ran"][variant.name] = rows
        save(self._path, self.raw)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All stages at all lengths."""
    device = torch.device(arguments.device)
    s3gen = random_s3gen(arguments.size).to(device)
    variants = [Variant(s3gen, name) for name in arguments.variants]
    prompt = round(arguments.prompt * TOKENS_PER_SECOND)
    notes = Notes(arguments)
    for seconds in arguments.seconds:
        tokens = round(seconds * TOKENS_PER_SECOND)
        bench = Bench(Utterance(s3gen, tokens, prompt, arguments.timesteps), variants)
        for stage in arguments.stages:
            stock = bench.output("stock", stage)
            for name in bench.variants:  # it warms up, too
                error = bench.output(name, stage) - stock
                notes.difference(stage, name, seconds, float(error.norm() / stock.norm()))
            for name, times in bench.measure(stage, arguments.rounds).items():
                notes.times(stage, name, seconds, times)
            for variant in variants:
                notes.ran(variant)
    return notes.raw


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="full")
    parser.add_argument("--seconds", type=float, nargs="+", default=[2, 5, 10, 20])
    parser.add_argument("--prompt", type=float, default=10, help="seconds of the voice's prompt")
    parser.add_argument("--timesteps", type=int, default=10, help="Euler steps")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    plain = ["stock", "exact", *(["bf16"] if cpu_multiplies_bf16() else [])]
    plain = list(VARIANTS) if cuda else plain
    parser.add_argument("--variants", nargs="+", default=plain, choices=VARIANTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--json", type=Path)
    return parser


def main() -> None:
    arguments = parser().parse_args()
    raw = run(arguments)
    print(json.dumps(raw["difference"], indent=2))


if __name__ == "__main__":
    main()
