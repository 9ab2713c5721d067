"""The flow captured as one CUDA graph for all utterances of up to so many tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .encoder import EncoderWeights, encode
from .flow import Blocks, FlowWeights, TimeTable, condition, solve

GRANULE = 64
"""Buckets are multiples of so many tokens, 2.56 s."""
LARGEST = 1536
"""Tokens; a longer utterance, over a minute with its prompt, runs eagerly at its own length."""


class Flow(NamedTuple):
    """What a bucket captures: weights, the table of the Euler steps, and what runs a block."""

    encoder: EncoderWeights
    solver: FlowWeights
    table: TimeTable
    blocks: Blocks

    @property
    def rows(self) -> int:
        """Rows of the estimator for one utterance: two where there is guidance."""
        return 1 if self.solver.guidance is None else 2


def bucket_for(tokens: int) -> int | None:
    """The tokens of the bucket for an utterance of `tokens`; None where there is none."""
    return None if tokens > LARGEST else -(-tokens // GRANULE) * GRANULE


class Bucket:
    """Buffers of one size, and the flow as a function from some of them to the mel.

    One utterance at a time: whoever owns it sees to that.
    """

    def __init__(
        self, flow: Flow, tokens: int, capture: Callable[[Callable[[], None]], Callable[[], None]]
    ) -> None:
        """Allocates and captures.

        Args:
            tokens: how many there is room for.
            capture: makes of a function without arguments one that does the same.
        """
        self._flow = flow
        own, frames, bands = flow.encoder.tokens, 2 * tokens, len(flow.solver.project.weight)
        counts = {"dtype": torch.int32, "device": own.device}
        self._tokens = torch.zeros(1, tokens, dtype=torch.long, device=own.device)
        self._token_count = torch.full((1,), tokens, **counts)
        self._frame_count = torch.full((flow.rows,), frames, **counts)
        self._speaker = own.new_zeros(1, bands)
        self._prompt, self._noise, self._mel = own.new_zeros(3, 1, frames, bands)
        self._replay = capture(self._compute)

    def _compute(self) -> None:
        flow = self._flow
        mu = encode(flow.encoder, self._tokens, self._token_count)
        given = condition(flow.solver, mu, self._speaker, self._prompt)
        mel = solve(flow.solver, flow.table, given, self._noise, self._frame_count, flow.blocks)
        self._mel.copy_(mel)

    def mel(self, tokens: Tensor, speaker: Tensor, prompt: Tensor, noise: Tensor) -> Tensor:
        """Mel ``(1, T, 80)``; T frames may be fewer than two a token.

        Args:
            tokens: ``(1, N)`` int64.
            speaker: ``(1, 80)``, projected.
            prompt: ``(1, P, 80)``, the voice's mel, P <= T.
            noise: ``(1, T, 80)``.
        """
        frames = noise.shape[1]
        self._token_count.fill_(tokens.shape[1])
        self._frame_count.fill_(frames)
        self._speaker.copy_(speaker)
        filled = ((self._tokens, tokens), (self._prompt, prompt), (self._noise, noise))
        for buffer, values in filled:
            buffer[:, : values.shape[1]] = values
            buffer[:, values.shape[1] :] = 0
        self._replay()
        return self._mel[:, :frames].clone()
