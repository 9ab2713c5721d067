"""Where T3's engine takes stock's place: the loop, and the weights that it packs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

from ..compiling import why_not_compiled
from ..options import Options
from ..overrides import REDUCE, Change, Override, bound, reduce_as_stock
from ..request import current_request
from ..rng import drawing_by_name
from ..site import Row, Site, engine_row, how_it_runs, memory_row
from . import runner, weights
from .engine import Engine, Engines
from .support import why_unsupported


def t3_site(t3: Any, options: Options) -> Site:
    """T3's loop, and its weights."""
    engines = Engines(options)
    make = functools.partial(make_t3_inference, engines=engines)
    rows = functools.partial(describe_t3, t3, engines)
    more = functools.partial(packing_changes, t3, engines)
    return Site("t3.inference", t3, "inference", make, rows, more=more)


def packing_changes(t3: Any, engines: Engines) -> list[Change]:
    """T3's weights are packed, and its backbone brings them home for others who call it."""
    packing = Packing(t3, engines)
    if why_unsupported(t3) is not None:  # its backbone may not even be transformers'
        return [packing]
    return [*home_guards(t3, engines), packing]


@dataclass
class Packing:
    """Packs a T3's weights when it is patched, and gives them back as they were."""

    owner: Any
    engines: Engines
    name: str = "weights"

    def apply(self) -> None:
        """Packs the weights; a T3 that is left to stock keeps its own."""
        try:
            if why_unsupported(self.owner) is None:
                self.engines.of(self.owner)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Gives the weights back."""
        self.engines.release(self.owner)

    def in_place(self) -> bool:
        """Always: weights that changed since are packed anew."""
        return True


def describe_t3(t3: Any, engines: Engines) -> list[Row]:
    """What T3 would run if it were called now: `.to()` after patching can change the answer."""
    if (reason := why_unsupported(t3)) is not None:
        return [Row("t3.inference", "stock", "torch", reason)]
    engine = engines.of(t3)
    not_compiled = why_not_compiled(engine.layers)
    how = how_it_runs(engine.options.compile and not_compiled is None, engine.eager_because)
    why = (engine.precise.why, not_compiled, engine.eager_because)
    return [
        engine_row("t3.inference", engine.precise.precision, t3.device, how, why),
        describe_memory(t3, engine),
        *(Row(f"  {op}", "op", *choice) for op, choice in engine.choices.items()),
    ]


def describe_memory(t3: Any, engine: Engine) -> Row:
    """T3's weights in memory, stock's and now."""
    stock = sum(p.nbytes for p in t3.parameters())
    now = sum(p.nbytes for p in t3.parameters() if p.device == t3.device)
    if engine.weights.decode.head.weight.data_ptr() != t3.speech_head.weight.data_ptr():
        now += weights.bytes_of(engine.weights.decode)
    host = "; the originals wait on the host" if engine.replaces_originals else ""
    return memory_row(stock, now, t3.device, host)


def make_t3_inference(stock: Callable[..., Any], *, engines: Engines) -> Callable[..., Any]:
    """T3's loop: the engine where it computes the same as stock, else stock.

    Stock keeps a request's state on the module, so its own loop runs for one request at a time.
    """
    one_at_a_time = Lock()

    @functools.wraps(stock)
    def inference(self: Any, **arguments: Any) -> Any:
        if why_unsupported(self) is not None:
            with one_at_a_time:
                return type(self).inference(self, **arguments)
        generator = current_request().generator(self.device)
        with drawing_by_name():
            return runner.inference(self, engines.of(self), **arguments, generator=generator)

    return inference


def home_guards(t3: Any, engines: Engines) -> list[Change]:
    """The backbone's forward, for all who call it, stock's loop among them; and its copies.

    The engine does not call it. It may keep the backbone's weights on the host: they come home
    first, and stay.
    """
    stock = type(t3.tfmr).forward

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        engines.bring_home()
        return stock(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        engines.bring_home()
        return reduce_as_stock(self, protocol)

    return [
        Override(t3.tfmr, "forward", bound(forward, t3.tfmr)),
        Override(t3.tfmr, REDUCE, bound(reduce, t3.tfmr)),
    ]
