"""S3Gen's stages, tokens to audio: stock and ours, in turn.

    python bench/s3gen.py [--size full] [--seconds 2 5 10 20] [--prompt 10] [--json FILE]

Random weights, random tokens, a random voice of `--prompt` seconds. Every stage gets the input that
stock's stage before it leaves, and draws what it draws in a request. Stages: encoder (tokens to
what the flow is conditioned on), solver (all Euler steps), vocoder (F0, source, waveform), total
(`S3Gen.inference`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chatterbox_fast.demo import commit_id, describe_machine
from chatterbox_fast.overrides import apply_all, undo_all
from chatterbox_fast.s3gen import runner
from chatterbox_fast.s3gen.encoder import encode
from chatterbox_fast.s3gen.engine import FlowEngine
from chatterbox_fast.s3gen.site import flow_site, vocoder_site
from chatterbox_fast.s3gen.vocoder import pack_vocoder
from chatterbox_fast.testing import random_s3gen

STAGES = ("encoder", "solver", "vocoder", "total")
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
        self.engine, self.vocoder = FlowEngine(flow), pack_vocoder(s3gen.mel2wav)

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

    def our_encoder(self) -> Tensor:
        return encode(self.engine.encoder, self.all_tokens)

    def our_solver(self) -> Tensor:
        noise = self.mu.new_empty(self.mu.mT.shape).normal_()
        return runner.solve_from(
            self.engine, self.mu, self.speaker, self.prompt, noise, self.n_timesteps
        )

    def our_vocoder(self) -> Tensor:
        mel = runner.read_mel(self.vocoder, {"speech_feat": self.mel})
        assert mel is not None
        nothing = mel.new_zeros(1, 1, 0)
        return runner.vocoder_inference(
            self.vocoder, mel, nothing, generator=None, cpu_generator=None
        )[0]

    def total(self) -> Tensor:
        wave, _ = self.s3gen.inference(
            self.tokens, ref_dict=dict(self.voice), n_cfm_timesteps=self.n_timesteps
        )
        return wave  # type: ignore[no-any-return]

    def calls(self) -> dict[str, dict[str, tuple[Call, AbstractContextManager[Any]]]]:
        """Stage -> variant -> the call, and what must be around it."""
        stock: AbstractContextManager[Any] = nullcontext()
        return {
            "encoder": {"stock": (self.stock_encoder, stock), "ours": (self.our_encoder, stock)},
            "solver": {"stock": (self.stock_solver, stock), "ours": (self.our_solver, stock)},
            "vocoder": {"stock": (self.stock_vocoder, stock), "ours": (self.our_vocoder, stock)},
            "total": {"stock": (self.total, stock), "ours": (self.total, Patched(self.s3gen))},
        }


class Patched(AbstractContextManager[None]):
    """S3Gen as patch() leaves it; what was packed is kept from one time to the next."""

    def __init__(self, s3gen: Any) -> None:
        self.changes = [*flow_site(s3gen).changes(), *vocoder_site(s3gen).changes()]

    def __enter__(self) -> None:
        apply_all(self.changes)

    def __exit__(self, *error: object) -> None:
        undo_all(self.changes)


def verify(utterance: Utterance, stages: list[str]) -> dict[str, float]:
    """The relative difference of ours from stock's, after the same seed."""
    found = {}
    for stage, variants in utterance.calls().items():
        if stage not in stages:
            continue
        outputs = []
        for call, around in variants.values():
            torch.manual_seed(0)
            with around, torch.inference_mode():
                outputs.append(call())
        stock, ours = outputs
        found[stage] = float((ours - stock).norm() / stock.norm())
    return found


def measure(
    utterance: Utterance, stages: list[str], rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of every stage and variant, in turn: what disturbs one disturbs the other."""
    samples: dict[tuple[str, str], list[float]] = {}
    calls = utterance.calls()
    device = utterance.mu.device
    with torch.inference_mode():
        for stage in stages:
            for _ in range(rounds):
                for variant, (call, around) in calls[stage].items():
                    with ExitStack() as stack:
                        stack.enter_context(around)
                        start = _now(device)
                        call()
                        elapsed = _now(device) - start
                    samples.setdefault((stage, variant), []).append(1e3 * elapsed)
    return samples


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All stages at all lengths."""
    device = torch.device(arguments.device)
    s3gen = random_s3gen(arguments.size).to(device)
    prompt = round(arguments.prompt * TOKENS_PER_SECOND)
    results, differences = [], {}
    for seconds in arguments.seconds:
        tokens = round(seconds * TOKENS_PER_SECOND)
        utterance = Utterance(s3gen, tokens, prompt, arguments.timesteps)
        differences[f"{seconds:g}"] = verify(utterance, arguments.stages)  # it warms up, too
        for (stage, variant), samples in measure(
            utterance, arguments.stages, arguments.rounds
        ).items():
            result = Result(
                stage, variant, seconds, arguments.prompt,
                statistics.median(samples), min(samples), len(samples),
            )  # fmt: skip
            print(result, flush=True)
            results.append(result)
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit_id(),
        "machine": describe_machine(device),
        "weights": f"random, {arguments.size}",
        "timesteps": arguments.timesteps,
        "difference": differences,
        "s3gen": [asdict(result) for result in results],
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="full")
    parser.add_argument("--seconds", type=float, nargs="+", default=[2, 5, 10, 20])
    parser.add_argument("--prompt", type=float, default=10, help="seconds of the voice's prompt")
    parser.add_argument("--timesteps", type=int, default=10, help="Euler steps")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    return parser


def main() -> None:
    arguments = parser().parse_args()
    raw = run(arguments)
    print(json.dumps(raw["difference"], indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(raw, indent=2) + "\n")


if __name__ == "__main__":
    main()
