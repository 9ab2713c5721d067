"""The encoder: speech tokens to what the flow is conditioned on, two frames a token.

The same numbers as stock's `UpsampleConformerEncoder` and the layers around it up to rounding:

- without masks where a row is as long as the tensor; where a bucket pads it, its pads are zeroed
  before the lookahead, which reads three tokens further, and no query sees their keys;
- the relative positions of all layers are projected at once, and shifted by their strides alone;
- a frame's two halves of the upsampling read three tokens, not five copies of them.

Pure functions of tensors: no value is read on the host.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import Linear, Norm, SequenceConv, added, full_conv, in_dtype, linear, merged, norm


class Layer(NamedTuple):
    """A conformer layer: attention with relative positions, and a feed-forward network.

    Attributes:
        qkv: q's bias has stock's ``pos_bias_u`` in it.
        u_to_v: ``(C,)``, what makes of that q the one that meets the positions.
    """

    norm: Norm
    qkv: Linear
    u_to_v: Tensor
    out: Linear
    heads: int
    ff_norm: Norm
    up: Linear
    down: Linear

    def __call__(
        self, x: Tensor, part: Tensor | None, positions: Tensor, pads: Tensor | None
    ) -> Tensor:
        """What is to be added to x ``(B, T, C)`` after `part`, which is added to it here, in place.

        Args:
            positions: ``(2 T - 1, C)``, with attention's scale in them.
            pads: ``(B, T)`` bool, which keys are none; None: all are.
        """
        inner = self.norm.of_sum(x, part, self.qkv.weight.dtype)
        part = self.out(self._attention(self.qkv(inner), positions, pads))
        inner = self.ff_norm.of_sum(x, part, self.up.weight.dtype)
        return self.down(self.up.silu(inner))

    def _attention(self, qkv: Tensor, positions: Tensor, pads: Tensor | None) -> Tensor:
        q, k, v = (self._split(part) for part in qkv.chunk(3, dim=-1))
        with_v = self._split(qkv[..., : len(self.u_to_v)] + self.u_to_v.to(qkv.dtype))
        bias = by_distance(with_v @ self._split(positions).mT)
        if pads is not None:
            bias = bias.masked_fill(pads[:, None, None], -torch.inf)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return mixed.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        """``(..., H, T, D)`` of ``(..., T, C)``."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)


def by_distance(scores: Tensor) -> Tensor:
    """``(B, H, T, T)``, a view: row i takes columns T - 1 - i to 2 T - 2 - i of its ``2 T - 1``."""
    rows, heads, length, _ = scores.shape
    outer = scores.stride()[:2]
    return scores.as_strided((rows, heads, length, length), (*outer, 2 * length - 2, 1), length - 1)


class Stack(NamedTuple):
    """What embeds a sequence, and its layers.

    Attributes:
        embed_norm: stock's scale of the embedding is in it.
        positions: ``(2 P - 1, C)``, stock's table of relative positions.
        project: all layers' projections of positions, side by side.
    """

    embed: Linear
    embed_norm: Norm
    positions: Tensor
    project: Linear
    layers: tuple[Layer, ...]

    def embedded(self, x: Tensor) -> Tensor:
        """``(B, T, C)`` of ``(B, T, C')``."""
        return self.embed_norm(self.embed(x))

    def __call__(self, x: Tensor, pads: Tensor | None) -> Tensor | None:
        """What is to be added to x ``(B, T, C)``, which is changed: their sum is the output.

        `pads` as each layer takes them.
        """
        length, middle = x.shape[1], len(self.positions) // 2
        positions = self.project(self.positions[middle - length + 1 : middle + length])
        part: Tensor | None = None
        for layer, own in zip(self.layers, positions.chunk(len(self.layers), dim=-1), strict=True):
            part = layer(x, part, own, pads)
        return part


class EncoderWeights(NamedTuple):
    """Embedding, lookahead, layers before and after the upsampling, projection to mel bands."""

    tokens: Tensor
    ahead: SequenceConv
    behind: SequenceConv
    before: Stack
    upsample: SequenceConv
    after: Stack
    norm: Norm
    project: Linear

    @property
    def longest(self) -> int:
        """Tokens that the table of positions is long enough for."""
        return min((len(self.before.positions) + 1) // 2, (len(self.after.positions) + 1) // 4)


def pack_encoder(
    flow: Any, dtype: torch.dtype | None = None, add_norm: str = "reference"
) -> EncoderWeights:
    """The weights of a flow's encoder that `why_flow_unsupported` has nothing against.

    Args:
        dtype: of the matrices; None is the model's own.
        add_norm: the backend of the op of that name.
    """
    encoder = flow.encoder
    ahead = encoder.pre_lookahead_layer
    upsample = encoder.up_layer.conv
    weights = EncoderWeights(
        tokens=flow.input_embedding.weight.detach(),
        ahead=full_conv(ahead.conv1.weight, ahead.conv1.bias),
        behind=full_conv(ahead.conv2.weight, ahead.conv2.bias),
        before=_stack(encoder.embed, encoder.encoders, add_norm),
        upsample=full_conv(_both_halves(upsample.weight.detach()), upsample.bias.repeat(2)),
        after=_stack(encoder.up_embed, encoder.up_encoders, add_norm),
        norm=norm(encoder.after_norm, add_norm),
        project=linear(flow.encoder_proj),
    )
    return weights if dtype is None else in_dtype(weights, dtype)


def _both_halves(weight: Tensor) -> Tensor:
    """``(2 N, C, 3)``: the convolution ``(N, C, 5)`` of a sequence that has every item twice."""
    a, b, c, d, e = weight.unbind(-1)
    first = torch.stack([a + b, c + d, e], dim=-1)
    second = torch.stack([a, b + c, d + e], dim=-1)
    return torch.cat([first, second])


def _stack(embed: Any, layers: Any, add_norm: str) -> Stack:
    scale = embed.pos_enc.xscale
    plain = norm(embed.out[1], add_norm)
    width = layers[0].self_attn.d_k
    project = merged([layer.self_attn.linear_pos.weight / math.sqrt(width) for layer in layers])
    return Stack(
        embed=linear(embed.out[0]),
        embed_norm=plain._replace(weight=plain.weight * scale, bias=plain.bias * scale),
        positions=embed.pos_enc.pe[0].to(plain.weight),
        project=project,
        layers=tuple(_layer(layer, add_norm) for layer in layers),
    )


def _layer(module: Any, add_norm: str) -> Layer:
    attention, ff = module.self_attn, module.feed_forward
    u, v = attention.pos_bias_u.detach().flatten(), attention.pos_bias_v.detach().flatten()
    projections = attention.linear_q, attention.linear_k, attention.linear_v
    bias = torch.cat([each.bias.detach() for each in projections])
    bias[: len(u)] += u
    return Layer(
        norm=norm(module.norm_mha, add_norm),
        qkv=merged([each.weight for each in projections], bias),
        u_to_v=v - u,
        out=linear(attention.linear_out),
        heads=attention.h,
        ff_norm=norm(module.norm_ff, add_norm),
        up=linear(ff.w_1),
        down=linear(ff.w_2),
    )


def encode(weights: EncoderWeights, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
    """What the flow is conditioned on, ``(B, 2 N, 80)``, of tokens ``(B, N)`` int64.

    Args:
        lengths: ``(B,)`` integers, how many of a row's tokens there are; None is all. What is
            returned for the others means nothing, and is finite.
    """
    length, pads, late_pads = tokens.shape[1], None, None
    x = weights.before.embedded(F.embedding(tokens, weights.tokens))
    if lengths is not None:
        pads = torch.arange(length, device=tokens.device) >= lengths[:, None]
        late_pads = pads.repeat_interleave(2, dim=1)
        x = x.masked_fill(pads[..., None], 0)
    seen = F.leaky_relu(weights.ahead(x)[:, -length:], inplace=True)
    x = x + weights.behind(seen)[:, :length]  # in the order of x, whatever the convolution's
    x = added(x, weights.before(x, pads), weights.upsample.weight.dtype)
    x = weights.upsample(x)[:, :length].unflatten(-1, (2, -1)).flatten(1, 2)
    x = weights.after.embedded(x)
    x = weights.norm.of_sum(x, weights.after(x, late_pads), weights.project.weight.dtype)
    return weights.project(x).to(weights.tokens.dtype)
