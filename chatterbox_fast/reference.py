"""Plain-torch twin of every op: specification, fallback, test oracle and benchmark baseline.

Nothing here reads a tensor's value on the host, so each runs in a CUDA graph and under fake
tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cfg_sample(
    logits: Tensor, seen: Tensor, params: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draws one token a row from logits, in the order of stock English T3.

    CFG ``c + w (c - u)`` -> repetition penalty -> temperature -> min-p -> top-p -> draw.

    Args:
        logits: ``(R, V)``, or ``(2R, V)`` with CFG: conditional rows first, then unconditional.
        seen: ``(R, V)`` bool, the ids the repetition penalty applies to. Not changed here.
        params: ``(R, 5)`` as `SamplingParams.pack` makes it, of the logits' dtype and device.
        generator: what to draw from; None is torch's global one.

    Returns:
        token ``(R,)`` int64, and error ``(R,)`` bool: True where the row had a NaN or no finite
        logit, and the token means nothing.

    Equal to the processors of transformers (RepetitionPenalty, Temperature, MinP, TopP) followed
    by ``torch.multinomial(softmax(scores), 1)``, which is ``argmax(p / q)`` with ``q ~ Exp(1)``:
    the same token from the same generator state, and the same state after.
    """
    rows = seen.shape[0]
    cfg_weight, penalty, temperature, min_p, one_minus_top_p = params.split(1, dim=-1)
    scores = logits[:rows]
    if logits.shape[0] == 2 * rows:
        scores = scores + cfg_weight * (scores - logits[rows:])
    penalised = torch.where(scores < 0, scores * penalty, divide(scores, penalty))
    scores = torch.where(seen, penalised, scores)
    scores = divide(scores, temperature)
    scores = _keep_min_p(scores, min_p)
    scores = _keep_top_p(scores, one_minus_top_p)
    probs = scores.softmax(dim=-1)
    noise = torch.empty_like(probs).exponential_(1.0, generator=generator)
    return (probs / noise).argmax(dim=-1), probs.isnan().any(dim=-1)


def divide(x: Tensor, divisor: Tensor) -> Tensor:
    """``x / divisor`` as torch rounds it where stock's divisor is a Python number.

    On CUDA torch multiplies by the reciprocal then; with a tensor it would divide.
    """
    return x * divisor.reciprocal() if x.is_cuda else x / divisor


def _keep_min_p(scores: Tensor, min_p: Tensor) -> Tensor:
    """Removes ids less probable than `min_p` times the most probable one."""
    probs = scores.softmax(dim=-1)
    return scores.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), -float("inf"))


def _keep_top_p(scores: Tensor, one_minus_top_p: Tensor) -> Tensor:
    """Removes the least probable ids whose probabilities sum to at most 1 - top_p; one stays."""
    ascending, order = scores.sort(dim=-1, descending=False)
    remove = ascending.softmax(dim=-1).cumsum(dim=-1) <= one_minus_top_p
    remove[..., -1:] = False
    return scores.masked_fill(remove.scatter(-1, order, remove), -float("inf"))


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of Llama.

    Args:
        x: ``(B, H, S, D)``. cos, sin: ``(S, D)``, both halves alike.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """Attention of one new token: rotates q and k, appends k and v, attends to what is valid.

    Args:
        q, k, v: ``(B, H, 1, D)``, not rotated.
        k_cache, v_cache: ``(B, H, capacity, D)``; written in place at `position`.
        position: ``(1,)`` int64 on the device, in ``[0, capacity)``.
        cos, sin: ``(positions, D)``, the rotary table.

    Returns:
        ``(B, H, 1, D)``: softmax(q k' / sqrt(D)) v over cache slots ``0 .. position``.
    """
    here_cos, here_sin = cos.index_select(0, position), sin.index_select(0, position)
    k_cache.index_copy_(2, position, apply_rope(k, here_cos, here_sin))
    v_cache.index_copy_(2, position, v)
    slots = torch.arange(k_cache.shape[2], device=q.device)
    return F.scaled_dot_product_attention(
        apply_rope(q, here_cos, here_sin), k_cache, v_cache, attn_mask=(slots <= position)[None]
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Llama's RMSNorm over the last dimension: statistics in float32, as transformers rounds it."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
