"""cfg_sample against stock's own chain (transformers' processors, torch.multinomial), eager and
compiled: pytest bench --benchmark-only"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timing import compare
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chatterbox_fast import ops
from chatterbox_fast.rng import PhiloxStream
from chatterbox_fast.sampling import SamplingParams

ENGLISH = SamplingParams()
NUCLEUS = SamplingParams(top_p=0.9, min_p=0.0)
TURBO = SamplingParams(0.0, 1.2, 0.8, 0.0, 0.95, 1000)
CASES = {
    "english": (8194, ENGLISH, False),
    "english, top_p 0.9, min_p 0": (8194, NUCLEUS, False),
    "turbo": (6563, TURBO, True),
}
SEEN = 200  # ids drawn so far: eight seconds of speech


class Row:
    """Logits of one sequence, and what each implementation needs beside them."""

    def __init__(self, vocabulary: int, p: SamplingParams, turbo: bool, device: torch.device):
        source = torch.Generator().manual_seed(1)
        rows = 1 if turbo else 2
        self.logits = (torch.randn(rows, vocabulary, generator=source) * 3).to(device)
        self.ids = torch.randint(0, 6561, (1, SEEN), generator=source).to(device)
        self.seen = torch.zeros(1, vocabulary, dtype=torch.bool, device=device)
        self.seen[0, self.ids[0]] = True
        self.p, self.turbo = p, turbo
        self.params = p.pack(torch.float32, device)
        self.flags = torch.zeros(1, dtype=torch.int32, device=device)
        cuda = device.type == "cuda"
        self.philox = torch.zeros(1, 2, dtype=torch.long, device=device) if cuda else None
        self.warpers: list[Any] = [TopKLogitsWarper(p.top_k)] if p.top_k else []
        self.warpers += [] if turbo else [MinPLogitsWarper(p.min_p)]
        self.warpers += [TopPLogitsWarper(p.top_p)]
        self.penalty = RepetitionPenaltyLogitsProcessor(p.repetition_penalty)

    def stock_probs(self) -> torch.Tensor:
        """The body of stock's loop, up to the draw."""
        scores = self.logits[0:1]
        if not self.turbo:
            scores = scores + self.p.cfg_weight * (scores - self.logits[1:2])
            scores = self.penalty(self.ids, scores)
        scores = scores / self.p.temperature
        for warper in self.warpers:
            scores = warper(self.ids, scores)
        if self.turbo:
            scores = self.penalty(self.ids, scores)
        return torch.softmax(scores, dim=-1)

    def ours(self, backend: Any) -> torch.Tensor:
        """One call of the op, as the runner makes it: on a GPU only kernels read `philox`."""
        philox = None if backend == "reference" else self.philox
        return ops.cfg_sample(
            self.logits, self.seen, self.params, self.flags, stop_token=6562, turbo=self.turbo,
            philox=philox, backend=backend,
        )  # fmt: skip

    def draws(self, call: Callable[[], Any]) -> list[int]:
        """The ids of 50 calls with the mask as it is, from the beginning of one stream."""
        self.restart()
        seen = self.seen.clone()
        ids = []
        for _ in range(50):
            ids.append(int(call()))
            self.seen.copy_(seen)
        return ids

    def restart(self) -> None:
        """Seeds torch's generators; `philox` becomes the state that the GPU's is left in."""
        torch.manual_seed(2)
        if self.philox is not None:
            stream = PhiloxStream(None, self.philox.device, self.seen.shape[1], draws=1)
            stream.close(used=0)
            self.philox.copy_(stream.state)

    @property
    def bytes(self) -> int:
        """Logits and mask, read once; everything else is a few words."""
        return self.logits.numel() * self.logits.element_size() + self.seen.numel()


def stock(row: Row) -> Callable[[], Any]:
    return lambda: torch.multinomial(row.stock_probs(), num_samples=1)


def stock_compiled(row: Row) -> Callable[[], Any]:
    probs = torch.compile(row.stock_probs, dynamic=False)
    return lambda: torch.multinomial(probs(), num_samples=1)


def extension(row: Row) -> Callable[[], Any]:
    return lambda: row.ours("cuda")


def triton(row: Row) -> Callable[[], Any]:
    return lambda: row.ours("triton")


def reference(row: Row) -> Callable[[], Any]:
    return lambda: row.ours("reference")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [stock, stock_compiled, extension, triton, reference])
def bench_cfg_sample(benchmark: Any, device: torch.device, case: str, make: Any) -> None:
    compare(benchmark, device, "cfg_sample", case, make, lambda on: Row(*CASES[case], on), verify)


def verify(row: Row, call: Callable[[], Any]) -> None:
    """What is timed is right: from an equal generator state it draws the ids of stock's chain."""
    assert row.draws(call) == row.draws(stock(row))
