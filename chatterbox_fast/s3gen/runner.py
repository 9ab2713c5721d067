"""S3Gen's two stages as stock's callers see them: the arguments read, the draws, the engine.

What the engine does not compute goes to stock: batches of unequal lengths, odd dtypes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .engine import FlowEngine
from .flow import condition, solve


class Utterance(NamedTuple):
    """What the flow turns into a mel.

    Attributes:
        tokens: ``(B, N)`` int64, the voice's and then the speech's.
        speaker: ``(B, E)``, the speaker embedding.
        prompt: ``(B, P, 80)``, the voice's mel.
    """

    tokens: Tensor
    speaker: Tensor
    prompt: Tensor


def read_utterance(flow: Any, arguments: dict[str, Any]) -> Utterance | None:
    """The arguments of stock's ``flow.inference``; None where stock must run.

    The values of tokens and lengths are read on the host, all at once: one sync on a GPU.

    Raises:
        ValueError: no tokens, or a prompt_feat longer than the mel of all tokens.
        IndexError: a token that the embedding does not have (stock's own error, but for a GPU,
            where it would take the process's CUDA context with it).
    """
    if flow.decoder.estimator.meanflow is not arguments["meanflow"]:
        return None
    token, speaker = arguments["token"], torch.atleast_2d(arguments["embedding"])
    if token.ndim != 2 or speaker.dtype != flow.encoder_proj.weight.dtype:
        return None
    rows = len(token)
    prompt_token, prompt = arguments["prompt_token"], arguments["prompt_feat"]
    prompt_token, prompt = torch.atleast_2d(prompt_token), prompt[(None,) * (3 - prompt.ndim)]
    if any(len(each) not in (1, rows) for each in (prompt_token, prompt, speaker)):
        return None
    tokens = torch.cat([prompt_token.expand(rows, -1), token], dim=1).long()
    if tokens.shape[1] == 0:
        raise ValueError("chatterbox_fast: token and prompt_token must not both be empty")
    lengths = arguments["token_len"] + arguments["prompt_token_len"]
    facts = torch.stack([tokens.amin(), tokens.amax(), *(lengths.long().aminmax())])
    lowest, highest, shortest, longest = facts.tolist()
    if lowest < 0 or highest >= flow.vocab_size:
        bad = lowest if lowest < 0 else highest
        raise IndexError(
            f"chatterbox_fast: speech tokens must be in [0, {flow.vocab_size}), got {bad}"
        )
    if not shortest == longest == tokens.shape[1]:
        return None
    return Utterance(tokens, speaker.expand(rows, -1), prompt.expand(rows, -1, -1))


def flow_inference(
    flow: Any,
    engine: FlowEngine,
    utterance: Utterance,
    *,
    finalize: bool,
    n_timesteps: int,
    noised_mels: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    """The mel ``(B, 80, M)`` of the speech, without the voice's prompt.

    Args:
        finalize: False cuts the frames whose tokens have not been followed by the lookahead yet.
        n_timesteps: Euler steps.
        noised_mels: ``(B, 80, M')``, takes the place of the last M' frames of noise (meanflow).
        generator: what the noise is drawn from; None is torch's global generator.
    """
    tokens = utterance.tokens
    lengths = tokens.new_full((len(tokens),), tokens.shape[1])
    hidden, _ = flow.encoder(flow.input_embedding(tokens), lengths)
    if finalize is False:
        hidden = hidden[:, : -flow.pre_lookahead_len * flow.token_mel_ratio]
    mu = flow.encoder_proj(hidden)
    rows, frames, bands = mu.shape
    known = utterance.prompt.shape[1]
    if known > frames:
        raise ValueError(
            f"chatterbox_fast: prompt_feat must have at most the {frames} frames of all tokens' "
            f"mel, got {known}"
        )
    # Stock's draw, in stock's order of dimensions.
    noise = mu.new_empty(rows, bands, frames).normal_(generator=generator)
    if noised_mels is not None:
        noise[..., frames - noised_mels.shape[2] :] = noised_mels
    prompt = F.pad(utterance.prompt.to(mu.dtype), (0, 0, 0, frames - known))
    speaker = flow.spk_embed_affine_layer(F.normalize(utterance.speaker, dim=1))
    given = condition(engine.solver, mu, speaker, prompt)
    mel = solve(engine.solver, engine.table(n_timesteps), given, noise.transpose(1, 2).contiguous())
    return mel[:, known:].transpose(1, 2)
