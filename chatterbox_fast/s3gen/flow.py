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
from torch import Tensor

from ..compiling import Compiled
from .layers import (
    Linear,
    Norm,
    SequenceConv,
    added,
    attention,
    detached,
    full_conv,
    in_dtype,
    in_plain_torch,
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


class Activation(NamedTuple):
    """What follows a causal convolution: its bias, a norm, Mish.

    Attributes:
        offset: ``(C,)``, the bias, added here as cuDNN would in a pass of its own; None is none.
    """

    offset: Tensor | None
    norm: Norm

    def __call__(
        self,
        out: Tensor,
        length: int,
        dtype: torch.dtype | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """``(R, length, C)`` of the convolution's output, which may be longer.

        Args:
            dtype: of the result; None is the norm's own.
            shift: ``(C,)``, is added at the end.
        """
        return self.norm.mish(out[:, :length], self.offset, shift, dtype)


class Resnet(NamedTuple):
    """Two causal convolutions, the time added between them, and a projection around them."""

    conv1: SequenceConv
    act1: Activation
    conv2: SequenceConv
    act2: Activation
    around: Linear


class Stage(NamedTuple):
    """A residual block and its transformers."""

    resnet: Resnet
    transformers: tuple[Transformer, ...]


def transformer(block: Transformer, x: Tensor, part: Tensor, lengths: Tensor | None) -> Tensor:
    """What is to be added to x ``(R, T, C)`` after `part`, which is added to it here, in place.

    So that a sum is taken in the same pass as the norm that needs it.

    Args:
        lengths: ``(R,)`` int32, how many of a row's frames there are; None is all.
    """
    inner = block.norm.of_sum(x, part, block.qkv.weight.dtype)
    part = block.out(attention(block.qkv(inner), block.heads, lengths, block.padded))
    inner = block.ff_norm.of_sum(x, part, block.up.weight.dtype)
    return block.down(block.up.gelu(inner))


def resnet(block: Resnet, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """``(R, T, C')``, and what is to be added to it.

    Args:
        x: ``(R, T, C)``.
        shift: ``(C',)``, what the time adds.
    """
    inner = after_first_conv(block, block.conv1.unbounded(x), x.shape[1], shift)
    return inner, block.around(x)


def after_first_conv(block: Resnet, out: Tensor, length: int, shift: Tensor) -> Tensor:
    """All of a residual block but its first convolution, whose output is `out`, and its projection.

    In the norm's dtype.
    """
    inner = block.act1(out, length, block.conv2.weight.dtype, shift)
    return block.act2(block.conv2.unbounded(inner), length)


class Blocks(NamedTuple):
    """The functions that an engine calls for each block: eager, or compiled."""

    transformer: Callable[[Transformer, Tensor, Tensor, Tensor | None], Tensor]
    resnet: Callable[[Resnet, Tensor, Tensor], tuple[Tensor, Tensor]]


EAGER = Blocks(transformer, resnet)


def compiled_blocks() -> Blocks:
    """Both functions under torch.compile: one graph for all blocks of a shape."""
    return Blocks(Compiled(transformer), Compiled(resnet))


class FlowWeights(NamedTuple):
    """The estimator's layers and the solver's constants.

    Attributes:
        x_conv, x_around: the part of the first residual block that reads x, without bias.
        given_conv, given_around: the part that reads mu, speaker and prompt, with bias.
        down: the first stage. Its residual block's first convolution, the bias of that, and its
            projection are those four.
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
    final_act: Activation
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
        conv: ``(R, T, C)``, its first convolution's share, with the bias.
        around: ``(R, T, C)``, its projection's share, with the bias.
    """

    conv: Tensor
    around: Tensor


class Kernels(NamedTuple):
    """The backends of the ops of those names."""

    padded_attention: str = "reference"
    add_norm: str = "reference"


REFERENCE = Kernels()


def pack_flow(
    decoder: Any, dtype: torch.dtype | None = None, kernels: Kernels = REFERENCE
) -> FlowWeights:
    """The weights of a `CausalConditionalCFM` that `why_flow_unsupported` has nothing against.

    Args:
        dtype: of the matrices; None is the model's own. What reads mu, prompt and noise stays in
            that: nothing bounds those.
        kernels: what runs the ops.
    """
    estimator = decoder.estimator
    (down,), (up,) = estimator.down_blocks, estimator.up_blocks
    first, around = down[0].block1.block[0], down[0].res_conv
    x = estimator.out_channels
    half = around.weight.detach()[:, :, 0]
    given = Linear(half[:, x:].contiguous(), around.bias.detach(), False)
    final = estimator.final_block.block
    first_stage = _stage(down, kernels)
    act1 = first_stage.resnet.act1._replace(offset=None)
    weights = FlowWeights(
        x_conv=full_conv(first.weight[:, :x], None),
        x_around=Linear(half[:, :x].contiguous(), None, False),
        given_conv=full_conv(first.weight[:, x:], first.bias),
        given_around=given,
        down=first_stage._replace(resnet=first_stage.resnet._replace(act1=act1)),
        down_conv=full_conv(down[2].weight, down[2].bias),
        middle=tuple(_stage(block, kernels) for block in estimator.mid_blocks),
        up=_stage(up, kernels),
        up_conv=full_conv(up[2].weight, up[2].bias),
        final_conv=full_conv(final[0].weight, None),
        final_act=_activation(final, kernels),
        project=linear(estimator.final_proj),
        guidance=None if estimator.meanflow else float(decoder.inference_cfg_rate),
    )
    if dtype is None:
        return weights
    first = ("x_conv", "x_around", "given_conv", "given_around")
    return in_dtype(weights, dtype)._replace(**{name: getattr(weights, name) for name in first})


def for_compiler(weights: FlowWeights) -> FlowWeights:
    """The same, in plain torch where `compiled_blocks` run it."""
    down = weights.down._replace(transformers=in_plain_torch(weights.down.transformers))
    return weights._replace(
        down=down, middle=in_plain_torch(weights.middle), up=in_plain_torch(weights.up)
    )


def _stage(block: Any, kernels: Kernels) -> Stage:
    return Stage(
        _resnet(block[0], kernels), tuple(_transformer(each, kernels) for each in block[1])
    )


def _resnet(module: Any, kernels: Kernels) -> Resnet:
    first, second = module.block1.block, module.block2.block
    return Resnet(
        conv1=full_conv(first[0].weight, None),
        act1=_activation(first, kernels),
        conv2=full_conv(second[0].weight, None),
        act2=_activation(second, kernels),
        around=linear(module.res_conv),
    )


def _activation(block: Any, kernels: Kernels) -> Activation:
    return Activation(detached(block[0].bias), norm(block[2], kernels.add_norm))


def _transformer(module: Any, kernels: Kernels) -> Transformer:
    attn, ff = module.attn1, module.ff.net
    return Transformer(
        norm=norm(module.norm1, kernels.add_norm),
        qkv=merged([attn.to_q.weight, attn.to_k.weight, attn.to_v.weight]),
        out=linear(attn.to_out[0]),
        heads=attn.heads,
        padded=kernels.padded_attention,
        ff_norm=norm(module.norm3, kernels.add_norm),
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
    conv = weights.given_conv(given)[:, : mu.shape[1]].contiguous()
    return Given(conv, weights.given_around(given))


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

    def transformed(stage: Stage, x: Tensor, part: Tensor) -> Tensor:
        """Of x and what is to be added to it, as the next stage reads it."""
        for block in stage.transformers:
            part = blocks.transformer(block, x, part, lengths)
        return added(x, part, stage.resnet.conv2.weight.dtype)

    length, first = x.shape[1], weights.down.resnet
    conv = _share(given.conv, weights.x_conv(x)[:, :length])
    inner = after_first_conv(first, conv, length, shifts[0])
    skip = transformed(weights.down, inner, _share(given.around, weights.x_around(x)))
    hidden = weights.down_conv(skip)[:, :length].contiguous()
    for stage, shift in zip(weights.middle, shifts[1:-1], strict=True):
        hidden = transformed(stage, *blocks.resnet(stage.resnet, hidden, shift))
    both = torch.cat([hidden, skip], dim=-1)
    hidden = transformed(weights.up, *blocks.resnet(weights.up.resnet, both, shifts[-1]))
    hidden = weights.final_conv.unbounded(weights.up_conv(hidden)[:, :length])
    hidden = weights.final_act(hidden, length, weights.project.weight.dtype)
    return weights.project(hidden).to(x.dtype)


def _share(rows: Tensor, x: Tensor) -> Tensor:
    """Adds x ``(B, ...)`` to its conditional and its unconditional row in ``(R, ...)``."""
    return (rows.unflatten(0, (-1, len(x))) + x).flatten(0, 1)
