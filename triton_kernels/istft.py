"""Triton twin of istft: one launch, a block of neighbouring hops of one row a program.

    spectrum (B, M, 18) float32, float16 or bfloat16; window (16,) float32
    -> (B, 4 (M - 1)) float32; limit: see the reference.

Equivalent to: chatterbox_fast/reference.py, ``istft``.

Arithmetic: float32, with libdevice's exp, sin and cos on a GPU. A hop's four samples are summed
over the bins of a frame in a tree, then over the four frames that reach it, in order of time.

Expected bound: arithmetic, as a frame's bins are computed for each of the four hops that it
reaches: there is no way to hand them on but through memory.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from . import checks

_must = functools.partial(checks.must, "istft")

_FLOATING = (torch.float32, torch.float16, torch.bfloat16)
MOST_FRAMES = 2**31 - 1
HOPS = 32
LAUNCH = {"num_warps": 4}

_SIZE, _HOP, _OVERLAP = tl.constexpr(16), tl.constexpr(4), tl.constexpr(4)
_BINS, _CHANNELS, _LOUDEST = tl.constexpr(9), tl.constexpr(18), tl.constexpr(100.0)
_EIGHTH_OF_PI = tl.constexpr(0.39269908169872414)


@triton.jit
def _exp(x, CUDA: tl.constexpr):
    return libdevice.exp(x) if CUDA else tl.exp(x)  # tl.exp is coarser on CUDA


@triton.jit
def _cosine(step):
    """cos(2 pi step / 16), by an angle within a quarter turn: a larger one is rounded more."""
    turn = step % _SIZE - _SIZE // 2
    quarter = tl.where(turn < 0, -turn, turn) - _SIZE // 4
    return tl.sin(quarter.to(tl.float32) * _EIGHTH_OF_PI)


@triton.jit
def _basis(bins, n):
    """(16, 4): what the real and the imaginary part of a bin add to samples n of a frame."""
    step = bins[:, None] * n[None, :]
    both = ((bins > 0) & (bins < _BINS - 1))[:, None]  # the conjugates of the others are themselves
    scale = tl.where(both, 2.0 / _SIZE, 1.0 / _SIZE)
    return scale * _cosine(step), tl.where(both, scale * _cosine(step + _SIZE // 4), 0.0)


@triton.jit
def _frames(spectrum, frame, frames, bins, CUDA: tl.constexpr):
    """(HOPS, 16): the real and the imaginary parts of bins of frames; 0 where there is none."""
    wanted = ((frame >= 0) & (frame < frames))[:, None] & (bins < _BINS)[None, :]
    at = spectrum + frame[:, None] * _CHANNELS + bins[None, :]
    loudness = _exp(tl.load(at, mask=wanted, other=-float("inf")).to(tl.float32), CUDA)
    magnitude = tl.where(loudness > _LOUDEST, _LOUDEST, loudness)  # NaN is kept
    phase = tl.sin(tl.load(at + _BINS, mask=wanted, other=0).to(tl.float32))
    return magnitude * tl.cos(phase), magnitude * tl.sin(phase)


@triton.jit(do_not_specialize=["frames", "limit"])
def istft_kernel(
    spectrum, window, y, frames, limit, HOPS: tl.constexpr, CUDA: tl.constexpr,
):  # fmt: skip
    """HOPS hops of 4 samples of a row."""
    hops = frames - 1
    tiles = tl.cdiv(hops, HOPS)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    hop = (tl.program_id(0) % tiles).to(tl.int64) * HOPS + tl.arange(0, HOPS)
    bins, place = tl.arange(0, _SIZE), tl.arange(0, _HOP)
    own = spectrum + row * frames * _CHANNELS
    total = tl.zeros((HOPS, _HOP), tl.float32)
    envelope = tl.zeros((HOPS, _HOP), tl.float32)
    for i in tl.static_range(_OVERLAP):
        frame = hop - 1 + i
        n = (_OVERLAP - 1 - i) * _HOP + place
        weight = tl.load(window + n)[None, :]
        real, imaginary = _frames(own, frame, frames, bins, CUDA)
        cosines, sines = _basis(bins, n)
        products = real[:, :, None] * cosines[None] + imaginary[:, :, None] * sines[None]
        total += tl.sum(products, axis=1) * weight
        envelope += tl.where(((frame >= 0) & (frame < frames))[:, None], weight * weight, 0)
    audio = tl.div_rn(total, envelope)
    audio = tl.where(audio > limit, limit, audio)
    audio = tl.where(audio < -limit, -limit, audio)  # NaN is kept
    at = (row * hops + hop)[:, None] * _HOP + place[None, :]
    tl.store(y + at, audio, mask=(hop < hops)[:, None])


def istft(spectrum: Tensor, window: Tensor, limit: float) -> Tensor:
    """The head of HiFT. CUDA tensors, or CPU tensors in Triton's interpreter.

    Args:
        spectrum, window, limit: see `reference.istft`. Contiguous.

    Returns:
        ``(B, 4 (M - 1))`` float32.

    Raises:
        RuntimeError: an argument of another shape, dtype, layout or range than documented.
    """
    _check(spectrum, window, limit)
    rows, frames, _ = spectrum.shape
    y = torch.empty(rows, 4 * (frames - 1), dtype=torch.float32, device=spectrum.device)
    if y.numel() == 0:
        return y
    with torch.cuda.device_of(spectrum):
        istft_kernel[(triton.cdiv(frames - 1, HOPS) * rows,)](
            spectrum, window, y, frames, limit, HOPS=HOPS, CUDA=spectrum.is_cuda, **LAUNCH
        )
    return y


def _check(spectrum: Tensor, window: Tensor, limit: float) -> None:
    """As csrc/istft.cpp checks."""
    floating = "float32, float16 or bfloat16"
    _must(spectrum.dtype in _FLOATING, "spectrum", floating, spectrum.dtype)
    shape = tuple(spectrum.shape)
    fits = len(shape) == 3 and shape[1] >= 1 and shape[2] == 18
    fits = fits and shape[0] * shape[1] <= MOST_FRAMES
    must = f"(B, M, 18), with M >= 1 and B M at most {MOST_FRAMES}"
    _must(fits, "spectrum", must, shape)
    _must(spectrum.is_contiguous(), "spectrum", "contiguous", f"strides {spectrum.stride()}")
    checks.dense("istft", window, "window", torch.float32, spectrum.device)
    _must(window.shape == (16,), "window", "(16,)", tuple(window.shape))
    _must(limit > 0, "limit", "> 0", limit)
