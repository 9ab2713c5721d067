"""Where S3Gen's engines take stock's place: tokens to mel, and mel to audio."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..compiling import why_not_compiled
from ..options import Options
from ..request import current_request
from ..rng import drawing_by_name
from ..site import Row, Site, engine_row, how_it_runs, memory_row
from . import runner
from .engine import Engine, Engines, FlowEngine, VocoderEngine
from .layers import bytes_of
from .support import why_flow_unsupported, why_vocoder_unsupported


def flow_site(s3gen: Any, options: Options) -> Site:
    """S3Gen's flow: speech tokens to mel."""
    engines = Engines(FlowEngine, why_flow_unsupported, options)
    make = functools.partial(make_inference, engines=engines, serve=serve_flow)

    def describe() -> list[Row]:
        if isinstance(engine := engines.of(s3gen.flow), str):
            return [Row("s3gen.flow", "stock", "torch", engine)]
        not_compiled = why_not_compiled(engine.blocks)
        how = how_it_runs(options.compile and not_compiled is None, engine.eager_because)
        why = (engine.why, not_compiled, engine.eager_because, engine.without_room)
        weights = (engine.encoder, engine.solver)
        return [
            engine_row("s3gen.flow", engine.precision, engine.device, how, why),
            describe_memory(s3gen.flow, weights),
            Row("  padded_attention", "op", *engine.padded),
            Row("  add_norm", "op", *engine.add_norm),
        ]

    return Site("s3gen.flow", s3gen.flow, "inference", make, describe)


def vocoder_site(s3gen: Any, options: Options) -> Site:
    """S3Gen's vocoder: mel to audio."""
    engines = Engines(VocoderEngine, why_vocoder_unsupported, options)
    make = functools.partial(make_inference, engines=engines, serve=serve_vocoder)

    def describe() -> list[Row]:
        if isinstance(engine := engines.of(s3gen.mel2wav), str):
            return [Row("s3gen.vocoder", "stock", "torch", engine)]
        not_compiled = why_not_compiled([engine.decode])
        how = ["compiled"] if options.compile and not_compiled is None else []
        why = (engine.why, not_compiled)
        return [
            engine_row("s3gen.vocoder", engine.precision, engine.device, how, why),
            describe_memory(s3gen.mel2wav, engine.weights),
            Row("  snake", "op", *engine.snake),
            Row("  istft", "op", *engine.istft),
        ]

    return Site("s3gen.vocoder", s3gen.mel2wav, "inference", make, describe)


def lengths_site(s3gen: Any, _options: Options) -> Site:
    """S3Gen's count of its tokens, around the flow.

    Stock makes it on the host, and waits for all that runs to copy it to the device.
    """
    row = Row(
        "s3gen.flow_inference", "stock, one wait less", "-", "its token count is on the device"
    )
    return Site(
        "s3gen.flow_inference",
        s3gen,
        "flow_inference",
        make_flow_inference,
        lambda: [row],
        unfit=why_without_lengths,
    )


def why_without_lengths(stock: Callable[..., Any]) -> str | None:
    """The reason why stock's flow_inference cannot be given its token count, or None."""
    missing = {"speech_tokens", "speech_token_lens"} - set(inspect.signature(stock).parameters)
    return f"flow_inference() takes no {', '.join(sorted(missing))}" if missing else None


def make_flow_inference(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Stock's flow_inference, given the token count that it would make itself."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def flow_inference(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        tokens = given.arguments["speech_tokens"]
        if given.arguments.get("speech_token_lens") is None and torch.is_tensor(tokens):
            shape = torch.atleast_2d(tokens).shape
            lengths = torch.full(shape[:1], shape[-1], device=self.device)
            given.arguments["speech_token_lens"] = lengths
        return type(self).flow_inference(*given.args, **given.kwargs)

    return flow_inference


def describe_memory(module: nn.Module, weights: tuple[Any, ...]) -> Row:
    """A module's weights in memory, stock's and now, with the engine's copies."""
    stock = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()
    }
    now = stock | bytes_of(weights)
    device = next(module.parameters()).device
    return memory_row(sum(stock.values()), sum(now.values()), device)


def make_inference(
    stock: Callable[..., Any],
    *,
    engines: Engines[Engine],
    serve: Callable[[Engine, dict[str, Any]], Any],
) -> Callable[..., Any]:
    """One of S3Gen's stages: the engine where it computes the same as stock, else its class's own.

    Args:
        serve: (engine, stock's arguments by name) -> what stock returns; None where stock must run.
    """
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    @torch.inference_mode()
    def inference(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(engine := engines.of(self), str):
            given = signature.bind(self, *args, **kwargs)
            given.apply_defaults()
            if (served := serve(engine, given.arguments)) is not None:
                return served
        return type(self).inference(self, *args, **kwargs)

    return inference


def serve_flow(engine: FlowEngine, arguments: dict[str, Any]) -> Any:
    """Tokens to mel, as `make_inference` asks for it."""
    flow = arguments["self"]
    utterance = runner.read_utterance(flow, engine, arguments)
    if utterance is None:
        return None
    with drawing_by_name():
        mel = runner.flow_inference(
            flow,
            engine,
            utterance,
            finalize=arguments["finalize"],
            n_timesteps=arguments["n_timesteps"],
            noised_mels=arguments["noised_mels"],
            generator=current_request().generator(utterance.tokens.device),
        )
    return mel, None


def serve_vocoder(engine: VocoderEngine, arguments: dict[str, Any]) -> Any:
    """Mel to audio, as `make_inference` asks for it."""
    mel = runner.read_mel(engine, arguments)
    if mel is None:
        return None
    request = current_request()
    with drawing_by_name():
        return runner.vocoder_inference(
            engine,
            mel,
            arguments["cache_source"],
            generator=request.generator(mel.device),
            phase_generator=request.generator(torch.get_default_device()),
        )
