"""One decode step of T3 as a pure function over preallocated buffers.

It runs the same on a CPU, on a GPU and inside a CUDA graph: no value is read on the host, and
every quantity that changes from step to step (position, count, flags, parameters) is a tensor.

    embedding -> 30 x [norm - qkv - attention over the in-place KV cache - o-proj
                       norm - gate, up - silu - down-proj] -> norm -> head -> draw -> embedding
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, reference
from .state import DecodeState
from .weights import LayerWeights, T3Weights

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer number, q, k, v), each (B, H, S, D) and not rotated -> attention output, same shape."""


def decode_step(
    weights: T3Weights, state: DecodeState, generator: torch.Generator | None = None
) -> None:
    """Runs the last drawn token through the backbone and draws the next one, in place."""

    def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.decode_attention(
            q, k, v, state.k_cache[number], state.v_cache[number], state.position,
            state.cos, state.sin,
        )  # fmt: skip

    hidden = backbone(weights, state.embedding, attend)
    state.position += 1
    draw_token(weights, state, last_logits(weights, hidden), generator)


def backbone(weights: T3Weights, x: Tensor, attend: Attend) -> Tensor:
    """All layers over ``(B, S, dim)``; `attend` decides what attention sees and caches."""
    for number, layer in enumerate(weights.layers):
        x = x + _attention(weights, layer, number, x, attend)
        hidden = reference.rms_norm(x, layer.post_norm, weights.eps)
        gated = F.silu(F.linear(hidden, layer.gate)) * F.linear(hidden, layer.up)
        x = x + F.linear(gated, layer.down)
    return x


def _attention(
    weights: T3Weights, layer: LayerWeights, number: int, x: Tensor, attend: Attend
) -> Tensor:
    hidden = reference.rms_norm(x, layer.input_norm, weights.eps)
    rows, length, _ = hidden.shape
    split = (rows, length, weights.heads, weights.head_dim)
    q, k, v = (F.linear(hidden, w).view(split).transpose(1, 2) for w in (layer.q, layer.k, layer.v))
    out = attend(number, q, k, v)
    return F.linear(out.transpose(1, 2).reshape(rows, length, -1), layer.o)


def last_logits(weights: T3Weights, hidden: Tensor) -> Tensor:
    """Logits ``(B, V)`` of the last position of ``(B, S, dim)``."""
    last = reference.rms_norm(hidden[:, -1], weights.norm, weights.eps)
    return F.linear(last, weights.head)


def draw_token(
    weights: T3Weights,
    state: DecodeState,
    logits: Tensor,
    generator: torch.Generator | None = None,
) -> None:
    """Draws a token from `logits` ``(B, V)`` and prepares the next step's input, in place.

    The token drawn as number i enters the next step as ``speech_emb[token] + speech_pos[i + 1]``.
    """
    token = ops.cfg_sample(
        logits, state.seen, state.params, state.flags, stop_token=state.stop_token,
        generator=generator, philox=state.philox, backend=state.backend,
    )  # fmt: skip
    state.tokens.index_copy_(1, state.count, token[:, None])
    state.count += 1
    embedding = weights.speech_emb[token] + weights.speech_pos.index_select(0, state.count)
    state.embedding.copy_(embedding.expand(state.embedding.shape[0], -1)[:, None])
