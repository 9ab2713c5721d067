"""Plain-torch twin of every op: specification, fallback, test oracle and benchmark baseline.

Nothing here reads a tensor's value on the host, so each runs under fake tensors and, but for
`exponential`, which draws from a generator, in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

STOPPED, FAILED = 1, 2
"""Bits of `cfg_sample`'s flags: the stop token was drawn; the row cannot be drawn from."""

KEEP, SUPPRESS, FORCE = 0, 1, 2
"""What `cfg_sample` does with a row's stop token: nothing, rule it out, rule out all others."""

_RULED_OUT = float(2**15)
_FEW_PHASES = 512
"""As one strided convolution, more phases would take more memory than their filters do."""

_Op = TypeVar("_Op", bound=Callable[..., Tensor])

_DFT_SIZE, _HOP, _LOUDEST = 16, 4, 1e2
"""Of HiFT's iSTFT: samples of a frame, samples between two frames, the most a magnitude can be."""


def _not_autocast(op: _Op) -> _Op:
    """`op` in the dtype it says, as kernels compute it: autocast would round its products."""

    @functools.wraps(op)
    def as_it_says(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = x.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return op(x, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return op(x, *args, **kwargs)

    return as_it_says  # type: ignore[return-value]


def cfg_sample(
    logits: Tensor,
    seen: Tensor,
    params: Tensor,
    flags: Tensor,
    noise: Tensor,
    *,
    stop_token: int,
    stop_action: Tensor | None = None,
    turbo: bool = False,
    forget: int = -1,
) -> Tensor:
    """Draws one token a row. Stock's chain, in English order or in Turbo's:

    English: CFG -> stop action -> penalty -> temperature -> top-k -> min-p -> top-p -> draw.
    Turbo:   CFG -> stop action -> temperature -> top-k -> min-p -> top-p -> penalty -> draw.

    Args:
        logits: ``(R, V)``, or ``(2R, V)`` with CFG: conditional rows first, then unconditional.
            Half precision is computed in float32.
        seen: ``(R, V)`` bool, the ids the repetition penalty applies to; the drawn id is added.
        params: ``(R, 6)``, as `SamplingParams.pack` makes it.
        flags: ``(R,)`` int32; the bits `STOPPED` and `FAILED` are added where they apply. A row is
            `FAILED` where it has a NaN or no finite score; its token is 0 then and not added. A row
            that is `STOPPED` on entry keeps its flags: what is drawn after the end does not matter.
        noise: ``(R, V)``, Exp(1); see `exponential` and `philox_exponential`.
        stop_token: the id that ends a sequence.
        stop_action: ``(R,)`` int32 of `KEEP`, `SUPPRESS`, `FORCE`; None keeps all.
        turbo: Turbo's order.
        forget: this id is taken out of `seen` before the drawn one is added; -1 is none. For
            Turbo's first draw, which alone penalises the start token.

    Returns:
        ``(R,)`` int64.

    Equal to the processors of transformers (RepetitionPenalty, Temperature, TopK, MinP, TopP) in
    that order, then ``torch.multinomial(softmax(scores), 1)``, which is ``argmax(p / q)`` with
    ``q ~ Exp(1)``. Ties: top-k keeps all ids equal to the k-th; top-p removes the higher of two
    equal ids first; the draw takes the lower.
    """
    rows = seen.shape[0]
    cfg_weight, penalty, temperature, min_p, one_minus_top_p, top_k = params.split(1, dim=-1)
    wide = logits.to(params.dtype)
    scores = wide[:rows]
    if logits.shape[0] == 2 * rows:
        scores = scores + cfg_weight * (scores - wide[rows:])
    if stop_action is not None:
        scores = _act_on_stop(scores, stop_action[:, None], stop_token)
    if not turbo:
        scores = _penalise(scores, seen, penalty)
    scores = divide(scores, temperature)
    scores = _keep_top_k(scores, top_k)
    scores = _keep_min_p(scores, min_p)
    scores = _keep_top_p(scores, one_minus_top_p)
    if turbo:
        scores = _penalise(scores, seen, penalty)
    probs = scores.softmax(dim=-1)
    failed = probs.isnan().any(dim=-1)
    token = (probs / noise).argmax(dim=-1).masked_fill(failed, 0)
    new = FAILED * failed.int() + STOPPED * ((token == stop_token) & ~failed).int()
    flags |= new * ((flags & STOPPED) == 0)
    if forget >= 0:
        seen[:, forget] = False
    seen |= torch.zeros_like(seen).scatter(-1, token[:, None], ~failed[:, None])
    return token


def divide(x: Tensor, divisor: Tensor) -> Tensor:
    """``x / divisor`` as torch rounds it where stock's divisor is a Python number.

    On CUDA torch multiplies by the reciprocal then; with a tensor it would divide.
    """
    return x * divisor.reciprocal() if x.is_cuda else x / divisor


def exponential(
    rows: int, vocabulary: int, like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """``(rows, vocabulary)`` Exp(1) noise, as ``torch.multinomial`` draws it from `generator`."""
    noise = torch.empty(rows, vocabulary, dtype=like.dtype, device=like.device)
    return noise.exponential_(1.0, generator=generator)


def philox_exponential(philox: Tensor, vocabulary: int, threads: int) -> Tensor:
    """What ``torch.empty(vocabulary, device="cuda").exponential_()`` draws, from counters.

    Args:
        philox: ``(R, 2)`` int64: each row's seed, and the offset of its generator. Unchanged.
        vocabulary: V.
        threads: threads of torch's launch: `philox_threads`.

    Returns:
        ``(R, V)`` float32. Element i is number ``i // threads % 4`` of the Philox block with
        subsequence ``i % threads`` and counter ``offset / 4 + i // (4 threads)``
        (torch: DistributionTemplates.h, calc_execution_policy and distribution kernel).
    """
    seed, offset = philox[:, :1], philox[:, 1:]
    element = torch.arange(vocabulary, device=philox.device)
    counter = offset // 4 + element // (4 * threads)
    subsequence = (element % threads).expand_as(counter)
    lanes = _philox4x32(seed.expand_as(counter), counter, subsequence)
    lane = (element // threads % 4).expand_as(counter)
    bits = torch.stack(lanes).gather(0, lane[None])[0].to(torch.float32)
    uniform = bits * 2.0**-32 + 2.0**-33  # curand_uniform: (0, 1]
    half_epsilon = torch.finfo(torch.float32).eps / 2
    log = torch.where(uniform >= 1 - half_epsilon, -half_epsilon, uniform.log())
    return -log


def philox_threads(vocabulary: int, device_threads: int) -> int:
    """Threads that torch launches to draw `vocabulary` numbers: whole blocks of 256.

    Args:
        device_threads: multiprocessors x threads per multiprocessor of the device.
    """
    return min(device_threads // 256, -(-vocabulary // 256)) * 256


def philox_increment(vocabulary: int, threads: int) -> int:
    """By how much drawing `vocabulary` numbers advances a CUDA generator's offset."""
    return ((vocabulary - 1) // (4 * threads) + 1) * 4


def _philox4x32(seed: Tensor, counter: Tensor, subsequence: Tensor) -> list[Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words."""
    word = 0xFFFFFFFF
    key = [seed & word, seed >> 32 & word]
    c = [counter & word, counter >> 32 & word, subsequence & word, subsequence >> 32 & word]
    for _ in range(10):
        even, odd = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(odd >> 32 & word) ^ c[1] ^ key[0], odd & word,
             (even >> 32 & word) ^ c[3] ^ key[1], even & word]  # fmt: skip
        key = [key[0] + 0x9E3779B9 & word, key[1] + 0xBB67AE85 & word]
    return c


def _act_on_stop(scores: Tensor, action: Tensor, stop_token: int) -> Tensor:
    is_stop = torch.arange(scores.shape[-1], device=scores.device) == stop_token
    scores = scores.masked_fill((action == SUPPRESS) & is_stop, -_RULED_OUT)
    forced = torch.where(is_stop, _RULED_OUT, -_RULED_OUT).to(scores.dtype)
    return torch.where(action == FORCE, forced, scores)


def _penalise(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    penalised = torch.where(scores < 0, scores * penalty, divide(scores, penalty))
    return torch.where(seen, penalised, scores)


def _keep_top_k(scores: Tensor, top_k: Tensor) -> Tensor:
    """Removes ids below the k-th highest score; k = 0 keeps all."""
    place = top_k.long().clamp(1, scores.shape[-1]) - 1
    kth = scores.sort(dim=-1, descending=True).values.gather(-1, place)
    return scores.masked_fill((top_k > 0) & (scores < kth), -float("inf"))


def _keep_min_p(scores: Tensor, min_p: Tensor) -> Tensor:
    """Removes ids less probable than `min_p` times the most probable one."""
    probs = scores.softmax(dim=-1)
    return scores.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), -float("inf"))


def _keep_top_p(scores: Tensor, one_minus_top_p: Tensor) -> Tensor:
    """Removes the least probable ids whose probabilities sum to at most 1 - top_p; one stays.

    top_p = 1 removes none, not even ids whose probability is 0: Turbo may still penalise others.
    """
    # Flipped, a stable sort puts the higher of two equal ids first.
    ascending, order = scores.flip(-1).sort(dim=-1, stable=True)
    remove = ascending.softmax(dim=-1).cumsum(dim=-1) <= one_minus_top_p
    remove &= one_minus_top_p > 0
    remove[..., -1:] = False
    return scores.masked_fill(remove.scatter(-1, order, remove).flip(-1), -float("inf"))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Llama's RMSNorm over the last dimension, in x's dtype."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def gated_silu(both: Tensor) -> Tensor:
    """Llama's gated activation: ``silu(gate) * up`` of gate and up side by side."""
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


@_not_autocast
def skinny_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 0.0,
    gated: bool = False,
) -> Tensor:
    """``x @ weight.T`` and what a Llama layer does before and after, in float32.

    Args:
        x: ``(M, K)`` float32, float16 or bfloat16, M at most 8.
        weight: ``(N, K)`` float32, float16, bfloat16, or int8 with `scale`; where `gated`,
            ``(2 N, K)`` with the gate first.
        scale: ``(N,)`` (``(2 N,)``) float32: row n of an int8 weight is ``scale[n] * weight[n]``.
        norm: ``(K,)`` float32: x is RMS-normalised before, with `eps`, and multiplied with this.
        residual: ``(M, N)`` in x's dtype, added to the result.
        gated: the product is gated: ``silu(gate) * up``.

    Returns:
        ``(M, N)`` in x's dtype. For an int8 weight the CPU kernel rounds x to 15 bits of the
        largest of 256 neighbours.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    own = x.to(wide) if norm is None else rms_norm(x.to(wide), norm.to(wide), eps)
    y = F.linear(own, weight.to(wide))
    y = y if scale is None else y * scale
    y = gated_silu(y) if gated else y
    return (y if residual is None else residual + y).to(x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of Llama.

    Args:
        x: ``(..., D)``. cos, sin: of a shape that broadcasts with it, both halves alike.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@_not_autocast
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
) -> Tensor:
    """Attention of one new token a row: rotates q and k, appends k and v, attends to the prefix.

    Args:
        qkv: ``(B, 3, H, D)`` float32, float16 or bfloat16: q, k and v, not rotated. Computed in
            float32.
        k_cache, v_cache: ``(B, H, C, D)`` in a floating dtype of their own; slot `position` of
            each row is written in place. What lies behind it does not matter; here alone it must
            be finite.
        position: int64 on the device, ``(B,)``, or ``(1,)`` for all rows.
        flags: int32, of position's shape; the bit `FAILED` is added where a position is not in
            ``[0, C)``. Such a row appends nothing, and all it gets is 0.
        cos, sin: ``(C or more, D)``, the rotary table; None: no rotation.
        watched: ``(W, 2)`` int32, rows and heads there are. Of others the CPU op raises; the GPU's
            kernels and this, which cannot without the host, leave their probabilities as they are.
        probabilities: ``(W, C)`` float32: set to the softmax of each watched row and head, which is
            0 behind the position.
        arrivals: not used; see `ops.decode_attention`.

    Returns:
        ``(B, H D)`` in qkv's dtype: softmax(q k' / sqrt(D)) v over slots ``0 .. position``, k and v
        as they are stored.
    """
    del arrivals
    rows, _, heads, dim = qkv.shape
    capacity = k_cache.shape[2]
    if rows * heads == 0:
        return qkv.new_empty(rows, heads * dim)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.to(wide).unbind(1)
    inside = ((position >= 0) & (position < capacity))[:, None, None]
    slot = position.clamp(0, capacity - 1)
    flags |= FAILED * (~inside).flatten().int()
    if cos is not None and sin is not None:
        here = [table.index_select(0, slot).to(wide)[:, None] for table in (cos, sin)]
        q, k = apply_rope(q, *here), apply_rope(k, *here)
    at = slot[:, None, None, None].expand(rows, heads, 1, dim)
    for cache, new in ((k_cache, k), (v_cache, v)):
        stored = torch.where(inside, new.to(cache.dtype), cache.gather(2, at)[:, :, 0])
        cache.scatter_(2, at, stored[:, :, None])
    valid = (torch.arange(capacity, device=qkv.device) <= slot[:, None])[:, None]
    out = F.scaled_dot_product_attention(
        q[:, :, None], k_cache.to(wide), v_cache.to(wide), attn_mask=valid[:, None]
    )
    out = out[:, :, 0].masked_fill(~inside, 0)
    if watched is not None and probabilities is not None:
        row = watched[:, 0].long().clamp(0, rows - 1)
        head = watched[:, 1].long().clamp(0, heads - 1)
        scores = (k_cache[row, head].to(wide) @ q[row, head, :, None])[..., 0] / dim**0.5
        weights = scores.masked_fill(~valid[:, 0].expand(rows, -1)[row], -float("inf")).softmax(-1)
        weights = weights.masked_fill(~inside[:, 0].expand(rows, 1)[row], 0)
        there = (watched == torch.stack((row, head), dim=1)).all(1, keepdim=True)
        probabilities.copy_(torch.where(there, weights, probabilities))
    return out.reshape(rows, heads * dim).to(qkv.dtype)


@_not_autocast
def resample(
    waveform: Tensor,
    filters: Tensor,
    first: Tensor | None = None,
    *,
    stride: int,
    left: int,
    length: int,
) -> Tensor:
    """Polyphase convolution: ``y[j] = sum over k of f[k] x[j * stride // P - left + k]``.

    Args:
        waveform: ``(R, T)`` float32, float16 or bfloat16, x; 0 outside of its T samples. Here alone
            float64 too.
        filters: ``(P, K)`` float32 (float64 for float64), P K at most 2**20: output j is made with
            row ``j % P``. Of any strides; on a GPU it is fastest where phases are neighbours.
        first: ``(F, K)``: the filters of the first F outputs, in place of those; None: none.
        stride: by how many samples P outputs advance; in [1, 2**20].
        left: how many samples before an output's own place its first tap lies; in ``[0, K)``.
        length: of the result, >= 0.

    Returns:
        ``(R, length)`` in the waveform's dtype, computed in float32 (float64, which on a GPU the
        convolution is always in).

    Each output is the sum of the same products as torchaudio's strided convolution makes, without
    those that are 0 because a filter of another phase reaches further.
    """
    wide = torch.promote_types(waveform.dtype, torch.float32)
    (rows, samples), (phases, taps) = waveform.shape, filters.shape
    periods = -(-length // phases)
    ahead = (phases - 1) * stride // phases + taps  # what a period reads, from its first sample on
    right = max(0, periods * stride + ahead - left - samples)
    padded = F.pad(waveform.to(wide), (left, right))
    output = torch.arange(length, device=waveform.device)
    if phases <= _FEW_PHASES and rows * length > 0:
        start = output[:phases, None] * stride // phases + torch.arange(taps, device=output.device)
        kernel = filters.new_zeros(phases, ahead)
        kernel[: len(start)].scatter_(1, start, filters[: len(start)])
        # On a GPU torch lets cuDNN round to TF32 unless told otherwise, but for float64.
        exact = torch.float64 if waveform.is_cuda else wide
        read = padded[:, None, : max(periods - 1, 0) * stride + ahead]
        y = F.conv1d(read.to(exact), kernel[:, None].to(exact), stride=stride)
        y = y.to(wide).transpose(1, 2).reshape(rows, -1)[:, :length]
    else:
        y = _dots(padded, output * stride // phases, filters[output % phases])
    if first is not None:
        own = _dots(padded, output[: len(first)] * stride // phases, first[:length])
        y = torch.cat((own, y[:, len(first) :]), dim=1)
    return y.to(waveform.dtype)


def _dots(x: Tensor, start: Tensor, filters: Tensor) -> Tensor:
    """``(R, N)``: of each row of x with N filters ``(N, K)``, from N starts on."""
    reach = torch.arange(filters.shape[1], device=x.device)
    return (x[:, start[:, None] + reach] * filters).sum(dim=-1)


def istft(spectrum: Tensor, window: Tensor, limit: float) -> Tensor:
    """The head of HiFT: from its last convolution's output to audio, 4 samples a frame.

    Args:
        spectrum: ``(B, M, 18)`` float32, float16 or bfloat16, M at least 1: of each frame 9
            logarithms of magnitudes, which are clipped to 100, and 9 numbers whose sines are the
            phases, in radians. Here alone float64 too.
        window: ``(16,)`` float32 (float64 for float64). The squares of the windows that reach a
            sample must not add up to 0, which is not checked; ``torch.istft`` demands it too.
        limit: > 0; the audio is clamped to ``[-limit, limit]``.

    Returns:
        ``(B, 4 (M - 1))`` float32 (float64), computed in it whatever the dtype of the spectrum. A
        NaN reaches the samples of its frame.

    Equal to the end of stock's ``HiFTGenerator.decode`` and its ``_istft``: ``torch.istft`` with
    n_fft 16, hop 4 and ``center=True``, which takes the imaginary parts of the first and the last
    bin for 0, and divides what overlaps by the squares of the windows there are, few at the ends.
    """
    wide = torch.promote_types(spectrum.dtype, torch.float32)
    if spectrum.shape[0] == 0:  # torch's FFT on a CPU takes no empty batch
        return spectrum.new_empty(0, _HOP * (spectrum.shape[1] - 1), dtype=wide)
    # Contiguous: torch's elementwise functions are slow on rows of nine.
    log_magnitude, angle = (half.contiguous() for half in spectrum.to(wide).chunk(2, dim=-1))
    magnitude, phase = log_magnitude.exp().clamp(max=_LOUDEST), angle.sin()
    bins = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
    weights = window.to(wide).expand(1, spectrum.shape[1], _DFT_SIZE)
    audio = _overlap_add(torch.fft.irfft(bins, _DFT_SIZE) * weights)
    return (audio / _overlap_add(weights.square())).clamp(-limit, limit)


def _overlap_add(frames: Tensor) -> Tensor:
    """``(B, 4 (M - 1))`` of ``(B, M, 16)``: frames 4 apart, without half a frame at both ends."""
    parts = frames.unflatten(-1, (-1, _HOP)).unbind(-2)
    last = len(parts) - 1
    # Frames in order of time: the last part of an early one meets the first part of a later one.
    padded = [F.pad(part, (0, 0, i, last - i)) for i, part in enumerate(parts)]
    total = torch.stack(padded[::-1]).sum(0).flatten(1)
    return total[:, _DFT_SIZE // 2 : -_DFT_SIZE // 2]


@_not_autocast
def padded_attention(qkv: Tensor, lengths: Tensor, heads: int) -> Tensor:
    """Full attention of rows of which only a prefix is valid; the rest pads a bucket.

    Args:
        qkv: ``(R, T, 3 H D)`` float32, float16 or bfloat16: of each position q, k and v side by
            side, each H heads of D. Computed in float32. Here alone float64 too.
        lengths: ``(R,)`` int32 on the device: how many positions of each row are valid; taken as 0
            below and as T above.
        heads: H.

    Returns:
        ``(R, T, H D)`` in qkv's dtype: softmax(q k' / sqrt(D)) v over the valid positions of the
        row; 0 where a position is not valid. What q, k and v are there does not matter, be it NaN.
    """
    rows, positions, width = qkv.shape
    if qkv.numel() == 0:
        return qkv.new_empty(rows, positions, width // 3)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    valid = torch.arange(positions, device=qkv.device) < lengths[:, None]
    kept = qkv.to(wide).masked_fill(~valid[..., None], 0)
    q, k, v = kept.view(rows, positions, 3, heads, -1).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])
    out = out.transpose(1, 2).reshape(rows, positions, -1)
    return out.masked_fill(~valid[..., None], 0).to(qkv.dtype)


def snake(
    x: Tensor,
    alpha: Tensor,
    inverse: Tensor,
    residual: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Snake's activation, channels last, of a sum: ``z + sin(alpha z)^2 * inverse``.

    Args:
        x: ``(..., C)`` float32, float16 or bfloat16. Here alone float64 too.
        alpha: ``(C,)`` float32 (float64 for float64), each channel's frequency.
        inverse: ``(C,)`` like it; stock's Snake has ``1 / (alpha + 1e-9)``.
        residual: as x; x is added to it in place, and z is the sum. Else z is x.
        offset: ``(C,)`` like alpha, is added to x first: the bias of the convolution it is from.

    Returns:
        Of x's shape and dtype, computed in float32 (float64) and rounded once, of a z that is not
        rounded. The sine is accurate for arguments of any size. In float16, x, sum and result are
        held within its finite numbers.
    """
    z = _finite(x.to(torch.promote_types(x.dtype, torch.float32)), x.dtype)
    if offset is not None:
        z = z + offset
    if residual is not None:
        z = residual.to(z.dtype) + z
    z = _finite(z, x.dtype)
    if residual is not None:
        residual.copy_(z)
    y = torch.addcmul(z, torch.sin(z * alpha).square(), inverse)
    return _finite(y, x.dtype).to(x.dtype)


def _finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x`, in float16 without infinities; of NaN nothing is made."""
    largest = torch.finfo(torch.float16).max
    return x.clamp(-largest, largest) if dtype == torch.float16 else x


def add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    offset: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    eps: float,
    mish: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A residual sum and its layer norm: what stands between S3Gen's products and convolutions.

    Args:
        x: ``(R, T, C)`` float32, float16 or bfloat16, channels last. Here alone float64 too. An
            infinity in float16 counts as its largest number: what overflowed in the product before
            would else be NaN from here on.
        weight, bias: ``(C,)`` float32 (float64 for float64), the norm's.
        residual: ``(R, T, C)`` like those; x is added to it in place, and the sum normalised.
        offset: ``(C,)`` like those, is added to x first: the bias of the convolution it is from.
        shift: ``(C,)`` like those, is added at the end: what a residual block adds of the time.
        eps: is added to the variance.
        mish: whether Mish comes after the norm, ``n tanh(log(1 + exp(n)))``.
        dtype: of the result; None is x's.

    Returns:
        ``(R, T, C)`` contiguous, computed in float32 (float64) and rounded once, in float16 to
        finite numbers: the norm over the channels, its Mish if asked for, and the shift.
    """
    total = _finite(x.to(weight.dtype), x.dtype)
    if offset is not None:
        total = total + offset
    if residual is not None:
        total = residual + total
        residual.copy_(total)
    y = F.layer_norm(total, weight.shape, weight, bias, eps)
    if mish:
        y = F.mish(y)
    if shift is not None:
        y = y + shift
    wanted = dtype or x.dtype
    return _finite(y, wanted).to(wanted)
