"""Buffers that requests borrow: bounded in number, kept for the next request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Lock, Semaphore

import torch

from ..graph import settle
from .poll import FlagPoll
from .state import DecodeState, capacity_for

AT_ONCE = 8
"""Requests of one model that decode at the same time; the next one waits."""
KEPT_BYTES = 2**30
"""Idle KV caches of one model that are kept for the next request, at least: one of each size up to
1024 positions in float32, two in half precision."""
KEPT_SHARE = 1 / 16
"""Of a GPU's memory, where that is more: eight requests that grew to 1024 positions leave 3.5 GB in
half precision (63, 126 and 252 MB each), and what is not kept costs the next one a capture."""

Step = Callable[[int, "torch.Generator | None"], None]
"""(slots attention looks at, generator) -> runs one decode step on its own state."""


def kept_bytes(device: torch.device) -> int:
    """How much of the idle KV caches is kept on `device`."""
    if device.type != "cuda":
        return KEPT_BYTES
    return max(KEPT_BYTES, int(KEPT_SHARE * torch.cuda.get_device_properties(device).total_memory))


@dataclass(eq=False)
class Slot:
    """Buffers, the step that runs on them, eager or a captured graph, and how they are polled."""

    state: DecodeState
    step: Step
    poll: FlagPoll = field(init=False)

    def __post_init__(self) -> None:
        """A request that draws from numbers on the device is polled late."""
        self.poll = FlagPoll(late=self.state.philox is not None)


class Lease:
    """What a request holds: a slot, which is exchanged for a larger one when it gets too small."""

    def __init__(self, pool: SlotPool, slot: Slot) -> None:
        self._pool = pool
        self.slot = slot

    def grow(self, positions: int) -> None:
        """Makes room for one more cache slot than the `positions` in use, keeping the request."""
        if positions < self.slot.state.capacity:
            return
        larger = self._pool.take(self.slot.state.rows, positions + 1)
        larger.state.continue_from(self.slot.state, positions)
        settle(larger.state.position.device)  # before somebody else gets the small one
        larger.poll, self.slot.poll = self.slot.poll, larger.poll  # its copies are on their way
        self._pool.give_back(self.slot)
        self.slot = larger


class SlotPool:
    """Slots of one engine.

    Bounded twice: `AT_ONCE` requests at a time, however often they grow, and what is kept idle.
    """

    def __init__(self, make: Callable[[int, int], Slot], most_kept: int) -> None:
        """
        Args:
            make: (rows, capacity) -> a new slot.
            most_kept: bytes of idle KV caches.
        """
        self._make = make
        self.most_kept = most_kept
        self._permits = Semaphore(AT_ONCE)
        self._lock = Lock()
        self._idle: list[Slot] = []

    @contextmanager
    def lease(self, rows: int, positions: int) -> Iterator[Lease]:
        """A slot for a request of `rows` that needs `positions` cache slots at first.

        After a failure its buffers may hold NaN, which a masked position would still spread: they
        are let go.
        """
        with self._permits:
            lease = Lease(self, self.take(rows, positions))
            try:
                yield lease
            except BaseException:
                _settle_after_failure(lease.slot.state.position.device)
                raise
            self.give_back(lease.slot)

    def take(self, rows: int, positions: int) -> Slot:
        """An idle slot of the smallest capacity that is enough, else a new one."""
        capacity = capacity_for(positions)
        with self._lock:
            for slot in self._idle:
                if (slot.state.rows, slot.state.capacity) == (rows, capacity):
                    self._idle.remove(slot)
                    return slot
        return self._make(rows, capacity)

    def give_back(self, slot: Slot) -> None:
        """Keeps `slot` for the next request unless it is too large; those idle for longest go."""
        if slot.state.bytes > self.most_kept:
            return
        with self._lock:
            self._idle.append(slot)
            while sum(s.state.bytes for s in self._idle) > self.most_kept:
                del self._idle[0]

    def clear(self) -> None:
        """Lets all idle slots go."""
        with self._lock:
            self._idle.clear()

    def __len__(self) -> int:
        return len(self._idle)


def _settle_after_failure(device: torch.device) -> None:
    """Waits for the steps on the way: their buffers' memory may be given to another stream.

    What failed says more than a device that is lost.
    """
    with suppress(RuntimeError):
        settle(device)
