"""T3's linear layers with what a Llama layer does before and after: one kernel for a few rows.

    normalise -> multiply with the weights -> gate -> add the residual

The kernel `skinny_linear` does it all in one launch. It takes few rows: a decode step's. Prefill's
many are multiplied by torch, and so are those of a device without the kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, reference


class Norm(NamedTuple):
    """A Llama RMSNorm."""

    weight: Tensor  # (K,) float32
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """``(..., K)`` normalised: one kernel on a GPU, where transformers launches six."""
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # On a CPU torch composes it from more and slower operations than the reference.
        return reference.rms_norm(x, self.weight, self.eps)


class Projection(NamedTuple):
    """A linear layer without bias.

    `kernel` names what runs it for a few rows: a backend of `skinny_linear`, or ``"torch"``.
    """

    weight: Tensor  # (N, K), float or int8
    scale: Tensor | None  # (N,) float32 of an int8 weight
    kernel: str
    many: torch.dtype  # what torch multiplies many rows in; bfloat16 has every int8

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        gated: bool = False,
    ) -> Tensor:
        """``x @ weight.T`` over the last dimension of x, in x's dtype.

        Args:
            x: ``(..., K)``.
            norm: applied to x before.
            residual: ``(..., N)``, added.
            gated: the first half of the outputs gates the second, and N is half as many.
        """
        if not self.takes(x):
            y = self._by_torch(x if norm is None else norm(x))
            y = reference.gated_silu(y) if gated else y
            return y if residual is None else residual + y
        kernel, rows = ops.skinny_linear_by(self.kernel), x.reshape(-1, x.shape[-1]).contiguous()
        weight, eps = (None, 0.0) if norm is None else norm
        if residual is not None:
            residual = residual.reshape(len(rows), -1)
        y = kernel(rows, self.weight, self.scale, weight, residual, eps=eps, gated=gated)
        return y.view(*x.shape[:-1], -1)

    def takes(self, x: Tensor) -> bool:
        """Whether the kernel runs for these rows."""
        return self.kernel != "torch" and x.numel() <= ops.MAX_SKINNY_ROWS * x.shape[-1]

    def _by_torch(self, x: Tensor) -> Tensor:
        y = F.linear(x.to(self.many), self.weight.to(self.many)).to(x.dtype)
        return y if self.scale is None else y * self.scale


Projections = tuple[Projection, ...]
"""Layers that read the same input: fused into one, or one by one."""


def project(projections: Projections, x: Tensor, norm: Norm, gated: bool = False) -> Tensor:
    """The outputs of all `projections` of normalised x, side by side in the last dimension.

    Args:
        gated: there is a gate and an up projection; see `Projection`.
    """
    if len(projections) == 1:
        return projections[0](x, norm, gated=gated)
    if not projections[0].takes(x):
        normed = norm(x)
        parts = [projection(normed) for projection in projections]
    else:
        parts = [projection(x, norm) for projection in projections]
    if gated:
        gate, up = parts
        return F.silu(gate) * up
    return torch.cat(parts, dim=-1)
