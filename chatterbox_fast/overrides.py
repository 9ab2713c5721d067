"""Instance attributes, replaced and exactly restored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol


class Absent:
    """Marks an attribute that the instance did not have (the class itself is the mark)."""


def bound(function: Callable[..., Any], owner: Any) -> MethodType:
    """`function` as a method of `owner`, marked as a replacement of ours."""
    function.__dict__["chatterbox_fast"] = True
    return MethodType(function, owner)


def is_ours(attribute: Any) -> bool:
    """Whether a replacement that `bound` made."""
    return bool(getattr(getattr(attribute, "__func__", None), "chatterbox_fast", False))


class Change(Protocol):
    """Something that patch() does to a model and unpatch() takes back."""

    owner: Any
    name: str

    def apply(self) -> None:
        """Does it."""

    def undo(self) -> None:
        """Takes it back."""

    def in_place(self) -> bool:
        """Whether nobody else has changed it since."""


@dataclass
class Override:
    """One instance attribute that is replaced, and what it was before."""

    owner: Any
    name: str
    replacement: Any
    before: Any = Absent

    def apply(self) -> None:
        """Replaces the attribute."""
        self.before = vars(self.owner).get(self.name, Absent)
        setattr(self.owner, self.name, self.replacement)

    def undo(self) -> None:
        """Gives back what was there."""
        if self.before is Absent:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)

    def in_place(self) -> bool:
        """Whether the attribute is still our replacement."""
        return vars(self.owner).get(self.name) is self.replacement


REDUCE = "__reduce_ex__"
"""What copy and pickle ask an object for; they look at the instance first."""


def reduce_as_stock(owner: Any, protocol: Any) -> Any:
    """For copy and pickle: `owner` without the replacements that `bound` made for it."""
    reduce: Any = type(owner).__reduce_ex__  # the class's: the instance's is this function
    make, arguments, state, *rest = reduce(owner, protocol)
    stock = {name: value for name, value in state.items() if not is_ours(value)}
    return (make, arguments, stock, *rest)


def copied_as_stock(changes: Sequence[Change]) -> list[Override]:
    """What makes copies and pickles of the changes' owners stock objects.

    An owner among whose changes is one of how it is copied is left to that.
    """
    overrides = [change for change in changes if isinstance(change, Override)]
    owners = {id(override.owner): override.owner for override in overrides}
    for override in overrides:
        if override.name == REDUCE:
            owners.pop(id(override.owner), None)
    return [Override(owner, REDUCE, bound(reduce_as_stock, owner)) for owner in owners.values()]


def apply_all(changes: Sequence[Change]) -> None:
    """Applies all changes, or none where one fails."""
    applied: list[Change] = []
    try:
        for change in changes:
            change.apply()
            applied.append(change)
    except BaseException:
        undo_all(applied)
        raise


def undo_all(changes: Sequence[Change]) -> None:
    """Undoes all changes, the last one first."""
    for change in reversed(changes):
        change.undo()
