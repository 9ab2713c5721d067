"""Stock's resampler, which S3Gen's embed_ref looks up in its module, served by ours on one object.

Nothing of that module is touched: embed_ref runs as it is written, in a copy of the module's names
in which `get_resampler` alone is ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from .. import selftest
from ..options import Backend, Options
from ..precision import choose_precision
from ..site import Row, Site
from .resample import Resample

_NAME = "get_resampler"
_FILTER = {
    "resampling_method": "sinc_interp_hann",
    "lowpass_filter_width": 6,
    "rolloff": 0.99,
    "beta": None,
}


def embed_ref_site(s3gen: Any, options: Options) -> Site:
    """What S3Gen makes of a voice prompt, resampled by our op unless stock's bits are wanted."""

    def why_not(owner: Any) -> str | None:
        precise = choose_precision(options, owner.device, owner.dtype)
        return "exact keeps stock's bits" if precise.precision == "exact" else None

    def describe() -> list[Row]:
        choice = selftest.choose("resample", s3gen.device, options.backend, torch.float32)
        op = Row("  resample", "op", choice.backend, choice.reason)
        if (reason := why_not(s3gen)) is not None:
            return [Row("s3gen.embed_ref", "stock's resampler", "torch", reason), op]
        return [Row("s3gen.embed_ref", "own resampler", choice.backend, "the rest is stock's"), op]

    make = functools.partial(make_embed_ref, backend=options.backend, why_not=why_not)
    return Site("s3gen.embed_ref", s3gen, "embed_ref", make, describe, unfit=why_not_served)


def why_not_served(embed_ref: Any) -> str | None:
    """Why a class's embed_ref, or the resampler that it finds, is not stock's; or None."""
    if not isinstance(embed_ref, FunctionType) or hasattr(embed_ref, "__wrapped__"):
        return "embed_ref() is not stock's plain function"
    if _NAME not in embed_ref.__code__.co_names:
        return f"embed_ref() does not call {_NAME}()"
    found = embed_ref.__globals__.get(_NAME)
    uncached = getattr(found, "__wrapped__", None)  # of stock's lru_cache, which is left as it is
    if uncached is None or getattr(found, "__module__", None) != embed_ref.__module__:
        return f"{_NAME}() is replaced"
    made = uncached(2, 1, "cpu")
    if type(made).__module__.partition(".")[0] != "torchaudio" or any(
        getattr(made, name, ...) != value for name, value in _FILTER.items()
    ):
        return f"{_NAME}() does not make torchaudio's default resampler"
    return None


def make_embed_ref(
    stock: Callable[..., Any], *, backend: Backend, why_not: Callable[[Any], str | None]
) -> Callable[..., Any]:
    """Stock's embed_ref with our resampler.

    Args:
        why_not: S3Gen -> why its voices are resampled by stock, or None; asked at every call.
    """

    @functools.wraps(stock)
    def embed_ref(self: Any, *args: Any, **kwargs: Any) -> Any:
        unserved = why_not(self) or why_not_served(stock)
        if unserved is not None or not isinstance(stock, FunctionType):
            return stock(self, *args, **kwargs)
        found = stock.__globals__[_NAME]
        names = {**stock.__globals__, _NAME: functools.partial(_resampler, found, backend)}
        own = FunctionType(
            stock.__code__, names, stock.__name__, stock.__defaults__, stock.__closure__
        )
        own.__kwdefaults__ = stock.__kwdefaults__
        return own(self, *args, **kwargs)

    return embed_ref


def _resampler(stock: Any, backend: Backend, src_sr: Any, dst_sr: Any, device: Any) -> Any:
    """As stock's get_resampler; what ours does not take is stock's to make, or to refuse."""
    try:
        return Resample(src_sr, dst_sr, backend=backend)
    except (TypeError, ValueError):
        return stock(src_sr, dst_sr, device)
