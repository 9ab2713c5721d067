"""Whether a kernel computes what its reference does on this very machine; asked once a process.

A wheel may have been built for another GPU, or run on a CPU that nobody tried.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import dispatch, ops, reference, sampling
from .dispatch import Choice
from .graph import is_out_of_memory
from .options import Backend

Case = tuple[str, Tensor, Tensor]
"""What is computed, by the kernel and by the reference, which runs on the CPU in float32."""

CLOSE = {"rtol": 1e-3, "atol": 1e-3}
"""Of values around 1 in float32: ten times what a kernel may be off, and far less than a wrong one
is. What comes out in half precision may be off by two units of its last place."""

_T = TypeVar("_T")
_FLOAT: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
_INT: dict[str, Any] = {"dtype": torch.int32, "device": "cpu"}
_LONG: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}
"""Said of each tensor of a case: torch's defaults are the user's to set."""


def choose(op: str, device: torch.device, option: Backend, dtype: torch.dtype) -> Choice:
    """As `dispatch.choose`; a kernel that fails its test makes way.

    Of the extension and Triton the other one is taken where it works, else the reference.
    """
    failures: list[str] = []
    for preferred in (option, "triton", "cuda"):
        choice = dispatch.choose(op, device, preferred, dtype)
        if choice.backend == "reference":
            return Choice("reference", "; ".join(failures) or choice.reason)
        failed = why_failed(op, choice.backend, device)
        if failed is None:
            return Choice(choice.backend, "; ".join(failures) or choice.reason)
        if failed not in failures:
            failures.append(failed)
    return Choice("reference", "; ".join(failures))


def choose_add_norm(
    channels: int, device: torch.device, option: Backend, dtype: torch.dtype
) -> Choice:
    """As `choose`, for add_norm, whose kernels take up to `ops.MAX_NORM_CHANNELS` channels."""
    if channels > ops.MAX_NORM_CHANNELS:
        why = f"the kernels take up to {ops.MAX_NORM_CHANNELS} channels, these are {channels}"
        return Choice("reference", why)
    return choose("add_norm", device, option, dtype)


def choose_attention(
    op: str, width: int, device: torch.device, option: Backend, dtype: torch.dtype
) -> Choice:
    """As `choose`, for an op whose kernels take heads of `ops.HEAD_DIM` elements alone."""
    if width != ops.HEAD_DIM:
        why = f"the kernels take heads of {ops.HEAD_DIM}, these are {width} wide"
        return Choice("reference", why)
    return choose(op, device, option, dtype)


def outside_modes(make: Callable[[], _T]) -> _T:
    """What `make` returns, out of reach of the caller's modes, which belong to its thread.

    What is cached is for all callers: it must not be a fake tensor, one of inference mode, or one
    of a transform, nor follow from one.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


@functools.cache
def why_failed(op: str, backend: str, device: torch.device) -> str | None:
    """The reason why `op` by `backend` is not to be used on `device`; None where it works."""
    return outside_modes(lambda: _why_failed(op, backend, device))


def _why_failed(op: str, backend: str, device: torch.device) -> str | None:
    try:
        with torch.no_grad():
            for case, own, expected in _CASES[op](backend, device):
                half = own.dtype.itemsize == 2
                close = dict.fromkeys(CLOSE, 2 * torch.finfo(own.dtype).eps) if half else CLOSE
                if not torch.allclose(own.cpu().float(), expected.float(), **close):
                    return f"{op} is wrong on this machine with {case}"
    except Exception as failure:  # whatever a broken build or driver brings
        if is_out_of_memory(failure):  # says nothing of the kernel
            raise
        first_line = str(failure).partition("\n")[0]
        return f"{op} raises {type(failure).__name__}: {first_line}"
    return None


def _random(seed: int) -> Callable[..., Tensor]:
    """(shape) -> normal numbers: the same on every machine, whatever torch's defaults are."""
    source = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=source, **_FLOAT)


def _skinny_linear(backend: str, device: torch.device) -> Iterator[Case]:
    """Every dtype of weights, with and without what is fused; vectors of them, more than one loop
    takes, and single ones.
    """
    kernel, outputs, normal = ops.skinny_linear_by(backend), 10, _random(0)
    scale, residual = torch.linspace(1, 2, outputs, **_FLOAT) / 1000, normal(2, outputs // 2)
    dtypes = torch.float32, torch.bfloat16, torch.float16, torch.int8
    for inputs, dtype in itertools.product((2112, 37), dtypes):
        x, norm, weight = normal(2, inputs), normal(inputs), normal(outputs, inputs) / inputs**0.5
        narrow = dtype == torch.int8
        stored = (weight * 1000).clamp(-127, 127).round().to(dtype) if narrow else weight.to(dtype)
        plain = (x, stored, scale if narrow else None)
        for call, gated in (((*plain, None, None), False), ((*plain, norm, residual), True)):
            expected = reference.skinny_linear(*call, eps=1e-5, gated=gated)
            own = kernel(*(_on(device, tensor) for tensor in call), eps=1e-5, gated=gated)
            yield f"{dtype} weights, {inputs} inputs", own, expected


def _decode_attention(backend: str, device: torch.device) -> Iterator[Case]:
    """Every dtype of the cache; a rotation by 90 degrees, which rounds nothing."""
    kernel, normal = ops.decode_attention_by(backend), _random(1)
    position, slots = torch.tensor([300], **_LONG), 512
    qkv, caches = normal(2, 3, 2, ops.HEAD_DIM), normal(2, 2, 2, slots, ops.HEAD_DIM)
    cos, sin = torch.zeros(slots, ops.HEAD_DIM, **_FLOAT), torch.ones(slots, ops.HEAD_DIM, **_FLOAT)
    tables = (position, torch.zeros(1, **_INT), cos, sin)
    arrivals = torch.zeros(4, **_INT)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        call = (qkv, *caches.to(dtype, copy=True), *tables, None, None, arrivals)
        copies = [None if tensor is None else tensor.to(device, copy=True) for tensor in call]
        own, expected = kernel(*copies), reference.decode_attention(*call)
        for got, wanted in ((own, expected), *zip(copies[1:5], call[1:5], strict=True)):
            assert got is not None  # for mypy: what is None lies behind
            assert wanted is not None
            yield f"a cache in {dtype}", got, wanted


def _cfg_sample(backend: str, device: torch.device) -> Iterator[Case]:
    """A few draws in a row, with every rule of stock's chain, as the engine draws them; of few ids
    that min-p leaves, of many, and of many that are all equal.
    """
    for min_p, spread in ((0.05, 3.0), (0.0, 1.0), (0.0, 0.0)):
        params = sampling.SamplingParams(min_p=min_p, top_p=0.9, top_k=500)
        yield from _draws(backend, device, params, spread)


def _draws(
    backend: str, device: torch.device, p: sampling.SamplingParams, spread: float
) -> Iterator[Case]:
    sample, normal, vocabulary = ops.cfg_sample_by(backend), _random(2), 700
    params = p.pack(torch.float32, torch.device("cpu"))
    seen = torch.zeros(1, vocabulary, dtype=torch.bool, device="cpu")
    flags = torch.zeros(1, **_INT)
    own_seen, own_flags, own_params = (t.to(device, copy=True) for t in (seen, flags, params))
    on_device = device.type == "cuda" and backend != "reference"
    philox = torch.tensor([[7, 40]], **_LONG) if on_device else None
    own_philox = _on(device, philox)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    for _ in range(8):
        logits = spread * normal(2, vocabulary)
        noise = ops.sampling_noise(seen, params, generators[0], philox, device)
        wanted = reference.cfg_sample(logits, seen, params, flags, noise, stop_token=5)
        own = sample(
            logits.to(device), own_seen, own_params, own_flags, stop_token=5,
            generator=generators[1], philox=own_philox,
        )  # fmt: skip
        yield "a draw", own, wanted
    yield "the ids that were drawn", own_seen, seen
    yield "the stop token", own_flags, flags


def _padded_attention(backend: str, device: torch.device) -> Iterator[Case]:
    """Every dtype; rows that end within a tile of keys, after several, and at once."""
    kernel, normal = ops.padded_attention_by(backend), _random(3)
    qkv, lengths = normal(3, 150, 3 * 2 * ops.HEAD_DIM), torch.tensor([150, 70, 0], **_INT)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        own = kernel(qkv.to(device, dtype), lengths.to(device), 2)
        expected = reference.padded_attention(qkv.to(dtype), lengths, 2)
        yield f"{dtype}", own, expected


def _snake(backend: str, device: torch.device) -> Iterator[Case]:
    """Every dtype; channels that vectors divide and that none does; an argument of thousands; with
    a sum and without.
    """
    kernel, normal = ops.snake_by(backend), _random(4)
    dtypes = torch.float32, torch.bfloat16, torch.float16
    for channels, dtype in itertools.product((40, 37), dtypes):
        x, alpha = normal(2, 9, channels), normal(channels).abs() + 0.5
        x[0, 0] *= 2000
        call = (x.to(dtype), alpha, 1 / alpha)
        own = kernel(*(tensor.to(device) for tensor in call))
        what = f"{dtype}, {channels} channels"
        yield what, own, reference.snake(*call)
        sums = (*call, normal(2, 9, channels).to(dtype), normal(channels))
        copies = [tensor.to(device, copy=True) for tensor in sums]
        own = kernel(*copies)
        yield f"a sum in {what}", own, reference.snake(*sums)
        yield f"the residual in {what}", copies[3], sums[3]


def _add_norm(backend: str, device: torch.device) -> Iterator[Case]:
    """Every pair of dtypes, with what is optional and without; channels that vectors divide, and
    that none does; x a part of a longer sequence.
    """
    kernel, normal = ops.add_norm_by(backend), _random(6)
    dtypes = torch.float32, torch.bfloat16, torch.float16
    for channels, x_dtype, dtype in itertools.product((256, 37), dtypes, dtypes):
        longer, residual = normal(2, 11, channels).to(x_dtype), normal(2, 9, channels)
        weight, bias, offset, shift = normal(4, channels)
        for rest in ((residual, None, None), (None, offset, shift)):
            mish = rest[0] is None
            call = (longer[:, :9], weight, bias, *rest)
            own = [None if each is None else each.to(device, copy=True) for each in call]
            own[0] = longer.to(device)[:, :9]
            rules: dict[str, Any] = {"eps": 1e-5, "mish": mish, "dtype": dtype}
            what = f"{x_dtype} to {dtype}, {channels} channels"
            yield what, kernel(*own, **rules), reference.add_norm(*call, **rules)
            if own[3] is not None:
                yield f"the residual of {what}", own[3], residual


def _istft(backend: str, device: torch.device) -> Iterator[Case]:
    """More frames than a block has; loud ones, which are clipped."""
    kernel, normal = ops.istft_by(backend), _random(5)
    call = (2 * normal(2, 300, 18), torch.hann_window(16, **_FLOAT))
    own = kernel(*(tensor.to(device) for tensor in call), 0.99)
    yield "a spectrum", own, reference.istft(*call, 0.99)


def _resample(backend: str, device: torch.device) -> Iterator[Case]:
    """Every dtype; outputs that share samples, that are far apart, and of more phases than share;
    the first outputs' own filters, and phases that are neighbours in memory, as on a GPU.
    """
    kernel, normal, taps = ops.resample_by(backend), _random(7), 24
    dtypes = torch.float32, torch.bfloat16, torch.float16
    for (phases, stride), dtype in itertools.product(((2, 3), (1, 400), (700, 641)), dtypes):
        waveform = normal(2, 1300).to(dtype)
        filters, first = normal(phases, taps) / taps**0.5, normal(3, taps) / taps**0.5
        rules = {"stride": stride, "left": 9, "length": 1300 * phases // stride}
        for own in ((filters, None), (filters.t().contiguous().t(), first)):
            found = kernel(waveform.to(device), *(_on(device, each) for each in own), **rules)
            what = f"{dtype}, {phases} phases"
            yield what, found, reference.resample(waveform, *own, **rules)


def _on(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


_CASES: dict[str, Callable[[str, torch.device], Iterator[Case]]] = {
    "skinny_linear": _skinny_linear,
    "decode_attention": _decode_attention,
    "cfg_sample": _cfg_sample,
    "padded_attention": _padded_attention,
    "add_norm": _add_norm,
    "snake": _snake,
    "istft": _istft,
    "resample": _resample,
}
