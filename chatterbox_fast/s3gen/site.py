"""Where S3Gen's engines take stock's place: tokens to mel, and mel to audio."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..options import Options
from ..request import current_request
from ..rng import drawing_by_name
from ..site import Row, Site
from . import runner
from .engine import Engines, FlowEngine, VocoderEngine
from .layers import bytes_of
from .support import why_flow_unsupported, why_vocoder_unsupported


def flow_site(s3gen: Any, options: Options) -> Site:
    """S3Gen's flow: speech tokens to mel."""
    engines = Engines(FlowEngine, why_flow_unsupported, options)
    make = functools.partial(make_flow_inference, engines=engines)

    def describe() -> list[Row]:
        if isinstance(engine := engines.of(s3gen.flow), str):
            return [Row("s3gen.flow", "stock", "torch", engine)]
        why = [engine.why, *([] if engine.eager_because is None else [engine.eager_because])]
        how = [engine.device.type, *(["compiled"] if options.compile else [])]
        if engine.eager_because is None:
            how.append("CUDA graph")
        backend = ", ".join(how if len(how) > 1 else [*how, "eager"])
        weights = (engine.encoder, engine.solver)
        return [
            Row("s3gen.flow", f"engine, {engine.precision}", backend, "; ".join(why)),
            describe_memory(s3gen.flow, weights),
            Row("  padded_attention", "op", *engine.padded),
        ]

    return Site("s3gen.flow", s3gen.flow, "inference", make, describe)


def vocoder_site(s3gen: Any, options: Options) -> Site:
    """S3Gen's vocoder: mel to audio."""
    engines = Engines(VocoderEngine, why_vocoder_unsupported, options)
    make = functools.partial(make_vocoder_inference, engines=engines)

    def describe() -> list[Row]:
        if isinstance(engine := engines.of(s3gen.mel2wav), str):
            return [Row("s3gen.vocoder", "stock", "torch", engine)]
        backend = f"{s3gen.device.type}, {'compiled' if options.compile else 'eager'}"
        return [
            Row("s3gen.vocoder", f"engine, {engine.precision}", backend, engine.why),
            describe_memory(s3gen.mel2wav, engine.weights),
            Row("  snake", "op", *engine.snake),
            Row("  istft", "op", *engine.istft),
        ]

    return Site("s3gen.vocoder", s3gen.mel2wav, "inference", make, describe)


def describe_memory(module: nn.Module, weights: tuple[Any, ...]) -> Row:
    """A module's weights in memory, stock's and now, with the engine's copies."""
    stock = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()
    }
    now = stock | bytes_of(weights)
    size = f"{sum(stock.values()) / 1e9:.2f} GB -> {sum(now.values()) / 1e9:.2f} GB"
    return Row("  weights", size, next(module.parameters()).device.type, "before -> now")


def make_flow_inference(
    stock: Callable[..., Any], *, engines: Engines[FlowEngine]
) -> Callable[..., Any]:
    """Tokens to mel: the engine where it computes the same as stock, else stock."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    @torch.inference_mode()
    def inference(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(engine := engines.of(self), str):
            return stock(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        arguments = given.arguments
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
    stock: Callable[..., Any], *, engines: Engines[VocoderEngine]
) -> Callable[..., Any]:
    """Mel to audio: the engine where it computes the same as stock, else stock."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    @torch.inference_mode()
    def inference(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(engine := engines.of(self), str):
            return stock(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        mel = runner.read_mel(engine, given.arguments)
        if mel is None:
            return stock(self, *args, **kwargs)
        request = current_request()
        with drawing_by_name():
            return runner.vocoder_inference(
                engine,
                mel,
                given.arguments["cache_source"],
                generator=request.generator(mel.device),
                cpu_generator=request.generator(torch.device("cpu")),
            )

    return inference
