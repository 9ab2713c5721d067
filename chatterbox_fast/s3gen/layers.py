"""The layers that the flow is made of: weights, and how they are applied.

Sequences are ``(B, T, C)``, channels last, so that no layer transposes what the next one reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear(NamedTuple):
    """A linear layer, or a convolution of width 1.

    Attributes:
        weight: ``(N, K)``.
        bias: ``(N,)`` or None.
    """

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias`` over the last dimension."""
        return F.linear(x, self.weight, self.bias)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """``residual`` + the output; neither is changed."""
        return self(x).add_(residual)


class Norm(NamedTuple):
    """A layer norm over the last dimension; weight and bias are ``(C,)``."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """The norm of ``(..., C)``."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class SequenceConv(NamedTuple):
    """A convolution along T of ``(B, T, C)``.

    Attributes:
        weight: ``(N, C, 1, K)`` in channels-last order: a one-dimensional convolution is an image
            of height 1, for which torch has channels-last kernels.
        bias: ``(N,)`` or None.
    """

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """``(B, T + K - 1, N)``: row t sees x's rows t - K + 1 to t; beyond x's ends are zeros.

        The first T rows are the causal convolution, the last T the one that looks ahead. The
        surplus costs less than to copy x into a padded tensor.
        """
        image = x.transpose(1, 2).unsqueeze(2)
        out = F.conv2d(image, self.weight, self.bias, padding=(0, self.weight.shape[-1] - 1))
        return out.squeeze(2).transpose(1, 2)


def attention(qkv: Tensor, heads: int) -> Tensor:
    """Full attention ``(B, T, H D)`` over ``(B, T, 3 H D)``: q, k and v side by side."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def linear(*modules: Any) -> Linear:
    """The linear layers (or convolutions of width 1) `modules`, which read the same input, as one.

    One alone keeps its own parameters; several are a copy.
    """
    weights = [module.weight.detach().flatten(1) for module in modules]
    biases = [module.bias.detach() for module in modules if module.bias is not None]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    bias = None if not biases else biases[0] if len(biases) == 1 else torch.cat(biases)
    return Linear(weight, bias)


def norm(module: Any) -> Norm:
    """A LayerNorm."""
    return Norm(module.weight.detach(), module.bias.detach(), module.eps)


def sequence_conv(weight: Tensor, bias: Tensor | None) -> SequenceConv:
    """A convolution with a Conv1d's weight ``(N, C, K)``."""
    image = weight.detach().unsqueeze(2).contiguous(memory_format=torch.channels_last)
    return SequenceConv(image, None if bias is None else bias.detach())
