"""Random numbers that belong to a request instead of to the process."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily

from . import ops, reference
from .graph import drawing

_LIKE: Mapping[Callable[..., Tensor], Callable[..., Tensor]] = {
    torch.randn_like: Tensor.normal_,
    torch.rand_like: Tensor.uniform_,
}
_DRAWS = frozenset(
    {
        torch.rand,
        torch.randn,
        torch.randint,
        torch.randperm,
        torch.multinomial,
        torch.bernoulli,
        torch.normal,
        Tensor.multinomial,
        Tensor.bernoulli,
        Tensor.bernoulli_,
        Tensor.exponential_,
        Tensor.normal_,
        Tensor.random_,
        Tensor.uniform_,
    }
)


class Generators:
    """A seeded generator for each device a request draws on.

    ``Generators(seed, device)`` draws what ``torch.manual_seed(seed)`` would make torch's global
    generators draw, without touching them: stock draws on the model's device and, for the source
    phase, on the CPU.
    """

    def __init__(self, seed: int, device: torch.device | str) -> None:
        kinds = {"cpu", torch.device(device).type}
        self._by_device = {
            kind: torch.Generator(device if kind != "cpu" else "cpu").manual_seed(seed)
            for kind in kinds
        }

    def on(self, device: torch.device | str) -> torch.Generator:
        """The generator for `device`.

        Raises:
            RuntimeError: the request was not set up to draw there.
        """
        kind = torch.device(device).type
        if kind not in self._by_device:
            raise RuntimeError(
                f"chatterbox_fast: this request draws on {', '.join(sorted(self._by_device))}, "
                f"but stock asked for random numbers on {kind}"
            )
        return self._by_device[kind]


class DrawFrom(TorchFunctionMode):
    """Within this context, this thread's torch calls draw from `generators`.

    Calls that name a generator keep it. Other threads and torch's global generators are not
    touched, which is what makes seeded requests independent of each other.
    """

    def __init__(self, generators: Generators) -> None:
        super().__init__()
        self.generators = generators

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _LIKE:
            like = torch.empty_like(*args, **kwargs)
            return _LIKE[func](like, generator=self.generators.on(like.device))
        if func in _DRAWS and kwargs.get("generator") is None:
            kwargs["generator"] = self.generators.on(_device_of(args, kwargs))
        return func(*args, **kwargs)


def drawing_by_name() -> AbstractContextManager[Any]:
    """A context without `DrawFrom`, for code that names its generator in every call.

    It is spared the detour of each torch call, and torch.compile a mode that it would trace.
    """
    if isinstance(_get_current_function_mode(), DrawFrom):
        return _pop_mode_temporarily()
    return nullcontext()


def _device_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    """Where a random call draws: its tensor's device, the one it names, or torch's default."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value.device
    named = kwargs.get("device")
    return torch.device(named) if named is not None else torch.get_default_device()


class PhiloxStream:
    """The random numbers of up to `draws` draws, taken from a CUDA generator, on the device.

    The generator is moved past all of them at once, so that requests which share it draw from
    different numbers; `close` moves it back to where the draws that were used leave it, unless
    somebody else has drawn meanwhile: then the numbers in between stay unused. So they do after a
    request that failed, which never closes its stream.

    Streams take turns at a generator; torch's own draws do not. Its offset is read and set in two
    calls, and what another thread draws from torch's global generator between them is drawn again:
    that generator cannot be locked from Python. With ``generate(seed=n)`` a request has its own.

    Attributes:
        state: ``(1, 2)`` int64 on the device, seed and offset; ops read and advance it.
    """

    _lock = Lock()

    def __init__(
        self, generator: torch.Generator | None, device: torch.device, vocabulary: int, draws: int
    ) -> None:
        self._generator = generator or torch.cuda.default_generators[device.index or 0]
        self._drawing = functools.partial(drawing, device, generator)
        threads = ops.philox_threads(vocabulary, device)
        self._increment = reference.philox_increment(vocabulary, threads)
        self.state = torch.zeros(1, 2, dtype=torch.long, device=device)
        with self._lock, self._drawing():
            self._start = self._generator.get_offset()
            self._end = self._start + draws * self._increment
            self._generator.set_offset(self._end)
            row = [self._generator.initial_seed(), self._start]
        self.state.copy_(torch.tensor([[_signed(word) for word in row]], device="cpu"))

    def close(self, used: int) -> None:
        """Gives back the numbers that `used` draws did not need."""
        with self._lock, self._drawing():
            if self._generator.get_offset() == self._end:
                self._generator.set_offset(self._start + used * self._increment)


def _signed(word: int) -> int:
    """The int64 with the bits of a 64-bit word."""
    return word - 2**64 if word >= 2**63 else word


def check_seed(seed: object) -> int | None:
    """`seed` as an int that `torch.manual_seed` takes, or None.

    Raises:
        TypeError: not an integer. ValueError: outside [-2**63, 2**64).
    """
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, SupportsIndex):
        raise TypeError(f"chatterbox_fast: seed must be an int or None, got {seed!r}")
    number = operator.index(seed)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"chatterbox_fast: seed must be in [-2**63, 2**64), got {number}")
    return number
