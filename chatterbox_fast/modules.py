"""What an engine asks of any module that it computes in the module's place."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from types import MethodType
from typing import Any, NamedTuple

from torch import nn

from .overrides import is_ours


def is_exactly(thing: Any, name: str, package: str) -> bool:
    """Whether `thing` is exactly of the class `name` of `package`, not of a subclass."""
    return type(thing).__qualname__ == name and type(thing).__module__.startswith(package)


def parameters_of(root: nn.Module) -> list[nn.Parameter]:
    """All parameters; where modules share one it is there twice. Half the time of torch's own."""
    return [p for module in root.modules() for p in module._parameters.values() if p is not None]


def signature(module: nn.Module) -> tuple[Any, ...]:
    """Changes when a parameter is replaced, moved, converted or written to.

    Writing through ``parameter.data`` goes unnoticed, as it does for autograd, and so does writing
    into a parameter that was made in inference mode.
    """
    return tuple(
        (p.data_ptr(), p.device, p.dtype, 0 if p.is_inference() else p._version)
        for p in parameters_of(module)
    )


class Fingerprint(NamedTuple):
    """What a module and its parts are made of, to see whether that has changed.

    Attributes:
        things: every attribute, parameter, buffer and submodule. Kept, so that none of them can
            make room for another one at its address.
        numbers: where parameters and buffers lie, how often they were written to; the hooks' keys.
    """

    things: list[Any]
    numbers: list[Any]

    def same(self, other: Fingerprint) -> bool:
        """Whether nothing was set, moved, written to, hooked or exchanged in between.

        What changes inside of an attribute does not show; for the rest see `signature`.
        """
        return (
            len(self.things) == len(other.things)
            and all(map(operator.is_, self.things, other.things))
            and self.numbers == other.numbers
        )


def fingerprint(root: nn.Module) -> Fingerprint:
    """The fingerprint of a module as it is; what replaces its own methods is left out.

    Some twenty attributes of a thousand modules, at every call: hence no function calls.
    """
    things: list[Any] = [v for v in vars(root).values() if not isinstance(v, MethodType)]
    numbers: list[Any] = []
    tensors: list[Any] = []
    modules: list[Any] = [root]
    for module in modules:  # which grows meanwhile
        own = module.__dict__
        if module is not root:
            things.extend(own.values())
        if own["_parameters"]:
            tensors.extend(own["_parameters"].values())
        if own["_buffers"]:
            tensors.extend(own["_buffers"].values())
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            numbers.append((*own["_forward_hooks"], *own["_forward_pre_hooks"]))
        if own["_modules"]:
            modules.extend(m for m in own["_modules"].values() if m is not None)
    for tensor in tensors:
        if tensor is not None:
            version = 0 if tensor.is_inference() else tensor._version
            numbers.append((tensor.data_ptr(), tensor.dtype, tensor.device, version))
    things += modules[1:]
    things += tensors
    return Fingerprint(things, numbers)


def why_not_called(roots: Iterable[nn.Module]) -> str | None:
    """Hooks, and forwards that somebody put on an instance, which an engine would not call."""
    for root in roots:
        for module in root.modules():
            kind = type(module).__qualname__
            if "forward" in vars(module) and not is_ours(vars(module)["forward"]):
                return f"the forward of a {kind} is replaced and would not be called"
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if any(not _belongs_to_transformers(hook) for hook in hooks):
                return f"a forward hook on a {kind} would not be called"
    return None


def _belongs_to_transformers(hook: Any) -> bool:
    """transformers leaves hooks of its own on every layer to collect hidden states."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.")
