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
