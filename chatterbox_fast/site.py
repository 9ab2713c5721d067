"""One attribute of a Chatterbox object that patch() replaces, and what a report says of it.

A replacement is a plain function bound to the object whose attribute it becomes; a copy of that
object does not have it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .overrides import Change, Override, bound, is_ours


class Row(NamedTuple):
    """One line of a report: a site, what runs there, on which backend, and why."""

    site: str
    runs: str
    backend: str
    why: str


def engine_row(
    site: str, precision: str, device: torch.device, how: Sequence[str], why: Sequence[str | None]
) -> Row:
    """The row of an engine.

    Args:
        how: ``"compiled"``, ``"CUDA graph"``; nothing is eager.
        why: reasons; None is none.
    """
    backend = ", ".join([device.type, *(how or ["eager"])])
    return Row(site, f"engine, {precision}", backend, "; ".join(filter(None, why)))


def how_it_runs(compiled: bool, eager_because: str | None) -> list[str]:
    """Of an engine that captures what it runs unless there is a reason not to."""
    how = {"compiled": compiled, "CUDA graph": eager_because is None}
    return [name for name, so in how.items() if so]


def memory_row(stock: int, now: int, device: torch.device, note: str = "") -> Row:
    """The row of an engine's weights: bytes as stock has them, and now."""
    size = f"{stock / 1e9:.2f} GB -> {now / 1e9:.2f} GB"
    return Row("  weights", size, device.type, f"before -> now{note}")


@dataclass(frozen=True)
class Site:
    """An attribute of `owner` that `make` builds a replacement for.

    Attributes:
        name: as a report shows it.
        make: stock's function -> function that takes `owner` first.
        describe: () -> the report's rows for this site, as things are now.
        unfit: stock's function -> why it cannot be replaced, or None.
        more: () -> changes that go with the replacement, applied after it.
    """

    name: str
    owner: Any
    attribute: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]
    describe: Callable[[], list[Row]]
    unfit: Callable[[Callable[..., Any]], str | None] | None = None
    more: Callable[[], list[Change]] | None = None

    def why_not(self) -> str | None:
        """The reason why this attribute is left alone, or None."""
        taken = vars(self.owner).get(self.attribute)
        if taken is not None and not is_ours(taken):
            return "replaced by someone else"
        if (stock := getattr(type(self.owner), self.attribute, None)) is None:
            return f"a {type(self.owner).__qualname__} has no {self.attribute}()"
        function = inspect.unwrap(stock)
        if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
            return f"{self.attribute}() is a generator or a coroutine"
        return None if self.unfit is None else self.unfit(stock)

    def changes(self) -> list[Change]:
        """The replacement, bound to its owner, and what goes with it; ready to be applied."""
        function = self.make(getattr(type(self.owner), self.attribute))
        replacement = Override(self.owner, self.attribute, bound(function, self.owner))
        return [replacement, *(() if self.more is None else self.more())]
