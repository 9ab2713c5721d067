"""Triton twin of add_norm: one launch, a few rows a program.

    x (R, T, C) float32, float16 or bfloat16; the rest float32 -> (R, T, C) of either;
    residual (R, T, C) is updated in place

Equivalent to: chatterbox_fast/reference.py, ``add_norm``.

Arithmetic: float32 for every dtype; the variance is one of squares of what differs from the mean;
half precision is rounded once, at the end; float16 to finite numbers.

Expected bound: bytes, each read and written once.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks
from .arithmetic import finite

_must = functools.partial(checks.must, "add_norm")

_FLOATING = (torch.float32, torch.float16, torch.bfloat16)
MOST_CHANNELS = 1024
ELEMENTS = 2048
"""Of a program, about."""
LAUNCH = {"num_warps": 4}


@triton.jit(do_not_specialize=["rows", "times", "eps"])
def add_norm_kernel(
    x, weight, bias, residual, offset, shift, y, rows, times, row_stride, time_stride, channels,
    eps, MISH: tl.constexpr, TO_HALF: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of all channels. CHANNELS: channels, or more."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    is_channel = channel < channels
    wanted = (row < rows)[:, None] & is_channel[None, :]
    start = row // times * row_stride + row % times * time_stride
    total = tl.load(x + start[:, None] + channel[None, :], mask=wanted, other=0).to(tl.float32)
    total = finite(total, x.dtype.element_ty == tl.float16)
    place = row[:, None] * channels + channel[None, :]
    if offset is not None:
        total += tl.load(offset + channel, mask=is_channel, other=0)[None, :]
    if residual is not None:
        total += tl.load(residual + place, mask=wanted, other=0)
        tl.store(residual + place, total, mask=wanted)
    mean = tl.sum(tl.where(wanted, total, 0), axis=1) / channels
    rest = tl.where(wanted, total - mean[:, None], 0)
    scale = 1 / tl.sqrt(tl.sum(rest * rest, axis=1) / channels + eps)
    own = rest * scale[:, None] * tl.load(weight + channel, mask=is_channel, other=0)[None, :]
    own += tl.load(bias + channel, mask=is_channel, other=0)[None, :]
    if MISH:
        e = tl.exp(tl.where(own > 20, 20.0, own))
        n = e * (e + 2)
        own *= n / (n + 2)
    if shift is not None:
        own += tl.load(shift + channel, mask=is_channel, other=0)[None, :]
    tl.store(y + place, finite(own, TO_HALF).to(y.dtype.element_ty), mask=wanted)


def add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    offset: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    eps: float,
    mish: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A residual sum and its layer norm. CUDA tensors, or CPU tensors in Triton's interpreter.

    Args:
        x, weight, bias, residual, offset, shift, eps, mish, dtype: see `reference.add_norm`. At
            most 1024 channels; the residual contiguous, in memory of its own.

    Returns:
        ``(R, T, C)`` in `dtype`, contiguous.

    Raises:
        RuntimeError: an argument of another shape, dtype, layout or device than documented.
    """
    wanted = x.dtype if dtype is None else dtype
    _check(x, weight, bias, residual, offset, shift, wanted)
    # Triton's interpreter does not round to bfloat16, it truncates.
    y = torch.empty(x.shape, dtype=wanted if x.is_cuda else torch.float32, device=x.device)
    if y.numel() == 0:
        return y.to(wanted)
    channels = x.shape[2]
    rows, wide = x.numel() // channels, triton.next_power_of_2(channels)
    deep = max(1, ELEMENTS // max(wide, 128))
    with torch.cuda.device_of(x):
        add_norm_kernel[(triton.cdiv(rows, deep),)](
            x, weight, bias, residual, offset, shift, y, rows, x.shape[1], x.stride(0), x.stride(1),
            channels, eps, MISH=mish, TO_HALF=wanted == torch.float16, ROWS=deep, CHANNELS=wide,
            **LAUNCH,
        )  # fmt: skip
    return y.to(wanted)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    offset: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """As csrc/add_norm.cpp checks."""
    _must(x.dtype in _FLOATING, "x", "float32, float16 or bfloat16", x.dtype)
    fits = x.dim() == 3 and x.shape[2] <= MOST_CHANNELS
    _must(fits, "x", f"(R, T, C), C at most {MOST_CHANNELS}", tuple(x.shape))
    last = x.shape[2] <= 1 or x.stride(2) == 1
    _must(last, "x", "channels last", f"strides {x.stride()}")
    numbers = {"weight": weight, "bias": bias, "offset": offset, "shift": shift}
    for name, tensor in numbers.items():
        if tensor is not None:
            checks.of_channels("add_norm", tensor, name, x)
    if residual is not None:
        checks.residual("add_norm", residual, torch.float32, x)
    _must(dtype in _FLOATING, "dtype", "float32, float16 or bfloat16", dtype)
