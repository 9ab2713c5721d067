"""Functions under torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch
from torch._dynamo import exc as dynamo

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_LIMITS = ("FailOnRecompileLimitHit", "FailOnCacheLimitHit")
"""What torch raises where it will not compile a function anew: now, and in old releases."""
_FAILURES: tuple[type[Exception], ...] = (
    dynamo.TorchDynamoException,
    *(getattr(dynamo, name) for name in _LIMITS if hasattr(dynamo, name)),
)


class Compiled(Generic[Arguments, Result]):
    """A function under torch.compile, without a graph break, for any length.

    Where the compiler fails it is the function itself from then on: nothing of it has run yet.

    Attributes:
        eager_because: what the compiler said when it failed; None where it has not.
    """

    def __init__(self, function: Callable[Arguments, Result]) -> None:
        self._eager = function
        # A copy has its own share of how often torch compiles a function anew.
        plain = cast(FunctionType, function)
        copied = FunctionType(plain.__code__.replace(), plain.__globals__, plain.__name__)
        self._compiled: Callable[..., Any] = torch.compile(copied, fullgraph=True, dynamic=True)
        self.eager_because: str | None = None

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """The function."""
        if self.eager_because is None:
            try:
                return cast(Result, self._compiled(*args, **kwargs))
            except _FAILURES as failure:
                said = " ".join(str(failure).split("\n")[:2]).strip()  # whose, and what
                self.eager_because = f"torch.compile failed: {said}"
        return self._eager(*args, **kwargs)


def why_not_compiled(functions: Iterable[object]) -> str | None:
    """Why one of `functions` is not compiled although it was to be; None where there is no such."""
    reasons = (each.eager_because for each in functions if isinstance(each, Compiled))
    return next(filter(None, reasons), None)
