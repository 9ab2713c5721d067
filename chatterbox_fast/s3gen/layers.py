"""The layers that encoder, estimator and vocoder are made of: weights, and how they are applied.

Sequences are ``(B, T, C)``, channels last, so that no layer transposes what the next one reads.
A layer whose matrix is in half precision takes its input to that, and its output is in that too;
norms, and what the flow's residuals are added to, stay in float32 (or whatever the model's own
dtype is). In float16 sums and convolutions, which nothing bounds, are held within its finite
numbers, by themselves or by the op that reads them; what follows a norm is bounded by that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops

LARGEST = torch.finfo(torch.float16).max


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`; from a wider one to float16 as `saturated` says."""
    if dtype == torch.float16 != x.dtype:
        x = x.clamp(-LARGEST, LARGEST)
    return x.to(dtype)


def saturated(x: Tensor) -> Tensor:
    """`x`, where in float16 infinity is made the largest number, in place; NaN stays.

    Nothing bounds a mel, and so nothing bounds what is between norms. Float32 and bfloat16 hold it;
    an infinity would be NaN after the next norm, sum or sine.
    """
    return x.clamp_(-LARGEST, LARGEST) if x.dtype == torch.float16 else x


class Linear(NamedTuple):
    """A linear layer, and what may be done to its output in the same pass.

    Attributes:
        weight: ``(N, K)``.
        bias: ``(N,)`` or None.
        onednn: whether oneDNN runs it, which applies an activation within the matrix product; else
            that is an operation of its own.
    """

    weight: Tensor
    bias: Tensor | None
    onednn: bool

    def __call__(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias`` over the last dimension."""
        x = narrowed(x, self.weight.dtype)
        if self.onednn:
            return self._activated(x, "none", "")
        return F.linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU (the exact one, by erf) of the output."""
        return self._activated(x, "gelu", "none") if self.onednn else F.gelu(self(x))

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the output."""
        return self._activated(x, "swish", "") if self.onednn else F.silu(self(x), inplace=True)

    def _activated(self, x: Tensor, name: str, algorithm: str) -> Tensor:
        fused = torch.ops.mkldnn._linear_pointwise
        return fused(x, self.weight, self.bias, name, [], algorithm)


class Norm(NamedTuple):
    """A layer norm over the last dimension, and what comes before and after it in one op.

    Attributes:
        weight, bias: ``(C,)``.
        by: the backend of `add_norm`.
    """

    weight: Tensor
    bias: Tensor
    eps: float
    by: str

    def __call__(self, x: Tensor) -> Tensor:
        """The norm of ``(B, T, C)``, in the weight's dtype."""
        return self._of(x, None)

    def of_sum(self, x: Tensor, part: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The norm of ``x + part`` in `dtype`; `part` is added to x, in place. None is no part."""
        return self._of(x, dtype) if part is None else self._of(part, dtype, residual=x)

    def mish(
        self, x: Tensor, offset: Tensor | None, shift: Tensor | None, dtype: torch.dtype | None
    ) -> Tensor:
        """``mish(norm(x + offset)) + shift``, in `dtype` or the weight's."""
        # A convolution without cuDNN or oneDNN leaves it in another order.
        x = x if x.stride(-1) == 1 else x.contiguous()
        return self._of(x, dtype, offset=offset, shift=shift, mish=True)

    def _of(self, x: Tensor, dtype: torch.dtype | None, **parts: Any) -> Tensor:
        kernel, dtype = ops.add_norm_by(self.by), dtype or self.weight.dtype
        return kernel(x, self.weight, self.bias, eps=self.eps, dtype=dtype, **parts)


def added(x: Tensor, part: Tensor, dtype: torch.dtype) -> Tensor:
    """``x + part`` in `dtype`, as `narrowed` says."""
    return saturated(torch.add(x, part, out=x.new_empty(x.shape, dtype=dtype)))


class SequenceConv(NamedTuple):
    """A convolution along T of ``(B, T, C)``, with zeros beyond both ends.

    Attributes:
        weight: ``(N, C, 1, K)`` in channels-last order: a one-dimensional convolution is an image
            of height 1, for which torch has channels-last kernels (faster on the CPU that was
            measured).
        bias: ``(N,)`` or None.
    """

    weight: Tensor
    bias: Tensor | None
    padding: int
    stride: int = 1
    dilation: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        """``(B, T', N)``."""
        return saturated(self.unbounded(x))

    def unbounded(self, x: Tensor) -> Tensor:
        """The same, in which infinity is left: the next op, or the sum after it, holds it."""
        out = F.conv2d(
            _image(narrowed(x, self.weight.dtype)), self.weight, self.bias,
            (1, self.stride), (0, self.padding), (1, self.dilation),
        )  # fmt: skip
        return _sequence(out)

    def as_product(self, x: Tensor) -> Tensor:
        """The same as a matrix product; for a stride and a dilation of 1.

        On a GPU torch rounds a convolution of float32 to TF32 unless it is told otherwise, a
        product only if it is told to.
        """
        padded = F.pad(x.to(self.weight.dtype), (0, 0, self.padding, self.padding))
        windows = padded.unfold(1, self.weight.shape[-1], 1).transpose(2, 3).flatten(2)
        weight = self.weight.squeeze(2).transpose(1, 2).flatten(1)
        return F.linear(windows.contiguous(), weight, self.bias)


class SequenceConvTranspose(NamedTuple):
    """A transposed convolution along T of ``(B, T, C)``; the weight is ``(C, N, 1, K)``."""

    weight: Tensor
    bias: Tensor | None
    padding: int
    stride: int

    def __call__(self, x: Tensor) -> Tensor:
        """``(B, stride T + K - stride - 2 padding, N)``."""
        out = F.conv_transpose2d(
            _image(narrowed(x, self.weight.dtype)), self.weight, self.bias,
            (1, self.stride), (0, self.padding),
        )  # fmt: skip
        return _sequence(saturated(out))


def _image(x: Tensor) -> Tensor:
    return x.transpose(1, 2).unsqueeze(2)


def _sequence(image: Tensor) -> Tensor:
    return image.squeeze(2).transpose(1, 2)


Layers = TypeVar("Layers", bound=tuple[Any, ...])


def each_layer(
    layers: Layers,
    change: Callable[[Any], Any],
    kinds: tuple[type, ...] = (Linear, SequenceConv, SequenceConvTranspose),
) -> Layers:
    """The same structure with every layer of `kinds`, those that have a matrix, changed."""
    if isinstance(layers, kinds):
        return change(layers)
    parts = (
        each_layer(part, change, kinds) if isinstance(part, tuple) else part for part in layers
    )
    return type(layers)(parts) if type(layers) is tuple else type(layers)(*parts)


def in_dtype(layers: Layers, dtype: torch.dtype) -> Layers:
    """The same layers with matrices and their biases in `dtype`."""

    def narrow(layer: Any) -> Any:
        layer = layer._replace(weight=layer.weight.to(dtype), bias=_to(layer.bias, dtype))
        if isinstance(layer, Linear):  # oneDNN's fused layers are for float32
            return layer._replace(onednn=layer.onednn and has_onednn(layer.weight))
        return layer

    return each_layer(layers, narrow)


def without_onednn(layers: Layers) -> Layers:
    """The same layers in plain torch, which torch.compile and fake tensors look into."""
    return each_layer(layers, lambda layer: layer._replace(onednn=False), (Linear,))


def in_plain_torch(layers: Layers) -> Layers:
    """The same layers without ops of ours, but for attention, for torch.compile to fuse."""
    layers = each_layer(layers, lambda layer: layer._replace(by="reference"), (Norm,))
    return without_onednn(layers)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def bytes_of(layers: tuple[Any, ...]) -> dict[int, int]:
    """The storages of all tensors in `layers`: address -> bytes."""
    found: dict[int, int] = {}
    for part in layers:
        if isinstance(part, Tensor):
            storage = part.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(part, tuple):
            found |= bytes_of(part)
    return found


def attention(qkv: Tensor, heads: int, lengths: Tensor | None = None, by: str = "") -> Tensor:
    """Full attention, ``(B, T, H D)``, over q, k and v side by side in ``(B, T, 3 H D)``.

    Args:
        lengths: ``(B,)`` int32, how many positions each row has; None is all.
        by: the backend of `padded_attention`, where there are lengths.
    """
    if lengths is not None:
        return ops.padded_attention_by(by)(qkv, lengths, heads)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def linear(module: Any) -> Linear:
    """A linear layer, or a convolution of width 1, with its own parameters."""
    weight = module.weight.detach().flatten(1)
    return Linear(weight, detached(module.bias), has_onednn(weight))


def merged(weights: Sequence[Tensor], bias: Tensor | None = None) -> Linear:
    """One linear layer of the weights ``(N, K)`` of several, which read the same input; a copy."""
    weight = torch.cat([each.detach() for each in weights])
    return Linear(weight, bias, has_onednn(weight))


def has_onednn(weight: Tensor) -> bool:
    """Whether oneDNN's fused linear layers take `weight`."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def norm(module: Any, by: str) -> Norm:
    """A LayerNorm, by a backend of `add_norm`."""
    return Norm(module.weight.detach(), module.bias.detach(), module.eps, by)


def full_conv(weight: Tensor, bias: Tensor | None) -> SequenceConv:
    """All ``T + K - 1`` outputs of a Conv1d's weight ``(N, C, K)``: row t sees x's t - K + 1 to t.

    The first T rows are the causal convolution, the last T the one that looks ahead. The surplus
    costs less than to copy x into a padded tensor.
    """
    return SequenceConv(_image_weight(weight), detached(bias), weight.shape[-1] - 1)


def sequence_conv(module: Any) -> SequenceConv:
    """A Conv1d, its weight norm folded. Some of stock's strides are NumPy's: no compiler's ints."""
    return SequenceConv(
        _image_weight(module.weight),
        detached(module.bias),
        *(int(size[0]) for size in (module.padding, module.stride, module.dilation)),
    )


def sequence_conv_transpose(module: Any) -> SequenceConvTranspose:
    """A ConvTranspose1d, its weight norm folded."""
    return SequenceConvTranspose(
        _image_weight(module.weight),
        detached(module.bias),
        *(int(size[0]) for size in (module.padding, module.stride)),
    )


def _image_weight(weight: Tensor) -> Tensor:
    return weight.detach().unsqueeze(2).contiguous(memory_format=torch.channels_last)


def detached(tensor: Tensor | None) -> Tensor | None:
    """`tensor`, if there is one, outside of autograd's graph."""
    return None if tensor is None else tensor.detach()
