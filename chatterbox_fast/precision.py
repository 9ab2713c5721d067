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
    if device.type != "cuda":
        return _choose_float_without_cuda(wanted, device, own)
    if wanted in ("auto", "int8"):
        auto, why = _auto(device)
        why = why if wanted == "auto" else "int8 is T3's alone"
        wanted = auto
    if wanted != "exact" and (reason := _why_not_from(own, wanted)) is not None:
        return "exact", own, reason
    return wanted, DTYPES.get(wanted, own), why


def _choose_float_without_cuda(
    wanted: str, device: torch.device, own: torch.dtype
) -> tuple[str, torch.dtype, str]:
    if wanted == "exact":
        return "exact", own, "asked for"
    if device.type != "cpu":
        return "exact", own, f"S3Gen is float32 on {device.type}"
    if wanted == "auto":
        return "exact", own, _auto(device)[1]
    if wanted == "fp16":
        return "exact", own, "a CPU gains nothing from fp16"
    # Without such instructions one thread of an EPYC took 6 times as long for the solver in
    # bfloat16 as in float32, and 9 times for the vocoder.
    if not cpu_multiplies_bf16():
        return "exact", own, "S3Gen's bf16 needs a CPU with AVX512_BF16 or AMX, and oneDNN"
    if (reason := _why_not_from(own, "bf16")) is not None:
        return "exact", own, reason
    return "bf16", torch.bfloat16, "asked for" if wanted == "bf16" else "int8 is T3's alone"


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU does (AVX512_BF16 or AMX), and torch has the oneDNN that makes use of it."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name)() for name in names if hasattr(torch.cpu, name))


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
