"""Which implementation of an op runs, and why."""

from __future__ import annotations

import os
from typing import NamedTuple, get_args

import torch

from . import _ext
from .options import Backend

OPS = ("cfg_sample", "decode_attention")
"""The ops that engines call by name; each has at least its reference."""


class Choice(NamedTuple):
    """The implementation chosen for an op: its name, and the reason in a few words."""

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


def choose(op: str, device: torch.device, option: Backend = "auto") -> Choice:
    """Chooses the implementation of `op` on `device`.

    Only references have landed, so the answer is always the reference; the reason says whether
    something else was asked for.
    """
    wanted = requested_backend(option)
    if wanted == "reference":
        return Choice("reference", "asked for")
    lacking = _ext.missing or f"no {op} kernel for {device.type} has landed yet"
    if wanted == "auto":
        return Choice("reference", lacking)
    return Choice("reference", f"{wanted} was asked for, but {lacking}")
