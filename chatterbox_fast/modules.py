"""What an engine asks of any module that it computes in the module's place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter, itemgetter
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from .overrides import is_ours

_GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
)
"""torch's tables of hooks on all modules of a process."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_TABLES = ("_parameters", "_buffers", "_modules", *_HOOKS)
"""What a module keeps in dictionaries of its own, where it matters to what it computes."""
_BOOKKEEPING = frozenset(vars(nn.Module())) - {*_TABLES, "training"}
"""What else every module has: hooks on gradients and on state_dict(), and the like."""
_CALLS = ("forward", "__call__", "_call_impl", "_wrapped_call_impl")
"""The methods of nn.Module itself that a call of a module goes through."""
_WRAPPERS = ("torch", "transformers", "diffusers", "chatterbox", "contextlib")
"""Packages that decorate their own and each other's methods, and leave what those compute."""


def is_exactly(thing: Any, name: str, package: str) -> bool:
    """Whether `thing` is exactly of the class `name` of `package`, not of a subclass."""
    return type(thing).__qualname__ == name and type(thing).__module__.startswith(package)


def parameters_of(root: nn.Module) -> list[nn.Parameter]:
    """All parameters; where modules share one it is there twice. Half the time of torch's own."""
    return [p for module in root.modules() for p in module._parameters.values() if p is not None]


def signature(module: nn.Module) -> tuple[Any, ...]:
    """Changes when a parameter is replaced, moved, converted or written to.

    It keeps what parameters' data lies in, so that nothing else comes to lie there meanwhile.
    Writing through ``parameter.data`` goes unnoticed, as it does for autograd, and so does writing
    into a parameter that was made in inference mode, of which torch keeps no count.
    """
    return tuple(
        (
            p.untyped_storage(),
            p.data_ptr(),
            p.device,
            p.dtype,
            0 if p.is_inference() else p._version,
        )
        for p in parameters_of(module)
    )


class Fingerprint:
    """What a module and its parts are made of, to see whether that has changed.

    It is compared at every call, and a flow has a thousand modules: so it keeps the dictionaries
    that all is in, which C loops read, and leaves alone those that do not matter. It does not keep
    the module itself alive, but all that it is made of, so that nothing can make room for another
    thing at its address. What replaces the module's own methods for us is left out.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        inner = list(_inner_dictionaries(modules))
        self._empty = [each for each in inner if not each]
        self._filled = [each for each in inner if each]
        self._outer = [vars(module) for module in modules[1:]]
        self._readers = [(itemgetter(*names), own) for names, own in _alike(self._outer).items()]
        kinds = {type(module): None for module in modules}
        self._methods = [(attrgetter(*sorted(_methods_of(kind))), kind) for kind in kinds]
        contents = (each.values() for each in (*self._outer, vars(root), *self._filled))
        tensors = {id(each): each for each in chain(*contents) if isinstance(each, Tensor)}
        self._tensors = list(tensors.values())
        # An inference tensor has no version: nobody can see that it is written to.
        self._versioned = [each for each in self._tensors if not each.is_inference()]
        self._storages = [each.untyped_storage() for each in self._tensors]
        self._contents = [dict(each) for each in self._filled]
        self._seen = self._look(root)

    def _look(self, root: nn.Module) -> tuple[Any, ...]:
        """Attributes, methods of classes; how often tensors were written to, where and what."""
        own = list(vars(root).items())  # at once: another thread may patch meanwhile
        return (
            {name: _without_root(each) for name, each in own if not is_ours(each)},
            # Flat: tuples by the thousand would set the garbage collector going.
            [list(chain.from_iterable(map(read, alike))) for read, alike in self._readers],
            list(map(len, self._outer)),
            list(chain.from_iterable(read(kind) for read, kind in self._methods)),
            list(map(attrgetter("_version"), self._versioned)),
            list(map(Tensor.data_ptr, self._tensors)),
        )

    def is_still(self, root: nn.Module) -> bool:
        """Whether nothing of `root` was set, moved, written to, hooked or exchanged since.

        What changes inside of an attribute does not show, but for tensors and for the values of
        dictionaries; for the rest see `signature`.
        """
        try:
            now = self._filled, self._look(root)
        except (AttributeError, KeyError):  # something has lost an attribute
            return False
        return not any(self._empty) and _equal(now, (self._contents, self._seen))


def _equal(now: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    """By ==, for which every object equals itself without being asked.

    That is several times as fast as `is` for each of them. It is asked where it was exchanged, and
    a tensor or an array cannot say.
    """
    try:
        return now == before
    except (RuntimeError, TypeError, ValueError):
        return False


def _alike(dictionaries: list[dict[str, Any]]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Modules' dictionaries by the attributes they have, torch's bookkeeping left out."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for own in dictionaries:
        found.setdefault(tuple(n for n in own if n not in _BOOKKEEPING), []).append(own)
    return found


def _inner_dictionaries(modules: list[nn.Module]) -> Iterator[dict[Any, Any]]:
    """torch's tables, a module's own, and its attributes that are dictionaries."""
    yield from _GLOBAL_HOOKS
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, dict) and name not in _BOOKKEEPING:
                yield value


def _without_root(value: Any) -> Any:
    """A method of the root's without the root, which it would keep alive."""
    return value.__func__ if isinstance(value, MethodType) else value


def _methods_of(kind: type) -> set[str]:
    """The names of the methods of a module's class that may have to do with what it computes.

    Not of nn.Module, but for a few, nor of what transformers' models inherit: how they are loaded.
    """
    names = set(_CALLS)
    for base in kind.__mro__:
        if base is nn.Module:
            return names
        if not base.__module__.startswith("transformers.") or ".models." in base.__module__:
            names.update(n for n, each in vars(base).items() if isinstance(each, FunctionType))
    return names


def why_not_called(roots: Iterable[nn.Module]) -> str | None:
    """Hooks, and methods that somebody put into modules, which an engine would not call."""
    if (reason := why_hooked_globally()) is not None:
        return reason
    known: dict[type, Methods] = {}
    for root in roots:
        for module in root.modules():
            if (reason := why_altered(module, known)) is not None:
                return f"a {type(module).__qualname__} {reason}"
    return None


def why_altered(module: nn.Module, known: dict[type, Methods]) -> str | None:
    """The method or hook that somebody put into a module or its class, or None.

    Args:
        known: what was found out about classes, and is added to.
    """
    if (kind := type(module)) not in known:
        known[kind] = Methods(kind)
    return known[kind].why_replaced(module) or why_hooked(module)


class Methods:
    """The methods of a class of modules, but for those that an engine does call."""

    def __init__(self, kind: type, called: frozenset[str] = frozenset()) -> None:
        self._names = _methods_of(kind) - called
        foreign = (name for name in sorted(self._names) if _foreign(kind, name))
        self._foreign = next(foreign, None)

    def why_replaced(self, module: nn.Module) -> str | None:
        """The method that is not stock's, of the class or of a module of it; None where all are."""
        own = vars(module)
        for name in own.keys() & self._names:
            if not is_ours(own[name]):
                return f"has a {name} of its own, which would not be called"
        if self._foreign is not None:
            return f"has a {self._foreign} that was put into its class and would not be called"
        return None


def why_hooked_globally() -> str | None:
    """Whether somebody's hook waits for any module of the process to be called."""
    return "a forward hook on all modules would not be called" if any(_GLOBAL_HOOKS) else None


def why_hooked(module: nn.Module) -> str | None:
    """Whether somebody's hook waits for a module to be called."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if any(not _belongs_to_transformers(hook) for hook in hooks):
        return "has a forward hook, which would not be called"
    return None


def _foreign(kind: type, name: str) -> bool:
    """Whether a method was put into the class by somebody else, or around its own."""
    base = next(base for base in kind.__mro__ if name in vars(base))
    function, packages = vars(base)[name], set()
    while function is not None:
        packages.add(_package(function))
        function = getattr(function, "__wrapped__", None)
    own = base.__module__.partition(".")[0]
    if name in _CALLS and own not in packages:
        return True
    return not packages <= {own, *_WRAPPERS}


def _package(function: Any) -> str:
    """Of a function's source: functools.wraps copies a name, not the globals."""
    return str(getattr(function, "__globals__", {}).get("__name__", "")).partition(".")[0]


def _belongs_to_transformers(hook: Any) -> bool:
    """transformers leaves hooks of its own on every layer to collect hidden states."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.")
