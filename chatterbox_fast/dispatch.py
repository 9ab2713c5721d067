"""Which implementation of an op runs, and why."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple, get_args

import torch

from . import _ext
from .options import Backend

OPS = (
    "cfg_sample", "skinny_linear", "decode_attention", "resample", "istft", "padded_attention",
    "snake", "add_norm",
)  # fmt: skip
"""Every op; each has at least its reference."""


class Choice(NamedTuple):
    """The implementation chosen for an op, and the reason in a few words.

    `backend` is ``"extension"`` (the compiled op for the device), ``"triton"`` or ``"reference"``.
    """

    backend: str
    reason: str


def requested_backend(option: Backend) -> Backend:
    """The backend asked for: `CHATTERBOX_FAST_BACKEND` where it is set, else the option.

    Raises:
        ValueError: the environment variable names no backend.
    """
    named = os.environ.get("CHATTERBOX_FAST_BACKEND")
    if not named:
        return option
    for backend in get_args(Backend):
        if named == backend:
            return backend
    raise ValueError(
        f"CHATTERBOX_FAST_BACKEND must be one of {', '.join(get_args(Backend))}, got {named!r}"
    )


def choose(
    op: str, device: torch.device, option: Backend = "auto", dtype: torch.dtype = torch.float32
) -> Choice:
    """Chooses the implementation of `op` on `device`: the extension, else Triton, else reference.

    ``"cuda"`` and ``"triton"`` are preferences: where that one is not there, the next is taken.
    """
    wanted = requested_backend(option)
    if wanted == "reference":
        return Choice("reference", "asked for")
    if dtype == torch.float64:
        return Choice("reference", "float64 is computed by the reference alone")
    order = [("triton", _why_no_triton), ("extension", _why_no_extension)]
    if wanted != "triton":
        order.reverse()
    reasons: list[str] = []
    for backend, why_not in order:
        if (reason := why_not(op, device)) is None:
            return Choice(backend, "; ".join(reasons) or f"compiled for {device.type}")
        reasons.append(reason)
    return Choice("reference", "; ".join(reasons))


def extension_has(op: str) -> bool:
    """Whether the extension is loaded and declares `op`."""
    return _ext.module is not None and hasattr(torch.ops.chatterbox_fast, op)


@functools.cache
def _why_no_extension(op: str, device: torch.device) -> str | None:
    key = "CUDA" if device.type == "cuda" else "CPU"
    if not extension_has(op):
        return _ext.missing or f"the extension has no {op} yet"
    if device.type not in ("cpu", "cuda"):
        return f"the extension has no {op} for {device.type}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"chatterbox_fast::{op}", key):
        return _ext.missing or f"the extension has no {op} for {device.type}"
    return None


@functools.cache
def _why_no_triton(op: str, device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec(f"chatterbox_fast.triton_kernels.{op}") is None:
        return f"no Triton twin of {op} yet"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"triton does not run on {device.type}"
    return None
