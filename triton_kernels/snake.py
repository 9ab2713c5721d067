"""Triton twin of snake: one launch, a block of rows and channels a program.

    x (..., C) float32, float16 or bfloat16; alpha, inverse, offset (C,) float32 -> as x;
    residual, as x, is updated in place

Equivalent to: chatterbox_fast/reference.py, ``snake``.

Arithmetic: float32 for every dtype, the sine by libdevice's ``sinf``, accurate for arguments of any
size; half precision is rounded once, at the end.

Expected bound: bytes, one read and one write of x.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks
from .arithmetic import finite

_must = functools.partial(checks.must, "snake")

_FLOATING = (torch.float32, torch.float16, torch.bfloat16)
ELEMENTS, MOST_CHANNELS = 1024, 128
"""Of a program: all of them, and how many lie side by side at most."""
LAUNCH = {"num_warps": 4}


@triton.jit(do_not_specialize=["rows"])
def snake_kernel(
    x, alpha, inverse, residual, offset, y, rows, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of CHANNELS channels."""
    tiles = tl.cdiv(channels, CHANNELS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    own_alpha = tl.load(alpha + channel, mask=is_channel, other=0)
    own_inverse = tl.load(inverse + channel, mask=is_channel, other=0)
    place = row[:, None] * channels + channel[None, :]
    wanted = (row < rows)[:, None] & is_channel[None, :]
    half: tl.constexpr = x.dtype.element_ty == tl.float16
    own = finite(tl.load(x + place, mask=wanted, other=0).to(tl.float32), half)
    if offset is not None:
        own += tl.load(offset + channel, mask=is_channel, other=0)[None, :]
    if residual is not None:
        own += tl.load(residual + place, mask=wanted, other=0).to(tl.float32)
    own = finite(own, half)
    if residual is not None:
        tl.store(residual + place, own.to(residual.dtype.element_ty), mask=wanted)
    sine = tl.sin(own_alpha[None, :] * own)
    total = finite(own + sine * sine * own_inverse[None, :], half)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=wanted)


def snake(
    x: Tensor,
    alpha: Tensor,
    inverse: Tensor,
    residual: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Snake's activation of a sum. CUDA tensors, or CPU tensors in Triton's interpreter.

    Args:
        x, alpha, inverse, residual, offset: see `reference.snake`. Contiguous; the residual in
            memory of its own.

    Returns:
        Of x's shape and dtype.

    Raises:
        RuntimeError: an argument of another shape, dtype, layout or device than documented.
    """
    _check(x, alpha, inverse, residual, offset)
    # Triton's interpreter does not round to bfloat16, it truncates.
    dtype = x.dtype if x.is_cuda else torch.float32
    y, sums = torch.empty_like(x, dtype=dtype), None if residual is None else residual.to(dtype)
    if y.numel() == 0:
        return y.to(x.dtype)
    channels = x.shape[-1]
    rows, wide = x.numel() // channels, min(MOST_CHANNELS, triton.next_power_of_2(channels))
    deep = ELEMENTS // wide
    with torch.cuda.device_of(x):
        snake_kernel[(triton.cdiv(rows, deep) * triton.cdiv(channels, wide),)](
            x, alpha, inverse, sums, offset, y, rows, channels,
            ROWS=deep, CHANNELS=wide, **LAUNCH,
        )  # fmt: skip
    if residual is not None and sums is not residual:
        residual.copy_(sums)
    return y.to(x.dtype)


def _check(
    x: Tensor, alpha: Tensor, inverse: Tensor, residual: Tensor | None, offset: Tensor | None
) -> None:
    """As csrc/snake.cpp checks."""
    _must(x.dtype in _FLOATING, "x", "float32, float16 or bfloat16", x.dtype)
    _must(x.dim() >= 1, "x", "(..., C)", tuple(x.shape))
    _must(x.is_contiguous(), "x", "contiguous", f"strides {x.stride()}")
    for name, numbers in {"alpha": alpha, "inverse": inverse, "offset": offset}.items():
        if numbers is not None:
            checks.of_channels("snake", numbers, name, x)
    if residual is not None:
        checks.residual("snake", residual, x.dtype, x)
