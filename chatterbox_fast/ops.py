"""The public ops: arguments checked with the names users know, the implementation chosen."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch, reference
from .options import Backend

MAX_VOCABULARY = 65536
"""The most ids the kernels take."""
MAX_SKINNY_ROWS = 8
"""The most rows of x that skinny_linear takes."""
HEAD_DIM = 64
"""The width of a head that decode_attention's kernels take; its reference takes any."""


@dataclass(frozen=True)
class SamplingParams:
    """How a row of logits becomes a token. Plain numbers; see `reference.cfg_sample`.

    Attributes:
        cfg_weight: classifier-free guidance, >= 0. At 0 no unconditional row is needed.
        repetition_penalty: > 0; 1 is none.
        temperature: > 0.
        min_p: in [0, 1]; 0 is none.
        top_p: in [0, 1]; 1 is none.
        top_k: >= 0; 0 is none.
    """

    cfg_weight: float = 0.5
    repetition_penalty: float = 1.2
    temperature: float = 0.8
    min_p: float = 0.05
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError where a parameter is outside its range (NaN always is), TypeError
        where it is no number."""
        for name, value in vars(self).items():
            if not isinstance(value, Real):
                raise TypeError(f"chatterbox_fast: {name} must be a number, got {value!r}")
        _require("cfg_weight", self.cfg_weight, self.cfg_weight >= 0, ">= 0")
        penalty, temperature = self.repetition_penalty, self.temperature
        _require("repetition_penalty", penalty, _as_float32(penalty) > 0, "> 0")
        _require("temperature", temperature, _as_float32(temperature) > 0, "> 0")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")
        _require("top_p", self.top_p, 0 <= self.top_p <= 1, "in [0, 1]")
        _require("top_k", self.top_k, self.top_k >= 0 and self.top_k % 1 == 0, "whole, >= 0")

    def pack(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The row ``(1, 6)`` that ops read.

        cfg_weight, repetition_penalty, temperature, min_p, 1 - top_p, top_k. ``1 - top_p`` is
        taken in double and then rounded, as stock's comparison rounds it.

        Args:
            dtype: of the logits. The row is float64 for float64 logits, else float32.
        """
        row = [
            self.cfg_weight,
            self.repetition_penalty,
            self.temperature,
            self.min_p,
            1 - self.top_p,
            min(self.top_k, MAX_VOCABULARY),
        ]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.tensor([row], dtype=wide, device=device)


def _as_float32(value: float) -> float:
    """What the kernels read: a number may be 0 or infinite there and not as a double."""
    return ctypes.c_float(value).value


def _require(name: str, value: float, ok: bool, must: str) -> None:
    if not (ok and math.isfinite(_as_float32(value))):
        raise ValueError(f"chatterbox_fast: {name} must be finite and {must}, got {value!r}")


def cfg_sample(
    logits: Tensor,
    seen: Tensor,
    params: Tensor,
    flags: Tensor,
    *,
    stop_token: int,
    stop_action: Tensor | None = None,
    turbo: bool = False,
    forget: int = -1,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    philox: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Draws one token a row: one launch, where the extension or Triton runs it.

    Args:
        logits, seen, params, flags, stop_token, stop_action, turbo, forget: see
            `reference.cfg_sample`. `seen` and `flags` are updated in place.
        generator: on a CPU, what to draw from: one for all rows, as ``torch.multinomial`` uses it,
            or one a row; None is torch's global one. Not used where `philox` is given.
        philox: ``(R, 2)`` int64 on the logits' device: each row's seed and offset of a CUDA
            generator, advanced in place as torch would advance it (see `rng.PhiloxStream`).
            Needed by the kernels on CUDA, where it keeps the op free of the host; the reference
            takes the generator too.
        backend: which implementation to prefer, see `dispatch.choose`.

    Returns:
        ``(R,)`` int64.

    Raises:
        RuntimeError: an argument of another shape, dtype or device than documented.
    """
    if philox is None and isinstance(generator, Sequence):
        return _row_by_row(
            logits, seen, params, flags, generator, stop_token=stop_token,
            stop_action=stop_action, turbo=turbo, forget=forget, backend=backend,
        )  # fmt: skip
    choice = dispatch.choose("cfg_sample", logits.device, backend, logits.dtype)
    if philox is None and logits.is_cuda and choice.backend != "reference":
        raise RuntimeError("chatterbox_fast::cfg_sample: philox must be given on CUDA, got None")
    threads = 0 if philox is None else philox_threads(seen.shape[1], logits.device)
    rules: dict[str, Any] = {"stop_token": stop_token, "turbo": turbo, "forget": forget}
    if choice.backend == "extension":
        return torch.ops.chatterbox_fast.cfg_sample.default(
            logits, seen, params, flags, philox, stop_action,
            generator if philox is None else None, philox_threads=threads, **rules,
        )  # fmt: skip
    if choice.backend == "triton" and philox is not None:
        from .triton_kernels.cfg_sample import cfg_sample as twin

        return twin(logits, seen, params, flags, philox, stop_action, threads, **rules)
    noise = _noise(seen, params, generator, philox, threads)
    return reference.cfg_sample(
        logits, seen, params, flags, noise, stop_action=stop_action, **rules
    )


@functools.cache
def philox_threads(vocabulary: int, device: torch.device) -> int:
    """Threads that torch launches on `device` to draw `vocabulary` numbers.

    On a CPU, as an unbounded GPU would: one thread a number.
    """
    if device.type != "cuda":
        return reference.philox_threads(vocabulary, 2**31)
    properties = torch.cuda.get_device_properties(device)
    threads = properties.multi_processor_count * properties.max_threads_per_multi_processor
    return reference.philox_threads(vocabulary, threads)


def _noise(
    seen: Tensor,
    params: Tensor,
    generator: torch.Generator | None,
    philox: Tensor | None,
    threads: int,
) -> Tensor:
    rows, vocabulary = seen.shape
    if philox is None:
        return reference.exponential(rows, vocabulary, params, generator)
    noise = reference.philox_exponential(philox, vocabulary, threads).to(params.dtype)
    philox[:, 1] += reference.philox_increment(vocabulary, threads)
    return noise


def _row_by_row(
    logits: Tensor,
    seen: Tensor,
    params: Tensor,
    flags: Tensor,
    generators: Sequence[torch.Generator],
    *,
    stop_action: Tensor | None,
    **rules: Any,
) -> Tensor:
    """Each row from its own generator; the rows of `seen` and `flags` are views."""
    rows = seen.shape[0]
    if len(generators) != rows:
        raise RuntimeError(
            f"chatterbox_fast::cfg_sample: generator must be one or {rows}, got {len(generators)}"
        )
    tokens = []
    for r, generator in enumerate(generators):
        one = slice(r, r + 1)
        action = None if stop_action is None else stop_action[one]
        token = cfg_sample(
            logits[r::rows].contiguous(), seen[one], params[one], flags[one],
            generator=generator, stop_action=action, **rules,
        )  # fmt: skip
        tokens.append(token)
    return torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.long)


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 0.0,
    gated: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """``x @ weight.T`` for a few rows: reads the weights once, in the dtype they are stored in.

    Args:
        x, weight, scale, norm, residual, eps, gated: see `reference.skinny_linear`.
        backend: which implementation to prefer, see `dispatch.choose`.

    Returns:
        ``(M, N)`` in x's dtype.

    Raises:
        RuntimeError: an argument of another shape, dtype or device than documented.
    """
    choice = dispatch.choose("skinny_linear", x.device, backend, x.dtype)
    kernel = skinny_linear_by(choice.backend)
    return kernel(x, weight, scale, norm, residual, eps=eps, gated=gated)


def skinny_linear_by(backend: str) -> Callable[..., Tensor]:
    """skinny_linear by a backend that `dispatch.choose` named, for callers that choose once."""
    if backend == "extension":
        return torch.ops.chatterbox_fast.skinny_linear.default
    if backend == "triton":
        from .triton_kernels.skinny_linear import skinny_linear as twin

        return twin
    return reference.skinny_linear


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
    backend: Backend = "auto",
) -> Tensor:
    """Attention of one new token a row over its KV cache, which it is appended to in place.

    Args:
        qkv, k_cache, v_cache, position, flags, cos, sin, watched, probabilities: see
            `reference.decode_attention`. The kernels take at most 64 rows, 1024 heads of 64, and
            2**24 slots, float32 tables, and caches that share no memory, contiguous in their last
            two dimensions and aligned to 16 bytes in every row and head.
        arrivals: int32 zeros, ``(B H,)`` or more, in which the blocks of the CUDA kernel meet; they
            are zeros again after. Calls that may run at the same time need their own. None: the
            kernel makes them, which is one launch more.
        backend: which implementation to prefer, see `dispatch.choose`.

    Returns:
        ``(B, H D)`` in qkv's dtype: what the output projection reads.

    Raises:
        RuntimeError: an argument of another shape, dtype, layout or device than documented.
    """
    choice = dispatch.choose("decode_attention", qkv.device, backend, qkv.dtype)
    return decode_attention_by(choice.backend)(
        qkv, k_cache, v_cache, position, flags, cos, sin, watched, probabilities, arrivals
    )


def decode_attention_by(backend: str) -> Callable[..., Tensor]:
    """decode_attention by a backend that `dispatch.choose` named, for callers that choose once."""
    if backend == "extension":
        return torch.ops.chatterbox_fast.decode_attention.default
    if backend == "triton":
        from .triton_kernels.decode_attention import decode_attention as twin

        return twin
    return reference.decode_attention


def resample(
    waveform: Tensor,
    filters: Tensor,
    first: Tensor | None = None,
    *,
    stride: int,
    left: int,
    length: int,
    backend: Backend = "auto",
) -> Tensor:
    """Polyphase convolution with filters that are given; see `audio.resample` for sampling rates.

    Args:
        waveform, filters, first, stride, left, length: see `reference.resample`. Contiguous, but
            for `filters`. Where the waveform requires a gradient, or carries a tangent, the
            reference runs, which has them.
        backend: which implementation to prefer, see `dispatch.choose`.

    Returns:
        ``(R, length)`` in the waveform's dtype.

    Raises:
        RuntimeError: an argument of another shape, dtype, layout or range than documented.
    """
    if _is_differentiated(waveform):
        backend = "reference"
    return resample_by(_chosen("resample", waveform.device, backend, waveform.dtype))(
        waveform, filters, first, stride=stride, left=left, length=length
    )


def _is_differentiated(x: Tensor) -> bool:
    """Whether x requires a gradient that is recorded, or carries a tangent of forward mode."""
    if x.requires_grad and torch.is_grad_enabled():
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


@torch.compiler.assume_constant_result
def _chosen(op: str, device: torch.device, backend: Backend, dtype: torch.dtype) -> str:
    """The backend by `dispatch.choose`, which torch.compile does not look into."""
    return dispatch.choose(op, device, backend, dtype).backend


def resample_by(backend: str) -> Callable[..., Tensor]:
    """resample by a backend that `dispatch.choose` named."""
    if backend == "extension":
        return torch.ops.chatterbox_fast.resample.default
    if backend == "triton":
        from .triton_kernels.resample import resample as twin

        return twin
    return reference.resample


def istft(spectrum: Tensor, window: Tensor, limit: float, *, backend: Backend = "auto") -> Tensor:
    """The head of HiFT: from its last convolution's output to audio, 4 samples a frame, one launch.

    Args:
        spectrum, window, limit: see `reference.istft`. Contiguous. Where the spectrum requires a
            gradient, or carries a tangent, the reference runs, which has them.
        backend: which implementation to prefer, see `dispatch.choose`.

    Returns:
        ``(B, 4 (M - 1))`` float32, whatever the dtype of the spectrum; float64 for float64.

    Raises:
        RuntimeError: an argument of another shape, dtype, layout or range than documented.
    """
    if _is_differentiated(spectrum):
        backend = "reference"
    return istft_by(_chosen("istft", spectrum.device, backend, spectrum.dtype))(
        spectrum, window, limit
    )


def istft_by(backend: str) -> Callable[..., Tensor]:
    """istft by a backend that `dispatch.choose` named, for callers that choose once."""
    if backend == "extension":
        return torch.ops.chatterbox_fast.istft.default
    if backend == "triton":
        from .triton_kernels.istft import istft as twin

        return twin
    return reference.istft


def padded_attention(
    qkv: Tensor, lengths: Tensor, heads: int, *, backend: Backend = "auto"
) -> Tensor:
    """Full attention of sequences that a bucket pads: each row's first positions to each other.

    Args:
        qkv, lengths, heads: see `reference.padded_attention`. The kernels take heads of 64, and a
            qkv that is contiguous and aligned to 16 bytes. Where it requires a gradient the
            reference runs, which has one; so it does of a tangent, which torch may refuse.
        backend: which implementation to prefer, see `dispatch.choose`.

    Returns:
        ``(R, T, H D)`` in qkv's dtype: what the output projection reads.

    Raises:
        RuntimeError: an argument of another shape, dtype, layout or device than documented.
    """
    if _is_differentiated(qkv):
        backend = "reference"
    return padded_attention_by(_chosen("padded_attention", qkv.device, backend, qkv.dtype))(
        qkv, lengths, heads
    )


def padded_attention_by(backend: str) -> Callable[..., Tensor]:
    """padded_attention by a backend that `dispatch.choose` named, for callers that choose once."""
    if backend == "extension":
        return torch.ops.chatterbox_fast.padded_attention.default
    if backend == "triton":
        from .triton_kernels.padded_attention import padded_attention as twin

        return twin
    return reference.padded_attention


if dispatch.extension_has("cfg_sample"):

    @torch.library.register_fake("chatterbox_fast::cfg_sample")
    def _cfg_sample_fake(
        logits: Tensor,
        seen: Tensor,
        params: Tensor,
        flags: Tensor,
        philox: Tensor | None = None,
        stop_action: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        stop_token: int,
        turbo: bool = False,
        forget: int = -1,
        philox_threads: int = 0,
    ) -> Tensor:
        return seen.new_empty(seen.shape[0], dtype=torch.long)


if dispatch.extension_has("skinny_linear"):

    @torch.library.register_fake("chatterbox_fast::skinny_linear")
    def _skinny_linear_fake(
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None = None,
        norm: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        eps: float = 0.0,
        gated: bool = False,
    ) -> Tensor:
        return x.new_empty(x.shape[0], weight.shape[0] // 2 if gated else weight.shape[0])


if dispatch.extension_has("decode_attention"):

    @torch.library.register_fake("chatterbox_fast::decode_attention")
    def _decode_attention_fake(
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
        return qkv.new_empty(qkv.shape[0], qkv.shape[2] * qkv.shape[3])


if dispatch.extension_has("resample"):

    @torch.library.register_fake("chatterbox_fast::resample")
    def _resample_fake(
        waveform: Tensor,
        filters: Tensor,
        first: Tensor | None = None,
        *,
        stride: int,
        left: int,
        length: int,
    ) -> Tensor:
        return waveform.new_empty(waveform.shape[0], length)


if dispatch.extension_has("istft"):

    @torch.library.register_fake("chatterbox_fast::istft")
    def _istft_fake(spectrum: Tensor, window: Tensor, limit: float) -> Tensor:
        return window.new_empty(spectrum.shape[0], 4 * (spectrum.shape[1] - 1))


if dispatch.extension_has("padded_attention"):

    @torch.library.register_fake("chatterbox_fast::padded_attention")
    def _padded_attention_fake(qkv: Tensor, lengths: Tensor, heads: int) -> Tensor:
        return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)
