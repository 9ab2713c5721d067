"""Conditioning and text through T3 in one pass, straight into the KV cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .decode_step import backbone, last_logits
from .state import DecodeState
from .weights import T3Weights


def prefix_embeds(
    t3: Any,
    t3_cond: Any,
    text_tokens: Tensor,
    initial_speech_tokens: Tensor | None,
    cfg_weight: float,
) -> Tensor:
    """T3's input before the first token: ``(B, S, dim)``, B = 2 with CFG, else 1.

    Conditioning, text ``(1, S)``, and the start token twice, both at speech position 0: stock
    appends one as `initial_speech_tokens` and one as `bos_embed`. With CFG, row 1 has its text
    embeddings zeroed before the text positions are added: it keeps those and the conditioning.
    """
    rows = 2 if cfg_weight > 0 else 1
    text = text_tokens.expand(rows, -1)
    start = torch.full_like(text[:, :1], t3.hp.start_speech_token)
    speech = start if initial_speech_tokens is None else initial_speech_tokens.expand(rows, -1)
    embeds, _ = t3.prepare_input_embeds(
        t3_cond=t3_cond, text_tokens=text, speech_tokens=speech, cfg_weight=cfg_weight
    )
    bos = t3.speech_emb(start) + t3.speech_pos_emb.get_fixed_embedding(0)
    return torch.cat([embeds, bos], dim=1)


def prefill(weights: T3Weights, state: DecodeState, embeds: Tensor) -> Tensor:
    """Runs ``(B, S, dim)`` through the backbone, fills cache slots 0..S-1, returns last logits."""
    length = embeds.shape[1]
    cos, sin = state.cos[:length], state.sin[:length]

    def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = reference.apply_rope(k, cos, sin)
        state.k_cache[number, :, :, :length] = k
        state.v_cache[number, :, :, :length] = v
        q = reference.apply_rope(q, cos, sin)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return last_logits(weights, backbone(weights, embeds, attend))
