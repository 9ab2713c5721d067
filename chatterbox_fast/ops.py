"""The public ops: arguments checked with the names users know, the implementation chosen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch, reference
from . import fakes as fakes  # registers them
from .options import Backend
from .triton_kernels import checks

MAX_SKINNY_ROWS = 8
"""The most rows of x that skinny_linear takes."""
HEAD_DIM = 64
"""The width of a head that decode_attention's kernels take; its reference takes any."""
MAX_NORM_CHANNELS = 1024
"""The most channels that add_norm's kernels take; its reference takes any number."""


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
    choice = dispatch.choose("cfg_sample", logits.device, backend, logits.dtype)
    return cfg_sample_by(choice.backend)(
        logits, seen, params, flags, stop_token=stop_token, stop_action=stop_action, turbo=turbo,
        forget=forget, generator=generator, philox=philox,
    )  # fmt: skip


def cfg_sample_by(backend: str) -> Callable[..., Tensor]:
    """cfg_sample by a backend that `dispatch.choose` named, for callers that choose once."""
    return functools.partial(_cfg_sample, backend)


def _cfg_sample(
    backend: str,
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
) -> Tensor:
    rules: dict[str, Any] = {"stop_token": stop_token, "turbo": turbo, "forget": forget}
    has_kernel = backend == "extension" or (backend == "triton" and philox is not None)
    by_rows = generator if philox is None and isinstance(generator, Sequence) else None
    if by_rows is not None or not has_kernel:  # which checks by itself
        checks.cfg_sample(
            logits, seen, params, flags, philox, stop_action, stop_token=stop_token, forget=forget,
            float64=not has_kernel,
        )  # fmt: skip
    if by_rows is not None:
        return _row_by_row(
            backend, logits, seen, params, flags, by_rows, stop_action=stop_action, **rules
        )
    if philox is None and logits.is_cuda and backend != "reference":
        raise RuntimeError("chatterbox_fast::cfg_sample: philox must be given on CUDA, got None")
    # Of a shape that is not (R, V) too, which the kernels name.
    threads = 0 if philox is None else philox_threads(seen.shape[-1:].numel(), logits.device)
    if backend == "extension":
        return torch.ops.chatterbox_fast.cfg_sample.default(
            logits, seen, params, flags, philox, stop_action,
            generator if philox is None else None, philox_threads=threads, **rules,
        )  # fmt: skip
    if has_kernel:
        from .triton_kernels.cfg_sample import cfg_sample as twin

        return twin(logits, seen, params, flags, philox, stop_action, threads, **rules)
    noise = sampling_noise(seen, params, generator, philox, logits.device)
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


def sampling_noise(
    seen: Tensor,
    params: Tensor,
    generator: Any,
    philox: Tensor | None,
    device: torch.device,
) -> Tensor:
    """The numbers ``(R, V)`` that `cfg_sample` draws with on `device`; `philox` is advanced."""
    rows, vocabulary = seen.shape
    if philox is None:
        return reference.exponential(rows, vocabulary, params, generator)
    threads = philox_threads(vocabulary, device)
    noise = reference.philox_exponential(philox, vocabulary, threads).to(params.dtype)
    philox[:, 1] += reference.philox_increment(vocabulary, threads)
    return noise


def _row_by_row(
    backend: str,
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
        token = _cfg_sample(
            backend, logits[r::rows].contiguous(), seen[one], params[one], flags[one],
            generator=generator, stop_action=action, **rules,
        )  # fmt: skip
        tokens.append(token)
    return torch.cat(tokens) if tokens else seen.new_empty(0, dtype=torch.long)


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
        x, weight, scale, norm, residual, eps, gated: see `reference.skinny_linear`. Where one of
            them requires a gradient the reference runs, which has one.
        backend: which implementation to prefer, see `dispatch.choose`.

    Returns:
        ``(M, N)`` in x's dtype.

    Raises:
        RuntimeError: an argument of another shape, dtype or device than documented.
    """
    if differentiated(x, weight, scale, norm, residual):
        backend = "reference"
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


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd follows one of them, backward or forward: the kernels have no gradient."""
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return True
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given)


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
            two dimensions and aligned to 16 bytes in every row and head. Where qkv requires a
            gradient the reference runs, which has one; the caches that it writes to are then part
            of autograd's graph.
        arrivals: int32 zeros, ``(B H,)`` or more, in which the blocks of the CUDA kernel meet; they
            are zeros again after. Calls that may run at the same time need their own. None: the
            kernel makes them, which is one launch more.
        backend: which implementation to prefer, see `dispatch.choose`.

    Returns:
        ``(B, H D)`` in qkv's dtype: what the output projection reads.

    Raises:
        RuntimeError: an argument of another shape, dtype, layout or device than documented.
    """
    if differentiated(qkv):
        backend = "reference"
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
    if differentiated(waveform):
        backend = "reference"
    return resample_by(_chosen("resample", waveform.device, backend, waveform.dtype))(
        waveform, filters, first, stride=stride, left=left, length=length
    )


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
    if differentiated(spectrum):
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
    """Full attention of sequences that are padded: each row's first positions to each other.

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
    if differentiated(qkv):
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


def snake(
    x: Tensor,
    alpha: Tensor,
    inverse: Tensor,
    residual: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Snake's activation, channels last, of a sum, in one launch: ``z + sin(alpha z)^2 * inverse``.

    Args:
        x, alpha, inverse, residual, offset: see `reference.snake`. Contiguous; the residual shares
            no memory with x. Where one of them requires a gradient the reference runs, which has
            one.
        backend: which implementation to prefer, see `dispatch.choose`.

    Returns:
        Of x's shape and dtype; `residual` is updated in place.

    Raises:
        RuntimeError: an argument of another shape, dtype, layout or device than documented.
    """
    if differentiated(x, alpha, inverse, residual, offset):
        backend = "reference"
    kernel = snake_by(_chosen("snake", x.device, backend, x.dtype))
    return kernel(x, alpha, inverse, residual, offset)


def snake_by(backend: str) -> Callable[..., Tensor]:
    """snake by a backend that `dispatch.choose` named, for callers that choose once."""
    if backend == "extension":
        return torch.ops.chatterbox_fast.snake.default
    if backend == "triton":
        from .triton_kernels.snake import snake as twin

        return twin
    return reference.snake


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
    backend: Backend = "auto",
) -> Tensor:
    """A residual sum and its layer norm, with Mish if asked for, in one launch.

    Args:
        x, weight, bias, residual, offset, shift, eps, mish, dtype: see `reference.add_norm`. The
            kernels take up to `MAX_NORM_CHANNELS` channels, and a contiguous residual that shares
            no memory with x. Where a tensor requires a gradient the reference runs, which has one.
        backend: which implementation to prefer, see `dispatch.choose`.

    Returns:
        ``(R, T, C)`` in `dtype`, contiguous; `residual` is updated in place.

    Raises:
        RuntimeError: an argument of another shape, dtype, layout or device than documented.
    """
    if differentiated(x, weight, bias, residual, offset, shift):
        backend = "reference"
    return add_norm_by(_chosen("add_norm", x.device, backend, weight.dtype))(
        x, weight, bias, residual, offset, shift, eps=eps, mish=mish, dtype=dtype
    )


def add_norm_by(backend: str) -> Callable[..., Tensor]:
    """add_norm by a backend that `dispatch.choose` named, for callers that choose once."""
    if backend == "extension":
        return torch.ops.chatterbox_fast.add_norm.default
    if backend == "triton":
        from .triton_kernels.add_norm import add_norm as twin

        return twin
    return reference.add_norm
