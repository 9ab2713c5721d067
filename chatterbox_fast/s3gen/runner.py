"""S3Gen's two stages as stock's callers see them: the arguments read, the draws, the engine.

What the engine does not compute goes to stock: batches of unequal lengths, odd dtypes, more than
100 s at once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..graph import drawing
from .engine import FlowEngine, VocoderEngine
from .vocoder import Draws, VocoderWeights, f0, source

STEPS, MEANFLOW_STEPS = 10, 2
"""Euler steps, as stock's flow_inference() takes them where it is not told how many."""


class Utterance(NamedTuple):
    """What the flow turns into a mel.

    Attributes:
        tokens: ``(B, N)`` int64, the voice's and then the speech's.
        speaker: ``(B, E)``, the speaker embedding.
        prompt: ``(B, P, 80)``, the voice's mel.
    """

    tokens: Tensor
    speaker: Tensor
    prompt: Tensor


def read_utterance(flow: Any, engine: FlowEngine, arguments: dict[str, Any]) -> Utterance | None:
    """The arguments of stock's ``flow.inference``; None where stock must run.

    The values of tokens and lengths are read on the host, all at once: one sync on a GPU.

    Raises:
        ValueError: no tokens, or a prompt_feat of neither one band nor the mel's.
        IndexError: a token that the embedding does not have (stock's own error, but for a GPU,
            where it would take the process's CUDA context with it).
    """
    if flow.decoder.estimator.meanflow is not arguments["meanflow"]:
        return None
    token, speaker = arguments["token"], torch.atleast_2d(arguments["embedding"])
    if token.ndim != 2 or speaker.dtype != flow.encoder_proj.weight.dtype:
        return None
    rows = len(token)
    prompt_token, prompt = arguments["prompt_token"], arguments["prompt_feat"]
    prompt_token, prompt = torch.atleast_2d(prompt_token), prompt[(None,) * (3 - prompt.ndim)]
    if any(len(each) not in (1, rows) for each in (prompt_token, prompt, speaker)):
        return None
    if prompt.ndim != 3:
        return None
    if (bands := prompt.shape[2]) not in (1, flow.output_size):
        raise ValueError(
            f"chatterbox_fast: prompt_feat must have {flow.output_size} bands, or one for all, "
            f"got {bands}: {tuple(prompt.shape)}"
        )
    tokens = torch.cat([prompt_token.expand(rows, -1), token], dim=1).long()
    if tokens.shape[1] == 0:
        raise ValueError("chatterbox_fast: token and prompt_token must not both be empty")
    lengths = arguments["token_len"] + arguments["prompt_token_len"]
    facts = torch.stack([tokens.amin(), tokens.amax(), *(lengths.long().aminmax())])
    lowest, highest, shortest, longest = facts.tolist()
    known = len(engine.encoder.tokens)
    if lowest < 0 or highest >= known:
        check_tokens("token", token, known)
        check_tokens("prompt_token", prompt_token, known)
    if not shortest == longest == tokens.shape[1] <= engine.encoder.longest:
        return None
    prompt = prompt.expand(rows, -1, flow.output_size)
    return Utterance(tokens, speaker.expand(rows, -1), prompt)


def check_tokens(name: str, tokens: Tensor, known: int) -> None:
    """Looks at each on the host, so only where one is known to be bad.

    Raises:
        IndexError: one that the embedding, of `known`, does not have.
    """
    for token in tokens.long().flatten().tolist():
        if not 0 <= token < known:
            raise IndexError(f"chatterbox_fast: {name} must be in [0, {known}), got {token}")


def flow_inference(
    flow: Any,
    engine: FlowEngine,
    utterance: Utterance,
    *,
    finalize: bool,
    n_timesteps: int | None,
    noised_mels: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    """The mel ``(B, 80, M)`` of the speech, without the voice's prompt.

    Args:
        finalize: False cuts the frames whose tokens have not been followed by the lookahead yet.
        n_timesteps: Euler steps. None, which stock's own S3Gen.forward() hands on by default and
            fails at, is as many as its flow_inference() takes by default.
        noised_mels: ``(B, 80, M')``, takes the place of the last M' frames of noise (meanflow), of
            those before finalize=False cuts them: stock gives as many as the speech has, so that
            they begin where the prompt ends.
        generator: what the noise is drawn from; None is torch's global generator.
    """
    rows, whole = len(utterance.tokens), flow.token_mel_ratio * utterance.tokens.shape[1]
    prompt, bands = utterance.prompt, flow.output_size
    frames = check_frames(flow, whole, prompt.shape[1], finalize)
    speaker = flow.spk_embed_affine_layer(F.normalize(utterance.speaker, dim=1))
    # Stock's draw, in stock's order of dimensions.
    with drawing(speaker.device, generator):
        noise = speaker.new_empty(rows, bands, frames).normal_(generator=generator)
    if noised_mels is not None:
        first = check_noised_mels(noised_mels, whole)
        noise[..., first:] = noised_mels[..., : max(frames - first, 0)]
    noise = noise.transpose(1, 2).contiguous()
    if n_timesteps is None:
        n_timesteps = MEANFLOW_STEPS if flow.decoder.estimator.meanflow else STEPS
    mel = engine.mel(utterance.tokens, speaker, prompt.to(noise.dtype), noise, n_timesteps)
    return mel[:, prompt.shape[1] :].transpose(1, 2)


def check_frames(flow: Any, whole: int, known: int, finalize: bool) -> int:
    """The frames of an utterance's mel, of which the voice's prompt has `known`.

    Args:
        whole: those of all tokens; finalize=False cuts them.

    Raises:
        ValueError: a prompt longer than that; with finalize=False, nothing beyond the prompt.
    """
    if known > whole:
        raise ValueError(
            f"chatterbox_fast: prompt_feat must have at most the {whole} frames of all tokens' "
            f"mel, got {known}"
        )
    if finalize is not False:
        return whole
    held_back = flow.token_mel_ratio * flow.pre_lookahead_len
    if whole - held_back <= known:
        tokens = (whole - known) // flow.token_mel_ratio
        raise ValueError(
            f"chatterbox_fast: with finalize=False, which holds the last {flow.pre_lookahead_len} "
            f"tokens back, token must have more than {flow.pre_lookahead_len} tokens beyond "
            f"prompt_feat's {known} frames, got {tokens}"
        )
    return whole - held_back


def check_noised_mels(noised_mels: Tensor, whole: int) -> int:
    """The frame that noised_mels begins at.

    Raises:
        ValueError: longer than the mel.
    """
    if (given := noised_mels.shape[2]) > whole:
        raise ValueError(
            f"chatterbox_fast: noised_mels must have at most the {whole} frames of all tokens' "
            f"mel, got {given}"
        )
    return whole - given


def read_mel(engine: VocoderEngine, arguments: dict[str, Any]) -> Tensor | None:
    """The mel of stock's ``mel2wav.inference`` as ``(B, T, 80)``; None where stock must run.

    Raises:
        ValueError: a mel without frames.
    """
    mel: Tensor = arguments["speech_feat"]
    first = engine.weights.f0_convs[0].weight
    if mel.ndim != 3 or mel.shape[1] != first.shape[1] or mel.dtype != first.dtype:
        return None
    if mel.shape[2] == 0:
        raise ValueError(
            f"chatterbox_fast: speech_feat must have at least one frame, got {tuple(mel.shape)}; "
            "no speech tokens, no audio"
        )
    return mel.transpose(1, 2).contiguous()


def vocoder_inference(
    engine: VocoderEngine,
    mel: Tensor,
    cache_source: Tensor,
    *,
    generator: torch.Generator | None,
    phase_generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """The waveform ``(B, L)`` of mel ``(B, T, 80)``, and its excitation ``(B, 1, L)``.

    Args:
        cache_source: ``(B, 1, N)``, takes the place of the first N samples of the excitation.
        generator: what the noise is drawn from; None is torch's global generator.
        phase_generator: the same for the phase, which stock draws on torch's default device.
    """
    vocoder = engine.weights
    draws = draw_source(vocoder, mel, generator, phase_generator)
    excitation = source(vocoder, f0(vocoder, mel), draws)
    if cache_source.shape[2] != 0:
        excitation[:, :, : cache_source.shape[2]] = cache_source
    return engine.decode(vocoder, mel, excitation), excitation


def draw_source(
    vocoder: VocoderWeights,
    mel: Tensor,
    generator: torch.Generator | None,
    phase_generator: torch.Generator | None,
) -> Draws:
    """Stock's draws in stock's order, the last of which stock does not use."""
    rows, samples = len(mel), mel.shape[1] * vocoder.upsample
    harmonics, default = len(vocoder.harmonics), torch.get_default_device()
    with drawing(default, phase_generator):
        phase = torch.rand(rows, harmonics, 1, generator=phase_generator, device=default)
    phase = phase.mul_(2 * math.pi).sub_(math.pi)
    phase[:, 0] = 0
    with drawing(mel.device, generator):
        noise = mel.new_empty(rows, harmonics, samples).normal_(generator=generator)
        mel.new_empty(rows, samples, 1).normal_(generator=generator)
    # Few bytes, which the driver takes over before the call returns: no wait for the device.
    return Draws(phase.to(mel.device, mel.dtype, non_blocking=True), noise)
