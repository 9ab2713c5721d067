"""The flow: a U-Net of causal convolutions and attention, stepped from noise to mel by Euler.

The same numbers as stock's `ConditionalDecoder` and `CausalConditionalCFM` up to rounding:

- without masks where a row is as long as the tensor; where a bucket pads it, attention leaves out
  the pads' keys (the convolutions are causal and see no pads);
- what depends on the time alone (its embedding, and what each residual block makes of it) is a
  table: it is the same for every utterance;
- what the first block makes of mu, speaker and prompt is computed once an utterance, and what it
  makes of x once for both rows of classifier-free guidance.

Pure functions of tensors: no value is read on the host, so that a CUDA graph can hold them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compiling import Compiled
from .layers import (
    Linear,
    Norm,
    SequenceConv,
    attention,
    full_conv,
    in_dtype,
    linear,
    merged,
    norm,
)


class Transformer(NamedTuple):
    """diffusers' BasicTransformerBlock with self-attention alone.

    `padded` names the backend of `padded_attention`, which attends where rows have lengths.
    """

    norm: Norm
    qkv: Linear
    out: Linear
    heads: int
    padded: str
    ff_norm: Norm
    up: Linear
    down: Linear


class Resnet(NamedTuple):
    """Two causal convolutions, the time added between them, and a projection around them."""

    conv1: SequenceConv
    norm1: Norm
    conv2: SequenceConv
    norm2: Norm
    around: Linear


class Stage(NamedTuple):
    """A residual block and its transformers."""

    resnet: Resnet
    transformers: tuple[Transformer, ...]


def transformer(block: Transformer, x: Tensor, lengths: Tensor | None) -> Tensor:
    """``(R, T, C)``, as x.

    Args:
        lengths: ``(R,)`` int32, how many of a row's frames there are; None is all.
    """
    mixed = attention(block.qkv(block.norm(x)), block.heads, lengths, block.padded)
    x = block.out.added_to(x, mixed)
    return block.down.added_to(x, block.up.gelu(block.ff_norm(x)))


def resnet(block: Resnet, x: Tensor, shift: Tensor) -> Tensor:
    """``(R, T, C')`` of x ``(R, T, C)`` and what the time adds, ``(C',)``."""
    inner = after_first_conv(block, block.conv1(x), shift)
    return block.around.added_to(inner[:, : x.shape[1]], x)


def after_first_conv(block: Resnet, x: Tensor, shift: Tensor) -> Tensor:
    """All of a residual block but its first convolution and its projection.

    Two rows longer than the output of that.
    """
    x = F.mish(block.norm1(x), inplace=True).add_(shift)
    return F.mish(block.norm2(block.conv2(x)), inplace=True)


class Blocks(NamedTuple):
    """The functions that an engine calls for each block: eager, or compiled."""

    transformer: Callable[[Transformer, Tensor, Tensor | None], Tensor]
    resnet: Callable[[Resnet, Tensor, Tensor], Tensor]


EAGER = Blocks(transformer, resnet)


def compiled_blocks() -> Blocks:
    """Both functions under torch.compile: one graph for all blocks of a shape."""
    return Blocks(Compiled(transformer), Compiled(resnet))


class FlowWeights(NamedTuple):
    """The estimator's layers and the solver's constants.

    Attributes:
        x_conv, x_around: the part of the first residual block that reads x, without bias.
        given_conv, given_around: the part that reads mu, speaker and prompt, with bias.
        down: the first stage. Its residual block's first convolution and projection are those four.
        guidance: stock's inference_cfg_rate; None is meanflow, which has no unconditional row.
    """

    x_conv: SequenceConv
    x_around: Linear
    given_conv: SequenceConv
    given_around: Linear
    down: Stage
    down_conv: SequenceConv
    middle: tuple[Stage, ...]
    up: Stage
    up_conv: SequenceConv
    final_conv: SequenceConv
    final_norm: Norm
    project: Linear
    guidance: float | None


class TimeTable(NamedTuple):
    """What depends on the number of steps alone.

    Attributes:
        shifts: for every step, what each residual block adds, ``(C,)``: down, middle, up.
        steps: the length of every step, ``()`` each.
    """

    shifts: tuple[tuple[Tensor, ...], ...]
    steps: tuple[Tensor, ...]


class Given(NamedTuple):
    """What an utterance is conditioned on, as the first residual block reads it.

    Attributes:
        conv: ``(R, T + K - 1, C)``, its first convolution's share, with the bias.
        around: ``(R, T, C)``, its projection's share, with the bias.
    """

    conv: Tensor
    around: Tensor


def pack_flow(
    decoder: Any, dtype: torch.dtype | None = None, padded: str = "reference"
) -> FlowWeights:
    """The weights of a `CausalConditionalCFM` that `why_flow_unsupported` has nothing against.

    Args:
        dtype: of the matrices; None is the model's own. What reads mu, prompt and noise stays in
            that: nothing bounds those.
        padded: the backend of `padded_attention`.
    """
    estimator = decoder.estimator
    (down,), (up,) = estimator.down_blocks, estimator.up_blocks
    first, around = down[0].block1.block[0], down[0].res_conv
    x = estimator.out_channels
    half = around.weight.detach()[:, :, 0]
    given = Linear(half[:, x:].contiguous(), around.bias.detach(), False)
    final = estimator.final_block.block
    weights = FlowWeights(
        x_conv=full_conv(first.weight[:, :x], None),
        x_around=Linear(half[:, :x].contiguous(), None, False),
        given_conv=full_conv(first.weight[:, x:], first.bias),
        given_around=given,
        down=_stage(down, padded),
        down_conv=full_conv(down[2].weight, down[2].bias),
        middle=tuple(_stage(block, padded) for block in estimator.mid_blocks),
        up=_stage(up, padded),
        up_conv=full_conv(up[2].weight, up[2].bias),
        final_conv=full_conv(final[0].weight, final[0].bias),
        final_norm=norm(final[2]),
        project=linear(estimator.final_proj),
        guidance=None if estimator.meanflow else float(decoder.inference_cfg_rate),
    )
    if dtype is None:
        return weights
    first = ("x_conv", "x_around", "given_conv", "given_around")
    return in_dtype(weights, dtype)._replace(**{name: getattr(weights, name) for name in first})


def _stage(block: Any, padded: str) -> Stage:
    return Stage(_resnet(block[0]), tuple(_transformer(each, padded) for each in block[1]))


def _resnet(module: Any) -> Resnet:
    first, second = module.block1.block, module.block2.block
    return Resnet(
        conv1=full_conv(first[0].weight, first[0].bias),
        norm1=norm(first[2]),
        conv2=full_conv(second[0].weight, second[0].bias),
        norm2=norm(second[2]),
        around=linear(module.res_conv),
    )


def _transformer(module: Any, padded: str) -> Transformer:
    attn, ff = module.attn1, module.ff.net
    return Transformer(
        norm=norm(module.norm1),
        qkv=merged([attn.to_q.weight, attn.to_k.weight, attn.to_v.weight]),
        out=linear(attn.to_out[0]),
        heads=attn.heads,
        padded=padded,
        ff_norm=norm(module.norm3),
        up=linear(ff[0].proj),
        down=linear(ff[2]),
    )


def time_table(decoder: Any, n_timesteps: int) -> TimeTable:
    """The table of `n_timesteps` Euler steps, by stock's own modules."""
    estimator = decoder.estimator
    weight = estimator.final_proj.weight
    dtype = weight.dtype
    times = torch.linspace(0, 1, n_timesteps + 1, device=weight.device, dtype=dtype)
    if decoder.t_scheduler == "cosine" and not estimator.meanflow:
        times = 1 - torch.cos(times * 0.5 * torch.pi)
    embedded = estimator.time_mlp(estimator.time_embeddings(times).to(dtype))
    if estimator.meanflow:
        mixed = torch.cat([embedded[:-1], embedded[1:]], dim=1)
        embedded = estimator.time_embed_mixer(mixed)
    else:
        embedded = embedded[:-1]
    blocks = (*estimator.down_blocks, *estimator.mid_blocks, *estimator.up_blocks)
    shifts = [block[0].mlp(embedded) for block in blocks]
    return TimeTable(
        tuple(zip(*(shift.unbind() for shift in shifts), strict=True)),
        (times[1:] - times[:-1]).unbind(),
    )


def condition(weights: FlowWeights, mu: Tensor, speaker: Tensor, prompt: Tensor) -> Given:
    """What the solver needs of an utterance, computed once.

    Args:
        mu: ``(B, T, 80)``, the encoder's output.
        speaker: ``(B, 80)``.
        prompt: ``(B, T, 80)``, the voice's mel, then zeros.

    Returns:
        its B rows, after them the B unconditional ones where there is guidance.
    """
    given = torch.cat([mu, speaker[:, None].expand_as(mu), prompt], dim=-1)
    if weights.guidance is not None:
        given = torch.cat([given, torch.zeros_like(given)])
    return Given(weights.given_conv(given), weights.given_around(given))


def solve(
    weights: FlowWeights,
    table: TimeTable,
    given: Given,
    noise: Tensor,
    lengths: Tensor | None = None,
    blocks: Blocks = EAGER,
) -> Tensor:
    """Mel ``(B, T, 80)`` from noise ``(B, T, 80)``: one Euler step for each entry of `table`.

    Args:
        lengths: ``(R,)`` int32, how many frames the rows of `given` have; None is all. What is
            returned for the others means nothing.
    """
    x = noise
    for shifts, step in zip(table.shifts, table.steps, strict=True):
        velocity = estimate(weights, given, x, shifts, lengths, blocks)
        if weights.guidance is not None:
            conditional, unconditional = velocity.chunk(2)
            # (1 + g) c - g u, as one operation
            velocity = torch.lerp(unconditional, conditional, 1 + weights.guidance)
        x = torch.addcmul(x, velocity, step)
    return x


def estimate(
    weights: FlowWeights,
    given: Given,
    x: Tensor,
    shifts: tuple[Tensor, ...],
    lengths: Tensor | None = None,
    blocks: Blocks = EAGER,
) -> Tensor:
    """The velocity ``(R, T, 80)`` at x ``(B, T, 80)``, one row for each of `given`."""

    def transformed(stage: Stage, x: Tensor) -> Tensor:
        for block in stage.transformers:
            x = blocks.transformer(block, x, lengths)
        return x

    length, first = x.shape[1], weights.down.resnet
    inner = after_first_conv(first, _share(given.conv, weights.x_conv(x)), shifts[0])
    hidden = inner[:, :length] + _share(given.around, weights.x_around(x))
    skip = transformed(weights.down, hidden)
    hidden = weights.down_conv(skip)[:, :length].contiguous()
    for stage, shift in zip(weights.middle, shifts[1:-1], strict=True):
        hidden = transformed(stage, blocks.resnet(stage.resnet, hidden, shift))
    hidden = blocks.resnet(weights.up.resnet, torch.cat([hidden, skip], dim=-1), shifts[-1])
    hidden = transformed(weights.up, hidden)
    hidden = weights.final_conv(weights.up_conv(hidden)[:, :length])
    hidden = F.mish(weights.final_norm(hidden), inplace=True)
    return weights.project(hidden[:, :length].contiguous()).to(x.dtype)


def _share(rows: Tensor, x: Tensor) -> Tensor:
    """Adds x ``(B, ...)`` to its conditional and its unconditional row in ``(R, ...)``."""
    return (rows.unflatten(0, (-1, len(x))) + x).flatten(0, 1)
