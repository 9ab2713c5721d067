"""Triton twin of padded_attention: one launch, a tile of queries of a row and head a program.

    qkv (R, T, 3 H 64) float32, float16 or bfloat16; lengths (R,) int32 -> (R, T, H 64) in qkv's
    dtype, 0 where a position is a pad.

Equivalent to: chatterbox_fast/reference.py, ``padded_attention``.

Arithmetic: products of qkv's dtype, sums and softmax in float32, without TF32; weights are rounded
to qkv's dtype before they meet the values, their sum is of those not rounded. Tiles of keys beyond
the length are skipped; pads are not read.

Expected bound: the tensor cores in half precision, the multiply-adds in float32.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks

_must = functools.partial(checks.must, "padded_attention")

_FLOATING = (torch.float32, torch.float16, torch.bfloat16)
_ALIGNMENT = 16
DIM = 64
QUERIES, KEYS = 64, 64
LAUNCH = {"num_warps": 4, "num_stages": 2}


@triton.jit(do_not_specialize=["positions"])
def padded_attention_kernel(
    qkv, lengths, out, positions, heads,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """QUERIES positions of a row and head."""
    tiles = tl.cdiv(positions, QUERIES)
    pair = tl.program_id(0) // tiles
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    width = heads * DIM
    length = tl.minimum(tl.load(lengths + row), positions)
    tile = tl.program_id(0) % tiles * QUERIES
    query = tile + tl.arange(0, QUERIES).to(tl.int64)
    d = tl.arange(0, DIM)
    own = qkv + row * positions * 3 * width + head * DIM
    is_valid = (query < length)[:, None]
    q = tl.load(own + query[:, None] * 3 * width + d[None, :], mask=is_valid, other=0)
    highest = tl.full((QUERIES,), -3.402823466e38, tl.float32)  # not -infinity, which scores may be
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, DIM), tl.float32)
    end = tl.where(tile < length, length, 0)
    for start in range(0, end, KEYS):
        key = start + tl.arange(0, KEYS).to(tl.int64)
        at, there = own + key[:, None] * 3 * width + d[None, :], (key < length)[:, None]
        k = tl.load(at + width, mask=there, other=0)
        v = tl.load(at + 2 * width, mask=there, other=0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * 0.125
        scores = tl.where((key < length)[None, :], scores, -float("inf"))
        before = highest
        highest = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp(scores - highest[:, None])
        shrink = tl.exp(before - highest)
        total = total * shrink + tl.sum(weights, axis=1)
        sums = sums * shrink[:, None]
        sums = tl.dot(weights.to(v.dtype), v, sums, input_precision="ieee")
    value = tl.where(is_valid, sums / total[:, None], 0)
    to = out + (row * positions + query[:, None]) * width + head * DIM + d[None, :]
    tl.store(to, value.to(out.dtype.element_ty), mask=(query < positions)[:, None])


def padded_attention(qkv: Tensor, lengths: Tensor, heads: int) -> Tensor:
    """Attention of padded rows. CUDA tensors, or CPU tensors in Triton's interpreter.

    Args:
        qkv, lengths, heads: see `ops.padded_attention`.

    Returns:
        ``(R, T, H 64)`` in qkv's dtype.

    Raises:
        RuntimeError: an argument of another shape, dtype or layout than documented.
    """
    _check(qkv, lengths, heads)
    rows, positions, _ = qkv.shape
    # Triton's interpreter does not round to bfloat16, it truncates: it computes in float32.
    own = qkv.float() if not qkv.is_cuda and qkv.dtype == torch.bfloat16 else qkv
    out = torch.empty(rows, positions, heads * DIM, dtype=own.dtype, device=qkv.device)
    if out.numel() == 0:
        return out.to(qkv.dtype)
    with torch.cuda.device_of(qkv):
        padded_attention_kernel[(rows * heads * triton.cdiv(positions, QUERIES),)](
            own, lengths, out, positions, heads,
            QUERIES=QUERIES, KEYS=KEYS, DIM=DIM, **LAUNCH,
        )  # fmt: skip
    return out.to(qkv.dtype)


def _check(qkv: Tensor, lengths: Tensor, heads: int) -> None:
    """As csrc/padded_attention.cpp checks."""
    _must(qkv.dtype in _FLOATING, "qkv", "float32, float16 or bfloat16", qkv.dtype)
    _must(heads >= 1, "heads", "at least 1", heads)
    fits = qkv.dim() == 3 and qkv.shape[2] == 3 * heads * DIM
    _must(fits, "qkv", f"(R, T, 3 * {heads} * 64)", tuple(qkv.shape))
    _must(qkv.is_contiguous(), "qkv", "contiguous", f"strides {qkv.stride()}")
    beyond = qkv.data_ptr() % _ALIGNMENT
    _must(beyond == 0, "qkv", "aligned to 16 bytes", f"an address of {beyond} bytes more")
    checks.dense("padded_attention", lengths, "lengths", torch.int32, qkv.device)
    fits = lengths.shape == qkv.shape[:1]
    _must(fits, "lengths", f"({len(qkv)},) as qkv has rows", tuple(lengths.shape))
