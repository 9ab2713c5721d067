"""Triton twin of cfg_sample: one launch, one program a row, from logits to the drawn token.

English: CFG -> stop action -> penalty -> temperature -> top-k -> min-p -> top-p -> draw
Turbo:   CFG -> stop action -> temperature -> top-k -> min-p -> top-p -> penalty -> draw

    logits (R or 2R, V) float32, float16 or bfloat16; seen (R, V) bool; params (R, 6) float32;
    flags (R,) int32; philox (R, 2) int64; stop_action (R,) int32 or None -> token (R,) int64

Equivalent to: chatterbox_fast/reference.py, ``cfg_sample`` with the noise of
``philox_exponential``, then ``philox[:, 1] += philox_increment``. seen, flags and philox are
updated in place; a row that is STOPPED on entry keeps its flags.

Arithmetic: float32, rounded operation by operation as torch's own (no contraction to FMA); divisors
as torch applies them, see ``reference.divide``. Probabilities are not normalised: exp(s - max) is
compared with min_p, weighed for top-p and divided by the noise.

Random numbers: Philox4x32-10, torch's CUDA stream. On CUDA the noise is -lg2.approx(u) ln 2 as in
torch's ``exponential_``, not the reference's accurate logarithm.

Selection without a sort: scores become integers of the same order, and a threshold is bisected on
them bit by bit. top-k counts; top-p adds up masses exp(s - max) 2^40, rounded to int64, so its
sum does not depend on the order of addition.

Ties: top-k keeps all ids equal to the k-th; top-p removes the higher of two equal ids first; the
draw takes the lower.

Expected bound: latency. A row is at most 256 KiB in one program: about five reductions in a chain,
32 more where top-k is on and 48 more where top-p is on.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .. import reference
from . import checks

_must = functools.partial(checks.must, "cfg_sample")
LAUNCH = {"num_warps": 32, "enable_fp_fusion": False}

_NEVER = tl.constexpr(float("-inf"))  # a score that is not drawn
_ENDLESS = tl.constexpr(float("inf"))
_RULED_OUT = tl.constexpr(2.0**15)
_STOPPED, _FAILED = tl.constexpr(reference.STOPPED), tl.constexpr(reference.FAILED)
_SUPPRESS, _FORCE = tl.constexpr(reference.SUPPRESS), tl.constexpr(reference.FORCE)
_MASS_OF_ONE = tl.constexpr(2.0**40)
_CURAND_SCALE, _CURAND_SHIFT = tl.constexpr(2.0**-32), tl.constexpr(2.0**-33)
_HALF_EPSILON = tl.constexpr(2.0**-24)


@triton.jit
def _divide(x, divisor, CUDA: tl.constexpr):
    return x * tl.div_rn(1.0, divisor) if CUDA else tl.div_rn(x, divisor)


@triton.jit
def _exp(x, CUDA: tl.constexpr):
    return libdevice.exp(x) if CUDA else tl.exp(x)  # tl.exp is coarser on CUDA


@triton.jit
def _exponential(seed, offset, ids, threads, CUDA: tl.constexpr):
    """Number `ids` of what torch's exponential_ draws: see reference.philox_exponential."""
    block = offset // 4 + ids // (4 * threads)
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    x, y, z, w = tl.philox(seed, low, high, (ids % threads).to(tl.uint32), 0)
    lane = ids // threads % 4
    bits = tl.where(lane == 0, x, tl.where(lane == 1, y, tl.where(lane == 2, z, w)))
    uniform = bits.to(tl.float32) * _CURAND_SCALE + _CURAND_SHIFT
    log = libdevice.fast_logf(uniform) if CUDA else tl.log(uniform)
    return -tl.where(uniform >= 1 - _HALF_EPSILON, -_HALF_EPSILON, log)


@triton.jit
def _act_on_stop(scores, action, is_stop):
    scores = tl.where(is_stop & (action == _SUPPRESS), -_RULED_OUT, scores)
    forced = tl.where(is_stop, _RULED_OUT, -_RULED_OUT)
    return tl.where(action == _FORCE, forced, scores)


@triton.jit
def _penalise(scores, is_seen, penalty, CUDA: tl.constexpr):
    penalised = tl.where(scores < 0, scores * penalty, _divide(scores, penalty, CUDA))
    return tl.where(is_seen, penalised, scores)


@triton.jit
def _nan_to_endless(scores):
    """So that a NaN has an order; both fail the row, and no filter removes the highest score."""
    return tl.where(scores == scores, scores, _ENDLESS)


@triton.jit
def _key(scores):
    """int64 in [0, 2^32), in the order of the scores; the two zeros are equal."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -1 - bits, bits + 0x80000000)


@triton.jit
def _threshold(key, mass, limit, BITS: tl.constexpr):
    """The largest of [0, 2^BITS) such that the keys below it have a mass of at most `limit`."""
    threshold = tl.full((), 0, tl.int64)
    step = tl.full((), 2 ** (BITS - 1), tl.int64)
    for _ in range(BITS):
        below = tl.sum(tl.where(key < threshold + step, mass, 0), axis=0)
        threshold += tl.where(below <= limit, step, 0)
        step >>= 1
    return threshold


@triton.jit
def _keep_top_k(scores, top_k, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    if (top_k > 0) & (top_k < VOCABULARY):
        key = _key(scores)
        others = BLOCK - tl.maximum(top_k.to(tl.int32), 1)
        kth = _threshold(key, 1, others, BITS=32)
        scores = tl.where(key < kth, _NEVER, scores)
    return scores


@triton.jit
def _keep_top_p(scores, top, one_minus_top_p, ids, CUDA: tl.constexpr):
    if one_minus_top_p > 0:
        key = (_key(scores) << 16) | (65535 - ids)  # of equal scores the higher id is the lower key
        mass = (_exp(scores - top, CUDA) * _MASS_OF_ONE + 0.5).to(tl.int64)
        limit = one_minus_top_p.to(tl.float64) * tl.sum(mass, axis=0).to(tl.float64)
        lowest_kept = _threshold(key, mass, limit.to(tl.int64), BITS=48)
        lowest_kept = tl.minimum(lowest_kept, tl.max(key, axis=0))
        scores = tl.where(key < lowest_kept, _NEVER, scores)
    return scores


@triton.jit(
    do_not_specialize=["threads", "stop_token", "forget"],
    do_not_specialize_on_alignment=[
        "logits", "seen", "params", "flags", "philox", "stop_action", "token",
    ],
)  # fmt: skip
def cfg_sample_kernel(
    logits, seen, params, flags, philox, stop_action, token, threads, stop_token, forget,
    VOCABULARY: tl.constexpr, BLOCK: tl.constexpr, GUIDED: tl.constexpr, TURBO: tl.constexpr,
    CUDA: tl.constexpr,
):  # fmt: skip
    """One row. CUDA: round as torch does on CUDA, not as on a CPU."""
    row = tl.program_id(0)
    ids = tl.arange(0, BLOCK)
    real = ids < VOCABULARY
    seen += row * VOCABULARY
    params += row * 6
    penalty = tl.load(params + 1)
    is_seen = tl.load(seen + ids, mask=real, other=0)

    scores = tl.load(logits + row * VOCABULARY + ids, mask=real, other=0.0).to(tl.float32)
    if GUIDED:
        logits += tl.num_programs(0) * VOCABULARY
        other = tl.load(logits + row * VOCABULARY + ids, mask=real, other=0.0).to(tl.float32)
        scores = scores + tl.load(params) * (scores - other)
    if stop_action is not None:
        scores = _act_on_stop(scores, tl.load(stop_action + row), ids == stop_token)
    if not TURBO:
        scores = _penalise(scores, is_seen, penalty, CUDA)
    scores = _nan_to_endless(_divide(scores, tl.load(params + 2), CUDA))
    scores = _keep_top_k(tl.where(real, scores, _NEVER), tl.load(params + 5), VOCABULARY, BLOCK)
    top = tl.max(scores, axis=0)
    scores = tl.where(_exp(scores - top, CUDA) < tl.load(params + 3), _NEVER, scores)
    scores = _keep_top_p(scores, top, tl.load(params + 4), ids, CUDA)
    if TURBO:
        scores = _nan_to_endless(_penalise(scores, is_seen, penalty, CUDA))
        top = tl.max(scores, axis=0)

    seed, offset = tl.load(philox + 2 * row), tl.load(philox + 2 * row + 1)
    noise = _exponential(seed, offset, ids, threads, CUDA)
    drawn = tl.argmax(tl.div_rn(_exp(scores - top, CUDA), noise), axis=0)
    failed = (top == _ENDLESS) | (tl.max(scores, axis=0) == _NEVER)
    drawn = tl.where(failed, 0, drawn)
    flag = tl.where(failed, _FAILED, tl.where(drawn == stop_token, _STOPPED, 0))

    tl.debug_barrier()  # all threads have read the row before one of them changes it
    tl.store(token + row, drawn.to(tl.int64))
    old = tl.load(flags + row)
    tl.store(flags + row, tl.where((old & _STOPPED) != 0, old, old | flag))
    tl.store(seen + forget, False, mask=forget >= 0)
    tl.debug_barrier()  # the drawn id stays seen, also where it is the one to forget
    tl.store(seen + drawn, True, mask=~failed)
    increment = ((VOCABULARY - 1) // (4 * threads) + 1) * 4
    tl.store(philox + 2 * row + 1, offset + increment)


def cfg_sample(
    logits: Tensor,
    seen: Tensor,
    params: Tensor,
    flags: Tensor,
    philox: Tensor | None,
    stop_action: Tensor | None,
    threads: int,
    *,
    stop_token: int,
    turbo: bool = False,
    forget: int = -1,
) -> Tensor:
    """Draws one token a row. CUDA tensors, or CPU tensors in Triton's interpreter.

    Args:
        logits, seen, params, flags, stop_action, stop_token, turbo, forget: see
            `reference.cfg_sample`. All contiguous; R at most 64, V at most 65536.
        philox: ``(R, 2)`` int64, each row's seed and offset; the offset is advanced in place.
        threads: see `reference.philox_exponential`.

    Returns:
        ``(R,)`` int64.

    Raises:
        RuntimeError: an argument of another shape, dtype or layout than documented.
    """
    checks.cfg_sample(
        logits, seen, params, flags, philox, stop_action, stop_token=stop_token, forget=forget
    )
    rows, vocabulary = seen.shape
    _must(philox is not None, "philox", "given", None)
    fits = 0 < threads < 2**31 and threads % 256 == 0
    _must(fits, "threads", "a positive multiple of 256 below 2^31", threads)
    token = torch.empty(rows, dtype=torch.long, device=seen.device)
    if rows == 0:
        return token
    with torch.cuda.device_of(seen):
        cfg_sample_kernel[(rows,)](
            logits, seen, params, flags, philox, stop_action, token, threads, stop_token, forget,
            VOCABULARY=vocabulary, BLOCK=triton.next_power_of_2(vocabulary),
            GUIDED=logits.shape[0] != rows, TURBO=turbo, CUDA=seen.is_cuda,
            **LAUNCH,
        )  # fmt: skip
    return token
