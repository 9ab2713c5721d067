"""The loop around the decode step: what replaces stock's ``T3.inference``."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..graph import is_out_of_memory
from ..request import current_request
from ..rng import PhiloxStream
from ..sampling import SamplingParams
from .decode_step import draw_token
from .engine import Engine, out_of_memory
from .pool import Lease
from .prefill import VoicePrefix, check_conditioning, prefill, prefix_length, text_embeds
from .state import CAPACITIES, DecodeState


@torch.inference_mode()
def inference(
    t3: Any,
    engine: Engine,
    *,
    t3_cond: Any,
    text_tokens: Tensor,
    initial_speech_tokens: Tensor | None = None,
    prepend_prompt_speech_tokens: Tensor | None = None,
    num_return_sequences: int = 1,
    max_new_tokens: int | None = None,
    stop_on_eos: bool = True,
    do_sample: bool = True,
    temperature: float = 0.8,
    top_p: float = 0.95,
    min_p: float = 0.05,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.2,
    cfg_weight: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Speech tokens for a text: what stock's ``T3.inference`` returns.

    Args:
        t3: the stock module.
        engine: made for it.
        t3_cond: stock's `T3Cond`. Not changed: stock stores the prompt's embedding in it.
        text_tokens: ``(S,)``, ``(1, S)`` or ``(2, S)`` ints with start and stop token. Only the
            first row is read: stock passes two for CFG and blanks the second one's text.
        initial_speech_tokens: ``(B, n)`` ints in place of one start token.
        max_new_tokens: at most this many tokens; None is the model's own maximum.
        temperature, top_p, min_p, repetition_penalty, cfg_weight: see `SamplingParams`.
        generator: what to draw from; None is torch's global one.
        num_return_sequences, stop_on_eos, do_sample, length_penalty: ignored, as in stock.

    Returns:
        ``(1, n)`` int64, the stop token included where it was drawn: in exact precision stock's
        own tokens from the same generator state, which is left where stock leaves it. With
        ``cfg_weight=0``, where stock's generate() crashes, the unconditional row is left out.

    Raises:
        TypeError: tokens that are not a tensor of ints, a token count that is no int.
        ValueError: a parameter out of range, a text or a token count beyond the model's positions,
            a voice that does not fit the model.
        NotImplementedError: `prepend_prompt_speech_tokens`, as in stock.
        RuntimeError: the model's logits had a NaN or nothing finite.
        torch.OutOfMemoryError: also with the engine's caches freed.
    """
    del num_return_sequences, stop_on_eos, do_sample, length_penalty
    if prepend_prompt_speech_tokens is not None:
        raise NotImplementedError("chatterbox_fast: prepend_prompt_speech_tokens must be None")
    sampling = SamplingParams(cfg_weight, repetition_penalty, temperature, min_p, top_p)
    text = check_text(t3, text_tokens)
    limit = check_max_new_tokens(t3, max_new_tokens)
    initial = check_initial_speech_tokens(t3, initial_speech_tokens)
    try:
        key = check_conditioning(t3, t3_cond)
        given = 1 if initial is None else initial.shape[1]
        check_length(prefix_length(t3, t3_cond) + text.shape[1] + given + 1, limit)
        voice = engine.voice(t3, t3_cond, key)
        embeds = text_embeds(t3, text, initial, cfg_weight)
        return _speak(engine, voice, embeds, sampling, t3.hp.start_speech_token, limit, generator)
    except RuntimeError as failure:
        if not is_out_of_memory(failure):
            raise
        said = str(failure)
    engine.clear()
    raise out_of_memory(engine.device, said)


def _speak(
    engine: Engine,
    voice: VoicePrefix,
    embeds: Tensor,
    sampling: SamplingParams,
    start_token: int,
    limit: int,
    generator: torch.Generator | None,
) -> Tensor:
    start = voice.length + embeds.shape[1]
    with engine.slots.lease(len(embeds), start + 1) as lease:
        lease.slot.state.reset(sampling, start_token)
        return _decode_all(engine, lease, voice, embeds, limit, generator)


def _decode_all(
    engine: Engine,
    lease: Lease,
    voice: VoicePrefix,
    embeds: Tensor,
    limit: int,
    generator: torch.Generator | None,
) -> Tensor:
    state, weights = lease.slot.state, engine.weights
    logits = prefill(weights.prefill, state, voice, embeds, engine.rotary, engine.layers)
    stream = _philox_stream(state, generator, limit)
    draw_token(weights.decode, state, logits, generator)
    drawn = _decode(lease, generator, voice.length + embeds.shape[1], limit)
    tokens = lease.slot.state.tokens[:, :drawn].clone()
    used = _up_to_stop(tokens[0], state.stop_token)
    if stream is not None:
        stream.close(used)
    return tokens[:, :used]


def _philox_stream(
    state: DecodeState, generator: torch.Generator | None, draws: int
) -> PhiloxStream | None:
    """Where a kernel draws on a GPU: gives `state` the generator's next numbers."""
    if state.philox is None:
        return None
    stream = PhiloxStream(generator, state.philox.device, state.seen.shape[1], draws)
    state.philox.copy_(stream.state)
    return stream


def _decode(lease: Lease, generator: torch.Generator | None, start: int, limit: int) -> int:
    """Steps until the stop token was seen or `limit` tokens; the number of tokens drawn.

    On a GPU some are drawn after the stop token.
    """
    poll = lease.slot.poll
    poll.start()
    hidden = not current_request().progress
    with tqdm(total=limit, desc="Sampling", dynamic_ncols=True, disable=hidden) as bar:
        for drawn in range(1, limit):
            bar.update()
            if poll.finished(lease.slot.state.flags, drawn):
                return drawn
            lease.grow(start + drawn - 1)
            lease.slot.step(start + drawn, generator)
        bar.update()
    poll.finish(lease.slot.state.flags, limit)
    return limit


def _up_to_stop(tokens: Tensor, stop_token: int) -> int:
    """How many of `tokens` ``(n,)`` there are up to the first stop token, which counts."""
    stops = (tokens == stop_token).nonzero()
    return int(stops[0]) + 1 if len(stops) else len(tokens)


def check_length(start: int, limit: int) -> None:
    """Raises ValueError where `limit` tokens after `start` positions are more than any cache."""
    if start + limit > CAPACITIES[-1]:
        raise ValueError(
            f"chatterbox_fast: max_new_tokens must be at most {CAPACITIES[-1] - start} after "
            f"{start} positions of conditioning and text, got {limit}"
        )


def check_text(t3: Any, text_tokens: Tensor) -> Tensor:
    """`text_tokens` as one row ``(1, S)`` int64 on the model's device.

    Raises:
        TypeError: not a tensor of ints.
        ValueError: another shape, no start or stop token, an id the model does not have, or more
            tokens than it has positions.
    """
    _check_ids("text_tokens", text_tokens)
    text = torch.atleast_2d(text_tokens).to(dtype=torch.long, device=t3.device)
    if text.dim() != 2 or text.shape[0] not in (1, 2):
        raise ValueError(
            "chatterbox_fast: text_tokens must be (S,), (1, S) or (2, S), "
            f"got shape {tuple(text_tokens.shape)}"
        )
    text = text[:1]
    for name in ("start_text_token", "stop_text_token"):
        if not bool((text == getattr(t3.hp, name)).any()):
            raise ValueError(f"chatterbox_fast: text_tokens must contain the {name}")
    vocabulary, positions = t3.text_emb.num_embeddings, t3.text_pos_emb.emb.num_embeddings
    if text.shape[1] > positions:
        raise ValueError(
            f"chatterbox_fast: text must be at most {positions} tokens long, got {text.shape[1]}"
        )
    if int(text.min()) < 0 or int(text.max()) >= vocabulary:
        raise ValueError(f"chatterbox_fast: text_tokens must be in [0, {vocabulary})")
    return text


def check_initial_speech_tokens(t3: Any, tokens: Tensor | None) -> Tensor | None:
    """`tokens` as one row ``(1, n)`` int64 on the model's device.

    Raises:
        TypeError: not a tensor of ints.
        ValueError: another shape, rows that differ, an id the model does not have, or more than
            it has positions.
    """
    if tokens is None:
        return None
    _check_ids("initial_speech_tokens", tokens)
    rows = torch.atleast_2d(tokens).to(dtype=torch.long, device=t3.device)
    if rows.dim() != 2 or rows.shape[0] not in (1, 2) or not bool((rows == rows[:1]).all()):
        raise ValueError(
            "chatterbox_fast: initial_speech_tokens must be (n,), (1, n) or (2, n) with equal "
            f"rows, got shape {tuple(tokens.shape)}"
        )
    vocabulary = t3.speech_emb.num_embeddings
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= vocabulary):
        raise ValueError(f"chatterbox_fast: initial_speech_tokens must be in [0, {vocabulary})")
    positions = t3.speech_pos_emb.emb.num_embeddings
    if rows.shape[1] > positions:
        raise ValueError(
            f"chatterbox_fast: initial_speech_tokens must be at most {positions} long, "
            f"got {rows.shape[1]}"
        )
    return rows[:1]


def _check_ids(name: str, tokens: Any) -> None:
    if not torch.is_tensor(tokens):
        got = f"a {type(tokens).__qualname__}"
    elif tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        got = str(tokens.dtype)
    else:
        return
    raise TypeError(f"chatterbox_fast: {name} must be a tensor of ints, got {got}")


def check_max_new_tokens(t3: Any, max_new_tokens: int | None) -> int:
    """The token limit of a request.

    Raises:
        TypeError: not an int. ValueError: not in [1, the model's speech positions).
    """
    most = t3.speech_pos_emb.emb.num_embeddings - 1
    if max_new_tokens is None:
        return min(int(t3.hp.max_speech_tokens), most)
    try:
        limit = operator.index(max_new_tokens)
    except TypeError:  # of a tensor of floats too, which has an __index__
        raise TypeError(
            f"chatterbox_fast: max_new_tokens must be an int, got {max_new_tokens!r}"
        ) from None
    if not 1 <= limit <= most:
        raise ValueError(f"chatterbox_fast: max_new_tokens must be in [1, {most}], got {limit}")
    return limit
