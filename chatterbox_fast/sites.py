"""The table of sites: which attribute of a Chatterbox object is replaced, and by what."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from .audio.stock import embed_ref_site
from .options import Options
from .overrides import REDUCE, Override
from .request import Request, serving
from .rng import Generators, check_seed
from .s3gen.site import flow_site, lengths_site, vocoder_site
from .site import Row, Site
from .t3.site import t3_site
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


def sites_of(model: Any, options: Options) -> list[Site]:
    """The sites of a Chatterbox object, in the order the data flows."""
    generate = Row("generate", "stock, per request", "-", "own voice and generators")
    make = functools.partial(make_generate, options=options)
    sites = [Site("generate", model, "generate", make, lambda: [generate])]
    if hasattr(model, "t3") and not getattr(model.t3, "is_gpt", False):
        sites.append(t3_site(model.t3, options))
    makers = embed_ref_site, lengths_site, flow_site, vocoder_site
    return [*sites, *(make(model.s3gen, options) for make in makers)]


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
            view = RequestView(self, without=("generate", RECORD, REDUCE))
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
