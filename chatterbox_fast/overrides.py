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
