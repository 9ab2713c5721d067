"""How far a precision is from stock in float32: teacher-forced logits, and their divergence.

Both sides read the same tokens, so that one drawn differently does not make the rest
incomparable. What is compared is what is drawn from: the guided logits over the temperature.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .sampling import SamplingParams
from .t3.decode_step import feed_token, step_logits
from .t3.engine import Engine
from .t3.prefill import prefill, text_embeds


@torch.inference_mode()
def stock_logits(t3: Any, t3_cond: Any, text_tokens: Tensor, tokens: Tensor) -> Tensor:
    """Stock's logits before each of `tokens`, by one pass of its own modules, in their dtype.

    Args:
        text_tokens: ``(1, S)`` with start and stop token.
        tokens: ``(n,)`` speech tokens.

    Returns:
        ``(2, n, V)`` float32: conditional and unconditional row.
    """
    device, dtype = t3.speech_head.weight.device, t3.speech_head.weight.dtype
    cond = copy.deepcopy(t3_cond).to(device=device, dtype=dtype)
    start = torch.full((2, 1), t3.hp.start_speech_token, device=device)
    embeds, _ = t3.prepare_input_embeds(
        t3_cond=cond, text_tokens=text_tokens.expand(2, -1), speech_tokens=start, cfg_weight=0.5
    )
    drawn = t3.speech_emb(tokens) + t3.speech_pos_emb.emb.weight[1 : len(tokens) + 1]
    first = t3.speech_emb(start) + t3.speech_pos_emb.get_fixed_embedding(0)
    embeds = torch.cat([embeds, first, drawn[:-1].expand(2, -1, -1)], dim=1)
    hidden = t3.tfmr(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return t3.speech_head(hidden[:, -len(tokens) :]).float()


@torch.inference_mode()
def engine_logits(
    t3: Any, engine: Engine, t3_cond: Any, text_tokens: Tensor, tokens: Tensor
) -> Tensor:
    """The engine's logits before each of `tokens`, step by step; as `stock_logits`."""
    weights, embeds = engine.weights, text_embeds(t3, text_tokens, None, 0.5)
    voice = engine.voice(t3, t3_cond)
    start = voice.length + embeds.shape[1]
    with engine.slots.lease(2, start + len(tokens)) as lease:
        state = lease.slot.state
        state.reset(SamplingParams(), t3.hp.start_speech_token)
        logits = [prefill(weights.prefill, state, voice, embeds, engine.rotary, engine.layers)]
        for number, token in enumerate(tokens[:-1]):
            feed_token(weights.decode, state, token[None])
            logits.append(step_logits(weights.decode, state, start + number + 1, engine.layers))
        return torch.stack(logits, dim=1).float()


def draw_probabilities(logits: Tensor, cfg_weight: float = 0.5, temperature: float = 0.8) -> Tensor:
    """What stock draws from, before penalties and cuts: ``(n, V)`` float64 of ``(2, n, V)``."""
    cond, uncond = logits.double()
    return ((cond + cfg_weight * (cond - uncond)) / temperature).softmax(dim=-1)


def entropy(p: Tensor) -> float:
    """Mean entropy of ``(n, V)`` in nats."""
    return float(-torch.special.xlogy(p, p).sum(dim=-1).mean())


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean Kullback-Leibler divergence of q from p, ``(n, V)`` both, in nats."""
    return float((torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(dim=-1).mean())
