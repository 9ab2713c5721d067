"""Which precision a model computes in on a device, and why."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import dispatch, selftest
from .options import Options

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


class Precise(NamedTuple):
    """What the T3 engine computes in.

    Attributes:
        precision: ``"exact"``, ``"bf16"``, ``"fp16"`` or ``"int8"``.
        dtype: what the weights are stored in; for ``"exact"`` the model's own.
        linear: what runs `skinny_linear`, and why; its backend is ``"torch"`` for torch's own.
        why: the reason, in a few words.
    """

    precision: str
    dtype: torch.dtype
    linear: dispatch.Choice
    why: str


def choose_precision(options: Options, device: torch.device, own: torch.dtype) -> Precise:
    """The precision that `options` asks for where `device` has it, else the nearest one.

    Args:
        own: the dtype of the model's weights.
    """
    linear = selftest.choose("skinny_linear", device, options.backend, own)
    if linear.backend == "reference":
        linear = linear._replace(backend="torch")
    wanted, why = str(options.precision), "asked for"
    if wanted == "auto":
        wanted, why = _auto(device)
    if wanted != "exact" and (reason := _why_not(wanted, device, own, linear)) is not None:
        wanted, why = "exact", reason
    return Precise(wanted, DTYPES.get(wanted, own), linear, why)


def choose_float(
    options: Options, device: torch.device, own: torch.dtype
) -> tuple[str, torch.dtype, str]:
    """What S3Gen's matrices are stored in: the precision's name, its dtype, and why.

    Args:
        own: the dtype of the model's weights.
    """
    wanted, why = str(options.precision), "asked for"
    # One thread of an EPYC with AVX2, medians of five: in bfloat16 the solver takes 6 times as long
    # as in float32, the vocoder 9 times. No CPU with AMX or AVX-512 has been measured.
    if device.type != "cuda":
        return "exact", own, "S3Gen is float32 on a CPU" if wanted != "exact" else why
    if wanted in ("auto", "int8"):
        auto, why = _auto(device)
        why = why if wanted == "auto" else "int8 is T3's alone"
        wanted = auto
    if wanted != "exact" and (reason := _why_not_from(own, wanted)) is not None:
        return "exact", own, reason
    return wanted, DTYPES.get(wanted, own), why


def _auto(device: torch.device) -> tuple[str, str]:
    if device.type != "cuda":
        return "exact", "the default on a CPU"
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return "bf16", "the default on a GPU"
    return "fp16", "the default on a GPU without bfloat16"


def _why_not_from(own: torch.dtype, wanted: str) -> str | None:
    if own == torch.float32:
        return None
    return f"{wanted} needs float32 weights to start from, these are {own}"


def _why_not(
    wanted: str, device: torch.device, own: torch.dtype, linear: dispatch.Choice
) -> str | None:
    if (reason := _why_not_from(own, wanted)) is not None:
        return reason
    if device.type == "cpu" and wanted == "fp16":
        return "a CPU gains nothing from fp16"
    if linear.backend == "torch" and (device.type == "cpu" or wanted == "int8"):
        return f"{wanted} needs the kernel skinny_linear: {linear.reason}"
    return None
