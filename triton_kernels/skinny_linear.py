"""Triton twin of skinny_linear: one launch, a few outputs of all rows of x a program.

    x (M, K) float32, float16 or bfloat16; weight (N, K) of these or int8, then scale (N,) float32
    -> (M, N) in x's dtype: scale * (x @ weight.T). M at most 8, all contiguous. Optionally x is
    RMS-normalised before, weight (2 N, K) is a gate and what it gates, a residual is added.

Equivalent to: chatterbox_fast/reference.py, ``skinny_linear``.

Arithmetic: float32. Each place of a block of inputs sums its own products, then the places are
added in a tree; a row's scale is applied to its sum, and so is the size of x, whose squares are
summed on the way.

Expected bound: the weights' bytes, each of which is read once. x is read by every program, from L1
and L2.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks

_must = functools.partial(checks.must, "skinny_linear")

_MAX_ROWS = 8
_FLOATING = (torch.float32, torch.float16, torch.bfloat16)
_BLOCK = 2048  # rows of x times inputs
OUTPUTS = 4
LAUNCH = {"num_warps": 4}


@triton.jit
def _product(
    x, weight, scale, norm, output, is_output, rows, inputs, eps,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """All rows of x, normalised where there is a norm, with OUTPUTS rows of weight."""
    row = tl.arange(0, ROWS)
    is_row = row < rows
    sums = tl.zeros((ROWS, OUTPUTS, INPUTS), tl.float32)
    squares = tl.zeros((ROWS, INPUTS), tl.float32)
    for start in range(0, inputs, INPUTS):
        k = start + tl.arange(0, INPUTS)
        x_at = x + row[:, None] * inputs + k[None, :]
        own = tl.load(x_at, mask=is_row[:, None] & (k < inputs)[None, :], other=0).to(tl.float32)
        weight_at = weight + output[:, None] * inputs + k[None, :]
        weights = tl.load(weight_at, mask=is_output[:, None] & (k < inputs)[None, :], other=0)
        if norm is not None:
            squares += own * own
            own *= tl.load(norm + k, mask=k < inputs, other=0)[None, :]
        sums += own[:, None, :] * weights.to(tl.float32)[None, :, :]
    total = tl.sum(sums, axis=2)
    if scale is not None:
        total *= tl.load(scale + output, mask=is_output, other=0)[None, :]
    if norm is not None:
        total /= tl.sqrt(tl.sum(squares, axis=1) / inputs + eps)[:, None]
    return total


@triton.jit(do_not_specialize=["rows", "outputs", "eps"])
def skinny_linear_kernel(
    x, weight, scale, norm, residual, y, rows, inputs, outputs, eps,
    GATED: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """OUTPUTS outputs of all rows of x, INPUTS inputs at a time. ROWS: rows, or more."""
    row = tl.arange(0, ROWS)
    output = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_row, is_output = row < rows, output < outputs
    total = _product(
        x, weight, scale, norm, output, is_output, rows, inputs, eps, ROWS, OUTPUTS, INPUTS
    )
    if GATED:
        up = _product(
            x, weight, scale, norm, output + outputs, is_output, rows, inputs, eps,
            ROWS, OUTPUTS, INPUTS,
        )  # fmt: skip
        total = total / (1 + tl.exp(-total)) * up
    at = row[:, None] * outputs + output[None, :]
    stored = is_row[:, None] & is_output[None, :]
    if residual is not None:
        total += tl.load(residual + at, mask=stored, other=0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=stored)


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
    """``x @ weight.T``. CUDA tensors, or CPU tensors in Triton's interpreter.

    Args:
        x, weight, scale, norm, residual, eps, gated: see `reference.skinny_linear`. All
            contiguous.

    Returns:
        ``(M, N)`` in x's dtype.

    Raises:
        RuntimeError: an argument of another shape, dtype or layout than documented.
    """
    _check(x, weight, scale)
    _must(
        not gated or len(weight) % 2 == 0, "weight", "(2 N, K), gate first, where gated",
        tuple(weight.shape),
    )  # fmt: skip
    (rows, inputs), outputs = x.shape, len(weight) // 2 if gated else len(weight)
    if norm is not None:
        _check_tensor("norm", norm, torch.float32, (inputs,), x.device)
    if residual is not None:
        _check_tensor("residual", residual, x.dtype, (rows, outputs), x.device)
    # Triton's interpreter does not round to bfloat16, it truncates.
    dtype = x.dtype if x.is_cuda else torch.float32
    y = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y.to(x.dtype)
    if inputs == 0:
        norm = None  # a mean of nothing is none
    padded = triton.next_power_of_2(rows)
    block = min(_BLOCK // padded, triton.next_power_of_2(max(inputs, 1)))
    with torch.cuda.device_of(x):
        skinny_linear_kernel[(triton.cdiv(outputs, OUTPUTS),)](
            x, weight, scale, norm, residual, y, rows, inputs, outputs, eps,
            GATED=gated, ROWS=padded, OUTPUTS=OUTPUTS, INPUTS=block, **LAUNCH,
        )  # fmt: skip
    return y.to(x.dtype)


def _check(x: Tensor, weight: Tensor, scale: Tensor | None) -> None:
    """As csrc/skinny_linear.cpp checks."""
    _must(x.dtype in _FLOATING, "x", "float32, float16 or bfloat16", x.dtype)
    quantised = weight.dtype == torch.int8
    known = quantised or weight.dtype in _FLOATING
    _must(known, "weight", "float32, float16, bfloat16 or int8", weight.dtype)
    _must(weight.dim() == 2, "weight", "(N, K)", tuple(weight.shape))
    outputs, inputs = weight.shape
    fits = x.dim() == 2 and x.shape[0] <= _MAX_ROWS and x.shape[1] == inputs
    shape = f"(M, {inputs}) as weight has, M at most {_MAX_ROWS}"
    _must(fits, "x", shape, tuple(x.shape))
    _must(weight.device == x.device, "weight", f"on {x.device}", weight.device)
    _must(x.is_contiguous(), "x", "contiguous", f"strides {x.stride()}")
    _must(weight.is_contiguous(), "weight", "contiguous", f"strides {weight.stride()}")
    if scale is None or not quantised:
        must = "given for an int8 weight" if quantised else "None for a floating weight"
        _must(
            (scale is not None) == quantised, "scale", must, "None" if scale is None else "a tensor"
        )
        return
    _check_tensor("scale", scale, torch.float32, (outputs,), x.device)


def _check_tensor(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    checks.dense("skinny_linear", tensor, name, dtype, device)
    _must(tensor.shape == shape, name, str(shape), tuple(tensor.shape))
