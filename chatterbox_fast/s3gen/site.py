"""Where S3Gen's engines take stock's place: tokens to mel, and mel to audio."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..request import current_request
from ..rng import drawing_by_name
from ..site import Row, Site
from . import runner
from .engine import Engines, FlowEngine, flow_signature
from .support import why_flow_unsupported, why_vocoder_unsupported
from .vocoder import VocoderWeights, pack_vocoder


def flow_site(s3gen: Any) -> Site:
    """S3Gen's flow: speech tokens to mel."""
    engines = Engines(FlowEngine, flow_signature)
    make = functools.partial(make_flow_inference, engines=engines)
    name = "s3gen.flow"
    rows = functools.partial(describe_s3gen, name, s3gen.flow, why_flow_unsupported)
    return Site(name, s3gen.flow, "inference", make, rows)


def vocoder_site(s3gen: Any) -> Site:
    """S3Gen's vocoder: mel to audio."""
    engines = Engines(pack_vocoder)
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


def make_flow_inference(
    stock: Callable[..., Any], *, engines: Engines[FlowEngine]
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
        utterance = runner.read_utterance(self, engine, arguments)
        if utterance is None:
            return stock(self, *args, **kwargs)
        with drawing_by_name():
            mel = runner.flow_inference(
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
    stock: Callable[..., Any], *, engines: Engines[VocoderWeights]
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
        mel = runner.read_mel(vocoder, given.arguments)
        if mel is None:
            return stock(self, *args, **kwargs)
        request = current_request()
        with drawing_by_name():
            return runner.vocoder_inference(
                vocoder,
                mel,
                given.arguments["cache_source"],
                generator=request.generator(mel.device),
                cpu_generator=request.generator(torch.device("cpu")),
            )

    return inference
