"""T3's decode step: stock, stock in bf16, stock with a static cache and torch.compile, and ours.

    python bench/t3_decode.py [--size full] [--positions 100 500 1000] [--device cpu] [--json FILE]

Every variant decodes from the same number of cached positions with random weights. Stock's step is
the body of T3.inference's loop: transformers' Llama with its own cache, stock's processors, its
draw, its look at the token; without the hidden states that stock collects and does not use. The
cache is filled with random keys and values instead of by a prefill of that length: a step does the
same work, and the benchmark takes minutes instead of hours on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import conditions, save
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopPLogitsWarper,
)

from chatterbox_fast.demo import now
from chatterbox_fast.fidelity import (
    divergence,
    draw_probabilities,
    engine_logits,
    entropy,
    stock_logits,
)
from chatterbox_fast.memory import Arena
from chatterbox_fast.options import Options
from chatterbox_fast.sampling import SamplingParams
from chatterbox_fast.t3.engine import Engine
from chatterbox_fast.t3.weights import bytes_of
from chatterbox_fast.testing import VOICE_PROMPT, random_model, random_t3

START, TEXT = 6561, torch.tensor([[255, *range(3, 60), 0]])
LONG_TEXT = torch.tensor([[255, *range(3, 121), 0]])
Step = Callable[[], Any]
ROUNDS = 4


@dataclass
class Result:
    """One variant at one length."""

    variant: str
    positions: int
    median_us: float
    p20_us: float
    p80_us: float
    dispatched: int | None
    bytes: int
    share_of_read_bandwidth: float

    def __str__(self) -> str:
        return (
            f"{self.variant} @ {self.positions}: {1e6 / self.median_us:.1f} tokens/s, "
            f"{self.median_us:.0f} us, {self.dispatched} ops, {self.share_of_read_bandwidth:.0%}"
        )


def summary(
    name: str,
    positions: int,
    dispatched: int | None,
    bytes_: int,
    samples: list[float],
    bandwidth: float,
) -> Result:
    """A variant's samples (microseconds) in figures."""
    median = statistics.median(samples)
    cuts = statistics.quantiles(samples, n=5)
    share = bytes_ / (median * 1e-6) / bandwidth
    return Result(name, positions, median, cuts[0], cuts[3], dispatched, bytes_, share)


class StockStep:
    """The body of the loop in stock's T3.inference, over a cache of `positions` slots."""

    def __init__(self, t3: Any, positions: int, room: int, static: bool = False) -> None:
        self.t3, self.dtype = t3, t3.speech_head.weight.dtype
        self.device = t3.speech_head.weight.device
        config = t3.cfg
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (2, config.num_attention_heads, positions, head_dim)
        self.cache: Any = DynamicCache()
        if static:
            self.cache = StaticCache(config=config, max_cache_len=positions + room)
        for layer in range(config.num_hidden_layers):
            k, v = (torch.randn(shape, dtype=self.dtype, device=self.device) for _ in range(2))
            where = {"cache_position": torch.arange(positions, device=self.device)}
            self.cache.update(k, v, layer, where)
        self.position, self.static = positions, static
        self.countable = not static
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        self.forward = torch.compile(t3.tfmr.forward, mode=mode) if static else t3.tfmr
        self.ids = torch.tensor([[START]], device=self.device)
        self.penalty = RepetitionPenaltyLogitsProcessor(1.2)
        self.warpers = [MinPLogitsWarper(0.05), TopPLogitsWarper(1.0)]
        self.embedding = torch.randn(2, 1, t3.dim, dtype=self.dtype, device=self.device)

    @property
    def bytes(self) -> int:
        """Weights and cache, read once; the cache that stock writes anew is not counted."""
        weights = sum(p.nbytes for p in self.t3.tfmr.layers.parameters())
        return weights + self.t3.speech_head.weight.nbytes + self._cache_bytes()

    def _cache_bytes(self) -> int:
        config = self.t3.cfg
        per_position = 4 * config.num_hidden_layers * config.hidden_size * self.dtype.itemsize
        return per_position * self.position

    @torch.inference_mode()
    def __call__(self) -> None:
        where = {"cache_position": torch.tensor([self.position], device=self.device)}
        output = self.forward(
            inputs_embeds=self.embedding, past_key_values=self.cache, use_cache=True,
            **(where if self.static else {}),
        )  # fmt: skip
        logits = self.t3.speech_head(output.last_hidden_state[:, -1])
        scores = logits[0:1] + 0.5 * (logits[0:1] - logits[1:2])
        scores = self.penalty(self.ids, scores) / 0.8
        for warper in self.warpers:
            scores = warper(self.ids, scores)
        token = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)
        self.ids = torch.cat([self.ids, token], dim=1)
        if int(token) == self.t3.hp.stop_speech_token:  # stock's look at the host, every step
            pass
        embedded = self.t3.speech_emb(token)
        embedded = embedded + self.t3.speech_pos_emb.get_fixed_embedding(self.ids.shape[1] - 1)
        self.embedding = torch.cat([embedded, embedded])
        self.position += 1


class OurStep:
    """A slot of the engine whose first `positions` cache slots are random."""

    def __init__(self, t3: Any, options: Options, positions: int, room: int) -> None:
        self.engine = Engine(t3, options)
        with torch.inference_mode():
            self.slot = self.engine.slots.take(2, positions + room)
            state = self.slot.state
            state.reset(SamplingParams(), START)
            for cache in (state.k_cache, state.v_cache):
                cache[:, :, :, :positions].normal_()
            state.embedding.normal_()
            state.position.fill_(positions)
        self.position = positions
        self.countable = not options.compile and self.engine.eager_because is not None

    @property
    def bytes(self) -> int:
        weights, state = self.engine.weights.decode, self.slot.state
        return bytes_of(weights) + 2 * state.k_cache[:, :, :, : self.position].nbytes

    @torch.inference_mode()
    def __call__(self) -> None:
        self.slot.step(self.position + 1, None)
        self.position += 1


class Dispatched(TorchDispatchMode):
    """Counts ops that are no views. It cannot see into a graph or a compiled step."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def variants(t3: Any) -> Iterator[tuple[str, Callable[[int, int], Any]]]:
    """Name and maker (positions, room for steps) of every variant."""
    yield "stock", lambda n, room: StockStep(t3, n, room)
    half = copy.deepcopy(t3).bfloat16()
    yield "stock, bf16", lambda n, room: StockStep(half, n, room)
    yield "stock, static cache, compiled", lambda n, room: StockStep(t3, n, room, static=True)
    for precision in ("exact", "bf16", "int8"):
        for compile_ in (False, True):
            options = Options(precision=precision, compile=compile_)
            name = f"ours, {precision}{', compiled' if compile_ else ''}"
            yield name, lambda n, room, options=options: OurStep(t3, options, n, room)
            if t3.device.type == "cuda":
                yield (
                    f"{name}, no graph",
                    lambda n, room, o=options: _without_graphs(t3, o, n, room),
                )


def _without_graphs(t3: Any, options: Options, positions: int, room: int) -> OurStep:
    os.environ["CHATTERBOX_FAST_GRAPHS"] = "0"
    try:
        return OurStep(t3, options, positions, room)
    finally:
        del os.environ["CHATTERBOX_FAST_GRAPHS"]


def operations(step: Any) -> int | None:
    """How many ops a step dispatches, where that can be counted; warms it up."""
    for _ in range(3):
        step()
    if not step.countable:
        return None
    with Dispatched() as dispatched:
        step()
    return dispatched.count


def measure(
    steps: dict[str, Any], count: int, device: torch.device, failures: dict[str, str]
) -> dict[str, list[float]]:
    """Microseconds of `count` steps of each, in rounds: what disturbs the machine disturbs all.

    What fails is noted and left out; the rest goes on.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name in list(samples):
            try:
                samples[name] += timed(steps[name], -(-count // ROUNDS), device)
            except Exception as error:
                note(failures, name, error)
                del samples[name]
    return samples


def timed(step: Any, count: int, device: torch.device) -> Iterator[float]:
    """Microseconds of each of `count` steps, after one: the caches were another's."""
    step()
    for _ in range(count):
        start = now(device)
        step()
        yield 1e6 * (now(device) - start)


def note(failures: dict[str, str], name: str, error: Exception) -> None:
    """What does not run is reported, and the rest goes on."""
    failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    print(f"{name}: {failures[name]}", flush=True)


class Sum:
    """Reads memory as fast as torch does: what the steps' own reading is measured by."""

    def __init__(self, device: torch.device) -> None:
        count = 2**27 if device.type == "cpu" else 2**28
        self.data = Arena([4 * count], device).cut((count,), torch.float32).fill_(1)
        self.bytes = self.data.nbytes

    def __call__(self) -> Any:
        return self.data.sum()


def conditioning(device: torch.device) -> Any:
    """The example voice, as T3 takes it."""
    model = random_model("english", "tiny", device=str(device))
    model.prepare_conditionals(VOICE_PROMPT)
    model.conds.t3.cond_prompt_speech_emb = None
    return model.conds.t3


def prefill(
    t3: Any, device: torch.device, failures: dict[str, str], wanted: Callable[[str], bool]
) -> dict[str, Any]:
    """Milliseconds from a text to the first token's logits, medians.

    The voice is known: ours has its prefix, stock computes it each time.
    """
    cond, text, one = conditioning(device), LONG_TEXT.to(device), torch.tensor([7], device=device)

    def by_stock(stock: Any) -> Step:
        return lambda: stock_logits(stock, cond, text, one)

    def by_ours(precision: str) -> Step:
        engine = Engine(t3, Options(precision=precision))
        return lambda: engine_logits(t3, engine, cond, text, one)

    makers: dict[str, Callable[[], Step]] = {
        "stock": lambda: by_stock(t3),
        "stock, bf16": lambda: by_stock(copy.deepcopy(t3).bfloat16()),
        **{f"ours, {each}": partial(by_ours, each) for each in ("exact", "bf16", "int8")},
    }
    calls, failed = dict[str, Step](), dict[str, str]()
    for name in filter(wanted, makers):
        try:
            calls[name] = makers[name]()
        except Exception as error:
            note(failed, name, error)
    samples = measure(calls, ROUNDS, device, failed)
    failures |= {f"prefill, {name}": why for name, why in failed.items()}
    return {
        "text_tokens": text.shape[1],
        "median_ms": {name: statistics.median(each) / 1e3 for name, each in samples.items()},
    }


def fidelity(t3: Any, device: torch.device, count: int) -> dict[str, float]:
    """Divergence of every precision from stock in float32, over `count` tokens stock drew."""
    cond, text = conditioning(device), TEXT.to(device)
    torch.manual_seed(1)
    tokens = t3.inference(
        t3_cond=copy.copy(cond), text_tokens=text.expand(2, -1), max_new_tokens=count
    )[0]
    exact = draw_probabilities(stock_logits(t3, cond, text, tokens))
    half = copy.deepcopy(t3).bfloat16()
    found = {"entropy": entropy(exact)}
    found["stock, bf16"] = divergence(
        exact, draw_probabilities(stock_logits(half, cond, text, tokens))
    )
    for precision in ("exact", "bf16", "int8"):
        engine = Engine(t3, Options(precision=precision))
        ours = draw_probabilities(engine_logits(t3, engine, cond, text, tokens))
        found[f"ours, {precision}"] = divergence(exact, ours)
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All variants at all lengths."""
    device = torch.device(arguments.device)
    t3 = random_t3("english", arguments.size).to(device)
    failures: dict[str, str] = {}

    def wanted(name: str) -> bool:
        only = not arguments.only or any(part in name for part in arguments.only)
        return only and not any(part in name for part in arguments.without)

    raw: dict[str, Any] = {
        **conditions(device, arguments.size),
        "read_bandwidth": {},
        "divergence": fidelity(t3, device, arguments.forced) if arguments.forced else {},
        "prefill": prefill(t3, device, failures, wanted),
        "failures": failures,
        "t3_decode": [],
    }  # fmt: skip
    makers = [(name, make) for name, make in variants(t3) if wanted(name)]
    for positions in arguments.positions:
        steps, counts = {}, {}
        for name, make in makers:
            try:
                step = make(positions, arguments.steps + 4 + 2 * ROUNDS)
                counts[name] = operations(step)
                steps[name] = step
            except Exception as error:
                note(failures, name, error)
        reading = Sum(device)
        measured = measure({"a sum": reading, **steps}, arguments.steps, device, failures)
        bandwidth = reading.bytes / (1e-6 * statistics.median(measured.pop("a sum")))
        raw["read_bandwidth"][str(positions)] = bandwidth
        for name, samples in measured.items():
            result = summary(name, positions, counts[name], steps[name].bytes, samples, bandwidth)
            print(result, flush=True)
            raw["t3_decode"].append(asdict(result))
        save(arguments.json, raw)
    return raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="full")
    parser.add_argument("--positions", type=int, nargs="+", default=[100, 500, 1000])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--forced", type=int, default=16, help="tokens of the divergence; 0: none")
    parser.add_argument("--only", nargs="*", help="variants whose name has one of these")
    parser.add_argument("--without", nargs="*", default=[], help="and none of these")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    raw = run(arguments)
    print(json.dumps(raw["divergence"], indent=2))


if __name__ == "__main__":
    main()
