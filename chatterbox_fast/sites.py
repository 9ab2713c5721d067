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
from .options import Options
from .overrides import Change, Override, bound, is_ours
from .request import Request, current_request, serving
from .rng import Generators, check_seed, drawing_by_name
from .s3gen import runner as s3gen_runner
from .s3gen.engine import Engines as S3GenEngines
from .s3gen.engine import FlowEngine, flow_signature
from .s3gen.support import why_flow_unsupported, why_vocoder_unsupported
from .s3gen.vocoder import VocoderWeights, pack_vocoder
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
    """

    name: str
    owner: Any
    attribute: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]
    describe: Callable[[], list[Row]]
    packing: Packing | None = None

    def why_not(self) -> str | None:
        """The reason why this attribute is left alone, or None."""
        taken = vars(self.owner).get(self.attribute)
        if taken is not None and not is_ours(taken):
            return "replaced by someone else"
        if not hasattr(type(self.owner), self.attribute):
            return f"a {type(self.owner).__qualname__} has no {self.attribute}()"
        function = inspect.unwrap(getattr(type(self.owner), self.attribute))
        if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
            return f"{self.attribute}() is a generator or a coroutine"
        return None

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
    return [*sites, flow_site(model.s3gen), vocoder_site(model.s3gen)]


def t3_site(t3: Any, options: Options) -> Site:
    """T3's loop, and its weights."""
    engines = Engines(options)
    make = functools.partial(make_t3_inference, engines=engines)
    rows = functools.partial(describe_t3, t3, engines)
    return Site("t3.inference", t3, "inference", make, rows, Packing(t3, engines))


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
    for op in dispatch.OPS:
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


def flow_site(s3gen: Any) -> Site:
    """S3Gen's flow: speech tokens to mel."""
    engines = S3GenEngines(FlowEngine, flow_signature)
    make = functools.partial(make_flow_inference, engines=engines)
    name = "s3gen.flow"
    rows = functools.partial(describe_s3gen, name, s3gen.flow, why_flow_unsupported)
    return Site(name, s3gen.flow, "inference", make, rows)


def vocoder_site(s3gen: Any) -> Site:
    """S3Gen's vocoder: mel to audio."""
    engines = S3GenEngines(pack_vocoder)
    make = functools.partial(make_vocoder_inference, engines=engines)
    name = "s3gen.vocoder"
    rows = functools.partial(describe_s3gen, name, s3gen.mel2wav, why_vocoder_unsupported)
    return Site(name, s3gen.mel2wav, "inference", make, rows)


def describe_s3gen(
    name: str, module: Any, why_unsupported: Callable[[Any], str | None]
) -> list[Row]:
    """What a stage of S3Gen would run if it were called now."""
    if (reason := why_unsupported(module)) is not None:
        return [Row(name, "stock", "torch", reason)]
    device = next(module.parameters()).device
    return [Row(name, "engine, exact", f"{device.type}, eager", "S3Gen has no other precision yet")]


def describe_rest(model: Any, options: Options) -> list[Row]:
    """What no site replaces: the stages without an engine, the watermark."""
    rows = []
    if hasattr(model, "t3") and getattr(model.t3, "is_gpt", False):
        rows.append(Row("t3.inference_turbo", "stock", "torch", str(why_unsupported(model.t3))))
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


def make_flow_inference(
    stock: Callable[..., Any], *, engines: S3GenEngines[FlowEngine]
) -> Callable[..., Any]:
    """Tokens to mel: the engine where it computes the same as stock, else stock."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    @torch.inference_mode()
    def inference(self: Any, *args: Any, **kwargs: Any) -> Any:
        if why_flow_unsupported(self) is not None:
            return stock(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        arguments, engine = given.arguments, engines.of(self)
        utterance = s3gen_runner.read_utterance(self, engine, arguments)
        if utterance is None:
            return stock(self, *args, **kwargs)
        with drawing_by_name():
            mel = s3gen_runner.flow_inference(
                self,
                engine,
                utterance,
                finalize=arguments["finalize"],
                n_timesteps=arguments["n_timesteps"],
                noised_mels=arguments["noised_mels"],
                generator=current_request().generator(utterance.tokens.device),
            )
        return mel, None

    return inference


def make_vocoder_inference(
    stock: Callable[..., Any], *, engines: S3GenEngines[VocoderWeights]
) -> Callable[..., Any]:
    """Mel to audio: the engine where it computes the same as stock, else stock."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    @torch.inference_mode()
    def inference(self: Any, *args: Any, **kwargs: Any) -> Any:
        if why_vocoder_unsupported(self) is not None:
            return stock(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        vocoder = engines.of(self)
        mel = s3gen_runner.read_mel(vocoder, given.arguments)
        if mel is None:
            return stock(self, *args, **kwargs)
        request = current_request()
        with drawing_by_name():
            return s3gen_runner.vocoder_inference(
                vocoder,
                mel,
                given.arguments["cache_source"],
                generator=request.generator(mel.device),
                cpu_generator=request.generator(torch.device("cpu")),
            )

    return inference


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
