"""The table of sites: which attribute of a Chatterbox object is replaced, and by what.

A replacement is a plain function bound to the object whose attribute it becomes, so a deep copy of
a patched model runs on its own modules.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from types import MethodType
from typing import Any, NamedTuple

from . import dispatch
from .options import Options
from .overrides import Override
from .request import Request, current_request, serving
from .rng import Generators, check_seed
from .t3 import runner
from .t3.weights import why_unsupported
from .voices import request_view
from .watermark import NoWatermark

STOCK_CLASSES = (
    "ChatterboxTTS",
    "ChatterboxMultilingualTTS",
    "ChatterboxTurboTTS",
    "ChatterboxVC",
)


class Row(NamedTuple):
    """One line of a report: a site, what runs there, on which backend, and why."""

    site: str
    runs: str
    backend: str
    why: str


@dataclass(frozen=True)
class Site:
    """An attribute of `owner` that `make` builds a replacement for.

    Attributes:
        name: as a report shows it.
        make: (stock's function, options) -> function that takes `owner` first.
        describe: () -> the report's rows for this site, as things are now.
    """

    name: str
    owner: Any
    attribute: str
    make: Callable[[Callable[..., Any], Options], Callable[..., Any]]
    describe: Callable[[], list[Row]]

    def taken(self) -> bool:
        """Whether somebody else has put an attribute of their own there."""
        return self.attribute in vars(self.owner)

    def override(self, options: Options) -> Override:
        """The replacement, bound to its owner, ready to be applied."""
        stock = getattr(type(self.owner), self.attribute)
        function = self.make(stock, options)
        return Override(self.owner, self.attribute, MethodType(function, self.owner))


def sites_of(model: Any, options: Options) -> list[Site]:
    """The sites of a Chatterbox object, in the order the data flows."""
    generate = Row("generate", "stock, per request", "-", "own voice and generators")
    stock_s3gen = Row("s3gen.inference", "stock", "torch", "no engine yet")
    sites = [Site("generate", model, "generate", make_generate, lambda: [generate])]
    if hasattr(model, "t3"):
        attribute = "inference_turbo" if model.t3.is_gpt else "inference"
        make = make_drawing if model.t3.is_gpt else make_t3_inference
        rows = functools.partial(describe_t3, model.t3, f"t3.{attribute}", options)
        sites.append(Site(f"t3.{attribute}", model.t3, attribute, make, rows))
    sites.append(
        Site("s3gen.inference", model.s3gen, "inference", make_drawing, lambda: [stock_s3gen])
    )
    return sites


def describe_t3(t3: Any, site: str, options: Options) -> list[Row]:
    """What T3 would run if it were called now: `.to()` after patching can change the answer."""
    if (reason := why_unsupported(t3)) is not None:
        return [Row(site, "stock", "torch", reason)]
    rows = [Row(site, "engine, exact", f"{t3.device.type}, eager", "in-place KV cache")]
    for op in dispatch.OPS:
        choice = dispatch.choose(op, t3.device, options.backend)
        rows.append(Row(f"  {op}", "op", choice.backend, choice.reason))
    return rows


def describe_switches(options: Options) -> list[Row]:
    """The watermark, and every switch that has no engine behind it yet."""
    rows = [
        Row("watermark", "Perth (stock)", "cpu", "watermark=True")
        if options.watermark
        else Row("watermark", "none", "-", "watermark=False")
    ]
    if options.precision != "exact":
        why = "no other precision has an engine yet"
        rows.append(Row(f"precision={options.precision}", "exact", "-", why))
    if options.compile:
        rows.append(Row("compile=True", "eager", "-", "torch.compile has no engine yet"))
    return rows


def watermark_override(model: Any) -> Override:
    """Takes Perth out of `model`."""
    return Override(model, "watermarker", NoWatermark())


def make_generate(stock: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """Stock's generate() on a view that owns the request's voice and random numbers."""
    signature = inspect.signature(stock)
    lock = Lock()

    @functools.wraps(stock)
    def generate(self: Any, *args: Any, seed: int | None = None, **kwargs: Any) -> Any:
        arguments = _by_name(signature.bind(self, *args, **kwargs))
        checked = check_seed(seed)
        generators = None if checked is None else Generators(checked, self.device)
        with serving(Request(generators, options.progress)):
            return stock(request_view(self, arguments, lock), **arguments)

    parameters = list(signature.parameters.values())
    last = len(parameters) - any(p.kind is p.VAR_KEYWORD for p in parameters)
    parameters.insert(last, inspect.Parameter("seed", inspect.Parameter.KEYWORD_ONLY, default=None))
    generate.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return generate


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """The bound arguments without `self`, those of ``**kwargs`` among them."""
    named: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    return named


def make_t3_inference(stock: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """T3's loop: the engine where it computes the same as stock, else stock."""
    fallback = make_drawing(stock, options)

    @functools.wraps(stock)
    def inference(self: Any, **arguments: Any) -> Any:
        if why_unsupported(self) is not None:
            return fallback(self, **arguments)
        return runner.inference(self, **arguments, backend=options.backend)

    return inference


def make_drawing(stock: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """Stock's function, drawing its random numbers from the request that is being served."""
    del options

    @functools.wraps(stock)
    def drawing(self: Any, *args: Any, **kwargs: Any) -> Any:
        with current_request().drawing():
            return stock(self, *args, **kwargs)

    return drawing
