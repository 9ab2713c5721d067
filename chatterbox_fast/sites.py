"""The table of sites: which attribute of a Chatterbox object is replaced, and by what.

A replacement is a plain function bound to the object whose attribute it becomes, so a deep copy of
a patched module runs on its own weights.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple

import torch

from . import dispatch
from .audio.stock import make_embed_ref, why_not_served
from .options import Options
from .overrides import Change, Override, bound, is_ours
from .precision import choose_precision
from .request import Request, current_request, serving
from .rng import Generators, check_seed, drawing_by_name
from .s3gen import support as flow_support
from .s3gen.engine import FlowEngines
from .t3 import runner, weights
from .t3.engine import Engine, Engines
from .t3.support import why_unsupported
from .voices import RequestView, shares_methods
from .watermark import NoWatermark

STOCK_CLASSES = (
    "ChatterboxTTS",
    "ChatterboxMultilingualTTS",
    "ChatterboxTurboTTS",
    "ChatterboxVC",
)
RECORD = "_chatterbox_fast"
"""The instance attribute that holds what patch() did to a model."""


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
        make: stock's function -> function that takes `owner` first.
        describe: () -> the report's rows for this site, as things are now.
        packing: what happens to the owner's weights, or None.
        unfit: stock's function -> why it cannot be replaced, or None.
    """

    name: str
    owner: Any
    attribute: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]
    describe: Callable[[], list[Row]]
    packing: Packing | None = None
    unfit: Callable[[Callable[..., Any]], str | None] | None = None

    def why_not(self) -> str | None:
        """The reason why this attribute is left alone, or None."""
        taken = vars(self.owner).get(self.attribute)
        if taken is not None and not is_ours(taken):
            return "replaced by someone else"
        function = inspect.unwrap(getattr(type(self.owner), self.attribute))
        if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
            return f"{self.attribute}() is a generator or a coroutine"
        stock = getattr(type(self.owner), self.attribute)
        return None if self.unfit is None else self.unfit(stock)

    def changes(self) -> list[Change]:
        """The replacement, bound to its owner, and what goes with it; ready to be applied."""
        function = self.make(getattr(type(self.owner), self.attribute))
        replacement = Override(self.owner, self.attribute, bound(function, self.owner))
        if self.packing is None:
            return [replacement]
        if why_unsupported(self.owner) is not None:  # its backbone may not even be transformers'
            return [replacement, self.packing]
        return [replacement, home_guard(self.owner, self.packing.engines), self.packing]


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


def sites_of(model: Any, options: Options) -> list[Site]:
    """The sites of a Chatterbox object, in the order the data flows."""
    generate = Row("generate", "stock, per request", "-", "own voice and generators")
    make = functools.partial(make_generate, options=options)
    sites = [Site("generate", model, "generate", make, lambda: [generate])]
    if hasattr(model, "t3") and not getattr(model.t3, "is_gpt", False):
        sites.append(t3_site(model.t3, options))
    if hasattr(type(model.s3gen), "embed_ref"):
        sites.append(embed_ref_site(model.s3gen, options))
    if hasattr(getattr(getattr(model, "s3gen", None), "flow", None), "decoder"):
        sites.append(flow_site(model.s3gen.flow.decoder))
    return sites


def embed_ref_site(s3gen: Any, options: Options) -> Site:
    """What S3Gen makes of a voice prompt, resampled by our op unless stock's bits are wanted."""

    def why_not(owner: Any) -> str | None:
        precise = choose_precision(options, owner.device, owner.dtype)
        return "exact keeps stock's bits" if precise.precision == "exact" else None

    def describe() -> list[Row]:
        choice = dispatch.choose("resample", s3gen.device, options.backend)
        op = Row("  resample", "op", choice.backend, choice.reason)
        if (reason := why_not(s3gen)) is not None:
            return [Row("s3gen.embed_ref", "stock's resampler", "torch", reason), op]
        return [Row("s3gen.embed_ref", "own resampler", choice.backend, "the rest is stock's"), op]

    make = functools.partial(make_embed_ref, backend=options.backend, why_not=why_not)
    return Site("s3gen.embed_ref", s3gen, "embed_ref", make, describe, unfit=why_not_served)


def t3_site(t3: Any, options: Options) -> Site:
    """T3's loop, and its weights."""
    engines = Engines(options)
    make = functools.partial(make_t3_inference, engines=engines)
    rows = functools.partial(describe_t3, t3, engines)
    return Site("t3.inference", t3, "inference", make, rows, Packing(t3, engines))


def flow_site(decoder: Any) -> Site:
    """S3Gen's flow: from the encoder's output to mel."""
    make = functools.partial(make_flow, engines=FlowEngines())
    rows = functools.partial(describe_flow, decoder)
    return Site("s3gen.flow.decoder", decoder, "forward", make, rows)


def describe_flow(decoder: Any) -> list[Row]:
    """What the flow would run if it were called now."""
    reason = flow_support.why_unsupported(decoder)
    if reason is not None:
        return [Row("s3gen.flow.decoder", "stock", "torch", reason)]
    device = next(decoder.parameters()).device.type
    return [Row("s3gen.flow.decoder", "engine, exact", f"{device}, eager", "one row at a time")]


def describe_t3(t3: Any, engines: Engines) -> list[Row]:
    """What T3 would run if it were called now: `.to()` after patching can change the answer."""
    if (reason := why_unsupported(t3)) is not None:
        return [Row("t3.inference", "stock", "torch", reason)]
    engine, device = engines.of(t3), t3.device
    how = ["compiled"] if engine.options.compile else []
    why = [engine.precise.why]
    if engine.eager_because is None:
        how.append("CUDA graph")
    else:
        why.append(engine.eager_because)
    backend = ", ".join([device.type, *(how or ["eager"])])
    rows = [
        Row("t3.inference", f"engine, {engine.precise.precision}", backend, "; ".join(why)),
        describe_memory(t3, engine),
    ]
    for op in dispatch.T3_OPS:
        choice = dispatch.choose(op, device, engine.options.backend)
        rows.append(Row(f"  {op}", "op", choice.backend, choice.reason))
    return rows


def describe_memory(t3: Any, engine: Engine) -> Row:
    """T3's weights in memory, stock's and now."""
    stock = sum(p.nbytes for p in t3.parameters())
    now = sum(p.nbytes for p in t3.parameters() if p.device == t3.device)
    if engine.weights.decode.head.weight.data_ptr() != t3.speech_head.weight.data_ptr():
        now += weights.bytes_of(engine.weights.decode)
    host = "; the originals wait on the host" if engine.replaces_originals else ""
    size = f"{stock / 1e9:.2f} GB -> {now / 1e9:.2f} GB"
    return Row("  weights", size, t3.device.type, f"before -> now{host}")


def describe_rest(model: Any, options: Options) -> list[Row]:
    """What no site replaces: the stages without an engine, the watermark."""
    rows = []
    if hasattr(model, "t3") and getattr(model.t3, "is_gpt", False):
        rows.append(Row("t3.inference_turbo", "stock", "torch", str(why_unsupported(model.t3))))
    rows.append(Row("s3gen, the rest", "stock", "torch", "encoder, vocoder: no engine yet"))
    if options.watermark:
        rows.append(Row("watermark", "Perth (stock)", "cpu", "watermark=True"))
    else:
        rows.append(Row("watermark", "none", "-", "watermark=False"))
    return rows


def watermark_override(model: Any) -> Override:
    """Takes Perth out of `model`."""
    return Override(model, "watermarker", NoWatermark())


def make_generate(stock: Callable[..., Any], *, options: Options) -> Callable[..., Any]:
    """Stock's generate() on a view that owns the request's voice and random numbers."""
    signature = inspect.signature(stock)
    has_seed = "seed" in signature.parameters

    @functools.wraps(stock)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if has_seed:
            seed = signature.bind(self, *args, **kwargs).arguments.get("seed")
        else:
            seed = kwargs.pop("seed", None)
        checked = check_seed(seed)
        generators = None if checked is None else Generators(checked, self.device)
        request = Request(generators, options.progress)
        with serving(request), request.drawing():
            if shares_methods(self) is not None:
                return stock(self, *args, **kwargs)
            view = RequestView(self, without=("generate", RECORD, "__reduce_ex__"))
            result = stock(view.object, *args, **kwargs)
            view.publish()
            return result

    if not has_seed:
        generate.__signature__ = _with_seed(signature)  # type: ignore[attr-defined]
    return generate


def _with_seed(signature: inspect.Signature) -> inspect.Signature:
    """The signature with a keyword `seed=None`, before ``**kwargs`` where there is one."""
    parameters = list(signature.parameters.values())
    last = len(parameters) - any(p.kind is p.VAR_KEYWORD for p in parameters)
    parameters.insert(last, inspect.Parameter("seed", inspect.Parameter.KEYWORD_ONLY, default=None))
    return signature.replace(parameters=parameters)


def make_t3_inference(stock: Callable[..., Any], *, engines: Engines) -> Callable[..., Any]:
    """T3's loop: the engine where it computes the same as stock, else stock.

    Stock keeps a request's state on the module, so its own loop runs for one request at a time.
    """
    one_at_a_time = Lock()

    @functools.wraps(stock)
    def inference(self: Any, **arguments: Any) -> Any:
        if why_unsupported(self) is not None:
            with one_at_a_time:
                return stock(self, **arguments)
        generator = current_request().generator(self.device)
        with drawing_by_name():
            return runner.inference(self, engines.of(self), **arguments, generator=generator)

    return inference


def make_flow(stock: Callable[..., Any], *, engines: FlowEngines) -> Callable[..., Any]:
    """The flow's solver: the engine where it computes the same as stock, else stock."""

    @functools.wraps(stock)
    def forward(
        self: Any,
        mu: Any,
        mask: Any,
        n_timesteps: Any,
        temperature: float = 1.0,
        spks: Any = None,
        cond: Any = None,
        noised_mels: Any = None,
        meanflow: bool = False,
    ) -> Any:
        if flow_support.why_unsupported(self) or flow_support.why_not_request(
            self, mu, mask, spks, cond, meanflow
        ):
            return stock(
                self, mu, mask, n_timesteps, temperature, spks, cond, noised_mels, meanflow
            )
        noise = torch.randn_like(mu)  # stock's draw, of its shape, from the request's generator
        if noised_mels is not None:
            noise[..., mu.shape[2] - noised_mels.shape[2] :] = noised_mels
        with drawing_by_name():
            return engines.of(self).mel(self, noise, mu, spks, cond, n_timesteps), None

    return forward


def home_guard(t3: Any, engines: Engines) -> Override:
    """The backbone's forward, for all who call it, stock's loop among them.

    The engine does not. It may keep the backbone's weights on the host: they come home first, and
    stay.
    """
    stock = type(t3.tfmr).forward

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        engines.bring_home(self)
        return stock(self, *args, **kwargs)

    return Override(t3.tfmr, "forward", bound(forward, t3.tfmr))
