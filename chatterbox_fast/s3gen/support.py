"""Whether a flow is one that the engine computes as stock does, and if not, why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..modules import is_exactly, why_not_called

CLASSES = {
    "chatterbox.": {
        "CausalConditionalCFM", "ConditionalDecoder", "CausalBlock1D", "CausalConv1d",
        "CausalResnetBlock1D", "BasicTransformerBlock", "FeedForward", "SinusoidalPosEmb",
        "TimestepEmbedding", "Transpose",
    },
    "diffusers.": {"Attention", "GELU", "LoRACompatibleLinear"},
    "torch.": {
        "Conv1d", "Dropout", "LayerNorm", "Linear", "Mish", "ModuleList", "Sequential", "SiLU",
    },
}  # fmt: skip
"""All that stock's flow is made of, by package."""


def why_unsupported(decoder: Any) -> str | None:
    """The reason why this flow must be left to stock, or None where the engine computes the same.

    Args:
        decoder: ``model.s3gen.flow.decoder``.
    """
    if not isinstance(decoder, nn.Module) or not is_exactly(
        decoder, "CausalConditionalCFM", "chatterbox."
    ):
        return f"the flow is a {type(decoder).__qualname__}, not Chatterbox's"
    if decoder.training:
        return "the module is in training mode"
    return (
        _why_not_parts(decoder)
        or _why_not_structure(decoder)
        or why_not_called([decoder])
        or _why_not_tensors(decoder)
    )


def _why_not_parts(decoder: nn.Module) -> str | None:
    for module in decoder.modules():
        name = type(module).__qualname__
        if not any(
            is_exactly(module, name, package) and name in names
            for package, names in CLASSES.items()
        ):
            return f"a {name} is in the flow, which stock's has not"
    return None


def _why_not_structure(decoder: Any) -> str | None:
    estimator = decoder.estimator
    if not estimator.causal or estimator.static_chunk_size != 0:
        return "the estimator is not causal, or attends in chunks"
    if len(estimator.down_blocks) != 1 or len(estimator.up_blocks) != 1:
        return f"the estimator has {len(estimator.down_blocks)} levels, not one"
    if not estimator.meanflow and decoder.t_scheduler != "cosine":
        return f"the schedule is {decoder.t_scheduler!r}, not 'cosine'"
    for module in estimator.modules():
        if type(module).__qualname__ == "Attention" and not _is_plain(module):
            return "an Attention does more than Chatterbox's"
        if type(module).__qualname__ == "GELU" and module.approximate != "none":
            return f"a GELU is approximated by {module.approximate!r}"
        if getattr(module, "_chunk_size", None) is not None:
            return "feed-forward layers are chunked"
    return None


def _is_plain(attention: Any) -> bool:
    """Whether diffusers' Attention is softmax(q k / sqrt(d)) v and a projection, no more."""
    width = attention.to_q.out_features // attention.heads
    return (
        type(attention.processor).__qualname__ in ("AttnProcessor", "AttnProcessor2_0")
        and attention.scale == width**-0.5
        and attention.rescale_output_factor == 1.0
        and not attention.residual_connection
        and attention.to_k.out_features == attention.to_q.out_features
        and all(getattr(attention, f"to_{part}").bias is None for part in "qkv")
    )


def _why_not_tensors(decoder: nn.Module) -> str | None:
    kinds = {(str(p.dtype), str(p.device)) for p in decoder.parameters()}
    if len(kinds) != 1 or next(iter(kinds))[0] != "torch.float32":
        found = ", ".join(sorted(" on ".join(kind) for kind in kinds))
        return f"the flow's weights are {found}; the engine takes float32 on one device"
    device = next(decoder.parameters()).device
    if device.type == "meta":
        return "the flow's weights are on meta"
    return "torch.autocast is on" if torch.is_autocast_enabled(device.type) else None


def why_not_request(
    decoder: Any,
    mu: Tensor,
    mask: Tensor,
    spks: Tensor | None,
    cond: Tensor | None,
    meanflow: bool,
) -> str | None:
    """The reason why one call must be left to stock, or None. Reads the mask on the host, once."""
    own = next(decoder.parameters())
    if meanflow != decoder.estimator.meanflow:
        return "meanflow is asked of a model that is not, or the reverse"
    if spks is None or cond is None:
        return "no speaker or no prompt is given"
    if any(t.dtype != own.dtype or t.device != own.device for t in (mu, spks, cond)):
        return "an input has another dtype or device than the weights"
    if len(mu) != 1 or mask.shape != (1, 1, mu.shape[2]) or not bool((mask == 1).all()):
        return "a batch, or a row shorter than its tensor"
    return None
