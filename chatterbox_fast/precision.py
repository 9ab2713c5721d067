"""Which precision a model computes in on a device, and why."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from . import dispatch, ops, reference
from .options import Options

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


class Precise(NamedTuple):
    """What the T3 engine computes in.

    Attributes:
        precision: ``"exact"``, ``"bf16"``, ``"fp16"`` or ``"int8"``.
        dtype: what the weights are stored in; for ``"exact"`` the model's own.
        kernel: the backend of `skinny_linear`, or ``"torch"`` for torch's own.
        attention: the backend of `decode_attention`.
        why: the reason, in a few words.
    """

    precision: str
    dtype: torch.dtype
    kernel: str
    attention: str
    why: str


def choose_precision(options: Options, device: torch.device, own: torch.dtype) -> Precise:
    """The precision that `options` asks for where `device` has it, else the nearest one.

    Args:
        own: the dtype of the model's weights.
    """
    choice = dispatch.choose("skinny_linear", device, options.backend, own)
    if choice.backend != "reference" and (failed := _failed_self_test(choice.backend, device)):
        choice = dispatch.Choice("reference", failed)
    kernel = "torch" if choice.backend == "reference" else choice.backend
    wanted, why = str(options.precision), "asked for"
    if wanted == "auto":
        wanted, why = _auto(device)
    if wanted != "exact" and (reason := _why_not(wanted, device, own, choice)) is not None:
        wanted, why = "exact", reason
    attention = dispatch.choose("decode_attention", device, options.backend, own).backend
    return Precise(wanted, DTYPES.get(wanted, own), kernel, attention, why)


def choose_float(
    options: Options, device: torch.device, own: torch.dtype
) -> tuple[str, torch.dtype, str]:
    """What S3Gen's matrices are stored in: the precision's name, its dtype, and why.

    Args:
        own: the dtype of the model's weights.
    """
    wanted, why = str(options.precision), "asked for"
    if device.type != "cuda":
        return "exact", own, "a CPU is fastest in float32" if wanted != "exact" else why
    if wanted in ("auto", "int8"):
        auto, why = _auto(device)
        why = why if wanted == "auto" else "int8 is T3's alone"
        wanted = auto
    if wanted != "exact" and own != torch.float32:
        return "exact", own, f"{wanted} needs float32 weights to start from, these are {own}"
    return wanted, DTYPES.get(wanted, own), why


@functools.cache
def _failed_self_test(backend: str, device: torch.device) -> str | None:
    """Whether skinny_linear computes what its reference does on this very machine; once a process.

    A wheel may have been built for another GPU, or run on a CPU that nobody tried.
    """
    source = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 96, generator=source).to(device) for n in (2, 66))
    norm = torch.rand(96, generator=source).to(device)
    residual = torch.randn(2, 33, generator=source).to(device)
    scale = torch.full((66,), 0.01, device=device)
    kernel = ops.skinny_linear_by(backend)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        stored = (30 * weight).round().to(dtype) if dtype == torch.int8 else weight.to(dtype)
        row_scale = scale if dtype == torch.int8 else None
        call = (x, stored, row_scale, norm, residual)
        expected = reference.skinny_linear(*call, eps=1e-5, gated=True)
        try:
            own = kernel(*call, eps=1e-5, gated=True)
            close = torch.allclose(own, expected, rtol=1e-3, atol=1e-3)
        except RuntimeError as failure:
            return f"skinny_linear raises: {str(failure).splitlines()[0]}"
        if not close:
            return f"skinny_linear is wrong on this machine with {dtype} weights"
    return None


def _auto(device: torch.device) -> tuple[str, str]:
    if device.type != "cuda":
        return "exact", "the default on a CPU"
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return "bf16", "the default on a GPU"
    return "fp16", "the default on a GPU without bfloat16"


def _why_not(
    wanted: str, device: torch.device, own: torch.dtype, kernel: dispatch.Choice
) -> str | None:
    if own != torch.float32:
        return f"{wanted} needs float32 weights to start from, these are {own}"
    if device.type == "cpu" and wanted == "fp16":
        return "a CPU gains nothing from fp16"
    if kernel.backend == "reference" and (device.type == "cpu" or wanted == "int8"):
        return f"{wanted} needs the kernel skinny_linear: {kernel.reason}"
    return None
