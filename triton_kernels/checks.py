"""Checks of the twins' arguments, with the messages of the compiled ops."""

from __future__ import annotations

import torch
from torch import Tensor


def must(op: str, condition: bool, argument: str, must: str, got: object) -> None:
    """Raises RuntimeError, ``OP: ARGUMENT must be WHAT, got WHAT IT WAS``, unless `condition`."""
    if not condition:
        raise RuntimeError(f"chatterbox_fast::{op}: {argument} must be {must}, got {got}")


def dense(
    op: str, tensor: Tensor, argument: str, dtype: torch.dtype, device: torch.device, like: str = ""
) -> None:
    """Raises unless `tensor` is contiguous, of `dtype`, and on `device`, where `like` is."""
    must(op, tensor.dtype == dtype, argument, str(dtype), tensor.dtype)
    where = f"on {device} as {like} is" if like else f"on {device}"
    must(op, tensor.device == device, argument, where, tensor.device)
    must(op, tensor.is_contiguous(), argument, "contiguous", f"strides {tensor.stride()}")


def of_channels(op: str, tensor: Tensor, argument: str, x: Tensor) -> None:
    """Raises unless `tensor` has a float32 a channel of `x`, where that is."""
    dense(op, tensor, argument, torch.float32, x.device)
    channels = x.shape[-1]
    shape = f"({channels},), a number a channel"
    must(op, tensor.shape == (channels,), argument, shape, tuple(tensor.shape))


def residual(op: str, tensor: Tensor, dtype: torch.dtype, x: Tensor) -> None:
    """Raises unless `tensor` is as `x` is, in `dtype`, and in memory of its own."""
    dense(op, tensor, "residual", dtype, x.device)
    shape = f"{tuple(x.shape)} as x is"
    must(op, tensor.shape == x.shape, "residual", shape, tuple(tensor.shape))
    shared = tensor.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    must(op, not shared or x.numel() == 0, "residual", "in memory of its own", "x's")
