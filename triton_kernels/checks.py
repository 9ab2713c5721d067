"""Checks of the twins' arguments, with the messages of the compiled ops."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_FLOATING = (torch.float32, torch.float16, torch.bfloat16)
_MAX_ROWS, _MAX_VOCABULARY = 64, 65536


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


def cfg_sample(
    logits: Tensor,
    seen: Tensor,
    params: Tensor,
    flags: Tensor,
    philox: Tensor | None,
    stop_action: Tensor | None,
    *,
    stop_token: int,
    forget: int = -1,
    float64: bool = False,
) -> None:
    """As csrc/cfg_sample.cpp checks, for the twin and for the reference.

    Args:
        float64: logits may be that too, with parameters that are.
    """
    check = functools.partial(must, "cfg_sample")
    check(seen.dtype == torch.bool, "seen", "torch.bool", seen.dtype)
    shape = tuple(seen.shape)
    fits = len(shape) == 2 and shape[0] <= _MAX_ROWS and 1 <= shape[1] <= _MAX_VOCABULARY
    check(fits, "seen", f"(R, V), R at most {_MAX_ROWS} and V in [1, {_MAX_VOCABULARY}]", shape)
    rows, vocabulary = shape
    wide = float64 and logits.dtype == torch.float64
    known = "float32, float16 or bfloat16"
    check(wide or logits.dtype in _FLOATING, "logits", known, logits.dtype)
    fits = tuple(logits.shape) in ((rows, vocabulary), (2 * rows, vocabulary))
    of_rows = f"({rows} or {2 * rows}, {vocabulary}) as seen is"
    check(fits, "logits", of_rows, tuple(logits.shape))
    tensors = {
        "logits": (logits, tuple(logits.shape), logits.dtype),
        "seen": (seen, shape, torch.bool),
        "params": (params, (rows, 6), torch.float64 if wide else torch.float32),
        "flags": (flags, (rows,), torch.int32),
        "philox": (philox, (rows, 2), torch.int64),
        "stop_action": (stop_action, (rows,), torch.int32),
    }
    for name, (tensor, size, dtype) in tensors.items():
        if tensor is not None:
            check(tensor.shape == size, name, str(size), tuple(tensor.shape))
            dense("cfg_sample", tensor, name, dtype, logits.device, like="logits")
    check(0 <= stop_token < vocabulary, "stop_token", f"in [0, {vocabulary})", stop_token)
    check(-1 <= forget < vocabulary, "forget", f"-1 or in [0, {vocabulary})", forget)
