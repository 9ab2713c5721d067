"""A request's flags, read on the host without stalling a GPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import reference

POLL_EVERY = 4
"""Steps between two looks at the flags on a GPU, which then runs up to twice as many too far."""


class FlagCopy:
    """A pinned word on the host that the flags are copied to when the stream gets there."""

    def __init__(self) -> None:
        self._word = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=True)
        self._copied = torch.cuda.Event()

    def take(self, flags: Tensor) -> None:
        """Enqueues the copy."""
        self._word.copy_(flags, non_blocking=True)
        self._copied.record(torch.cuda.current_stream(flags.device))

    def read(self) -> int:
        """Waits for the copy."""
        self._copied.synchronize()
        return int(self._word)


class FlagPoll:
    """Reads a request's flags on the host: at every token, or late and rarely on a GPU.

    There the flags are copied every `POLL_EVERY` steps, and a copy is looked at when the next one
    is under way: the host waits for steps that are done, and the stream never runs dry. It serves
    one request at a time; nothing is allocated after the first.
    """

    def __init__(self, late: bool) -> None:
        """`late`: tokens drawn too many cost nothing, as their random numbers are given back."""
        self._late = late
        self._taken = 0

    @functools.cached_property
    def _copies(self) -> tuple[FlagCopy, FlagCopy]:
        return FlagCopy(), FlagCopy()

    def start(self) -> None:
        """A new request: what was copied for the one before does not count."""
        self._taken = 0

    def finished(self, flags: Tensor, drawn: int) -> bool:
        """Whether the stop token is known to be among the `drawn` tokens.

        Raises:
            RuntimeError: a token had to be drawn from logits with a NaN or nothing finite.
        """
        if not self._late:
            return _stopped(int(flags), f"token {drawn}")
        if drawn % POLL_EVERY:
            return False
        self._copies[self._taken % 2].take(flags)
        self._taken += 1
        if self._taken < 2:
            return False
        return _stopped(self._copies[self._taken % 2].read(), f"a token before number {drawn}")

    def finish(self, flags: Tensor, drawn: int) -> None:
        """After the last token: raises as `finished` does."""
        _stopped(int(flags), f"token {drawn} or one before")


def _stopped(flags: int, where: str) -> bool:
    if flags & reference.FAILED:
        raise RuntimeError(
            f"chatterbox_fast: T3's logits for {where} have a NaN or no finite value; "
            "check the conditioning and the weights"
        )
    return bool(flags & reference.STOPPED)
