"""What an engine asks of any module that it computes in the module's place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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


def fingerprint(root: nn.Module) -> tuple[Any, ...]:
    """Changes when anything is set on a module in `root`, hooked to it or written to a parameter.

    That is: parameters and buffers replaced, moved or written to as `signature` sees it, attributes
    set, hooks added, modules exchanged. What changes inside of an attribute does not show.
    """
    found: list[Any] = []
    modules = [root]
    while modules:
        own = vars(modules.pop())
        # A number's address may be another's after two changes; a module's or a dict's is not.
        found.extend(v if isinstance(v, (int, float, str)) else id(v) for v in own.values())
        for tensors in (own["_parameters"], own["_buffers"]):
            for tensor in tensors.values():
                if tensor is not None:
                    version = 0 if tensor.is_inference() else tensor._version
                    found += (tensor.data_ptr(), tensor.device, tensor.dtype, version)
        found += (*own["_forward_hooks"], *own["_forward_pre_hooks"])
        modules.extend(module for module in own["_modules"].values() if module is not None)
    return tuple(found)


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
