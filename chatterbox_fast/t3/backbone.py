"""T3's transformer layers: many positions at once for prefill, one for a decode step.

Pure functions of tensors: they run eagerly, compiled without a graph break, and in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .. import ops, reference
from ..compiling import Compiled
from .projection import project
from .weights import LayerWeights, T3Weights


def decode_layer(
    layer: LayerWeights,
    x: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    flags: Tensor,
    cos: Tensor,
    sin: Tensor,
    arrivals: Tensor,
) -> Tensor:
    """One layer over one new position.

    Args:
        x: ``(B, 1, dim)``.
        k_cache, v_cache: ``(B, H, C, D)``, written in place at `position`; the first C slots of
            the layer's cache, which must hold it.
        position, flags, cos, sin, arrivals: see `ops.decode_attention`.
    """
    attention = ops.decode_attention_by(layer.attention)
    qkv = _fused_qkv(layer, x)[:, 0]
    out = attention(qkv, k_cache, v_cache, position, flags, cos, sin, None, None, arrivals)
    return _after_attention(layer, x, out[:, None])


def prefill_layer(
    layer: LayerWeights,
    x: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
) -> Tensor:
    """One layer over S new positions that follow `start` cached ones.

    Args:
        x: ``(B, S, dim)``.
        k_cache, v_cache: ``(B, H, C, D)``, written in place at ``start .. start + S - 1``.
        cos, sin: ``(S, D)``, the rotary table's rows for the new positions.
        mask: ``(S, start + S)`` bool, what a position attends to.
    """
    q, k, v = _fused_qkv(layer, x).permute(2, 0, 3, 1, 4)
    end = start + x.shape[1]
    k_cache[:, :, start:end] = reference.apply_rope(k, cos, sin).to(k_cache.dtype)
    v_cache[:, :, start:end] = v.to(v_cache.dtype)
    # A GPU is fastest in what the cache has, a CPU in float32.
    computed = k_cache.dtype if x.is_cuda else x.dtype
    out = F.scaled_dot_product_attention(
        reference.apply_rope(q, cos, sin).to(computed),
        k_cache[:, :, :end].to(computed),
        v_cache[:, :, :end].to(computed),
        attn_mask=mask,
    )
    return _after_attention(layer, x, out.to(x.dtype).transpose(1, 2).flatten(2))


def _fused_qkv(layer: LayerWeights, x: Tensor) -> Tensor:
    """q, k and v ``(B, S, 3, H, D)`` of x ``(B, S, dim)``, not rotated."""
    rows, length, _ = x.shape
    return project(layer.qkv, x, layer.input_norm).view(rows, length, 3, layer.heads, -1)


def _after_attention(layer: LayerWeights, x: Tensor, out: Tensor) -> Tensor:
    """The rest of the layer, from attention's output ``(B, S, H D)``."""
    x = layer.o(out, residual=x)
    hidden = project(layer.gate_up, x, layer.post_norm, gated=True)
    return layer.down(hidden, residual=x)


def last_logits(weights: T3Weights, hidden: Tensor) -> Tensor:
    """Logits ``(B, V)`` of the last position of ``(B, S, dim)``."""
    return weights.head(hidden[:, -1], weights.norm)


class Layers(NamedTuple):
    """The two layer functions that an engine calls: eager, or compiled."""

    decode: Callable[..., Tensor]
    prefill: Callable[..., Tensor]


EAGER = Layers(decode_layer, prefill_layer)


def compiled_layers() -> Layers:
    """Both layer functions under torch.compile: one graph for all layers.

    Each engine has its own.
    """
    return Layers(Compiled(decode_layer), Compiled(prefill_layer))
