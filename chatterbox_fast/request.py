"""What belongs to one call of generate(), and to nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from .rng import DrawFrom, Generators


@dataclass
class Request:
    """One call of generate().

    Attributes:
        generators: what it draws from; None draws from torch's global generators, as stock does.
        progress: whether to show stock's progress bar.
    """

    generators: Generators | None = None
    progress: bool = False

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The generator to hand to a torch call on `device`; None is torch's global one."""
        return None if self.generators is None else self.generators.on(device)

    def drawing(self) -> AbstractContextManager[Any]:
        """A context in which code that names no generator draws from this request's."""
        return nullcontext() if self.generators is None else DrawFrom(self.generators)


_current: ContextVar[Request | None] = ContextVar("chatterbox_fast_request", default=None)


def current_request() -> Request:
    """The request this thread is serving; a plain one where an engine is called directly."""
    return _current.get() or Request()


@contextmanager
def serving(request: Request) -> Iterator[Request]:
    """Makes `request` the current one of this thread (or asyncio task) within the context."""
    token = _current.set(request)
    try:
        yield request
    finally:
        _current.reset(token)
