"""Functions under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """A copy of `function` under torch.compile, without a graph break, for any length.

    A copy has its own share of how often torch compiles a function anew.
    """
    plain = cast(FunctionType, function)
    copied = FunctionType(plain.__code__.replace(), plain.__globals__, plain.__name__)
    return cast(Function, torch.compile(copied, fullgraph=True, dynamic=True))
