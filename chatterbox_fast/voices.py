"""The voice a request speaks with: its own, whatever other requests do to the model."""

from __future__ import annotations

import copy
from collections.abc import Collection
from types import FunctionType, MethodType
from typing import Any


class RequestView:
    """A shallow copy of a stock object for one request: its own voice, the same modules.

    Stock keeps the voice in ``model.conds`` (`ref_dict` for voice conversion) and changes it while
    it speaks, so two requests can swap voices. Here stock's generate() runs on `object`; what it
    leaves there is given back to the model by `publish`, a whole voice at a time.
    """

    def __init__(self, model: Any, without: Collection[str]) -> None:
        """`without`: instance attributes that the copy does not get."""
        self._model = model
        self.object = object.__new__(type(model))
        self._given = {
            name: _rebound(value, model, self.object)
            for name, value in vars(model).items()
            if name not in without
        }
        self._voice = self._given.get("conds")
        if self._voice is not None:
            self._given["conds"] = _own_conditionals(self._voice)
            self._t3_cond = self._given["conds"].t3
        if isinstance(self._given.get("ref_dict"), dict):
            self._given["ref_dict"] = dict(self._given["ref_dict"])
        vars(self.object).update(self._given)

    def publish(self) -> None:
        """Gives the model what the request set: a new voice, an exaggeration, anything else."""
        for name, value in vars(self.object).items():
            if self._given.get(name) is not value:
                setattr(self._model, name, value)
        conds = vars(self.object).get("conds")
        if conds is not None and conds is self._given["conds"] and conds.t3 is not self._t3_cond:
            self._model.conds = conds


def shares_methods(model: Any) -> str | None:
    """The instance attribute that stands for a method and cannot be moved to a view, if any.

    A function that somebody put on the instance works on that instance alone.
    """
    for name, value in vars(model).items():
        stands_for_method = isinstance(getattr(type(model), name, None), FunctionType)
        if stands_for_method and getattr(value, "__self__", None) is not model:
            return name
    return None


def _rebound(value: Any, model: Any, view: Any) -> Any:
    if isinstance(value, MethodType) and value.__self__ is model:
        return MethodType(value.__func__, view)
    return value


def _own_conditionals(conds: Any) -> Any:
    """A copy of stock's `Conditionals` that shares tensors but no container.

    Raises:
        TypeError: it is something else, such as the dictionary that is ChatterboxVC's voice.
    """
    if not (hasattr(conds, "t3") and isinstance(getattr(conds, "gen", None), dict)):
        raise TypeError(
            "chatterbox_fast: model.conds must be Conditionals, which prepare_conditionals() sets "
            f"and Conditionals.load() reads, got a {type(conds).__qualname__}"
        )
    own = copy.copy(conds)
    own.t3, own.gen = copy.copy(conds.t3), dict(conds.gen)
    return own
