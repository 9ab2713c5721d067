"""Conditioning and text through T3 in one pass, straight into the KV cache.

The voice comes first in the sequence, and attention looks back only: what its positions leave in
the cache is the same for every text and for both rows of CFG. It is computed once a voice.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backbone import EAGER, Layers, last_logits
from .state import DecodeState
from .weights import T3Weights

Rotary = Callable[[int], tuple[Tensor, Tensor]]
"""positions -> cos and sin ``(positions, D)``."""

MOST_VOICES = 16
"""Prefixes that are kept: 8 MB each at full size in float32."""

_PROMPT = ("cond_prompt_speech_tokens", "cond_prompt_speech_emb")
"""Which voices need not have; the second is stock's own embedding of the first, if it is there."""


class VoicePrefix(NamedTuple):
    """What a voice leaves in the cache: ``(L, 1, H, P, D)`` each, for P positions."""

    k: Tensor
    v: Tensor

    @property
    def length(self) -> int:
        """P."""
        return self.k.shape[3]


def check_conditioning(t3: Any, t3_cond: Any) -> bytes:
    """The key of a voice: a digest of all its values, which are read on the host once.

    Raises:
        ValueError: a field that this model needs is missing, or one that it does not take is
            there; one has another shape, is on another device, or is not finite: a voice that was
            prepared by a model of another class.
    """
    clap = getattr(t3_cond, "clap_emb", None)
    _must(clap is None, "clap_emb", "None, as in stock", f"a {type(clap).__qualname__}")
    digest, on_host = hashlib.blake2b(), dict[str, Tensor]()
    sizes = {"speaker_emb": t3.hp.speaker_embed_size}
    if t3.hp.emotion_adv:
        sizes["emotion_adv"] = 1
    for name in (*sizes, *_PROMPT):
        value: Any = getattr(t3_cond, name, None)
        if value is None and name in _PROMPT:
            continue
        _must(torch.is_tensor(value), name, "a tensor for this model", value)
        size = sizes.get(name)
        _must(size in (None, value.numel()), name, f"of {size} values", tuple(value.shape))
        _must(value.device == t3.device, name, f"on {t3.device} as T3 is", value.device)
        host = on_host[name] = value.detach().cpu()
        _must(bool(host.isfinite().all()), name, "finite", "NaN or infinite values")
        own = t3.speech_emb.weight.dtype
        whole = name == "cond_prompt_speech_tokens"
        fits = not host.is_floating_point() if whole else host.dtype == own
        _must(fits, name, "of an integer dtype" if whole else f"{own}", host.dtype)
        digest.update(f"{name} {host.dtype} {tuple(value.shape)}".encode())
        digest.update(host.flatten().view(torch.uint8).numpy().tobytes())
    _check_prompt(t3, *map(on_host.get, _PROMPT))
    return digest.digest()


def _check_prompt(t3: Any, tokens: Tensor | None, embedded: Tensor | None) -> None:
    if embedded is not None:
        name, shape = "cond_prompt_speech_emb", tuple(embedded.shape)
        _must(tokens is not None, name, "None without cond_prompt_speech_tokens", shape)
        fits = len(shape) == 3 and (shape[0], shape[2]) == (1, t3.dim)
        _must(fits, name, f"(1, n, {t3.dim})", shape)
    if tokens is None:
        return
    name, vocabulary = "cond_prompt_speech_tokens", t3.speech_emb.num_embeddings
    _must(tokens.dim() == 2 and len(tokens) == 1, name, "(1, n)", tuple(tokens.shape))
    if not tokens.numel():
        return
    lowest, highest = torch.stack(tokens.aminmax()).tolist()
    known = lowest >= 0 and highest < vocabulary
    _must(known, name, f"in [0, {vocabulary})", f"{lowest} to {highest}")
    most = t3.speech_pos_emb.emb.num_embeddings
    _must(tokens.shape[-1] <= most, name, f"at most {most} long", tokens.shape[-1])


def _must(ok: bool, name: str, must: str, got: object) -> None:
    if not ok:
        raise ValueError(
            f"chatterbox_fast: the voice's {name} must be {must}, got {got}; "
            "was it prepared by a model of another class?"
        )


def prefix_length(t3: Any, t3_cond: Any) -> int:
    """The positions of a voice that `check_conditioning` let pass: what stock's T3CondEnc makes.

    One is the speaker's, one the emotion's.
    """
    tokens, embedded = (getattr(t3_cond, name, None) for name in _PROMPT)
    prompt = tokens if embedded is None else embedded
    if prompt is not None and t3.hp.use_perceiver_resampler:
        prompt = t3.cond_enc.perceiver.pre_attention_query
    return 1 + (0 if prompt is None else prompt.shape[1]) + bool(t3.hp.emotion_adv)


def voice_prefix(
    t3: Any, t3_cond: Any, weights: T3Weights, rotary: Rotary, layers: Layers = EAGER
) -> VoicePrefix:
    """Runs a voice's conditioning through the backbone. `t3_cond` is not written to."""
    embeds = t3.prepare_conditioning(copy.copy(t3_cond))
    shape = (len(weights.layers), 1, weights.heads, embeds.shape[1], weights.head_dim)
    prefix = VoicePrefix(*(embeds.new_zeros(shape, dtype=weights.cache_dtype) for _ in range(2)))
    _extend(weights, prefix.k, prefix.v, 0, embeds, rotary, layers)
    return prefix


def text_embeds(
    t3: Any, text_tokens: Tensor, initial_speech_tokens: Tensor | None, cfg_weight: float
) -> Tensor:
    """T3's input between the voice and the first token: ``(B, S, dim)``, B = 2 with CFG, else 1.

    Text ``(1, S)``, and the start token twice, both at speech position 0: stock appends one as
    `initial_speech_tokens` and one as `bos_embed`. With CFG, row 1 has its text embeddings zeroed
    before the text positions are added: it keeps those.
    """
    rows = 2 if cfg_weight > 0 else 1
    text = text_tokens.expand(rows, -1)
    embedded = t3.text_emb(text)
    embedded[1:].zero_()
    start = torch.full_like(text[:, :1], t3.hp.start_speech_token)
    speech = start if initial_speech_tokens is None else initial_speech_tokens.expand(rows, -1)
    return torch.cat(
        [
            embedded + t3.text_pos_emb(text),
            t3.speech_emb(speech) + t3.speech_pos_emb(speech),
            t3.speech_emb(start) + t3.speech_pos_emb.get_fixed_embedding(0),
        ],
        dim=1,
    )


def prefill(
    weights: T3Weights,
    state: DecodeState,
    prefix: VoicePrefix,
    embeds: Tensor,
    rotary: Rotary,
    layers: Layers = EAGER,
) -> Tensor:
    """Fills the cache with the voice and ``(B, S, dim)`` after it; returns the last logits."""
    start, end = prefix.length, prefix.length + embeds.shape[1]
    state.k_cache[:, :, :, :start] = prefix.k
    state.v_cache[:, :, :, :start] = prefix.v
    hidden = _extend(weights, state.k_cache, state.v_cache, start, embeds, rotary, layers)
    state.position.fill_(end)
    return last_logits(weights, hidden)


def _extend(
    weights: T3Weights,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
    x: Tensor,
    rotary: Rotary,
    layers: Layers,
) -> Tensor:
    """Runs ``(B, S, dim)`` as the positions from `start` on; the hidden states of those."""
    length = x.shape[1]
    end = start + length
    cos, sin = (table[start:end] for table in rotary(end))
    mask = torch.ones(length, end, dtype=torch.bool, device=x.device).tril(diagonal=start)
    for number, layer in enumerate(weights.layers):
        x = layers.prefill(layer, x, k_cache[number], v_cache[number], start, cos, sin, mask)
    return x
