"""Triton twin of decode_attention: two launches, a part of a row and head a program, then a row and
head.

    qkv (B, 3, H, 64) float32, float16 or bfloat16; k_cache, v_cache (B, H, C, 64) of these,
    contiguous in their last two dimensions; position int64 and flags int32 (B,) or (1,); cos, sin
    (C, 64) float32 or None; watched (W, 2) int32 and probabilities (W, C) float32 or None
    -> (B, H 64) in qkv's dtype; the rotated k and v are appended at the position.

Equivalent to: chatterbox_fast/reference.py, ``decode_attention``.

Arithmetic: float32, not contracted to fused multiply-adds, so that k is rotated as torch rounds
it. The first kernel leaves each part's highest score, sum of weights and weighted values, and in
`probabilities` its scores; the second puts the parts together. That is a launch more than the CUDA
kernel's, and simpler: nothing that has to be zero, no fences.

Expected bound: the valid prefix's bytes, each of which is read once.
"""

from __future__ import annotations

import functools
import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks

_must = functools.partial(checks.must, "decode_attention")

_MAX_ROWS, _MAX_HEADS, _MAX_SPLITS = 64, 1024, 64
_MAX_CAPACITY, _MAX_PROBABILITIES = 2**24, 2**31 - 1
_FLOATING = (torch.float32, torch.float16, torch.bfloat16)
_DIM, _SLOTS = 64, 64
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _length_of(position, row, capacity, SHARED: tl.constexpr):
    """How many slots are valid; 0 where the position is outside."""
    at = tl.load(position if SHARED else position + row)
    return tl.where((at >= 0) & (at < capacity), at + 1, 0).to(tl.int32)


@triton.jit
def _share_of(length, splits, SLOTS: tl.constexpr):
    """Slots of each part, of which the valid prefix has ``cdiv(length, share)``."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, splits), 16) * 16, SLOTS)


@triton.jit
def _rotated(x, cos, sin, slot, DIM: tl.constexpr):
    """A head's q or k, rotated."""
    d = tl.arange(0, DIM)
    own = tl.load(x + d).to(tl.float32)
    if cos is not None:
        other = tl.load(x + (d + DIM // 2) % DIM).to(tl.float32)
        across = tl.where(d < DIM // 2, -other, other)
        own = own * tl.load(cos + slot * DIM + d) + across * tl.load(sin + slot * DIM + d)
    return own


@triton.jit(do_not_specialize=["heads", "capacity", "watched_count", "splits"])
def attention_part_kernel(
    qkv, k_cache, v_cache, position, cos, sin, watched, probabilities, partials,
    k_row, k_head, v_row, v_head, heads, capacity, watched_count, splits,
    SHARED: tl.constexpr, DIM: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One part of a row and head. Partials: DIM sums, the highest score, the total weight."""
    pair, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    length = _length_of(position, row, capacity, SHARED)
    share = _share_of(length, splits, SLOTS)
    first = split * share
    end = tl.minimum(first + share, length)
    d = tl.arange(0, DIM)
    if first < end:
        own = qkv + (3 * row * heads + head) * DIM
        keys, values = k_cache + row * k_row + head * k_head, v_cache + row * v_row + head * v_head
        new = length - 1
        q = _rotated(own, cos, sin, new, DIM) * 0.125
        k_new = _rotated(own + heads * DIM, cos, sin, new, DIM).to(k_cache.dtype.element_ty)
        v_new = tl.load(own + 2 * heads * DIM + d).to(tl.float32).to(v_cache.dtype.element_ty)
        if end == length:
            tl.store(keys + new * DIM + d, k_new)
            tl.store(values + new * DIM + d, v_new)
        highest = tl.full((), -3.402823466e38, tl.float32)  # not -infinity, which scores may be
        total = tl.zeros((), tl.float32)
        sums = tl.zeros((DIM,), tl.float32)
        for start in range(first, end, SLOTS):
            slot = start + tl.arange(0, SLOTS)
            at, stored = slot[:, None] * DIM + d[None, :], (slot < new)[:, None]
            is_new = (slot == new)[:, None]
            k = tl.load(keys + at, mask=stored, other=0)
            v = tl.load(values + at, mask=stored, other=0)
            k = tl.where(is_new, k_new[None, :], k).to(tl.float32)
            v = tl.where(is_new, v_new[None, :], v).to(tl.float32)
            scores = tl.where(slot < end, tl.sum(k * q[None, :], axis=1), -float("inf"))
            if watched is not None:
                for w in range(watched_count):
                    if (tl.load(watched + 2 * w) == row) & (tl.load(watched + 2 * w + 1) == head):
                        tl.store(probabilities + w * capacity + slot, scores, mask=slot < end)
            before = highest
            highest = tl.maximum(highest, tl.max(scores, axis=0))
            weights = tl.exp(scores - highest)
            shrink = tl.exp(before - highest)
            total = total * shrink + tl.sum(weights, axis=0)
            sums = sums * shrink + tl.sum(v * weights[:, None], axis=0)
        partial = partials + tl.program_id(0) * (DIM + 2)
        tl.store(partial + d, sums)
        tl.store(partial + DIM, highest)
        tl.store(partial + DIM + 1, total)


@triton.jit(do_not_specialize=["heads", "capacity", "watched_count", "splits"])
def attention_whole_kernel(
    position, flags, watched, probabilities, partials, out,
    heads, capacity, watched_count, splits,
    SHARED: tl.constexpr, DIM: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The parts of a row and head put together. PARTS: splits, or more."""
    pair = tl.program_id(0)
    row, head = pair // heads, pair % heads
    length = _length_of(position, row, capacity, SHARED)
    parts = tl.cdiv(length, _share_of(length, splits, SLOTS))
    part, d = tl.arange(0, PARTS), tl.arange(0, DIM)
    partial = partials + (pair * splits + part) * (DIM + 2)
    highest = tl.load(partial + DIM, mask=part < parts, other=-3.402823466e38)
    top = tl.max(highest, axis=0)
    weights = tl.where(part < parts, tl.exp(highest - top), 0)
    totals = tl.load(partial + DIM + 1, mask=part < parts, other=0)
    sums = tl.load(partial[:, None] + d[None, :], mask=(part < parts)[:, None], other=0)
    total = tl.sum(totals * weights, axis=0)
    value = tl.sum(sums * weights[:, None], axis=0) / total
    value = tl.where(length > 0, value, 0)
    tl.store(out + pair * DIM + d, value.to(out.dtype.element_ty))
    if (length == 0) & (head == 0) & ((row == 0) | (not SHARED)):
        flag = flags if SHARED else flags + row
        tl.store(flag, tl.load(flag) | 2)
    if watched is not None:
        for w in range(watched_count):
            if (tl.load(watched + 2 * w) == row) & (tl.load(watched + 2 * w + 1) == head):
                for start in range(0, capacity, SLOTS):
                    slot = start + tl.arange(0, SLOTS)
                    at = probabilities + w * capacity + slot
                    scores = tl.load(at, mask=slot < length, other=-float("inf"))
                    weight = tl.where(slot < length, tl.exp(scores - top) / total, 0)
                    tl.store(at, weight, mask=slot < capacity)


def decode_attention(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    flags: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    watched: Tensor | None = None,
    probabilities: Tensor | None = None,
    arrivals: Tensor | None = None,
    *,
    splits: int = 0,
) -> Tensor:
    """Attention of one new token a row. CUDA tensors, or CPU tensors in Triton's interpreter.

    Args:
        qkv, k_cache, v_cache, position, flags, cos, sin, watched, probabilities: see
            `ops.decode_attention`.
        arrivals: not used.
        splits: into how many parts the valid prefix is cut at most; 0: as the device needs.

    Returns:
        ``(B, H 64)`` in qkv's dtype.

    Raises:
        RuntimeError: an argument of another shape, dtype or layout than documented.
    """
    del arrivals
    _check(qkv, k_cache, v_cache, position, flags, cos, sin, watched, probabilities)
    _must(0 <= splits <= _MAX_SPLITS, "splits", f"in [0, {_MAX_SPLITS}]", splits)
    rows, _, heads, _ = qkv.shape
    capacity, pairs = k_cache.shape[2], rows * heads
    # Triton's interpreter does not round to bfloat16, it truncates.
    dtype = qkv.dtype if qkv.is_cuda else torch.float32
    out = torch.empty(rows, heads * _DIM, dtype=dtype, device=qkv.device)
    if pairs == 0:
        return out.to(qkv.dtype)
    splits = splits or _splits(pairs, capacity, qkv.device)
    partials = torch.empty(pairs, splits, _DIM + 2, dtype=torch.float32, device=qkv.device)
    count = 0 if watched is None else len(watched)
    same = {"SHARED": len(position) == 1, "DIM": _DIM, "SLOTS": _SLOTS, **LAUNCH}
    with torch.cuda.device_of(qkv):
        attention_part_kernel[(pairs * splits,)](
            qkv, k_cache, v_cache, position, cos, sin, watched, probabilities, partials,
            *k_cache.stride()[:2], *v_cache.stride()[:2], heads, capacity, count, splits, **same,
        )  # fmt: skip
        attention_whole_kernel[(pairs,)](
            position, flags, watched, probabilities, partials, out, heads, capacity, count, splits,
            PARTS=triton.next_power_of_2(splits), **same,
        )  # fmt: skip
    return out.to(qkv.dtype)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _splits(pairs: int, capacity: int, device: torch.device) -> int:
    """As decode_attention_splits of the CUDA kernel."""
    wanted = triton.cdiv(4 * _multiprocessors(device), pairs)
    return min(wanted, triton.cdiv(capacity, _SLOTS), _MAX_SPLITS)


def _check(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    flags: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    watched: Tensor | None,
    probabilities: Tensor | None,
) -> None:
    """As csrc/decode_attention.cpp checks."""
    _must(qkv.dtype in _FLOATING, "qkv", "float32, float16 or bfloat16", qkv.dtype)
    known = qkv.dim() == 4 and (qkv.shape[1], qkv.shape[3]) == (3, _DIM)
    known = known and qkv.shape[0] <= _MAX_ROWS and qkv.shape[2] <= _MAX_HEADS
    must = f"(B, 3, H, 64), B at most {_MAX_ROWS}, H at most {_MAX_HEADS}"
    _must(known, "qkv", must, tuple(qkv.shape))
    _must(qkv.is_contiguous(), "qkv", "contiguous", f"strides {qkv.stride()}")
    _check_cache("k_cache", k_cache, qkv)
    _check_cache("v_cache", v_cache, qkv)
    same = v_cache.dtype == k_cache.dtype
    _must(same, "v_cache", f"{k_cache.dtype} as k_cache is", v_cache.dtype)
    shape, capacity = tuple(k_cache.shape), k_cache.shape[2]
    _must(v_cache.shape == shape, "v_cache", f"{shape} as k_cache is", tuple(v_cache.shape))
    own = not _overlap(k_cache, v_cache)
    _must(own, "v_cache", "of memory of its own", "some of k_cache's")
    rows = qkv.shape[0]
    _check_table("position", position, torch.int64, qkv)
    fits = position.shape in ((1,), (rows,))
    _must(fits, "position", f"(1,) or ({rows},)", tuple(position.shape))
    _check_table("flags", flags, torch.int32, qkv)
    fits = flags.shape == position.shape
    _must(fits, "flags", f"{tuple(position.shape)} as position is", tuple(flags.shape))
    _check_pair("sin", sin, "cos", cos)
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None:
            _check_table(name, table, torch.float32, qkv)
            fits = table.dim() == 2 and table.shape[0] >= capacity and table.shape[1] == _DIM
            _must(fits, name, f"({capacity} or more, 64)", tuple(table.shape))
    _check_pair("probabilities", probabilities, "watched", watched)
    if watched is not None and probabilities is not None:
        _check_table("watched", watched, torch.int32, qkv)
        most = _MAX_PROBABILITIES // capacity
        fits = watched.dim() == 2 and watched.shape[1] == 2 and len(watched) <= most
        _must(fits, "watched", f"(W, 2), W at most {most}", tuple(watched.shape))
        _check_table("probabilities", probabilities, torch.float32, qkv)
        shape = (len(watched), capacity)
        _must(probabilities.shape == shape, "probabilities", str(shape), tuple(probabilities.shape))


def _check_cache(name: str, cache: Tensor, qkv: Tensor) -> None:
    rows, _, heads, _ = qkv.shape
    _must(cache.dtype in _FLOATING, name, "float32, float16 or bfloat16", cache.dtype)
    _must(cache.device == qkv.device, name, f"on {qkv.device} as qkv is", cache.device)
    fits = cache.dim() == 4 and 1 <= cache.shape[2] <= _MAX_CAPACITY
    fits = fits and (*cache.shape[:2], cache.shape[3]) == (rows, heads, _DIM)
    must = f"({rows}, {heads}, C, 64) as qkv has, C in [1, {_MAX_CAPACITY}]"
    _must(fits, name, must, tuple(cache.shape))
    step = 16 // cache.element_size()
    sizes, strides = cache.shape, cache.stride()
    fits = strides[3] == 1 and (sizes[2] == 1 or strides[2] == _DIM)
    fits = fits and all(sizes[i] == 1 or strides[i] % step == 0 for i in range(2))
    fits = fits and cache.data_ptr() % 16 == 0
    must = "contiguous in its last two dimensions and aligned to 16 bytes in every row and head"
    _must(fits, name, must, f"strides {cache.stride()}")
    own = cache.numel() == 0 or _extent(cache) > 0
    _must(own, name, "of rows and heads of its own", f"strides {cache.stride()}")


def _extent(cache: Tensor) -> int:
    """Elements from a cache's first to behind its last, or 0 where rows or heads share some."""
    end = cache.shape[2] * _DIM
    for stride, size in sorted(zip(cache.stride()[:2], cache.shape[:2], strict=True)):
        if size > 1 and stride < end:
            return 0
        end += stride * (size - 1)
    return end


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two caches of one shape and dtype share memory; each has an extent."""
    size = one.element_size()
    ends = [cache.data_ptr() + _extent(cache) * size for cache in (one, other)]
    if one.numel() == 0 or ends[0] <= other.data_ptr() or ends[1] <= one.data_ptr():
        return False
    heads = sorted(  # of two caches that lie between each other
        cache.data_ptr() + (row * cache.stride(0) + head * cache.stride(1)) * size
        for cache in (one, other) for row in range(cache.shape[0]) for head in range(cache.shape[1])
    )  # fmt: skip
    block = one.shape[2] * _DIM * size
    return any(after - before < block for before, after in itertools.pairwise(heads))


def _check_table(name: str, tensor: Tensor, dtype: torch.dtype, qkv: Tensor) -> None:
    checks.dense("decode_attention", tensor, name, dtype, qkv.device, like="qkv")


def _check_pair(name: str, tensor: Tensor | None, other_name: str, other: Tensor | None) -> None:
    must = f"{'None' if other is None else 'given'}, as {other_name} is"
    got = "None" if tensor is None else "a tensor"
    _must((tensor is None) == (other is None), name, must, got)
