"""Triton twin of resample: one launch, a block of neighbouring outputs of one row a program.

    waveform (R, T) float32, float16 or bfloat16; filters (P, K) float32; first (F, K) float32
    -> (R, length) in the waveform's dtype; stride, left: see the reference.

Equivalent to: chatterbox_fast/reference.py, ``resample``.

Arithmetic: float32. Each place of a block of taps sums its own products, then the places are added
in a tree.

Expected bound: with some 24 taps the launch; with soxr's 300 the loads of samples and taps from L1,
two a product.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks

_must = functools.partial(checks.must, "resample")

_FLOATING = (torch.float32, torch.float16, torch.bfloat16)
MOST_COEFFICIENTS = 2**20
MOST_SAMPLES = 2**40
MOST_TILES = 2**31 - 1
OUTPUTS, TAPS = 128, 16
LAUNCH = {"num_warps": 4}


@triton.jit(do_not_specialize=["samples", "length", "first_count", "stride", "left"])
def resample_kernel(
    waveform, filters, first, y,
    samples, length, phases, taps, first_count, stride, left, phase_stride, tap_stride,
    OUTPUTS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """OUTPUTS outputs of a row, TAPS taps at a time."""
    tiles = tl.cdiv(length, OUTPUTS)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    output = (tl.program_id(0) % tiles).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = output < length
    start = output * stride // phases - left
    filter_at = filters + output % phases * phase_stride
    is_first = output < first_count
    sums = tl.zeros((OUTPUTS, TAPS), tl.float32)
    for begin in range(0, taps, TAPS):
        k = begin + tl.arange(0, TAPS)
        wanted = is_output[:, None] & (k < taps)[None, :]
        place = start[:, None] + k[None, :]
        inside = wanted & (place >= 0) & (place < samples)
        x = tl.load(waveform + row * samples + place, mask=inside, other=0).to(tl.float32)
        usual = wanted & ~is_first[:, None]
        tap = tl.load(filter_at[:, None] + (k * tap_stride)[None, :], mask=usual, other=0)
        if first is not None:
            own = first + (output * taps)[:, None] + k[None, :]
            tap += tl.load(own, mask=wanted & is_first[:, None], other=0)
        sums += x * tap
    total = tl.sum(sums, axis=1)
    tl.store(y + row * length + output, total.to(y.dtype.element_ty), mask=is_output)


def resample(
    waveform: Tensor,
    filters: Tensor,
    first: Tensor | None = None,
    *,
    stride: int,
    left: int,
    length: int,
) -> Tensor:
    """Polyphase convolution. CUDA tensors, or CPU tensors in Triton's interpreter.

    Args:
        waveform, filters, first, stride, left, length: see `reference.resample`. Contiguous, but
            for `filters`.

    Returns:
        ``(R, length)`` in the waveform's dtype.

    Raises:
        RuntimeError: an argument of another shape, dtype, layout or range than documented.
    """
    _check(waveform, filters, first, stride, left, length)
    # Triton's interpreter does not round to bfloat16, it truncates.
    dtype = waveform.dtype if waveform.is_cuda else torch.float32
    rows, samples = waveform.shape
    y = torch.empty(rows, length, dtype=dtype, device=waveform.device)
    if y.numel() == 0:
        return y.to(waveform.dtype)
    (phases, taps), count = filters.shape, 0 if first is None else len(first)
    with torch.cuda.device_of(waveform):
        resample_kernel[(triton.cdiv(length, OUTPUTS) * rows,)](
            waveform, filters, first, y,
            samples, length, phases, taps, count, stride, left, *filters.stride(),
            OUTPUTS=OUTPUTS, TAPS=TAPS, **LAUNCH,
        )  # fmt: skip
    return y.to(waveform.dtype)


def _check(
    waveform: Tensor, filters: Tensor, first: Tensor | None, stride: int, left: int, length: int
) -> None:
    """As csrc/resample.cpp checks."""
    floating = "float32, float16 or bfloat16"
    _must(waveform.dtype in _FLOATING, "waveform", floating, waveform.dtype)
    _must(waveform.dim() == 2, "waveform", "(R, T)", tuple(waveform.shape))
    strides = f"strides {waveform.stride()}"
    _must(waveform.is_contiguous(), "waveform", "contiguous", strides)
    _must(filters.dtype == torch.float32, "filters", "torch.float32", filters.dtype)
    _must(filters.device == waveform.device, "filters", f"on {waveform.device}", filters.device)
    fits = filters.dim() == 2 and 1 <= filters.numel() <= MOST_COEFFICIENTS
    must = f"(P, K), with 1 to {MOST_COEFFICIENTS} coefficients"
    _must(fits, "filters", must, tuple(filters.shape))
    taps = filters.shape[1]
    if first is not None:
        checks.dense("resample", first, "first", torch.float32, filters.device)
        fits = first.dim() == 2 and first.shape[1] == taps
        _must(fits, "first", f"(F, {taps}) as filters has", tuple(first.shape))
    fits = 1 <= stride <= MOST_COEFFICIENTS
    _must(fits, "stride", f"in [1, {MOST_COEFFICIENTS}]", stride)
    _must(0 <= left < taps, "left", f"in [0, {taps}), before the last tap", left)
    most = MOST_SAMPLES // stride
    _must(0 <= length <= most, "length", f"in [0, {most}]", length)
    most = MOST_TILES // max(1, -(-length // OUTPUTS))
    must = f"of at most {most} rows for {length} outputs"
    _must(len(waveform) <= most, "waveform", must, tuple(waveform.shape))
