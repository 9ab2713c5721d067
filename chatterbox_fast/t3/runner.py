"""The loop around the decode step: what replaces stock's ``T3.inference``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import dispatch, reference
from ..ops import SamplingParams
from ..options import Backend
from ..request import current_request
from ..rng import PhiloxStream
from .decode_step import decode_step, draw_token
from .prefill import prefill, prefix_embeds
from .state import CAPACITIES, DecodeState
from .weights import T3Weights


@torch.inference_mode()
def inference(
    t3: Any,
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
    backend: Backend = "auto",
) -> Tensor:
    """Speech tokens for a text; stock's ``T3.inference`` with a static KV cache.

    Args:
        t3: the stock module.
        t3_cond: stock's `T3Cond`. Not changed: stock stores the prompt's embedding in it.
        text_tokens: ``(S,)``, ``(1, S)`` or ``(2, S)`` ints with start and stop token. Only the
            first row is read: stock passes two for CFG and blanks the second one's text.
        initial_speech_tokens: ``(B, n)`` ints in place of one start token.
        max_new_tokens: at most this many tokens; None is the model's own maximum.
        temperature, top_p, min_p, repetition_penalty, cfg_weight: see `SamplingParams`.
        generator: what to draw from; None is torch's global one.
        backend: which implementation of the ops to prefer.
        num_return_sequences, stop_on_eos, do_sample, length_penalty: ignored, as in stock.

    Returns:
        ``(1, n)`` int64, the stop token included where it was drawn: in float32 stock's own
        tokens from the same generator state, which is left where stock leaves it. With
        ``cfg_weight=0``, where stock's generate() crashes, the unconditional row is left out.

    Raises:
        ValueError: a parameter out of range, a text or a token count beyond the model's positions.
        NotImplementedError: `prepend_prompt_speech_tokens`, as in stock.
        RuntimeError: the model's logits had a NaN or nothing finite.
    """
    del num_return_sequences, stop_on_eos, do_sample, length_penalty
    if prepend_prompt_speech_tokens is not None:
        raise NotImplementedError("chatterbox_fast: prepend_prompt_speech_tokens must be None")
    sampling = SamplingParams(cfg_weight, repetition_penalty, temperature, min_p, top_p)
    text = check_text(t3, text_tokens)
    limit = check_max_new_tokens(t3, max_new_tokens)
    weights = T3Weights.of(t3)
    initial = check_initial_speech_tokens(t3, initial_speech_tokens)
    embeds = prefix_embeds(t3, copy.copy(t3_cond), text, initial, cfg_weight)
    rows, prefix, _ = embeds.shape
    if prefix + limit > CAPACITIES[-1]:
        raise ValueError(
            f"chatterbox_fast: max_new_tokens must be at most {CAPACITIES[-1] - prefix} after "
            f"{prefix} positions of conditioning and text, got {limit}"
        )
    state = DecodeState.allocate(
        weights,
        sampling,
        rows=rows,
        prefix=prefix,
        max_new_tokens=limit,
        start_token=t3.hp.start_speech_token,
        stop_token=t3.hp.stop_speech_token,
        backend=backend,
    )
    logits = prefill(weights, state, embeds)
    stream = _philox_stream(state, logits, generator, limit)
    draw_token(weights, state, logits, generator)
    drawn = _decode(weights, state, generator, prefix, limit)
    if stream is not None:
        stream.close(drawn)
    return state.tokens[:, :drawn].clone()


def _philox_stream(
    state: DecodeState, logits: Tensor, generator: torch.Generator | None, draws: int
) -> PhiloxStream | None:
    """On a GPU, where a kernel draws: gives `state` the generator's next numbers."""
    backend = dispatch.choose("cfg_sample", logits.device, state.backend, logits.dtype).backend
    if not logits.is_cuda or backend == "reference":
        return None
    stream = PhiloxStream(generator, logits.device, logits.shape[-1], draws)
    state.philox = stream.state
    return stream


def _decode(
    weights: T3Weights,
    state: DecodeState,
    generator: torch.Generator | None,
    prefix: int,
    limit: int,
) -> int:
    """Steps until the stop token or `limit` tokens; the number of tokens drawn."""
    with tqdm(
        total=limit, desc="Sampling", dynamic_ncols=True, disable=not current_request().progress
    ) as bar:
        for drawn in range(1, limit + 1):
            bar.update()
            if _finished(state, drawn) or drawn == limit:
                return drawn
            state.grow(weights, prefix + drawn)
            decode_step(weights, state, generator)
    raise AssertionError("unreachable: limit is at least 1")


def _finished(state: DecodeState, drawn: int) -> bool:
    """Reads the flags on the host: the loop's only synchronisation.

    Raises:
        RuntimeError: a token had to be drawn from logits with a NaN or nothing finite.
    """
    flags = int(state.flags)
    if flags & reference.FAILED:
        raise RuntimeError(
            f"chatterbox_fast: T3's logits for token {drawn} have a NaN or no finite value; "
            "check the conditioning and the weights"
        )
    return bool(flags & reference.STOPPED)


def check_text(t3: Any, text_tokens: Tensor) -> Tensor:
    """`text_tokens` as one row ``(1, S)`` int64 on the model's device.

    Raises:
        ValueError: another shape, no start or stop token, an id the model does not have, or more
            tokens than it has positions.
    """
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
        ValueError: another shape, rows that differ, or an id the model does not have.
    """
    if tokens is None:
        return None
    rows = torch.atleast_2d(tokens).to(dtype=torch.long, device=t3.device)
    if rows.dim() != 2 or rows.shape[0] not in (1, 2) or not bool((rows == rows[:1]).all()):
        raise ValueError(
            "chatterbox_fast: initial_speech_tokens must be (n,), (1, n) or (2, n) with equal "
            f"rows, got shape {tuple(tokens.shape)}"
        )
    vocabulary = t3.speech_emb.num_embeddings
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= vocabulary):
        raise ValueError(f"chatterbox_fast: initial_speech_tokens must be in [0, {vocabulary})")
    return rows[:1]


def check_max_new_tokens(t3: Any, max_new_tokens: int | None) -> int:
    """The token limit of a request.

    Raises:
        ValueError: not in [1, the model's speech positions).
    """
    most = t3.speech_pos_emb.emb.num_embeddings - 1
    if max_new_tokens is None:
        return min(int(t3.hp.max_speech_tokens), most)
    if not 1 <= max_new_tokens <= most:
        raise ValueError(
            f"chatterbox_fast: max_new_tokens must be in [1, {most}], got {max_new_tokens}"
        )
    return int(max_new_tokens)
