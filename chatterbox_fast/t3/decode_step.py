"""One decode step of T3 as a pure function over preallocated buffers.

It runs the same on a CPU, on a GPU and inside a CUDA graph: no value is read on the host, and
every quantity that changes from step to step (position, count, flags, parameters) is a tensor.

    embedding -> 30 x [norm - qkv - attention over the in-place KV cache - o-proj
                       norm - gate, up - silu - down-proj] -> norm -> head -> draw -> embedding
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .backbone import EAGER, Layers, last_logits
from .state import DecodeState
from .weights import T3Weights


def decode_step(
    weights: T3Weights,
    state: DecodeState,
    slots: int,
    generator: torch.Generator | None = None,
    layers: Layers = EAGER,
) -> None:
    """Runs the last drawn token through the backbone and draws the next one, in place.

    Args:
        slots: how many cache slots attention looks at; more than `state.position`, else the flag
            `FAILED` is set. The fewer, the less the reference reads; kernels read the position. In
            a CUDA graph it is the capacity.
    """
    logits = step_logits(weights, state, slots, layers)
    draw_token(weights, state, logits, generator)


def step_logits(
    weights: T3Weights, state: DecodeState, slots: int, layers: Layers = EAGER
) -> Tensor:
    """Logits ``(B, V)`` after `state.embedding`, whose keys and values are appended."""
    x = state.embedding
    for number, layer in enumerate(weights.layers):
        k_cache, v_cache = state.k_cache[number, :, :, :slots], state.v_cache[number, :, :, :slots]
        x = layers.decode(
            layer, x, k_cache, v_cache, state.position, state.flags, state.cos, state.sin,
            state.arrivals,
        )  # fmt: skip
    state.position += 1
    return last_logits(weights, x)


def draw_token(
    weights: T3Weights,
    state: DecodeState,
    logits: Tensor,
    generator: torch.Generator | None = None,
) -> None:
    """Draws a token from `logits` ``(B, V)`` and prepares the next step's input, in place."""
    token = ops.cfg_sample_by(state.sampler)(
        logits, state.seen, state.params, state.flags, stop_token=state.stop_token,
        generator=generator, philox=state.philox,
    )  # fmt: skip
    feed_token(weights, state, token)


def feed_token(weights: T3Weights, state: DecodeState, token: Tensor) -> None:
    """Makes `token` ``(R,)`` the next of the sequence and the next step's input, in place.

    The token drawn as number i enters the next step as ``speech_emb[token] + speech_pos[i + 1]``.
    """
    state.tokens.index_copy_(1, state.count, token[:, None])
    state.count += 1
    embedding = weights.speech_emb[token] + weights.speech_pos.index_select(0, state.count)
    state.embedding.copy_(embedding.expand(state.rows, -1)[:, None])
