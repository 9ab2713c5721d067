"""Instance attributes, replaced and exactly restored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class Absent:
    """Marks an attribute that the instance did not have (the class itself is the mark)."""


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


def apply_all(overrides: list[Override]) -> None:
    """Applies all overrides, or none where one fails."""
    applied: list[Override] = []
    try:
        for override in overrides:
            override.apply()
            applied.append(override)
    except BaseException:
        undo_all(applied)
        raise


def undo_all(overrides: list[Override]) -> None:
    """Undoes all overrides, the last one first."""
    for override in reversed(overrides):
        override.undo()
